//! What must not change for a bitwise resume.

use specforge_config::RunPlan;

use crate::{LEAST, parse};

#[track_caller]
fn plan(sets: &[&str]) -> RunPlan {
    parse(LEAST, sets).unwrap_or_else(|error| panic!("{error}")).plan
}

#[track_caller]
fn check(sets: &[&str], expected: &[&str]) {
    let (now, before) = (plan(sets), plan(&[]));
    assert_eq!(now.differences(&before), expected, "{sets:?}");
    assert_eq!(now.training_identity() == before.training_identity(), expected.is_empty());
}

#[test]
fn names_paths_cadence_and_measurement_may_change() {
    check(
        &[
            "name=other",
            "output-dir=x",
            "threads=3",
            "target.path=moved",
            "data.conversations=[\"moved.jsonl\"]",
            "data.cache-dir=c",
            "store.path=s",
            "store.shard-mib=9",
            "train.log-every=1",
            "train.eval-every=2",
            "train.save-every=3",
            "train.keep=9",
            "train.auto-resume=true",
            "eval.topk=4",
            "eval.prompts=p",
            "export.path=e",
            "export.embeddings=true",
            "data.template.table=t",
            "data.template.file=f",
        ],
        &[],
    );
}

#[test]
fn each_changed_key_is_named_with_both_values() {
    check(&["seed=1"], &["seed: now 1, before 42"]);
    check(
        &["train.max-steps=9"],
        &["train.epochs: now absent, before 1", "train.max-steps: now 9, before absent"],
    );
    check(&["train.optimizer.lr=0.5"], &["train.optimizer.lr: now 0.5, before 0.0001"]);
    check(&["train.schedule.kind=linear"], &["train.schedule.kind: now \"linear\", before \"cosine\""]);
    check(&["method.eagle3.ttt-steps=3"], &["method.eagle3.ttt-steps: now 3, before 7"]);
    check(&["data.max-length=99"], &["data.max-length: now 99, before 2048"]);
    check(&["data.row-per-turn=true"], &["data.row-per-turn: now true, before false"]);
    check(&["data.template.name=llama3"], &["data.template.name: now \"llama3\", before null"]);
    check(&["capture.dtype=f32"], &["capture.dtype: now \"f32\", before \"bf16\""]);
    check(&["train.accumulation=2"], &["train.accumulation: now 2, before 1"]);
}

#[test]
fn exact_stores_are_the_same_run_in_every_mode() {
    check(&["mode=offline"], &[]);
    check(&["mode=cache", "store.encoding=lossless"], &[]);
    check(&["mode=online", "store.encoding=fp8"], &[]);
    check(
        &["mode=offline", "store.encoding=fp8"],
        &["store.encoding: now \"fp8\", before \"exact\"", "store.mode: now \"offline\", before absent"],
    );
}
