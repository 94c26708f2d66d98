//! Tests on processes that `mpirun` starts: a command, or the test itself once more.

use std::process::Command;

use crate::golden::this_program;

/// `mpirun` of so many ranks on this machine, on however few cores and without a network; the program is to be added.
pub fn mpirun(ranks: usize) -> Command {
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["-n", &ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
    mpirun.args(["--mca", "btl", "self,vader", "--mca", "mpi_yield_when_idle", "1"]);
    mpirun
}

/// Runs a test of this program, by its whole name, on ranks; what they printed, and whether all ended well.
pub fn test_on_ranks(test: &str, ranks: usize) -> (bool, String) {
    let output = mpirun(ranks).arg(this_program()).args(["--exact", test, "--nocapture"]).output();
    let output = output.expect("mpirun is installed");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// Runs a test on ranks, which must all pass.
#[track_caller]
pub fn passes_on_ranks(test: &str, ranks: usize) {
    let (ended_well, said) = test_on_ranks(test, ranks);
    assert!(ended_well && said.matches("1 passed").count() == ranks, "{ranks} ranks: {said}");
}
