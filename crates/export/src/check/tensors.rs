//! The tensors: none missing, none unknown, shapes, types, values, and the two vocabulary maps.

use std::collections::BTreeMap;

use specforge_nn::weights::{Dtype, View, Weights};

use super::Problem;
use crate::eagle3::{Eagle3Config, Kind, Slot, canonical, slots};

/// What is wrong with the tensors of a draft with this configuration.
pub(super) fn problems(config: &Eagle3Config, weights: &Weights) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut found: BTreeMap<String, (&str, View<'_>)> = BTreeMap::new();
    for name in weights.names() {
        let Some(view) = weights.get(name) else { continue };
        if let Some((twin, _)) = found.insert(canonical(name), (name, view)) {
            problems.push(Problem::error(
                name,
                format!("it is the same as {twin} under another name"),
                "remove one",
            ));
        }
    }
    let slots = slots(config);
    let mut maps = Maps::default();
    for slot in &slots {
        match found.remove(&slot.name) {
            Some((name, view)) => problems.extend(slot_problems(slot, name, view, &mut maps)),
            None if slot.required => problems.push(missing(slot)),
            None => {}
        }
    }
    problems.extend(found.values().map(|(name, _)| unknown(name, config, &slots)));
    problems.extend(map_problems(config, &maps));
    problems
}

/// The vocabulary maps, if they are there and of the right type and shape.
#[derive(Default)]
struct Maps {
    /// Target id minus draft id.
    d2t: Option<Vec<i64>>,
    t2d: Option<Vec<bool>>,
}

fn missing(slot: &Slot) -> Problem {
    let fix = match slot.kind {
        Kind::DraftToTarget => {
            "without it draft ids are taken for target ids: write target id - draft id as I64"
        }
        _ => "engines leave it uninitialised without a word: add it, or is it under another name?",
    };
    Problem::error(&slot.name, format!("it is missing (shape {:?})", slot.shape), fix)
}

/// A tensor that engines have no place for.
fn unknown(name: &str, config: &Eagle3Config, slots: &[Slot]) -> Problem {
    let known = |name: &str| slots.iter().any(|slot| slot.name == canonical(name));
    if name.ends_with("rotary_emb.inv_freq") {
        return Problem::warning(name, "engines compute it themselves and ignore it", "remove it");
    }
    let fix = if let Some((prefix, _)) = name.split_once('.').filter(|(_, rest)| known(rest)) {
        format!("remove {prefix}. in front of the name")
    } else if name.contains("d2t") {
        "SGLang takes every name with d2t in it for the vocabulary map: rename or remove it".to_owned()
    } else if canonical(name).starts_with("fc_norm.") && !config.fc_norm {
        "it was trained, so write fc_norm: true into config.json".to_owned()
    } else if name.starts_with("input_norm") {
        "it was trained, so write norm_before_fc: true into config.json".to_owned()
    } else if name.contains("mask_hidden") {
        "it belongs to a P-EAGLE draft, which SGLang does not serve".to_owned()
    } else if name.rsplit('.').next() == Some("bias") {
        "no layer of an EAGLE3 draft has a bias: train without, or remove it".to_owned()
    } else {
        "rename or remove it".to_owned()
    };
    Problem::error(name, "engines have no place for it: SGLang ignores it without a word", fix)
}

fn slot_problems(slot: &Slot, name: &str, view: View<'_>, maps: &mut Maps) -> Vec<Problem> {
    if view.shape != slot.shape {
        let what = format!("shape {:?}, expected {:?} by config.json", view.shape, slot.shape);
        return vec![Problem::error(
            name,
            what,
            "correct config.json, or are the files of two drafts mixed?",
        )];
    }
    match slot.kind {
        Kind::Weight => weight_problems(name, view),
        Kind::DraftToTarget => {
            maps.d2t = integers(view);
            wrong_integers(name, view.dtype)
        }
        Kind::TargetToDraft => {
            maps.t2d = matches!(view.dtype, Dtype::Bool | Dtype::U8)
                .then(|| view.bytes.iter().map(|&b| b != 0).collect());
            let wrong = (view.dtype != Dtype::Bool).then(|| {
                Problem::warning(
                    name,
                    format!("type {}, expected BOOL", view.dtype),
                    "engines ignore this tensor",
                )
            });
            wrong.into_iter().collect()
        }
    }
}

fn wrong_integers(name: &str, dtype: Dtype) -> Vec<Problem> {
    let what = format!("type {dtype}, expected I64");
    match dtype {
        Dtype::I64 => Vec::new(),
        Dtype::I32 => vec![Problem::warning(name, what, "SGLang converts it, others may not")],
        _ => vec![Problem::error(name, what, "write it as I64")],
    }
}

fn integers(view: View<'_>) -> Option<Vec<i64>> {
    match view.dtype {
        Dtype::I64 => Some(view.bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()),
        Dtype::I32 => {
            Some(view.bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect())
        }
        _ => None,
    }
}

fn weight_problems(name: &str, view: View<'_>) -> Vec<Problem> {
    if !matches!(view.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) {
        return vec![Problem::error(name, format!("type {}, expected BF16", view.dtype), "write it as BF16")];
    }
    let mut problems = Vec::new();
    if view.dtype != Dtype::BF16 {
        let what = format!("type {}, expected BF16: it is converted while loading", view.dtype);
        problems.push(Problem::warning(name, what, "write it as BF16 to halve the file"));
    }
    let Values { not_finite, largest } = scan(view);
    if not_finite > 0 {
        let what = format!("{not_finite} of its elements are NaN or infinite");
        problems.push(Problem::error(name, what, "the training diverged: take an earlier checkpoint"));
    } else if largest == 0.0 {
        let what = "all its elements are zero";
        let fix = "it was not trained, or not written";
        // Zeros at the end of a branch are a way to begin training; a zero head or fc drafts nothing.
        let useless = ["lm_head.weight", "fc.weight"].contains(&canonical(name).as_str());
        problems.push(if useless {
            Problem::error(name, what, fix)
        } else {
            Problem::warning(name, what, fix)
        });
    } else if largest > 1e4 {
        let what = format!("its largest element is {largest:e}");
        problems.push(Problem::warning(
            name,
            what,
            "that looks like uninitialised memory or a diverged training",
        ));
    }
    problems
}

/// What can be seen of a tensor's values without knowing them.
struct Values {
    not_finite: usize,
    /// The largest magnitude of the finite ones.
    largest: f32,
}

fn scan(view: View<'_>) -> Values {
    let mut values = Values { not_finite: 0, largest: 0.0 };
    // In pieces: a head widened as a whole would take gigabytes.
    for bytes in view.bytes.chunks(view.dtype.size() << 16) {
        for value in (View { bytes, ..view }).to_f32() {
            if value.is_finite() {
                values.largest = values.largest.max(value.abs());
            } else {
                values.not_finite += 1;
            }
        }
    }
    values
}

fn map_problems(config: &Eagle3Config, maps: &Maps) -> Vec<Problem> {
    let Some(d2t) = &maps.d2t else { return Vec::new() };
    let v = config.vocab_size as i64;
    let ids: Vec<i64> =
        d2t.iter().zip(0..).map(|(&offset, draft_id)| offset.saturating_add(draft_id)).collect();
    if let Some(at) = ids.iter().position(|id| !(0..v).contains(id)) {
        let what = format!("draft id {at} becomes target id {}, outside 0..{v}", ids[at]);
        let looks_absolute = d2t.is_sorted_by(|a, b| a < b) && d2t.iter().all(|id| (0..v).contains(id));
        let fix = if looks_absolute {
            "these look like target ids: subtract the draft id"
        } else {
            "build the map again"
        };
        return vec![Problem::error("d2t", what, fix)];
    }
    let mut problems = Vec::new();
    if config.draft_vocab_size == config.vocab_size {
        let what = "the draft has the whole vocabulary, and vLLM then does not accept a map";
        problems.push(Problem::warning("d2t", what, "remove d2t and t2d to serve with vLLM"));
    } else if d2t.iter().all(|&offset| offset == 0) {
        let what = format!("all zeros: the draft can propose only the first {} target ids", d2t.len());
        problems.push(Problem::warning("d2t", what, "was the map ever built?"));
    }
    problems.extend(order_problem(&ids));
    problems.extend(maps.t2d.as_ref().and_then(|t2d| mask_problem(&ids, t2d)));
    problems
}

fn order_problem(ids: &[i64]) -> Option<Problem> {
    if ids.is_sorted_by(|a, b| a < b) {
        return None;
    }
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    let fix = "build the map again";
    Some(match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Problem::error("d2t", format!("two draft ids become target id {}", pair[0]), fix),
        None => {
            Problem::warning("d2t", "the target ids do not ascend", "is lm_head.weight in the same order?")
        }
    })
}

fn mask_problem(ids: &[i64], t2d: &[bool]) -> Option<Problem> {
    let marked = t2d.iter().filter(|&&marked| marked).count();
    if marked == ids.len() && ids.iter().all(|&id| t2d[id as usize]) {
        return None;
    }
    if marked == 0 || marked == t2d.len() {
        let what = format!("marks {marked} of {} target ids: it was never set", t2d.len());
        return Some(Problem::warning("t2d", what, "engines ignore it, but was d2t ever set?"));
    }
    let what = format!("marks {marked} target ids, and not the {} that d2t leads to", ids.len());
    Some(Problem::error("t2d", what, "one of the two maps is of another draft"))
}
