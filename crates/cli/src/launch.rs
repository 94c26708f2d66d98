//! Starts the ranks of one machine as processes, one per GPU, and looks after them: when one fails the others end, and
//! when this process ends so do they.

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::commands::capture::stop_on_signal;
use crate::env;
use crate::show::{note, quiet};

/// How often it looks whether a rank has ended.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// So long the others have to end by themselves, having heard the cause.
const GRACE: Duration = Duration::from_secs(5);

/// Runs this very command on so many ranks of this machine, to their end.
pub(crate) fn start(ranks: usize) -> Result<()> {
    // Found free now, and bound again by rank 0 in a moment.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).context("no free port")?.port();
    let mut running = Vec::new();
    for rank in 0..ranks {
        running.push(Rank(start_rank(rank, ranks, port)?));
    }
    let stop = stop_on_signal()?;
    look_after(&mut running, stop)
}

/// A process that does not outlive this one.
struct Rank(Child);

impl Drop for Rank {
    fn drop(&mut self) {
        // It has ended, as a rule.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_rank(rank: usize, ranks: usize, port: u16) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).stdin(Stdio::piped());
    // A terminal's Ctrl-C comes to this process alone, which passes it on: twice would mean at once.
    command.process_group(0);
    let local = [("MASTER_ADDR", "127.0.0.1".to_owned()), ("MASTER_PORT", port.to_string())];
    let place =
        [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks)].map(|(k, v)| (k, v.to_string()));
    command.envs(local.into_iter().chain(place)).env(env::CHILD, "1");
    command.spawn().with_context(|| format!("rank {rank} cannot be started"))
}

/// Waits for all; the first failure is the one to tell.
fn look_after(running: &mut [Rank], stop: &AtomicBool) -> Result<()> {
    let (mut first, mut told_to_stop) = (None, false);
    loop {
        let mut left = 0;
        for (number, rank) in running.iter_mut().enumerate() {
            match rank.0.try_wait()? {
                None => left += 1,
                Some(status) if !status.success() => {
                    first.get_or_insert((number, status, Instant::now()));
                }
                Some(_) => {}
            }
        }
        if left == 0 {
            break;
        }
        if stop.load(Ordering::Relaxed) && !std::mem::replace(&mut told_to_stop, true) {
            running.iter_mut().for_each(|rank| signal(&rank.0));
        }
        if first.is_some_and(|(_, _, since)| since.elapsed() > GRACE) {
            // Ends them: they wait for one that is gone.
            running.iter_mut().for_each(|rank| drop(rank.0.kill()));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    match first {
        None => Ok(()),
        Some((number, status, _)) => {
            bail!("rank {number} of {} {}; what it said is above", running.len(), how(status))
        }
    }
}

/// Asks a rank to stop as Ctrl-C would; one that has heard the signal itself stops all the same.
fn signal(child: &Child) {
    let asked = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    if asked.is_err() {
        note!("warning: process {} cannot be asked to stop", child.id());
    }
}

fn how(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => format!("was killed ({status})"),
    }
}

/// In a rank that [`start`] has started: ends it when that process is gone.
pub(crate) fn end_with_parent() {
    if !env::is_child() {
        return;
    }
    std::thread::spawn(|| {
        // Nothing is ever written: the pipe closes when its other end ends.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        die("the process that started this rank is gone");
    });
}

/// Ends this process, and with it all other ranks: there is nothing left that could go on.
pub(crate) fn die(why: &str) {
    quiet(false);
    note!("error: {why}");
    // A device that waits for another rank can hold up an orderly end.
    std::thread::spawn(|| {
        std::thread::sleep(GRACE);
        std::process::abort();
    });
    #[expect(clippy::exit, reason = "the thread that waits cannot be reached")]
    std::process::exit(1);
}
