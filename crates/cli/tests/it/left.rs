//! What runs leave, compared bit by bit, or exports within the rounding of sums in another order.

use serde_json::Value;
use specforge_testkit::Tensors;

use crate::world::World;

/// What a finished run left that must not depend on how it got there.
#[derive(Debug, PartialEq)]
pub(crate) struct Left {
    draft: Vec<u8>,
    optimizer: Vec<u8>,
    position: Value,
    best: Value,
    tokens: Value,
    pointers: [String; 2],
    best_draft: Vec<u8>,
    export: Vec<u8>,
    acceptance: [Value; 3],
    steps: Vec<Value>,
}

impl Left {
    /// Reads the run `name`.
    #[track_caller]
    pub(crate) fn by(world: &World, name: &str) -> Self {
        let run = |file: &str| format!("runs/{name}/{file}");
        let pointers =
            ["latest", "best"].map(|p| world.text(&run(&format!("checkpoints/{p}"))).trim().to_owned());
        let saved = |file: &str| run(&format!("checkpoints/{}/{file}", pointers[0]));
        let state = world.json(&saved("state.json"));
        let summary = world.json(&run("summary.json"));
        Self {
            draft: world.bytes(&saved("draft.safetensors")),
            optimizer: world.bytes(&saved("optimizer.safetensors")),
            position: state["position"].clone(),
            best: state["best"].clone(),
            tokens: state["tokens"].clone(),
            best_draft: world.bytes(&run(&format!("checkpoints/{}/draft.safetensors", pointers[1]))),
            export: world.bytes(&run("export/model.safetensors")),
            acceptance: ["acceptance_length", "acceptance_length_untrained", "acceptance_per_position"]
                .map(|key| summary[key].clone()),
            steps: steps(world, name),
            pointers,
        }
    }

    /// The steps of the whole run.
    pub(crate) fn last_step(&self) -> usize {
        self.steps.len()
    }

    /// Asserts that another run left the same, naming the first part that differs.
    #[track_caller]
    pub(crate) fn assert_same(&self, other: &Self, what: &str) {
        assert_eq!(self.position, other.position, "{what}: position");
        assert_eq!(self.steps, other.steps, "{what}: metrics.jsonl");
        assert_eq!(self.best, other.best, "{what}: best");
        assert_eq!(self.pointers, other.pointers, "{what}: latest and best");
        assert!(self.draft == other.draft, "{what}: draft.safetensors differs");
        assert!(self.optimizer == other.optimizer, "{what}: optimizer.safetensors differs");
        assert_eq!(self.acceptance, other.acceptance, "{what}: summary");
        assert!(self == other, "{what}: tokens, the best draft or the export differ");
    }
}

/// The lines of `metrics.jsonl` without what depends on the clock.
pub(crate) fn steps(world: &World, name: &str) -> Vec<Value> {
    let text = world.text(&format!("runs/{name}/metrics.jsonl"));
    text.lines()
        .map(|line| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            record.as_object_mut().unwrap().remove("tokens_per_second");
            record
        })
        .collect()
}

/// The same weights in the exports of two runs, within the rounding of sums in another order.
#[track_caller]
pub(crate) fn assert_same_export(world: &World, name: &str, other: &str) {
    let read = |name| Tensors::read(world.path(&format!("runs/{name}/export/model.safetensors")));
    let (got, want) = (read(name), read(other));
    assert_eq!(got.names().collect::<Vec<_>>(), want.names().collect::<Vec<_>>(), "{name}");
    for weight in want.names().filter(|name| !["d2t", "t2d"].contains(name)) {
        let ((shape, got), (wanted, want)) = (got.f32(weight), want.f32(weight));
        assert_eq!(shape, wanted, "{name}: {weight}");
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let off = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
        assert!(off < 1e-3, "{name}: {weight} is off by {off:e}");
    }
}
