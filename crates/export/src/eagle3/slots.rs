//! The tensors that belong to a draft: names, shapes, and the other names they go by.

use super::Eagle3Config;

/// A tensor that a configuration asks for or allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Engines leave a missing one uninitialised.
    pub(crate) required: bool,
    pub(crate) kind: Kind,
}

/// What is in a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Trained floats.
    Weight,
    /// Integers: target id minus draft id.
    DraftToTarget,
    /// One mask entry for each target id.
    TargetToDraft,
}

/// All tensors of a draft with this configuration, by the names of [`canonical`].
pub(crate) fn slots(config: &Eagle3Config) -> Vec<Slot> {
    let Eagle3Config { hidden_size: h, target_hidden_size: t, vocab_size: v, draft_vocab_size: vd, .. } =
        *config;
    let aux = config.num_aux_hidden_states;
    let mut slots = vec![weight("fc.weight", &[h, aux * t]), weight("norm.weight", &[h])];
    if config.fc_norm {
        slots.extend((0..aux).map(|i| weight(&format!("fc_norm.{i}.weight"), &[t])));
    }
    if config.norm_before_fc {
        slots.push(weight("input_norm.weight", &[aux * t]));
    }
    for layer in 0..config.num_hidden_layers {
        slots.extend(layer_slots(config, layer));
    }
    let head = weight("lm_head.weight", &[vd, h]);
    slots.push(Slot { required: !config.shares_target_head, ..head });
    let map = |name: &str, length, kind, required| Slot {
        name: name.to_owned(),
        shape: vec![length],
        required,
        kind,
    };
    slots.push(map("d2t", vd, Kind::DraftToTarget, vd != v));
    slots.push(map("t2d", v, Kind::TargetToDraft, false));
    // The target's embedding is used instead wherever it fits.
    slots.push(Slot { required: t != h, ..weight("embed_tokens.weight", &[v, h]) });
    slots
}

fn layer_slots(config: &Eagle3Config, layer: usize) -> Vec<Slot> {
    let Eagle3Config { hidden_size: h, intermediate_size: inner, head_dim, .. } = *config;
    let (q, kv) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
    // The first layer reads the embedding beside the hidden state.
    let input = if layer == 0 { 2 * h } else { h };
    let prefix = if layer == 0 { "midlayer".to_owned() } else { format!("layers.{layer}") };
    let part = |name: &str, shape: &[usize]| weight(&format!("{prefix}.{name}.weight"), shape);
    vec![
        part("self_attn.q_proj", &[q, input]),
        part("self_attn.k_proj", &[kv, input]),
        part("self_attn.v_proj", &[kv, input]),
        part("self_attn.o_proj", &[h, q]),
        part("mlp.gate_proj", &[inner, h]),
        part("mlp.up_proj", &[inner, h]),
        part("mlp.down_proj", &[h, inner]),
        part("hidden_norm", &[h]),
        part("post_attention_layernorm", &[h]),
        // Of later layers SGLang uses `hidden_norm` and vLLM `input_layernorm` for the same thing.
        Slot { required: layer == 0, ..part("input_layernorm", &[h]) },
    ]
}

fn weight(name: &str, shape: &[usize]) -> Slot {
    Slot { name: name.to_owned(), shape: shape.to_vec(), required: true, kind: Kind::Weight }
}

/// The name a tensor has in our files, for any name that engines load it by:
/// `layers.0.` is `midlayer.`, `aux_norm_{low,mid,high}` are `fc_norm.{0,1,2}`, `model.` in front is optional.
pub(crate) fn canonical(name: &str) -> String {
    let inner = match name.strip_prefix("model.") {
        // The head is not part of the inner model: with the prefix no engine finds it.
        Some(inner) if !inner.starts_with("lm_head") => inner,
        _ => name,
    };
    let aux = ["aux_norm_low.", "aux_norm_mid.", "aux_norm_high."];
    if let Some(rest) = inner.strip_prefix("layers.0.") {
        return format!("midlayer.{rest}");
    }
    for (i, legacy) in aux.iter().enumerate() {
        if let Some(rest) = inner.strip_prefix(legacy) {
            return format!("fc_norm.{i}.{rest}");
        }
    }
    inner.to_owned()
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn every_loadable_name_has_one_canonical_form() {
        let table = [
            ("midlayer.self_attn.q_proj.weight", "midlayer.self_attn.q_proj.weight"),
            ("layers.0.hidden_norm.weight", "midlayer.hidden_norm.weight"),
            ("model.layers.0.hidden_norm.weight", "midlayer.hidden_norm.weight"),
            ("layers.1.hidden_norm.weight", "layers.1.hidden_norm.weight"),
            ("aux_norm_low.weight", "fc_norm.0.weight"),
            ("aux_norm_mid.weight", "fc_norm.1.weight"),
            ("aux_norm_high.weight", "fc_norm.2.weight"),
            ("model.fc.weight", "fc.weight"),
            ("model.lm_head.weight", "model.lm_head.weight"),
            ("d2t", "d2t"),
        ];
        for (name, expected) in table {
            assert_eq!(canonical(name), expected);
        }
    }
}
