//! Where threads meet: everyone puts a tensor down, waits for the others', and takes all of them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use specforge_tensor::Tensor;

use super::ENDED;

/// The meeting place of one group.
#[derive(Debug)]
pub(super) struct Board {
    size: usize,
    patience: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Meetings that have ended.
    round: u64,
    /// What is asked for in this round.
    op: Option<&'static str>,
    given: Vec<Option<Tensor>>,
    /// How many have taken what was given.
    taken: usize,
    /// Ranks that have ended.
    gone: Vec<bool>,
    /// Why the group is of no use any more.
    failed: Option<String>,
    /// Sent and not received, by sender and receiver.
    posted: BTreeMap<(usize, usize), VecDeque<Tensor>>,
    /// Groups that were split off, by round and colour.
    parts: BTreeMap<(u64, usize), Arc<Board>>,
}

type Held<'a> = MutexGuard<'a, State>;

impl Board {
    pub(super) fn new(size: usize, patience: Duration) -> Self {
        let state = State { given: vec![None; size], gone: vec![false; size], ..State::default() };
        Self { size, patience, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    fn lock(&self) -> Held<'_> {
        // A thread that panicked while it held this has left the state whole: it only puts and takes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts down `x` and takes everyone's, once all are there; also the number of the meeting.
    pub(super) fn meet(
        &self,
        op: &'static str,
        rank: usize,
        x: Tensor,
    ) -> Result<(Vec<Tensor>, u64), String> {
        let all_taken = |state: &State| state.taken == 0;
        let late = |_: &State| format!("the others have not finished the call before {op}");
        let mut state = self.wait(self.lock(), all_taken, |_, _| false, late)?;
        if let Some(other) = state.op.filter(|other| *other != op) {
            return Err(
                self.fail(&mut state, format!("rank {rank} asks for {op} while another asks for {other}"))
            );
        }
        if let Some(other) =
            state.given.iter().flatten().find(|y| y.shape() != x.shape() || y.dtype() != x.dtype())
        {
            let why = format!("rank {rank} brings {x:?} to {op}, another {other:?}");
            return Err(self.fail(&mut state, why));
        }
        state.op = Some(op);
        state.given[rank] = Some(x);
        self.changed.notify_all();
        let all_there = |state: &State| state.taken > 0 || state.given.iter().all(Option::is_some);
        let is_needed = |state: &State, rank: usize| state.given[rank].is_none();
        let mut state = self.wait(state, all_there, is_needed, |state| {
            let missing: Vec<_> = (0..self.size).filter(|&r| state.given[r].is_none()).collect();
            format!("ranks {missing:?} did not come to {op}")
        })?;
        let (all, round) = (state.given.iter().flatten().cloned().collect(), state.round);
        state.taken += 1;
        if state.taken == self.size {
            (state.taken, state.op, state.round) = (0, None, round + 1);
            state.given.fill(None);
            self.changed.notify_all();
        }
        Ok((all, round))
    }

    /// Waits until something is so, as long as everyone who is needed is still there.
    fn wait<'a>(
        &self,
        mut state: Held<'a>,
        is_so: impl Fn(&State) -> bool,
        is_needed: impl Fn(&State, usize) -> bool,
        late: impl Fn(&State) -> String,
    ) -> Result<Held<'a>, String> {
        let until = Instant::now() + self.patience;
        loop {
            if let Some(why) = &state.failed {
                return Err(why.clone());
            }
            if is_so(&state) {
                return Ok(state);
            }
            if let Some(rank) = (0..self.size).find(|&r| state.gone[r] && is_needed(&state, r)) {
                let why = format!("rank {rank} {ENDED}; {}", late(&state));
                return Err(self.fail(&mut state, why));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = format!("after {} s {}", self.patience.as_secs_f64(), late(&state));
                return Err(self.fail(&mut state, why));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Nobody waits any longer.
    fn fail(&self, state: &mut Held<'_>, why: String) -> String {
        state.failed = Some(why.clone());
        self.changed.notify_all();
        why
    }

    /// A rank has ended.
    pub(super) fn leave(&self, rank: usize) {
        self.lock().gone[rank] = true;
        self.changed.notify_all();
    }

    pub(super) fn post(&self, from: usize, to: usize, x: Tensor) {
        self.lock().posted.entry((from, to)).or_default().push_back(x);
        self.changed.notify_all();
    }

    pub(super) fn fetch(&self, from: usize, to: usize) -> Result<Tensor, String> {
        let is_there = |state: &State| state.posted.get(&(from, to)).is_some_and(|q| !q.is_empty());
        let late = |_: &State| format!("nothing came from rank {from}");
        let mut state = self.wait(self.lock(), is_there, |_, rank| rank == from, late)?;
        state
            .posted
            .get_mut(&(from, to))
            .and_then(VecDeque::pop_front)
            .ok_or_else(|| format!("nothing came from rank {from}"))
    }

    /// The board of those that gave this colour in this round.
    pub(super) fn part(&self, round: u64, colour: usize, size: usize) -> Arc<Self> {
        let new = || Arc::new(Self::new(size, self.patience));
        self.lock().parts.entry((round, colour)).or_insert_with(new).clone()
    }
}
