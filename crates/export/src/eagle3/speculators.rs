//! The `config.json` of speculators' EAGLE3 drafts in the form of everybody else's.
//!
//! There the layer's sizes are in `transformer_layer_config`, and captured layers are numbered by the layer that a state
//! enters. The target's own tensors may lie beside the draft's.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::IDS;
use crate::error::{Error, Result};

/// The key that says whose form it is.
const MARK: &str = "speculators_model_type";
/// Names of the target's tensors begin so.
pub(super) const TARGET_PREFIX: &str = "verifier_";

/// The configuration with its sizes on top; any other configuration as it is.
pub(super) fn flattened(path: &Path, config: Value) -> Result<Value> {
    let Some(kind) = config.get(MARK) else { return Ok(config) };
    if kind != "eagle3" {
        return Err(Error::key(path, MARK, format!("expected \"eagle3\", got {kind}")));
    }
    let layer = config.get("transformer_layer_config").and_then(Value::as_object);
    let layer = layer.ok_or_else(|| Error::key(path, "transformer_layer_config", "is missing"))?;
    let mut flat: Map<String, Value> = layer.clone();
    let of_draft = ["draft_vocab_size", "target_hidden_size", "norm_before_fc", "norm_output", "fc_norm"];
    for key in of_draft.into_iter().chain([NORM_BEFORE_RESIDUAL]) {
        if let Some(value) = config.get(key).filter(|value| !value.is_null()) {
            flat.insert(key.to_owned(), value.clone());
        }
    }
    flat.entry("num_hidden_layers").or_insert(json!(1));
    if let Some(ids) = config.get(IDS).filter(|ids| !ids.is_null()) {
        let layers: Option<Vec<u64>> =
            ids.as_array().and_then(|ids| ids.iter().map(|id| id.as_u64()?.checked_sub(1)).collect());
        let layers =
            layers.ok_or_else(|| Error::key(path, IDS, format!("expected layers from 1, got {ids}")))?;
        // The last one may be the target's last hidden state, which is no input of the draft.
        flat.insert(
            "eagle_config".to_owned(),
            json!({ IDS: layers.into_iter().take(3).collect::<Vec<_>>() }),
        );
    }
    Ok(Value::Object(flat))
}

/// The residual stream begins with the normed state: another computation than SGLang's.
pub(super) const NORM_BEFORE_RESIDUAL: &str = "norm_before_residual";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_up_and_layers_are_counted_from_their_outputs() {
        let path = Path::new("config.json");
        let config = json!({
            "speculators_model_type": "eagle3", "draft_vocab_size": 40, "target_hidden_size": null,
            "eagle_aux_hidden_state_layer_ids": [2, 4, 5], "norm_before_residual": true,
            "transformer_layer_config": { "hidden_size": 32, "num_attention_heads": 2 },
        });
        let flat = flattened(path, config.clone()).unwrap();
        assert_eq!(flat["hidden_size"], 32);
        assert_eq!((&flat["draft_vocab_size"], &flat["num_hidden_layers"]), (&json!(40), &json!(1)));
        assert_eq!(flat["eagle_config"][IDS], json!([1, 3, 4]));
        assert!(flat.get("target_hidden_size").is_none() && flat["norm_before_residual"] == true);
        let plain = json!({ "hidden_size": 8 });
        assert_eq!(flattened(path, plain.clone()).unwrap(), plain);
        for (key, value, expected) in [
            ("speculators_model_type", json!("dflash"), "expected \"eagle3\""),
            ("transformer_layer_config", json!(null), "is missing"),
            ("eagle_aux_hidden_state_layer_ids", json!([0, 1, 2]), "expected layers from 1"),
        ] {
            let mut wrong = config.clone();
            wrong[key] = value;
            assert!(flattened(path, wrong).unwrap_err().to_string().contains(expected), "{key}");
        }
    }
}
