//! All conversations, several at once: threads take rows one after the other, and one place writes down what came of
//! each.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};
use specforge_data::{RawRow, RawRows, Source};

use super::super::capture::stop_on_signal;
use super::Args;
use super::answer::{Answerer, NoAnswer};
use super::journal::{Journal, State, key};
use super::turns::{Outcome, regenerate};
use crate::show::{Progress, note};

/// Conversations in a row that fail before everything is given up: then it is not the conversations.
const HOPELESS: u64 = 100;

/// What was counted.
#[derive(Debug, Default, Serialize)]
pub(super) struct Counts {
    /// All rows of the input: the sum of the next three.
    pub(super) rows: u64,
    pub(super) done: u64,
    pub(super) skipped: u64,
    pub(super) failed: u64,
    /// Of those that are done, by earlier runs.
    pub(super) resumed: u64,
    /// In this run.
    pub(super) answers: u64,
    pub(super) tokens: u64,
    /// Turns that call tools and stayed as they were.
    pub(super) kept_calls: u64,
}

/// A row to be regenerated.
struct Task {
    number: u64,
    key: String,
    row: Map<String, Value>,
}

/// The rows that are left, and what was seen of those before.
struct Queue<'a> {
    rows: std::iter::Take<RawRows>,
    number: u64,
    seen: BTreeMap<[u8; 16], u32>,
    before: &'a BTreeMap<String, State>,
    counts: Counts,
}

/// Regenerates everything that no earlier run did.
pub(super) fn all(
    args: &Args,
    sources: &[Source],
    answerer: &Answerer,
    at_once: usize,
    journal: &mut Journal,
) -> Result<Counts> {
    let stop = stop_on_signal()?;
    let before = journal.states();
    let queue = Mutex::new(Queue {
        rows: RawRows::open(sources)?.take(args.max_rows.unwrap_or(usize::MAX)),
        number: 0,
        seen: BTreeMap::new(),
        before: &before,
        counts: Counts::default(),
    });
    let (send, receive) = mpsc::sync_channel(at_once);
    let give_up = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        for _ in 0..at_once {
            let (send, queue, give_up) = (send.clone(), &queue, &give_up);
            scope.spawn(move || {
                while let Some(task) = next(queue, give_up) {
                    let result = task.map(|task| {
                        let outcome = regenerate(args, answerer, (task.number, &task.row), give_up);
                        (task, outcome)
                    });
                    if send.send(result).is_err() {
                        return;
                    }
                }
            });
        }
        drop(send);
        write(&receive, journal, &queue, (stop, &give_up))
    });
    let counts = queue.into_inner().unwrap_or_else(PoisonError::into_inner).counts;
    let counts = merged(&counts, &written?);
    if stop.load(Ordering::Relaxed) {
        journal.sync()?;
        bail!(
            "stopped with {} conversations regenerated; go on with the same command and --resume",
            counts.done
        );
    }
    Ok(counts)
}

/// The next row that is to be regenerated; none at the end or when it is to stop.
fn next(queue: &Mutex<Queue<'_>>, give_up: &AtomicBool) -> Option<Result<Task>> {
    let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if give_up.load(Ordering::Relaxed) {
            return None;
        }
        let row = match queue.rows.next()? {
            Ok(RawRow { row, .. }) => row,
            Err(error) => return Some(Err(error.into())),
        };
        queue.counts.rows += 1;
        queue.number += 1;
        let Ok(row) = row else {
            queue.counts.skipped += 1;
            continue;
        };
        let key = key(&row, &mut queue.seen);
        match queue.before.get(&key) {
            Some(State::Done) => {
                queue.counts.done += 1;
                queue.counts.resumed += 1;
            }
            Some(State::Skipped) => queue.counts.skipped += 1,
            _ => return Some(Ok(Task { number: queue.number, key, row })),
        }
    }
}

type Finished = Result<(Task, Result<Outcome, NoAnswer>)>;

/// Writes down what comes, until all threads have ended.
fn write(
    receive: &mpsc::Receiver<Finished>,
    journal: &mut Journal,
    queue: &Mutex<Queue<'_>>,
    (stop, give_up): (&AtomicBool, &AtomicBool),
) -> Result<Counts> {
    let progress = Progress::new("regenerate", false);
    let mut counts = Counts::default();
    let (mut failures, mut first_error) = (0, None);
    loop {
        // The user's signal ends the requests that are under way.
        if stop.load(Ordering::Relaxed) {
            give_up.store(true, Ordering::Relaxed);
        }
        let finished = match receive.recv_timeout(Duration::from_millis(100)) {
            Ok(finished) => finished,
            Err(mpsc::RecvTimeoutError::Timeout) => continue,
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        };
        let result = finished
            .and_then(|(task, outcome)| note_down(journal, &mut counts, &mut failures, &task, outcome));
        if let Err(error) = result {
            give_up.store(true, Ordering::Relaxed);
            first_error.get_or_insert(error);
        }
        let seen = queue.lock().map_or(0, |queue| queue.counts.rows);
        progress
            .message(format!("{} done, {} skipped, {} failed", counts.done, counts.skipped, counts.failed));
        progress.set(counts.done + counts.skipped + counts.failed, seen);
    }
    progress.done();
    journal.sync()?;
    first_error.map_or(Ok(counts), Err)
}

fn note_down(
    journal: &mut Journal,
    counts: &mut Counts,
    failures: &mut u64,
    task: &Task,
    outcome: Result<Outcome, NoAnswer>,
) -> Result<()> {
    *failures = if matches!(outcome, Ok(Outcome::Failed(_))) { *failures + 1 } else { 0 };
    match outcome {
        Ok(Outcome::Done { row, answers, tokens, kept }) => {
            counts.done += 1;
            counts.answers += answers;
            counts.tokens += tokens;
            counts.kept_calls += kept;
            journal.note(&task.key, State::Done, "", Some(&row))
        }
        Ok(Outcome::Skipped(why)) => {
            counts.skipped += 1;
            journal.note(&task.key, State::Skipped, &why, None)
        }
        Ok(Outcome::Failed(why)) => {
            counts.failed += 1;
            if counts.failed <= 3 {
                note!("warning: row {} failed: {why}", task.number);
            }
            journal.note(&task.key, State::Failed, &why, None)?;
            if *failures >= HOPELESS {
                bail!(
                    "{HOPELESS} conversations in a row failed, the last one: {why}; when that is mended, go on with --resume"
                );
            }
            Ok(())
        }
        Err(NoAnswer::Stopped | NoAnswer::Failed(_)) => Ok(()),
        Err(NoAnswer::Hopeless(error)) => Err(error.context("no conversation would be answered")),
    }
}

/// What the queue counted of rows that needed nothing, and what came of the others.
fn merged(queue: &Counts, written: &Counts) -> Counts {
    Counts {
        rows: queue.rows,
        done: queue.done + written.done,
        skipped: queue.skipped + written.skipped,
        failed: written.failed,
        resumed: queue.resumed,
        answers: written.answers,
        tokens: written.tokens,
        kept_calls: written.kept_calls,
    }
}
