//! A tiny random Llama target written to a folder, and drafts that need no training: they ask the target itself and
//! distort its answer.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::tensor::{Dtype, TensorView};
use specforge_eval::{Options, Report, Sampling, Speculation, evaluate};
use specforge_methods::{Batch, DraftMethod, Drafter, Error, PendingLoss, Result, VocabMap};
use specforge_models::{Capture, KvCache, Target};
use specforge_tensor::{DType, Device, Params, Tape, Tensor};
use specforge_testkit::{Lcg, assert_close, tempdir};

pub(crate) const VOCAB: usize = 64;
const HIDDEN: usize = 32;
const LAYERS: usize = 8;

/// A random target; `context` is its `max_position_embeddings`, `eos` its end-of-sequence token (any number at or
/// above [`VOCAB`] never comes).
pub(crate) fn tiny_target(context: usize, eos: u32) -> Target {
    let dir = tempdir();
    let (heads, kv_heads, head_dim, width) = (4, 2, 8, 48);
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": context, "tie_word_embeddings": false,
        "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": eos, "torch_dtype": "float32",
    });
    fs_err::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut weights = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCAB, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: Vec<usize>| {
            weights.push((format!("model.layers.{layer}.{name}.weight"), shape));
        };
        add("input_layernorm", vec![HIDDEN]);
        add("self_attn.q_proj", vec![heads * head_dim, HIDDEN]);
        add("self_attn.k_proj", vec![kv_heads * head_dim, HIDDEN]);
        add("self_attn.v_proj", vec![kv_heads * head_dim, HIDDEN]);
        add("self_attn.o_proj", vec![HIDDEN, heads * head_dim]);
        add("post_attention_layernorm", vec![HIDDEN]);
        add("mlp.gate_proj", vec![width, HIDDEN]);
        add("mlp.up_proj", vec![width, HIDDEN]);
        add("mlp.down_proj", vec![HIDDEN, width]);
    }
    let mut lcg = Lcg::new(11);
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = weights
        .into_iter()
        .map(|(name, shape)| {
            let n = shape.iter().product();
            let values = if shape.len() == 1 { vec![1.0; n] } else { lcg.normals(n, 0.3) };
            (name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    Target::load(dir.path(), Device::Cpu, Some(DType::F32)).unwrap()
}

/// Prompts of several lengths.
pub(crate) fn prompts(n: usize) -> Vec<Vec<u32>> {
    let mut lcg = Lcg::new(5);
    (0..n).map(|i| (0..=3 * i).map(|_| lcg.below(VOCAB) as u32).collect()).collect()
}

pub(crate) fn options(speculation: Speculation, max_new_tokens: usize) -> Options {
    Options { speculation, max_new_tokens, ..Options::default() }
}

pub(crate) fn sampled(options: &Options, temperature: f64, seed: u64) -> Options {
    Options { sampling: Sampling { temperature, top_p: 1.0, seed }, ..options.clone() }
}

pub(crate) fn run(
    target: &Target,
    method: &dyn DraftMethod,
    prompts: &[Vec<u32>],
    options: &Options,
) -> Report {
    evaluate(target, method, &Params::new(), prompts, options, &|_, _| {}).unwrap()
}

/// What a draft makes of the target's logits after a path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Distortion {
    /// Nothing: the perfect draft.
    None,
    /// Least likely becomes most likely: never right.
    Negated,
    /// Noise of this size: right now and then.
    Noise(f32),
}

/// A draft that asks the target. It checks all it is told on the way: the states of committed tokens must be the
/// target's own, the tokens one ahead of them.
pub(crate) struct Oracle<'t> {
    target: &'t Target,
    distortion: Distortion,
    vocab: VocabMap,
    capture: Capture,
    /// The first token of each prompt is never told to a draft.
    first: u32,
}

impl fmt::Debug for Oracle<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Oracle({:?})", self.distortion)
    }
}

impl<'t> Oracle<'t> {
    /// All prompts must start with the token `first`.
    pub(crate) fn new(target: &'t Target, distortion: Distortion, first: u32) -> Self {
        let capture = Capture { layers: vec![1, 3, 4], last_hidden: false };
        Self { target, distortion, vocab: VocabMap::full(VOCAB), capture, first }
    }

    pub(crate) fn with_vocab(self, vocab: VocabMap) -> Self {
        Self { vocab, ..self }
    }

    /// The captured states of `tokens`, and the logits after the last.
    fn ask(&self, tokens: &[u32]) -> (Tensor, Vec<f32>) {
        let mut cache = KvCache::new(self.target, tokens.len()).unwrap();
        let capture = Capture { last_hidden: true, ..self.capture.clone() };
        let captured = self.target.extend(&mut cache, tokens, None, &capture).unwrap();
        let logits = self.target.logits(&captured.last_hidden.unwrap()).unwrap().to_f32();
        (captured.hidden_states, logits[logits.len() - VOCAB..].to_vec())
    }

    fn logits(&self, tokens: &[u32]) -> Vec<f32> {
        let (_, mut logits) = self.ask(tokens);
        let seed = tokens.iter().fold(1u64, |s, &t| s.wrapping_mul(131).wrapping_add(u64::from(t)));
        let mut lcg = Lcg::new(seed);
        match self.distortion {
            Distortion::None => {}
            Distortion::Negated => logits.iter_mut().for_each(|x| *x = -*x),
            Distortion::Noise(size) => logits.iter_mut().for_each(|x| *x += size * lcg.normal()),
        }
        self.vocab.target_ids().iter().map(|&t| logits[t as usize]).collect()
    }
}

impl DraftMethod for Oracle<'_> {
    fn capture(&self) -> &Capture {
        &self.capture
    }

    fn loss(&self, _: &Tape<'_>, _: &Batch) -> Result<PendingLoss> {
        Err(Error::Batch("an oracle is not trained".to_owned()))
    }

    fn drafter<'a>(&'a self, _: &'a Params) -> Result<Box<dyn Drafter + 'a>> {
        Ok(Box::new(Asking { oracle: self, committed: vec![self.first], nodes: Vec::new() }))
    }

    fn vocab(&self) -> &VocabMap {
        &self.vocab
    }

    fn export_config(&self) -> BTreeMap<String, serde_json::Value> {
        BTreeMap::new()
    }
}

#[derive(Debug)]
struct Asking<'a> {
    oracle: &'a Oracle<'a>,
    committed: Vec<u32>,
    nodes: Vec<Vec<u32>>,
}

impl Drafter for Asking<'_> {
    fn commit(&mut self, hidden_states: &Tensor, next_tokens: &[u32]) -> Result<Vec<f32>> {
        self.nodes.clear();
        let first = self.committed.len() - 1;
        self.committed.extend(next_tokens);
        // The states belong to the tokens before `next_tokens`; the newest token has none yet.
        let (states, _) = self.oracle.ask(&self.committed[..self.committed.len() - 1]);
        let width = states.rows_cols().1;
        assert_eq!(hidden_states.shape(), [next_tokens.len(), width]);
        assert_close("states", &hidden_states.to_f32(), &states.to_f32()[first * width..], 1e-3, 1e-3);
        Ok(self.oracle.logits(&self.committed))
    }

    fn expand(&mut self, nodes: &[(u32, Option<usize>)]) -> Result<Vec<Vec<f32>>> {
        let path = |&(token, parent): &(u32, Option<usize>)| {
            let before = parent.map_or(&self.committed, |p| &self.nodes[p]);
            [before, &[token][..]].concat()
        };
        let paths: Vec<_> = nodes.iter().map(path).collect();
        let logits = paths.iter().map(|path| self.oracle.logits(path)).collect();
        self.nodes.extend(paths);
        Ok(logits)
    }
}

/// `prompts` with the same first token.
pub(crate) fn starting_with(first: u32, mut prompts: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    prompts.iter_mut().for_each(|p| p[0] = first);
    prompts
}

/// An end-of-sequence token that never comes.
pub(crate) const NO_EOS: u32 = VOCAB as u32 + 1;
