//! Who started this process as one of several: torchrun, SLURM, MPI or Kubernetes, read from the variables they set.

use std::collections::BTreeMap;

/// Where this process stands among those that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Its number on its machine.
    pub local_rank: usize,
    /// Where rank 0 can be reached, host and port, if it is known.
    pub meeting: Option<(String, u16)>,
    /// Who started it.
    pub by: Launcher,
}

/// Who starts processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// torchrun, or this program itself, which sets the same variables.
    Torchrun,
    /// Kubernetes: a training operator, or an indexed job.
    Kubernetes,
    /// mpirun of Open MPI, MPICH and their relatives.
    Mpi,
    /// srun.
    Slurm,
}

/// What is wrong with the variables.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Some of a launcher's variables are set and others are not.
    #[error("{by}: {} set, but not {}: set all of them, or none for a single rank", set.join(", "), missing.join(", "))]
    Partial {
        /// The launcher.
        by: &'static str,
        /// Variables that are set.
        set: Vec<String>,
        /// Variables that are needed besides.
        missing: Vec<String>,
    },
    /// A variable is not a number in its range.
    #[error("{name} = {value:?}: expected {expected}")]
    Value {
        /// The variable.
        name: String,
        /// What it is set to.
        value: String,
        /// What would do.
        expected: String,
    },
}

/// Variables by name.
pub type Variables = BTreeMap<String, String>;

/// Every variable that [`placement`] looks at.
pub const VARIABLES: [&str; 20] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "KUBERNETES_SERVICE_HOST",
    "JOB_COMPLETION_INDEX",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK",
    "PMI_SIZE",
    "MPI_LOCALRANKID",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
];

/// The names of a launcher's variables: rank, size, rank on the machine.
struct Names {
    by: Launcher,
    name: &'static str,
    needed: [&'static str; 3],
}

const OPEN_MPI: Names = Names {
    by: Launcher::Mpi,
    name: "Open MPI",
    needed: ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
};
const MPICH: Names =
    Names { by: Launcher::Mpi, name: "MPICH", needed: ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"] };
const TORCHRUN: Names =
    Names { by: Launcher::Torchrun, name: "torchrun", needed: ["RANK", "WORLD_SIZE", "LOCAL_RANK"] };
const SLURM: Names = Names {
    by: Launcher::Slurm,
    name: "SLURM",
    needed: ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"],
};

/// The port where rank 0 is met when nobody says another.
const PORT: u16 = 29_577;

/// Reads the variables; `None` where this process was started alone.
pub fn placement(variables: &Variables) -> Result<Option<Placement>, Error> {
    let is_set = |name: &str| variables.contains_key(name);
    // A batch script of SLURM has a rank too, but only srun makes steps of several tasks.
    if is_set("KUBERNETES_SERVICE_HOST") && is_set("WORLD_SIZE") && !is_set("LOCAL_RANK") {
        return kubernetes(variables).map(Some);
    }
    for names in [TORCHRUN, OPEN_MPI, MPICH] {
        // MPICH leaves the rank on the machine out at times; PMI_RANK is the mark.
        let marks = if names.needed[0] == "PMI_RANK" { &names.needed[..2] } else { &names.needed[..] };
        if marks.iter().any(|name| is_set(name)) {
            return read(variables, &names).map(Some);
        }
    }
    if is_set("SLURM_STEP_ID") && is_set("SLURM_PROCID") {
        return read(variables, &SLURM).map(Some);
    }
    Ok(None)
}

fn read(variables: &Variables, names: &Names) -> Result<Placement, Error> {
    complete(variables, names.name, &names.needed)?;
    let [rank, size, local_rank] = names.needed;
    let size_of = number(variables, size, 1..usize::MAX)?;
    Ok(Placement {
        rank: number(variables, rank, 0..size_of)?,
        size: size_of,
        local_rank: number(variables, local_rank, 0..size_of)?,
        meeting: meeting(variables, names)?,
        by: names.by,
    })
}

/// One process per pod.
fn kubernetes(variables: &Variables) -> Result<Placement, Error> {
    let index = if variables.contains_key("RANK") { "RANK" } else { "JOB_COMPLETION_INDEX" };
    complete(variables, "Kubernetes", &[index, "WORLD_SIZE", "MASTER_ADDR"])?;
    let size = number(variables, "WORLD_SIZE", 1..usize::MAX)?;
    let meeting = meeting(variables, &TORCHRUN)?;
    let rank = number(variables, index, 0..size)?;
    Ok(Placement { rank, size, local_rank: 0, meeting, by: Launcher::Kubernetes })
}

fn complete(variables: &Variables, by: &'static str, needed: &[&str]) -> Result<(), Error> {
    let (set, missing): (Vec<String>, Vec<String>) =
        needed.iter().map(|name| (*name).to_owned()).partition(|name| variables.contains_key(name));
    if missing.is_empty() { Ok(()) } else { Err(Error::Partial { by, set, missing }) }
}

fn number(variables: &Variables, name: &str, range: std::ops::Range<usize>) -> Result<usize, Error> {
    let value = variables.get(name).map_or("", String::as_str);
    let expected = || match range.end {
        usize::MAX => format!("a whole number, at least {}", range.start),
        end => format!("a whole number from {} to {}", range.start, end.saturating_sub(1)),
    };
    let wrong = || Error::Value { name: name.to_owned(), value: value.to_owned(), expected: expected() };
    value.parse().ok().filter(|number| range.contains(number)).ok_or_else(wrong)
}

/// Where rank 0 can be reached.
fn meeting(variables: &Variables, names: &Names) -> Result<Option<(String, u16)>, Error> {
    let by_slurm = (names.by == Launcher::Slurm).then(|| slurm_host(variables)).flatten();
    let Some(host) = variables.get("MASTER_ADDR").cloned().or(by_slurm) else { return Ok(None) };
    let port = if variables.contains_key("MASTER_PORT") {
        let port = number(variables, "MASTER_PORT", 1..65_535)? as u16;
        // The agent of torchrun listens there itself.
        let taken = variables.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        port + u16::from(taken)
    } else {
        // Jobs that share machines should not meet each other.
        let job = variables.get("SLURM_JOB_ID").and_then(|id| id.parse::<u64>().ok()).unwrap_or(0);
        PORT + (job % 1000) as u16
    };
    Ok(Some((host, port)))
}

/// The first machine of a step, of a list such as `node[03-07,12],other1`.
fn slurm_host(variables: &Variables) -> Option<String> {
    let list = variables.get("SLURM_STEP_NODELIST")?;
    let first = list.split([',', ']']).next()?;
    match first.split_once('[') {
        Some((prefix, range)) => Some(format!("{prefix}{}", range.split('-').next()?)),
        None => Some(first.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Option<Placement>, Error> {
        let pair = |word: &str| word.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        placement(&text.split_whitespace().filter_map(pair).collect())
    }

    fn placed(text: &str) -> (usize, usize, usize, Option<(String, u16)>, Launcher) {
        let p = of(text).expect("complete").expect("one of several");
        (p.rank, p.size, p.local_rank, p.meeting, p.by)
    }

    fn at(host: &str, port: u16) -> (String, u16) {
        (host.to_owned(), port)
    }

    #[test]
    fn parallel_variables_of_every_launcher_are_read() {
        assert_eq!(of(""), Ok(None));
        assert_eq!(of("MASTER_ADDR=a MASTER_PORT=1"), Ok(None));
        // The batch script itself is no rank.
        assert_eq!(of("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0"), Ok(None));
        let torchrun = "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=n1 MASTER_PORT=29500";
        assert_eq!(placed(torchrun), (3, 8, 1, Some(at("n1", 29500)), Launcher::Torchrun));
        let agent = format!("{torchrun} TORCHELASTIC_USE_AGENT_STORE=True");
        assert_eq!(placed(&agent).3, Some(at("n1", 29501)));
        let mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1";
        assert_eq!(placed(mpi), (1, 2, 1, None, Launcher::Mpi));
        assert_eq!(placed(&format!("{mpi} MASTER_ADDR=x")).3, Some(at("x", PORT)));
        let slurm =
            "SLURM_STEP_ID=0 SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=16 SLURM_LOCALID=5 SLURM_JOB_ID=77012";
        let nodes = format!("{slurm} SLURM_STEP_NODELIST=gpu[07-09,12],other");
        assert_eq!(placed(&nodes), (5, 16, 5, Some(at("gpu07", PORT + 12)), Launcher::Slurm));
        assert_eq!(placed(&format!("{slurm} SLURM_STEP_NODELIST=n4,n5")).3, Some(at("n4", PORT + 12)));
        let pod = "KUBERNETES_SERVICE_HOST=10.0.0.1 WORLD_SIZE=4 MASTER_ADDR=m";
        assert_eq!(placed(&format!("{pod} RANK=2")), (2, 4, 0, Some(at("m", PORT)), Launcher::Kubernetes));
        assert_eq!(placed(&format!("{pod} JOB_COMPLETION_INDEX=1")).0, 1);
        // torchrun inside of a pod or a SLURM step counts.
        assert_eq!(placed(&format!("KUBERNETES_SERVICE_HOST=x {slurm} {torchrun}")).4, Launcher::Torchrun);
    }

    #[test]
    fn parallel_partial_and_wrong_variables_are_told() {
        let said = |text: &str| of(text).expect_err("an error").to_string();
        assert_eq!(
            said("RANK=0 WORLD_SIZE=2"),
            "torchrun: RANK, WORLD_SIZE set, but not LOCAL_RANK: set all of them, or none for a single rank"
        );
        assert!(
            said("OMPI_COMM_WORLD_SIZE=2").contains("not OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK")
        );
        assert!(said("SLURM_STEP_ID=0 SLURM_PROCID=1").contains("not SLURM_STEP_NUM_TASKS, SLURM_LOCALID"));
        let pod = said("KUBERNETES_SERVICE_HOST=x WORLD_SIZE=4 RANK=1");
        assert!(pod.contains("Kubernetes: RANK, WORLD_SIZE set, but not MASTER_ADDR"), "{pod}");
        assert_eq!(
            said("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0"),
            "RANK = \"2\": expected a whole number from 0 to 1"
        );
        assert!(said("RANK=0 WORLD_SIZE=0 LOCAL_RANK=0").contains("at least 1"));
        assert!(said("RANK=0 WORLD_SIZE=two LOCAL_RANK=0").contains("WORLD_SIZE = \"two\""));
        let port = said("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=99999");
        assert!(port.contains("MASTER_PORT = \"99999\": expected a whole number from 1 to 65534"), "{port}");
    }
}
