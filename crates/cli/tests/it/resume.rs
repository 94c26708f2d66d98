//! A run that was stopped, in whatever way, goes on to the bits of one that never was.

use std::time::Duration;

use crate::kill::{Running, logged};
use crate::left::Left;
use crate::world::{World, names, torn};

/// The run everything is compared with.
fn uninterrupted(world: &World) -> Left {
    world.ok(&["train", "R"]);
    Left::by(world, "run")
}

fn name(name: &str) -> String {
    format!("name={name}")
}

/// Kills the run `name` once its log has `lines` lines and then some. Whether that came in time.
fn kill_at(world: &World, name: &str, lines: usize, then: Duration, resume: bool) -> bool {
    let set = format!("name={name}");
    let mut args = vec!["train", "R", "--set", &set];
    if resume {
        args.push("--resume");
    }
    let mut running = Running::start(world, &args);
    running.wait_until(|| logged(world, name) >= lines);
    std::thread::sleep(then);
    running.kill()
}

/// Goes on to the end and compares.
#[track_caller]
fn go_on(world: &World, run: &str, whole: &Left) {
    world.ok(&["train", "R", "--set", &name(run), "--resume"]);
    Left::by(world, run).assert_same(whole, run);
    assert_eq!(torn(&world.path(&format!("runs/{run}"))), Vec::<String>::new());
}

/// At every step of the first epoch's middle, around checkpoints, at the turn of the epoch and near the end; each once
/// right after the line is written and once a little later, while something else is going on.
#[test]
fn killed_anywhere_a_run_resumes_to_the_same_bits() {
    let world = World::new();
    let whole = uninterrupted(&world);
    let last = whole.last_step();
    let points = [1, 3, 4, 5, 7, 8, 9, last / 2, last / 2 + 1, last - 5, last - 2, last - 1];
    let mut in_time = 0;
    for (i, lines) in points.into_iter().enumerate() {
        let run = format!("killed-{lines}-{i}");
        in_time += usize::from(kill_at(&world, &run, lines, Duration::from_micros(700 * i as u64), false));
        go_on(&world, &run, &whole);
    }
    assert!(in_time >= 10, "only {in_time} of {} kills found the program at work", points.len());
}

/// Also while a checkpoint is written, pointed at, and older ones go.
#[test]
fn killed_while_saving_a_run_resumes_to_the_same_bits() {
    let world = World::new();
    let whole = uninterrupted(&world);
    for (i, there) in
        ["step-00000004.tmp", "step-00000004", "latest", "step-00000008", "best"].into_iter().enumerate()
    {
        let run = format!("saving-{i}");
        let mut running = Running::start(&world, &["train", "R", "--set", &name(&run)]);
        let path = world.path(&format!("runs/{run}/checkpoints/{there}"));
        running.wait_until(|| path.exists());
        running.kill();
        go_on(&world, &run, &whole);
    }
}

#[test]
fn killed_again_and_again_a_run_still_ends_at_the_same_bits() {
    let world = World::new();
    let whole = uninterrupted(&world);
    for lines in [2, 5, 6, 10, 14, whole.last_step()] {
        kill_at(&world, "often", lines, Duration::ZERO, true);
    }
    go_on(&world, "often", &whole);
}

#[test]
fn killed_before_the_first_checkpoint_a_run_begins_again() {
    let world = World::new();
    let whole = uninterrupted(&world);
    for (run, resume) in [("early", true), ("earlier", false)] {
        let set = name(run);
        let mut args = vec!["train", "R", "--set", &set];
        let mut running = Running::start(&world, &args);
        running.wait_until(|| world.has(&format!("runs/{run}/plan.json")));
        running.kill();
        assert!(!world.has(&format!("runs/{run}/checkpoints/latest")));
        // Nothing of value is lost, so that nobody has to say --overwrite.
        args.extend(resume.then_some("--resume"));
        let ran = world.ok(&args);
        assert_eq!(ran.stderr.contains("no checkpoint yet"), resume, "{}", ran.stderr);
        Left::by(&world, run).assert_same(&whole, run);
    }
}

#[test]
fn killed_after_the_last_step_a_run_is_completed() {
    let world = World::new();
    let whole = uninterrupted(&world);
    let last = format!("runs/late/checkpoints/step-{:08}", whole.last_step());
    let mut running = Running::start(&world, &["train", "R", "--set", "name=late"]);
    running.wait_until(|| world.has(&last));
    running.kill();
    assert!(!world.has("runs/late/summary.json"));
    go_on(&world, "late", &whole);
}

/// `best` names the checkpoint that `state.json` says, whatever the kill left it at.
#[test]
fn a_pointer_that_was_not_moved_in_time_is_put_right() {
    let world = World::new();
    let whole = uninterrupted(&world);
    for pointer in ["best", "latest"] {
        let run = format!("runs/stale-{pointer}");
        copy(&world.path("runs/run"), &world.path(&run));
        world.write(&format!("{run}/checkpoints/{pointer}"), "step-00000001\n");
        world.ok(&["train", "R", "--set", &name(&format!("stale-{pointer}")), "--resume"]);
        Left::by(&world, &format!("stale-{pointer}")).assert_same(&whole, pointer);
    }
}

#[test]
fn a_signal_saves_says_how_to_go_on_and_ends_with_1() {
    let world = World::new();
    let whole = uninterrupted(&world);
    for (signal, lines) in [("INT", 2), ("TERM", 6), ("INT", 15)] {
        let run = format!("signal-{signal}-{lines}");
        let mut running = Running::start(&world, &["train", "R", "--set", &name(&run)]);
        running.wait_until(|| logged(&world, &run) >= lines);
        let ran = running.signal(signal);
        ran.refused(&["stopped at step", "--resume", &format!("--set {}", name(&run))]);
        let saved = world.text(&format!("runs/{run}/checkpoints/latest"));
        let step: usize = saved.trim().strip_prefix("step-").unwrap().parse().unwrap();
        assert!(step >= lines && step < whole.last_step(), "{step}");
        assert_eq!(logged(&world, &run), step);
        go_on(&world, &run, &whole);
    }
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let world = World::new();
    let whole = uninterrupted(&world);
    let before = names(&world.path("runs/run/checkpoints"));
    go_on(&world, "run", &whole);
    assert_eq!(names(&world.path("runs/run/checkpoints")), before);
}

#[test]
fn remains_of_interrupted_writes_are_removed() {
    let world = World::new();
    let whole = uninterrupted(&world);
    kill_at(&world, "torn", 6, Duration::ZERO, false);
    let torn_step = world.path("runs/torn/checkpoints/step-00000099.tmp");
    fs_err::create_dir_all(&torn_step).unwrap();
    fs_err::write(torn_step.join("draft.safetensors"), "half").unwrap();
    world.write("runs/torn/checkpoints/latest.tmp", "step-0000");
    world.write("runs/torn/summary.tmp", "{");
    let half = world.path("runs/torn/.export.4711.partial");
    fs_err::create_dir_all(&half).unwrap();
    let metrics = world.text("runs/torn/metrics.jsonl");
    world.write("runs/torn/metrics.jsonl", metrics + "{\"step\": 7, \"ep");
    go_on(&world, "torn", &whole);
}

#[test]
fn an_earlier_checkpoint_may_be_named() {
    let world = World::new();
    let whole = uninterrupted(&world);
    let best = format!("runs/run/checkpoints/{}", world.text("runs/run/checkpoints/best").trim());
    world.ok(&["train", "R", "--resume", &best]);
    Left::by(&world, "run").assert_same(&whole, "from an earlier checkpoint");
}

#[test]
fn a_recipe_may_ask_to_resume_by_itself() {
    let world = World::new();
    let whole = uninterrupted(&world);
    kill_at(&world, "auto", 6, Duration::ZERO, false);
    world.ok(&["train", "R", "--set", "name=auto", "--set", "train.auto-resume=true"]);
    Left::by(&world, "auto").assert_same(&whole, "auto-resume");
}

#[test]
fn a_resumed_run_must_be_the_same_run() {
    let world = World::new();
    world.ok(&["train", "R"]);
    let resume = |sets: &[&str], expected: &[&str]| {
        world.fails(
            &[&["train", "R", "--resume"], sets].concat(),
            &[&["must be the same run"], expected].concat(),
        );
    };
    resume(&["--set", "train.optimizer.lr=1e-3"], &["train.optimizer.lr: now 0.001, before 0.004"]);
    resume(&["--set", "seed=7"], &["seed: now 7, before 42"]);
    resume(&["--set", "method.eagle3.ttt-steps=4"], &["method.eagle3.ttt-steps: now 4, before 3"]);
    let text = world.text("conversations.jsonl");
    world.write("conversations.jsonl", format!("{text}{}", crate::world::line("one", "more")));
    resume(&[], &["data: the contents are not those"]);
    world.write("conversations.jsonl", text);
    specforge_testkit::SmallTarget::llama(2).write(&world.path("target"));
    resume(&[], &["target: the contents are not those"]);
}

/// Copies a folder and all below it.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs_err::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs_err::copy(from, to).unwrap();
        }
    }
}
