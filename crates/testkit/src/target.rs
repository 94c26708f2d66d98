//! A small random target as a Hugging Face folder: Llama-shaped, with a byte-level tokenizer and a ChatML template.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use crate::Lcg;

/// A ChatML template.
pub const CHATML: &str = "\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// One tensor of a target: name, shape, elements.
pub type TargetTensor = (String, Vec<usize>, Vec<f32>);

/// A target before it is written; tests spoil a part of it to see what happens.
#[derive(Debug, Clone)]
pub struct SmallTarget {
    /// `config.json`.
    pub config: Value,
    /// Content of `model.safetensors`, all float32.
    pub tensors: Vec<TargetTensor>,
    /// The chat template.
    pub template: String,
}

impl SmallTarget {
    /// Eight layers of width 32, random but for the head, which mostly follows each letter of [`SmallTarget::LETTERS`]
    /// by the next one, around and around: logits far from uniform, and a draft that learns within a few steps.
    pub fn llama(seed: u64) -> Self {
        Self::with(seed, 2, 263)
    }

    /// As [`SmallTarget::llama`], for one, two or four ranks to share: four heads, and a token more that is never used.
    pub fn shared(seed: u64) -> Self {
        Self::with(seed, 4, 264)
    }

    fn with(seed: u64, heads: usize, vocabulary: usize) -> Self {
        let (width, intermediate, head_dim) = (32, 48, 16);
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
            "num_hidden_layers": 8, "vocab_size": vocabulary, "num_attention_heads": heads, "num_key_value_heads": heads,
            "head_dim": head_dim, "intermediate_size": intermediate, "max_position_embeddings": 512,
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "torch_dtype": "float32", "bos_token_id": null, "eos_token_id": 261,
        });
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, width], 1.0)];
        for layer in 0..8 {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec(), 0.08));
            };
            let all_heads = heads * head_dim;
            ["q", "k", "v"].iter().for_each(|p| add(&format!("self_attn.{p}_proj"), &[all_heads, width]));
            add("self_attn.o_proj", &[width, all_heads]);
            add("mlp.gate_proj", &[intermediate, width]);
            add("mlp.up_proj", &[intermediate, width]);
            add("mlp.down_proj", &[width, intermediate]);
            add("input_layernorm", &[width]);
            add("post_attention_layernorm", &[width]);
        }
        shapes.push(("model.norm.weight".to_owned(), vec![width], 0.1));
        shapes.push(("lm_head.weight".to_owned(), vec![vocabulary, width], 0.1));
        let mut lcg = Lcg::new(seed);
        let draw = |(name, shape, scale): (String, Vec<usize>, f32)| {
            let about = if name.contains("norm") { 1.0 } else { 0.0 };
            let values = lcg.normals(shape.iter().product(), scale).into_iter().map(|v| v + about).collect();
            (name, shape, values)
        };
        let tensors = shapes.into_iter().map(draw).collect();
        let mut target = Self { config, tensors, template: CHATML.to_owned() };
        let embedding = target.tensor("model.embed_tokens.weight").2.clone();
        let (_, _, head) = target.tensor("lm_head.weight");
        // A letter's id is its place among the printable bytes, which start at 33.
        let ids: Vec<usize> = Self::LETTERS.bytes().map(|letter| usize::from(letter) - 33).collect();
        for (&id, &next) in ids.iter().zip(ids.iter().cycle().skip(1)) {
            let about = &embedding[id * width..(id + 1) * width];
            head[next * width..(next + 1) * width].iter_mut().zip(about).for_each(|(h, e)| *h = 0.5 * e);
        }
        target
    }

    /// What the target says, in this order.
    pub const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmnop";

    /// The tensor of this name.
    pub fn tensor(&mut self, name: &str) -> &mut TargetTensor {
        self.tensors.iter_mut().find(|(n, _, _)| n == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Writes the folder: configuration, weights, tokenizer and template.
    pub fn write(&self, folder: &Path) {
        let put = |name: &str, content: String| {
            fs_err::write(folder.join(name), content).unwrap_or_else(|error| panic!("{error}"));
        };
        fs_err::create_dir_all(folder).unwrap_or_else(|error| panic!("{error}"));
        put("config.json", self.config.to_string());
        put("tokenizer.json", byte_level_tokenizer().to_string());
        put("tokenizer_config.json", tokenizer_config(&self.template).to_string());
        let bytes: Vec<Vec<u8>> =
            self.tensors.iter().map(|(_, _, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let views = self.tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            (name.as_str(), view.unwrap_or_else(|error| panic!("{name}: {error}")))
        });
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    }
}

/// `tokenizer_config.json` with a template; `<|im_end|>` ends a turn.
pub fn tokenizer_config(template: &str) -> Value {
    json!({
        "bos_token": null,
        "eos_token": { "content": "<|im_end|>", "special": true },
        "pad_token": "<|pad|>",
        "chat_template": template,
    })
}

/// `tokenizer.json`: the GPT-2 alphabet of bytes, merges for `he`, `ll`, `Ġhe`, two newlines, and the special tokens
/// of ChatML; 263 tokens.
pub fn byte_level_tokenizer() -> Value {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut vocab: Vec<String> =
        (0..=255u8).filter(printable).map(|byte| char::from(byte).to_string()).collect();
    vocab.extend((0..68u32).filter_map(|index| char::from_u32(256 + index)).map(|symbol| symbol.to_string()));
    let merges = [["h", "e"], ["l", "l"], ["\u{120}", "he"], ["\u{10A}", "\u{10A}"]];
    vocab.extend(merges.iter().map(|pair| pair.concat()));
    let size = vocab.len();
    let vocab: Map<String, Value> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = ["<|im_start|>", "<|im_end|>", "<|pad|>"].iter().enumerate().map(|(index, token)| {
        json!({ "id": size + index, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    });
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": special.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}
