//! Processes that are stopped half-way.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::world::{Ran, World};

/// A command in the background; killed if the test ends before it does.
pub(crate) struct Running(Child);

impl Running {
    /// Starts a command.
    pub(crate) fn start(world: &World, args: &[&str]) -> Self {
        Self::of(world.specforge(args))
    }

    /// Starts any command.
    pub(crate) fn of(mut command: Command) -> Self {
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Waits until `there` is true or the process has ended.
    pub(crate) fn wait_until(&mut self, mut there: impl FnMut() -> bool) {
        let patience = Instant::now() + Duration::from_mins(1);
        while !there() && self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < patience, "what the test waits for does not happen");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Kills it so that it cannot clean up (SIGKILL). Whether it was still at work.
    pub(crate) fn kill(mut self) -> bool {
        let at_work = self.0.try_wait().unwrap().is_none();
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        at_work
    }

    /// Kills one of the processes that this one has started (SIGKILL) and waits for the end of all; `None` where they
    /// had ended.
    pub(crate) fn kill_child(mut self, which: usize) -> Option<Ran> {
        let pid = self.0.id();
        let children = fs_err::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children: Vec<&str> = children.split_whitespace().collect();
        let child = children.get(which % children.len().max(1))?;
        let killed = Command::new("kill").args(["-KILL", child]).status().unwrap().success();
        let ran = self.end();
        killed.then_some(ran)
    }

    /// Sends a signal by name and waits for the end.
    pub(crate) fn signal(mut self, name: &str) -> Ran {
        let pid = self.0.id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap();
        assert!(sent.success());
        self.end()
    }

    /// Waits for the end.
    pub(crate) fn end(&mut self) -> Ran {
        use std::io::Read;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        Ran { code: self.0.wait().unwrap().code(), stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, in a test that passes.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whole lines of a run's metrics so far.
pub(crate) fn logged(world: &World, name: &str) -> usize {
    let text = fs_err::read_to_string(world.path(&format!("runs/{name}/metrics.jsonl"))).unwrap_or_default();
    text.matches('\n').count()
}
