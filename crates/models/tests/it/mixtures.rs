//! Small targets with mixtures of experts, latent attention, and linear attention: their configurations and tensors.

use serde_json::{Value, json};

/// Names and shapes of the tensors of a layer, below `model.layers.N.`.
pub(crate) type Tensors = Vec<(String, Vec<usize>)>;

/// The architectures, with what is special about each switched on.
pub(crate) fn kinds() -> Vec<(&'static str, Value)> {
    let experts = json!({ "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12 });
    let routed = json!({ "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 12 });
    let latent = with(
        &routed,
        &json!({ "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
        "v_head_dim": 7 }),
    );
    let linear = json!({ "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
        "linear_value_head_dim": 5, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "partial_rotary_factor": 0.5, "shared_expert_intermediate_size": 10 });
    vec![
        ("MixtralForCausalLM", json!({ "num_local_experts": 5, "num_experts_per_tok": 2 })),
        ("Qwen3MoeForCausalLM", with(&experts, &json!({ "mlp_only_layers": [1] }))),
        ("Glm4MoeForCausalLM", with(&routed, &json!({ "attention_bias": true, "use_qk_norm": true }))),
        (
            "GptOssForCausalLM",
            json!({ "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4 }),
        ),
        ("DeepseekV2ForCausalLM", with(&latent, &json!({ "topk_method": "group_limited_greedy" }))),
        ("DeepseekV3ForCausalLM", with(&latent, &json!({ "q_lora_rank": 9 }))),
        (
            "Llama4ForCausalLM",
            json!({ "num_local_experts": 5, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 40, "no_rope_layers": [1, 0, 1], "attention_chunk_size": 4, "floor_scale": 4 }),
        ),
        ("Qwen3NextForCausalLM", with(&experts, &linear)),
        ("Qwen3_5ForCausalLM", linear.clone()),
        ("Qwen3_5MoeForCausalLM", with(&experts, &linear)),
    ]
}

fn with(base: &Value, more: &Value) -> Value {
    let mut all = base.clone();
    for (key, value) in more.as_object().expect("keys") {
        all[key] = value.clone();
    }
    all
}

/// The tensors of layer `layer`; none of an architecture that is not of these.
pub(crate) fn layer(config: &Value, layer: usize) -> Option<Tensors> {
    let model = Model { config, layer };
    let [h, _] = model.widths();
    let mut all = match config["architectures"][0].as_str()? {
        "MixtralForCausalLM" => [model.attention(), model.mixtral()].concat(),
        "Qwen3MoeForCausalLM" => [model.attention(), model.head_norms(), model.qwen_mlp()].concat(),
        "Glm4MoeForCausalLM" => {
            [model.attention(), model.biases(&["q", "k", "v"]), model.head_norms(), model.routed(true)]
                .concat()
        }
        "GptOssForCausalLM" => {
            [model.attention(), model.biases(&["q", "k", "v", "o"]), model.gpt_oss()].concat()
        }
        "DeepseekV2ForCausalLM" => [model.latent(), model.routed(false)].concat(),
        "DeepseekV3ForCausalLM" => [model.latent(), model.routed(true)].concat(),
        "Llama4ForCausalLM" => [model.attention(), model.llama4()].concat(),
        "Qwen3NextForCausalLM" | "Qwen3_5ForCausalLM" | "Qwen3_5MoeForCausalLM" => model.qwen_next(),
        _ => return None,
    };
    all.extend(named(&[("input_layernorm.weight", vec![h]), ("post_attention_layernorm.weight", vec![h])]));
    Some(all)
}

fn named(tensors: &[(&str, Vec<usize>)]) -> Tensors {
    tensors.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())).collect()
}

struct Model<'a> {
    config: &'a Value,
    layer: usize,
}

impl Model<'_> {
    fn n(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
    }

    /// H and D.
    fn widths(&self) -> [usize; 2] {
        [self.n("hidden_size"), self.n("head_dim")]
    }

    fn heads(&self) -> [usize; 2] {
        ["num_attention_heads", "num_key_value_heads"].map(|key| self.n(key) * self.n("head_dim"))
    }

    fn attention(&self) -> Tensors {
        let ([h, _], [q, kv]) = (self.widths(), self.heads());
        named(&[
            ("self_attn.q_proj.weight", vec![q, h]),
            ("self_attn.k_proj.weight", vec![kv, h]),
            ("self_attn.v_proj.weight", vec![kv, h]),
            ("self_attn.o_proj.weight", vec![h, q]),
        ])
    }

    fn biases(&self, of: &[&str]) -> Tensors {
        let ([h, _], [q, kv]) = (self.widths(), self.heads());
        let width = |name: &str| match name {
            "q" => q,
            "o" => h,
            _ => kv,
        };
        of.iter().map(|name| (format!("self_attn.{name}_proj.bias"), vec![width(name)])).collect()
    }

    fn head_norms(&self) -> Tensors {
        let [_, d] = self.widths();
        named(&[("self_attn.q_norm.weight", vec![d]), ("self_attn.k_norm.weight", vec![d])])
    }

    fn mlp(&self, at: &str, [gate, up, down]: [&str; 3], width: usize) -> Tensors {
        let [h, _] = self.widths();
        let shapes = [(gate, vec![width, h]), (up, vec![width, h]), (down, vec![h, width])];
        shapes.into_iter().map(|(name, shape)| (format!("{at}.{name}.weight"), shape)).collect()
    }

    fn plain_mlp(&self, at: &str, width: usize) -> Tensors {
        self.mlp(at, ["gate_proj", "up_proj", "down_proj"], width)
    }

    fn experts(&self, at: &str, n: usize, names: [&str; 3], width: usize) -> Tensors {
        let [h, _] = self.widths();
        let mut all = named(&[(&format!("{at}.gate.weight"), vec![n, h])]);
        all.extend((0..n).flat_map(|e| self.mlp(&format!("{at}.experts.{e}"), names, width)));
        all
    }

    fn plain_experts(&self, count: &str) -> Tensors {
        let names = ["gate_proj", "up_proj", "down_proj"];
        self.experts("mlp", self.n(count), names, self.n("moe_intermediate_size"))
    }

    fn mixtral(&self) -> Tensors {
        let n = self.n("num_local_experts");
        self.experts("block_sparse_moe", n, ["w1", "w3", "w2"], self.n("intermediate_size"))
    }

    fn qwen_mlp(&self) -> Tensors {
        if self.config["mlp_only_layers"].as_array().is_some_and(|l| l.contains(&json!(self.layer))) {
            self.plain_mlp("mlp", self.n("intermediate_size"))
        } else {
            self.plain_experts("num_experts")
        }
    }

    fn routed(&self, is_corrected: bool) -> Tensors {
        if self.layer < self.n("first_k_dense_replace") {
            return self.plain_mlp("mlp", self.n("intermediate_size"));
        }
        let mut all = self.plain_experts("n_routed_experts");
        if is_corrected {
            all.extend(named(&[("mlp.gate.e_score_correction_bias", vec![self.n("n_routed_experts")])]));
        }
        all.extend(self.plain_mlp("mlp.shared_experts", self.n("moe_intermediate_size")));
        all
    }

    fn gpt_oss(&self) -> Tensors {
        let ([h, _], n, i) = (self.widths(), self.n("num_local_experts"), self.n("intermediate_size"));
        named(&[
            ("self_attn.sinks", vec![self.n("num_attention_heads")]),
            ("mlp.router.weight", vec![n, h]),
            ("mlp.router.bias", vec![n]),
            ("mlp.experts.gate_up_proj", vec![n, h, 2 * i]),
            ("mlp.experts.gate_up_proj_bias", vec![n, 2 * i]),
            ("mlp.experts.down_proj", vec![n, i, h]),
            ("mlp.experts.down_proj_bias", vec![n, h]),
        ])
    }

    fn latent(&self) -> Tensors {
        let ([h, _], heads, l) = (self.widths(), self.n("num_attention_heads"), self.n("kv_lora_rank"));
        let [rest, p, v] = ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"].map(|key| self.n(key));
        let mut all = named(&[
            ("self_attn.kv_a_proj_with_mqa.weight", vec![l + p, h]),
            ("self_attn.kv_a_layernorm.weight", vec![l]),
            ("self_attn.kv_b_proj.weight", vec![heads * (rest + v), l]),
            ("self_attn.o_proj.weight", vec![h, heads * v]),
        ]);
        let q = heads * (rest + p);
        all.extend(match self.config["q_lora_rank"].as_u64() {
            None => named(&[("self_attn.q_proj.weight", vec![q, h])]),
            Some(rank) => named(&[
                ("self_attn.q_a_proj.weight", vec![rank as usize, h]),
                ("self_attn.q_a_layernorm.weight", vec![rank as usize]),
                ("self_attn.q_b_proj.weight", vec![q, rank as usize]),
            ]),
        });
        all
    }

    fn llama4(&self) -> Tensors {
        let ([h, _], n, i) = (self.widths(), self.n("num_local_experts"), self.n("intermediate_size"));
        if !(self.layer + 1).is_multiple_of(self.n("interleave_moe_layer_step")) {
            return self.plain_mlp("feed_forward", self.n("intermediate_size_mlp"));
        }
        let mut all = named(&[
            ("feed_forward.router.weight", vec![n, h]),
            ("feed_forward.experts.gate_up_proj", vec![n, h, 2 * i]),
            ("feed_forward.experts.down_proj", vec![n, i, h]),
        ]);
        all.extend(self.plain_mlp("feed_forward.shared_expert", i));
        all
    }

    fn qwen_next(&self) -> Tensors {
        let [h, _] = self.widths();
        let is_next = self.config["architectures"][0] == "Qwen3NextForCausalLM";
        let mut all = if self.config["layer_types"][self.layer] == "linear_attention" {
            self.linear(is_next)
        } else {
            [self.attention(), self.head_norms()].concat()
        };
        // Queries and gates.
        let [q, _] = self.heads();
        all.iter_mut()
            .filter(|(name, _)| name == "self_attn.q_proj.weight")
            .for_each(|t| t.1 = vec![2 * q, h]);
        if self.config["num_experts"].is_null() {
            all.extend(self.plain_mlp("mlp", self.n("intermediate_size")));
        } else {
            all.extend(self.plain_experts("num_experts"));
            all.extend(self.plain_mlp("mlp.shared_expert", self.n("shared_expert_intermediate_size")));
            all.extend(named(&[("mlp.shared_expert_gate.weight", vec![1, h])]));
        }
        all
    }

    fn linear(&self, is_next: bool) -> Tensors {
        let [h, _] = self.widths();
        let [keys, values] = ["linear_num_key_heads", "linear_num_value_heads"].map(|key| self.n(key));
        let [dk, dv] = ["linear_key_head_dim", "linear_value_head_dim"].map(|key| self.n(key));
        let (width, z) = (2 * keys * dk + values * dv, values * dv);
        let mut all = named(&[
            ("linear_attn.conv1d.weight", vec![width, 1, 4]),
            ("linear_attn.A_log", vec![values]),
            ("linear_attn.dt_bias", vec![values]),
            ("linear_attn.norm.weight", vec![dv]),
            ("linear_attn.out_proj.weight", vec![h, z]),
        ]);
        all.extend(if is_next {
            named(&[
                ("linear_attn.in_proj_qkvz.weight", vec![width + z, h]),
                ("linear_attn.in_proj_ba.weight", vec![2 * values, h]),
            ])
        } else {
            named(&[
                ("linear_attn.in_proj_qkv.weight", vec![width, h]),
                ("linear_attn.in_proj_z.weight", vec![z, h]),
                ("linear_attn.in_proj_b.weight", vec![values, h]),
                ("linear_attn.in_proj_a.weight", vec![values, h]),
            ])
        });
        all
    }
}
