//! What is saved when, what it is called, and what is made of it afterwards.

use specforge_train::{Checkpoint, Checkpoints, Outcome, Trainer};

use crate::fixture::{Fixture, Script, log, names, run, sound, weights};

fn checkpoints(trainer: &Trainer<'_>) -> Checkpoints {
    Checkpoints::open(trainer.settings.folder.join("checkpoints"), 0).unwrap()
}

/// Trains with these acceptance lengths, evaluated at steps 2, 4, ...; gives the best step.
fn best_of(name: &str, acceptance: &[Option<f64>]) -> (u64, f64, bool) {
    let fixture = Fixture::new();
    let mut trainer = fixture.trainer(name);
    (trainer.settings.eval_every, trainer.settings.save_every) = (2, 0);
    let mut script = Script { acceptance: acceptance.to_vec(), ..Script::default() };
    trainer.run(&mut sound(), &mut script).unwrap();
    let named = checkpoints(&trainer).named("best").unwrap().unwrap().state;
    let best = trainer.state.best.unwrap();
    assert_eq!(named.position.step, best.step);
    (best.step, best.acceptance_length, best.decoded)
}

#[test]
fn the_best_checkpoint_is_the_one_that_decodes_best() {
    let some = |lengths: &[f64]| lengths.iter().map(|&l| Some(l)).collect::<Vec<_>>();
    assert_eq!(best_of("middle", &some(&[1.2, 1.8, 1.5, 1.1, 1.8, 1.7])), (4, 1.8, true));
    assert_eq!(best_of("last", &some(&[1.2, 1.3, 1.4, 1.5, 1.6, 1.7])), (12, 1.7, true));
    assert_eq!(best_of("first", &some(&[1.2, 1.1, 1.1, 1.1, 1.1, 1.1])), (2, 1.2, true));
    // An estimate never stands above what was decoded, however high it is.
    assert_eq!(best_of("estimates", &[None, None, Some(1.0), None, None, None]), (6, 1.0, true));
    let (_, _, decoded) = best_of("estimated", &[]);
    assert!(!decoded);
}

#[test]
fn rotation_keeps_the_newest_and_the_best() {
    let fixture = Fixture::new();
    let mut trainer = fixture.trainer("rotated");
    (trainer.settings.eval_every, trainer.settings.save_every, trainer.settings.keep) = (2, 1, 2);
    let acceptance = [1.1, 1.9, 1.2, 1.2, 1.2, 1.2].map(Some).to_vec();
    trainer.run(&mut sound(), &mut Script { acceptance, ..Script::default() }).unwrap();
    let kept = names(&trainer.settings.folder.join("checkpoints"));
    assert_eq!(kept, ["best", "latest", "step-00000004", "step-00000011", "step-00000012"]);
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bits_and_logs_each_step_once() {
    let fixture = Fixture::new();
    let mut whole = fixture.trainer("whole");
    run(&mut whole);
    // Within the first epoch, at its end, within the second.
    for stop in [1, 3, 6, 9] {
        let name = format!("stopped-{stop}");
        let mut first = fixture.trainer(&name);
        let script = &mut Script { stop_after: Some(stop), ..Script::default() };
        assert_eq!(first.run(&mut sound(), script).unwrap(), Outcome::Stopped);
        let saved = checkpoints(&first).latest().unwrap().unwrap();
        assert_eq!(saved.state.position.step, stop);
        let mut second = fixture.trainer(&name);
        second.resume(&saved).unwrap();
        run(&mut second);
        assert_eq!(weights(&second), weights(&whole), "{name}");
        assert_eq!(second.state.position, whole.state.position);
        assert_eq!((second.state.tokens, second.state.best), (whole.state.tokens, whole.state.best));
        assert_eq!(log(&second.settings.folder), log(&whole.settings.folder));
    }
}

/// A killed process may have logged further than it saved.
#[test]
fn lines_after_the_checkpoint_are_written_again() {
    let fixture = Fixture::new();
    let mut whole = fixture.trainer("whole");
    run(&mut whole);
    let written = log(&whole.settings.folder);
    assert_eq!(written.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    let mut again = fixture.trainer("whole");
    let earlier = again.settings.folder.join("checkpoints/step-00000004");
    again.resume(&Checkpoint::open(&earlier).unwrap()).unwrap();
    run(&mut again);
    assert_eq!(log(&again.settings.folder), written);
}

#[test]
fn a_finished_run_that_is_resumed_does_nothing() {
    let fixture = Fixture::new();
    let mut whole = fixture.trainer("whole");
    run(&mut whole);
    let mut again = fixture.trainer("whole");
    again.resume(&checkpoints(&whole).latest().unwrap().unwrap()).unwrap();
    assert!(run(&mut again).losses.is_empty());
    assert_eq!(weights(&again), weights(&whole));
    assert_eq!(log(&again.settings.folder).len(), 12);
}

/// Between the rename of a checkpoint and the pointers to it there is time to be killed in.
#[test]
fn what_a_killed_process_left_is_put_right_by_the_next() {
    let fixture = Fixture::new();
    let mut whole = fixture.trainer("whole");
    run(&mut whole);
    let folder = whole.settings.folder.join("checkpoints");
    fs_err::write(folder.join("latest"), "step-00000002\n").unwrap();
    fs_err::write(folder.join("best"), "step-00000001\n").unwrap();
    fs_err::create_dir(folder.join("step-00000014.tmp")).unwrap();
    fs_err::write(folder.join("step-00000014.tmp/draft.safetensors"), "half").unwrap();
    fs_err::write(folder.join("latest.tmp"), "step").unwrap();
    let looking = checkpoints(&whole);
    // Whoever only looks must leave alone what another process is writing.
    assert!(folder.join("step-00000014.tmp").exists());
    assert_eq!(looking.latest().unwrap().unwrap().state.position.step, 12);
    looking.recover().unwrap();
    for name in ["latest", "best"] {
        assert_eq!(looking.named(name).unwrap().unwrap().state.position.step, 12, "{name}");
    }
    assert_eq!(names(&folder).len(), 6 + ["latest", "best"].len());
}

#[test]
fn a_pointer_to_elsewhere_is_refused() {
    let fixture = Fixture::new();
    let trainer = fixture.trainer("pointed");
    let checkpoints = checkpoints(&trainer);
    let folder = trainer.settings.folder.join("checkpoints");
    for name in ["../../etc", "step-1/../..", "", "latest"] {
        fs_err::write(folder.join("best"), name).unwrap();
        let error = checkpoints.named("best").unwrap_err().to_string();
        assert!(error.contains("expected the name of a checkpoint beside it"), "{error}");
    }
    assert!(checkpoints.latest().unwrap().is_none());
}
