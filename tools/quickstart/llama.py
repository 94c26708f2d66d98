"""A compact Llama in plain PyTorch, its export as a Hugging Face folder and the way back.

Parameter names and arithmetic are those of transformers' LlamaForCausalLM, so the state dict is the checkpoint.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 14,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
    "use_cache": True,
    "vocab_size": 2048,
}
GENERATION = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.57.0"}


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_tables(positions, head_dim, theta):
    """Cosines and sines [batch, 1, length, head_dim], the two halves equal (Hugging Face's layout)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[:, None, :, None].float() * inverse
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Rotary embedding of [batch, heads, length, head_dim]."""
    left, right = x.chunk(2, -1)
    return (x * rope[0] + torch.cat([-right, left], -1) * rope[1]).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; `inputs` is wider than `hidden_size` in an EAGLE3 draft."""

    def __init__(self, c, inputs=None):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        inputs = inputs or c["hidden_size"]
        self.q_proj = nn.Linear(inputs, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c["hidden_size"], bias=False)

    def qkv(self, x, rope):
        """Rotated queries, rotated keys and values, all with the full number of heads."""
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = rotate(k, rope), v
        group = self.heads // self.kv_heads
        return rotate(q, rope), k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def output(self, mixed):
        """[batch, heads, length, head_dim] back to the residual stream."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x, rope, mask):
        q, k, v = self.qkv(x, rope)
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, rope, mask):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])


class Llama(nn.Module):
    """The target with tied embeddings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = math.sqrt(2 * config["num_hidden_layers"]) if narrow else 1.0
                nn.init.normal_(weight, std=config["initializer_range"] / scale)

    def features(self, ids, positions=None, mask=None):
        """The outputs of all layers and, last, the normed state that the head reads."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rope = rope_tables(positions, self.config["head_dim"], self.config["rope_theta"])
        x = self.model.embed_tokens(ids)
        states = []
        for layer in self.model.layers:
            x = layer(x, rope, mask)
            states.append(x)
        return states + [self.model.norm(x)]

    def head(self, x):
        """Logits; the head is the embedding."""
        return F.linear(x, self.model.embed_tokens.weight)

    def forward(self, ids, positions=None, mask=None):
        return self.head(self.features(ids, positions, mask)[-1])


def save_folder(model, folder):
    """config.json, generation_config.json and model.safetensors in bfloat16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", model.config), ("generation_config", GENERATION)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    tensors = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_folder(folder, device):
    """The model with its stored weights in float32."""
    folder = Path(folder)
    model = Llama(json.loads((folder / "config.json").read_text("utf-8")))
    model.load_state_dict({name: w.float() for name, w in load_file(folder / "model.safetensors").items()})
    return model.eval().to(device)
