"""Times the EAGLE3 training step of SpecForge (pip install specforge==0.2.0) on the shapes of `specforge bench step`.

Its own model, loss and optimizer, unmodified; random weights and data on the GPU, so that both sides read nothing:
    python tools/bench/specforge_step.py --preset llama3-8b --tokens 2x2048 [--backend flex_attention|sdpa]
Prints one line of JSON.
"""

import argparse
import json
import statistics

import torch
from specforge.algorithms.eagle3.model import OnlineEagle3Model
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.optimizer import BF16Optimizer
from transformers import LlamaConfig

PRESETS = {
    "llama3-8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
                      head_dim=128, vocab_size=128256, rope_theta=500000.0),
    "qwen3-4b": dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8,
                     head_dim=128, vocab_size=151936, rope_theta=1000000.0),
    "qwen3-8b": dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
                     head_dim=128, vocab_size=151936, rope_theta=1000000.0),
}
DRAFT_VOCAB = 32000


def draft(preset, backend):
    config = LlamaConfig(**PRESETS[preset], draft_vocab_size=DRAFT_VOCAB, num_hidden_layers=1, rms_norm_eps=1e-5,
                         max_position_embeddings=40960, pad_token_id=0, tie_word_embeddings=False)
    model = LlamaForCausalLMEagle3(config, attention_backend=backend).cuda().to(torch.bfloat16)
    model.embed_tokens.weight.requires_grad_(False)
    kept = torch.randperm(config.vocab_size)[:DRAFT_VOCAB].sort().values
    model.t2d.zero_()
    model.t2d[kept.cuda()] = True
    model.d2t.copy_((kept - torch.arange(DRAFT_VOCAB)).cuda())
    return config, OnlineEagle3Model(model, length=7, attention_backend=backend)


def batch(config, n, length):
    h = config.hidden_size
    shape = (n, length)
    return dict(
        input_ids=torch.randint(0, config.vocab_size, shape, device="cuda"),
        attention_mask=torch.ones(shape, dtype=torch.long, device="cuda"),
        loss_mask=torch.ones((*shape, 1), dtype=torch.long, device="cuda"),
        hidden_states=torch.randn((*shape, 3 * h), dtype=torch.bfloat16, device="cuda"),
    ), torch.randn((*shape, h), dtype=torch.bfloat16, device="cuda")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="llama3-8b")
    parser.add_argument("--tokens", default="1x2048")
    parser.add_argument("--backend", default="flex_attention")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    n, length = map(int, args.tokens.split("x"))
    config, model = draft(args.preset, args.backend)
    optimizer = BF16Optimizer(model.draft_model, lr=1e-4, total_steps=1000)
    head = (torch.randn((config.vocab_size, config.hidden_size), device="cuda") * 0.02).to(torch.bfloat16)
    inputs, last_hidden = batch(config, n, length)

    def step():
        with torch.no_grad():
            target = last_hidden @ head.T
        losses = model(target=target, **inputs)[0]
        del target
        sum(0.8**i * loss for i, loss in enumerate(losses)).backward()
        optimizer.step()

    for _ in range(args.warmup):
        step()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    print(json.dumps(dict(preset=args.preset, tokens=args.tokens, backend=args.backend, step_ms=ms,
                          tokens_per_second=n * length / ms * 1e3, device=torch.cuda.get_device_name(),
                          peak_bytes=torch.cuda.max_memory_allocated(), torch=torch.__version__)))


if __name__ == "__main__":
    main()
