//! A folder with everything a run needs, and the program run in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use specforge_testkit::{Lcg, SmallTarget, test_device};

/// The recipe of most tests: two epochs of 13 steps or so, saved, logged and evaluated often.
const RECIPE: &str = r#"
name = "run"
output-dir = "runs"
mode = "online"
device = "DEVICE"
threads = 2

[target]
path = "target"

[data]
conversations = ["conversations.jsonl"]
max-length = 96
eval-fraction = 0.1

[method.eagle3]
ttt-steps = 3
draft-vocab-size = 40

[train]
epochs = 2
tokens-per-batch = 128
accumulation = 2
log-every = 1
save-every = 4
eval-every = 8
keep = 3

[train.optimizer]
lr = 4e-3

[eval]
max-prompts = 4
training-prompts = 2
max-new-tokens = 12
draft-steps = 3
"#;

/// One test's folder.
pub(crate) struct World {
    folder: tempfile::TempDir,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    /// The exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl World {
    /// A target, conversations and the recipe.
    pub(crate) fn new() -> Self {
        Self::with_target(&SmallTarget::llama(1))
    }

    pub(crate) fn with_target(target: &SmallTarget) -> Self {
        let world = Self { folder: specforge_testkit::tempdir() };
        target.write(&world.path("target"));
        world.write("conversations.jsonl", conversations(60, 3));
        world.write("recipe.toml", RECIPE.replace("DEVICE", &test_device()));
        world
    }

    /// A path below the folder, in which every command runs.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs_err::write(self.path(name), content).unwrap();
    }

    /// The recipe of the quick start, with so many steps.
    pub(crate) fn write_quick_start(&self, name: &str, steps: u64) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let recipe = fs_err::read_to_string(root.join("recipes/quickstart.toml")).unwrap();
        let recipe = recipe.replace("assets/", &format!("{}/assets/", root.display()));
        self.write(name, recipe.replace("epochs = 1\n", &format!("max-steps = {steps}\n")));
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        fs_err::read(self.path(name)).unwrap()
    }

    pub(crate) fn text(&self, name: &str) -> String {
        fs_err::read_to_string(self.path(name)).unwrap()
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.bytes(name)).unwrap()
    }

    /// Whether there is a file or folder of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// The command `specforge` with these arguments, not started. `R` stands for the recipe.
    pub(crate) fn specforge(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_specforge"));
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command.args(args.iter().map(|&arg| if arg == "R" { "recipe.toml" } else { arg }));
        command
    }

    /// Runs the command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        Ran::of(&mut self.specforge(args))
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {}{}", ran.stdout, ran.stderr);
        ran
    }

    /// Runs a command that must succeed and print JSON.
    #[track_caller]
    pub(crate) fn ok_json(&self, args: &[&str]) -> Value {
        let ran = self.ok(args);
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {}", ran.stdout))
    }

    /// Runs a command that must fail over its input, with a message that has all of `expected` in it.
    #[track_caller]
    pub(crate) fn fails(&self, args: &[&str], expected: &[&str]) -> String {
        let ran = self.run(args);
        ran.refused(expected);
        ran.stderr
    }
}

impl Ran {
    /// Runs any command to its end.
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Asserts an error in the input, told in one line that starts with `error:` and has all of `expected` in it.
    #[track_caller]
    pub(crate) fn refused(&self, expected: &[&str]) {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        assert!(self.stderr.contains("error: ") && !self.stderr.contains("panicked"), "{}", self.stderr);
        for part in expected {
            assert!(self.stderr.contains(part), "{part:?} is not in: {}", self.stderr);
        }
    }
}

/// A command on so many ranks of MPI, on however few cores.
#[cfg(feature = "mpi")]
pub(crate) fn mpirun(command: &Command, ranks: usize) -> Command {
    let mut mpirun = specforge_testkit::mpirun(ranks);
    mpirun.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    mpirun.current_dir(command.get_current_dir().unwrap());
    mpirun
}

/// Questions of random letters and answers such as the target's own, with slips; one JSON line each.
pub(crate) fn conversations(n: usize, seed: u64) -> String {
    let (mut lcg, letters) = (Lcg::new(seed), SmallTarget::LETTERS.as_bytes());
    let mut lines = String::new();
    for i in 0..n {
        let question: String =
            (0..4 + i % 5).map(|_| char::from(letters[lcg.below(letters.len())])).collect();
        let mut at = lcg.below(letters.len());
        let answer = (0..8 + i * 7 % 30).map(|_| {
            at = if lcg.below(8) == 0 { lcg.below(letters.len()) } else { (at + 1) % letters.len() };
            char::from(letters[at])
        });
        lines += &line(&question, &answer.collect::<String>());
    }
    lines
}

/// One conversation as a line.
pub(crate) fn line(question: &str, answer: &str) -> String {
    let messages =
        json!([{ "role": "user", "content": question }, { "role": "assistant", "content": answer }]);
    format!("{}\n", json!({ "messages": messages }))
}

/// Names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Names in a folder and all below it that belong to an interrupted write.
pub(crate) fn torn(folder: &Path) -> Vec<String> {
    let mut torn = Vec::new();
    for name in names(folder) {
        let path = folder.join(&name);
        if path.is_dir() {
            torn.extend(self::torn(&path));
        }
        if [".tmp", ".partial", ".part", ".old"].iter().any(|end| name.ends_with(end)) {
            torn.push(path.display().to_string());
        }
    }
    torn
}
