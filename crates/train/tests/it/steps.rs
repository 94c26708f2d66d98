//! What a step does to the weights, and what must not do anything to them.

use specforge_testkit::{assert_close, assert_close_max};
use specforge_train::{Error, Outcome};

use crate::fixture::{Fixture, LEN, Narrow, Script, Source, run, sound, weights};

#[test]
fn accumulated_micro_batches_equal_one_bigger_batch() {
    let fixture = Fixture::new();
    let with = |name: &str, tokens_per_batch: usize, accumulation: usize| {
        let mut trainer = fixture.trainer(name);
        (trainer.order.tokens_per_batch, trainer.order.accumulation) = (tokens_per_batch, accumulation);
        trainer.settings.total_steps = trainer.order.total_steps(2);
        let losses = run(&mut trainer).losses;
        (losses.iter().map(|&loss| loss as f32).collect::<Vec<_>>(), weights(&trainer))
    };
    let (losses, whole) = with("whole", 4 * LEN, 1);
    assert_eq!(losses.len(), 6);
    for (name, tokens, accumulation) in [("halves", 2 * LEN, 2), ("rows", LEN, 4)] {
        let (parts, accumulated) = with(name, tokens, accumulation);
        assert_close(name, &parts, &losses, 0.0, 1e-5);
        for ((weight, got), (_, want)) in accumulated.iter().zip(&whole) {
            assert_close_max(&format!("{name}: {weight}"), got, want, 1e-4);
        }
    }
    // The comparison means something: a step changes the weights by more than that.
    let untrained = weights(&fixture.trainer("fresh"));
    assert!(untrained.iter().zip(&whole).all(|((_, fresh), (_, trained))| {
        let moved = fresh.iter().zip(trained).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        moved > 1e-3 * fresh.iter().fold(0.0f32, |most, a| most.max(a.abs()))
    }));
}

#[test]
fn evaluation_logging_and_saving_change_no_bit() {
    let fixture = Fixture::new();
    let with = |name: &str, every: u64| {
        let mut trainer = fixture.trainer(name);
        let settings = &mut trainer.settings;
        (settings.eval_every, settings.save_every, settings.log_every) = (every, every, every.max(1));
        let losses = run(&mut trainer).losses;
        (losses, weights(&trainer))
    };
    assert_eq!(with("never", 0), with("often", 3));
}

#[test]
fn a_value_that_is_not_finite_is_told_with_its_step_and_rows_and_applied_to_nothing() {
    let fixture = Fixture::new();
    let mut trainer = fixture.trainer("nan");
    let steps = trainer.order.epoch(0);
    let bad = steps[3][0][1];
    let error = trainer.run(&mut Source { nan: Some(bad), ..sound() }, &mut Script::default()).unwrap_err();
    let Error::NotFinite { step, rows, checkpoint, .. } = &error else { panic!("{error}") };
    assert_eq!((*step, rows), (4, &steps[3][0].iter().map(|&row| row as u64).collect()));
    assert!(checkpoint.ends_with("step-00000002"), "{checkpoint}");
    // The weights are those of the step before.
    let mut stopped = fixture.trainer("stopped");
    let stop = &mut Script { stop_after: Some(3), ..Script::default() };
    assert_eq!(stopped.run(&mut sound(), stop).unwrap(), Outcome::Stopped);
    assert_eq!(weights(&trainer), weights(&stopped));
}

#[test]
fn a_source_that_fails_ends_the_run_with_its_error() {
    let fixture = Fixture::new();
    let mut trainer = fixture.trainer("broken");
    let bad = trainer.order.epoch(1)[2][0][0];
    let mut source = Source { broken: Some(bad), ..sound() };
    let error = trainer.run(&mut source, &mut Script::default()).unwrap_err();
    assert_eq!(error.to_string(), format!("row {bad}: the disk says no"));
    // A held-out row is needed at the end, by another path.
    let mut source = Source { broken: Some(14), ..sound() };
    assert!(fixture.trainer("held").run(&mut source, &mut Script::default()).is_err());
}

#[test]
fn a_run_without_rows_is_an_error() {
    let fixture = Fixture::new();
    let mut trainer = fixture.trainer("empty");
    trainer.order.rows.clear();
    let error = trainer.run(&mut sound(), &mut Script::default()).unwrap_err();
    assert!(error.to_string().starts_with("nothing to train on"), "{error}");
}

#[test]
fn a_step_that_does_not_fit_is_taken_again_in_smaller_portions() {
    let fixture = Fixture::new();
    let with = |name: &str, most: usize| {
        let mut trainer = fixture.trainer(name);
        let narrow = Narrow { method: trainer.method, most };
        trainer.method = &narrow;
        (trainer.order.tokens_per_batch, trainer.order.accumulation) = (4 * LEN, 2);
        trainer.settings.total_steps = trainer.order.total_steps(1);
        trainer.settings.shrink_on_oom = true;
        let losses = run(&mut trainer).losses;
        (losses.iter().map(|&loss| loss as f32).collect::<Vec<_>>(), weights(&trainer))
    };
    let (losses, whole) = with("room", usize::MAX);
    for (name, most) in [("halves", 2 * LEN), ("quarters", LEN)] {
        let (parts, shrunk) = with(name, most);
        assert_close(name, &parts, &losses, 0.0, 1e-5);
        for ((weight, got), (_, want)) in shrunk.iter().zip(&whole) {
            assert_close_max(&format!("{name}: {weight}"), got, want, 1e-4);
        }
    }
}

#[test]
fn what_does_not_fit_is_told_with_what_would_help() {
    let fixture = Fixture::new();
    let fails = |name: &str, most: usize, shrink: bool| {
        let mut trainer = fixture.trainer(name);
        let narrow = Narrow { method: trainer.method, most };
        trainer.method = &narrow;
        trainer.settings.shrink_on_oom = shrink;
        trainer.run(&mut sound(), &mut Script::default()).unwrap_err().to_string()
    };
    let message = fails("whole", LEN, false);
    for part in ["1024.0 MiB asked for", "20 tokens", "train.tokens-per-batch", "train.on-oom"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    // A single document cannot be halved.
    assert!(fails("single", LEN - 1, true).contains("10 tokens"));
}
