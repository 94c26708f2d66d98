//! What must not change for a resumed run to give the same bits, and what may.
//!
//! Part of the identity: everything that decides the rows and their order, the numbers the draft is trained on, the
//! draft, and every optimizer step. The length of the run is part of it, because schedules fall over all of it.
//!
//! Not part of it: names and paths, since folders move and contents are known by their hashes, which the trainer keeps
//! beside the plan; the number of threads and of ranks, which changes no more than the order of sums; the cadence of log, evaluation and checkpoints; how the draft is measured
//! and exported; whether bf16 states are computed or read from a store that keeps them exactly.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use specforge_store::Encoding;

use crate::plan::{DataPlan, RunPlan, StorePlan, TargetPlan, TrainPlan};
use crate::run::{CaptureConfig, CaptureDType, Mode};

/// The longest value printed in full when two plans differ.
const SHOWN: usize = 60;

impl RunPlan {
    /// Everything that must not change for a bitwise resume, keyed as the recipe is. Equal identities are equal JSON.
    pub fn training_identity(&self) -> Value {
        let Self {
            name: _,
            run_dir: _,
            mode,
            device,
            seed,
            threads: _,
            target: TargetPlan { path: _, dtype },
            data,
            capture: CaptureConfig { dtype: capture },
            store: StorePlan { path: _, encoding, shard_bytes: _ },
            method,
            train,
            parallel: _,
            eval: _,
            export: _,
        } = self;
        json!({
            "device": device,
            "seed": seed,
            "target": { "dtype": dtype },
            "data": data_identity(data),
            "capture": { "dtype": capture },
            "store": store_identity(*mode, *capture, *encoding),
            "method": method,
            "train": train_identity(train),
        })
    }

    /// The keys of the training identity in which a saved plan differs from this one, each with both values.
    pub fn differences(&self, saved: &Self) -> Vec<String> {
        let (now, before) = (flatten(&self.training_identity()), flatten(&saved.training_identity()));
        let keys: std::collections::BTreeSet<&String> = now.keys().chain(before.keys()).collect();
        let differ = |key: &&&String| now.get(**key) != before.get(**key);
        let shown =
            |values: &BTreeMap<String, Value>, key| values.get(key).map_or("absent".to_owned(), short);
        keys.iter()
            .filter(differ)
            .map(|key| format!("{key}: now {}, before {}", shown(&now, *key), shown(&before, *key)))
            .collect()
    }
}

fn data_identity(data: &DataPlan) -> Value {
    let DataPlan {
        conversations: _,
        format,
        columns,
        template,
        mask_compat,
        max_length,
        min_supervised,
        last_turn_only,
        row_per_turn,
        deduplicate,
        on_error,
        max_rows,
        eval_fraction,
        cache_dir: _,
    } = data;
    // These are paths; what they hold is part of the prepared set's hash.
    let mut template = json!(template);
    if let Some(template) = template.as_object_mut() {
        template.retain(|key, _| !matches!(key.as_str(), "table" | "file"));
    }
    json!({
        "format": format,
        "columns": columns,
        "template": template,
        "mask-compat": mask_compat,
        "max-length": max_length,
        "min-supervised": min_supervised,
        "last-turn-only": last_turn_only,
        "row-per-turn": row_per_turn,
        "deduplicate": deduplicate,
        "on-error": on_error,
        "max-rows": max_rows,
        "eval-fraction": eval_fraction,
    })
}

fn train_identity(train: &TrainPlan) -> Value {
    let TrainPlan {
        length,
        tokens_per_batch,
        accumulation,
        // Another order of the same sums, where memory is short.
        on_oom: _,
        log_every: _,
        eval_every: _,
        save_every: _,
        keep: _,
        auto_resume: _,
        // The weights a run started from are in its checkpoint.
        warm_start: _,
        optimizer,
        schedule,
    } = train;
    let mut identity = json!({
        "tokens-per-batch": tokens_per_batch,
        "accumulation": accumulation,
        "optimizer": optimizer,
        "schedule": schedule,
    });
    if let (Value::Object(identity), Value::Object(length)) = (&mut identity, json!(length)) {
        identity.extend(length);
    }
    identity
}

/// Only a store that rounds makes a difference: to all passes, or in mode `cache` to all but the first.
fn store_identity(mode: Mode, capture: CaptureDType, encoding: Encoding) -> Value {
    let rounds = encoding == Encoding::Fp8 && capture == CaptureDType::Bf16 && mode != Mode::Online;
    if rounds { json!({ "encoding": encoding, "mode": mode }) } else { json!({ "encoding": "exact" }) }
}

/// Dotted keys and what is not a table.
pub(crate) fn flatten(value: &Value) -> BTreeMap<String, Value> {
    fn walk(value: &Value, path: &str, flat: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(table) => {
                for (key, value) in table {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(value, &path, flat);
                }
            }
            _ => {
                flat.insert(path.to_owned(), value.clone());
            }
        }
    }
    let mut flat = BTreeMap::new();
    walk(value, "", &mut flat);
    flat
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
