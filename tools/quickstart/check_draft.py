"""Measures how predictable the target is: trains a small EAGLE3 draft and counts the tokens per target pass.

    python check_draft.py --target WORK/target --data WORK/data --epochs 1

The draft is the paper's: features of three layers, one decoder layer, training-time test with 7 steps. The length
is what greedy chain drafting with 5 tokens gives on the held-out prompts, with the answers as the true tokens.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from llama import MLP, Attention, RMSNorm, load_folder, rope_tables
from tokenize_text import pieces

SEED = 22
TTT_STEPS, CHAIN, DECAY = 7, 5, 0.8


class Draft(nn.Module):
    """EAGLE3's draft over the target's frozen embedding."""

    def __init__(self, c, embedding, vocabulary):
        super().__init__()
        size, eps = c["hidden_size"], c["rms_norm_eps"]
        self.c, self.embedding = c, embedding
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.hidden_norm, self.input_layernorm, self.post_norm, self.norm = (RMSNorm(size, eps) for _ in range(4))
        self.attention, self.mlp = Attention(c, 2 * size), MLP(c)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def steps(self, features, ids, number):
        """Logits of each step: step j at position t stands for the token t + 2 + j."""
        hidden, keys, values = self.fc(features), [], []
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        for j in range(number):
            tokens = F.pad(ids[:, j + 1 :], (0, j + 1))
            x = torch.cat([self.input_layernorm(self.embedding[tokens]), self.hidden_norm(hidden)], -1)
            positions = torch.arange(length, device=ids.device)[None] + j
            rope = rope_tables(positions, self.c["head_dim"], self.c["rope_theta"])
            q, k, v = self.attention.qkv(x, rope)
            keys.append(k)
            values.append(v)
            scores = (q @ keys[0].transpose(-1, -2)).masked_fill(~causal, -torch.inf)
            own = [(q * k).sum(-1, keepdim=True) for k in keys[1:]]
            weights = (torch.cat([scores, *own], -1) / math.sqrt(self.c["head_dim"])).softmax(-1)
            mixed = weights[..., :length] @ values[0]
            for i, v in enumerate(values[1:]):
                mixed = mixed + weights[..., length + i, None] * v
            hidden = hidden + self.attention.output(mixed)
            hidden = hidden + self.mlp(self.post_norm(hidden))
            yield self.head(self.norm(hidden))


def rows_of(path, tokenizer):
    """Tokens and loss masks; of a held-out prompt only the kept answer counts."""
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        turns = record["conversations"]
        if "answer" in record:
            turns = turns + [{"role": "assistant", "content": record["answer"]}]
        parts = list(pieces(turns))[:-1]
        ids, mask = [], []
        for at, (text, learned) in enumerate(parts):
            new = tokenizer.encode(text, add_special_tokens=False).ids
            ids += new
            mask += [learned and ("answer" not in record or at == len(parts) - 1)] * len(new)
        yield ids, mask


def batch(rows, device):
    """Rows padded on the right."""
    length = max(len(ids) for ids, _ in rows)
    return (torch.tensor([r[i] + [0] * (length - len(r[i])) for r in rows], device=device) for i in (0, 1))


def capture(target, ids):
    """The three layers' outputs side by side, and the target's logits."""
    with torch.no_grad():
        states = target.features(ids)
        layers = target.config["num_hidden_layers"]
        picked = [states[i] for i in (1, layers // 2 - 1, layers - 4)]
        return torch.cat(picked, -1), target.head(states[-1])


def loss_of(draft, target, ids, mask, kept, to_draft):
    """Weighted soft cross-entropy over the steps, and the share of equal best tokens at each."""
    features, logits = capture(target, ids)
    total, hits = 0.0, []
    for j, predicted in enumerate(draft.steps(features, ids, TTT_STEPS)):
        shift = lambda x, by: F.pad(x[:, by:], (0,) * (2 * (x.dim() - 2)) + (0, by))
        teacher, best = shift(logits, j + 1), shift(logits, j + 1).argmax(-1)
        weight = (shift(mask, j + 2) * (to_draft[best] >= 0)).float()
        soft = teacher[..., kept].softmax(-1)
        losses = -(soft * predicted.log_softmax(-1)).sum(-1)
        total = total + DECAY**j * (losses * weight).sum() / weight.sum()
        hits.append(((predicted.argmax(-1) == to_draft[best]) * weight).sum() / weight.sum())
    return total, torch.stack(hits)


@torch.no_grad()
def acceptance(draft, target, rows, kept, device):
    """Mean tokens per target pass, and the chance that step j is accepted when it is reached."""
    emitted = passes = 0
    reached, accepted = torch.zeros(CHAIN), torch.zeros(CHAIN)
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        ids, _ = batch(part, device)
        features, _ = capture(target, ids)
        best = [kept[p.argmax(-1)].cpu() for p in draft.steps(features, ids, CHAIN)]
        for row, (tokens, mask) in enumerate(part):
            at = mask.index(True) - 1
            while at + 1 < len(tokens) - 1:
                got = 0
                while got < CHAIN and at + 2 + got < len(tokens):
                    reached[got] += 1
                    if best[got][row, at] != tokens[at + 2 + got]:
                        break
                    accepted[got] += 1
                    got += 1
                step = min(got + 1, len(tokens) - 2 - at)
                at, emitted, passes = at + step, emitted + step, passes + 1
    return emitted / passes, (accepted / reached).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    target = load_folder(args.target, args.device).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    rows, heldout = (list(rows_of(args.data / f"{name}.jsonl", tokenizer)) for name in ("conversations", "prompts"))
    counts = torch.zeros(target.config["vocab_size"])
    for ids, mask in rows:
        for token, learned in zip(ids, mask):
            counts[token] += learned
    kept = counts.argsort(descending=True, stable=True)[: args.vocabulary].sort().values
    to_draft = torch.full((len(counts),), -1).scatter(0, kept, torch.arange(len(kept))).to(args.device)
    print(f"{len(rows)} rows, {sum(len(r[0]) for r in rows) / len(rows):.1f} tokens, {counts.sum() / len(rows):.1f} supervised, "
          f"{int((counts > 0).sum())} tokens of the vocabulary seen, {counts[kept].sum() / counts.sum():.4f} covered")
    kept = kept.to(args.device)
    draft = Draft(target.config, target.model.embed_tokens.weight.detach(), len(kept)).to(args.device)
    steps = int(args.epochs * len(rows) / args.rows_per_step)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator, order, seen, started = torch.Generator().manual_seed(SEED), [], 0, time.time()
    print(f"untrained: acceptance length {acceptance(draft, target, heldout, kept, args.device)[0]:.3f}", flush=True)
    for step in range(steps):
        if len(order) < args.rows_per_step:
            order = torch.randperm(len(rows), generator=generator).tolist()
        picked, order = [rows[i] for i in order[: args.rows_per_step]], order[args.rows_per_step :]
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
        ids, mask = batch(picked, args.device)
        loss, hits = loss_of(draft, target, ids, mask, kept, to_draft)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += sum(len(r[0]) for r in picked)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1} tokens {seen} {time.time() - started:.0f} s loss {loss:.3f} "
                  f"hits {[round(h, 3) for h in hits.tolist()]}", flush=True)
    length, chance = acceptance(draft, target, heldout, kept, args.device)
    print(f"vocabulary {len(kept)} epochs {args.epochs} rows/step {args.rows_per_step} rate {args.rate}: "
          f"ACCEPTANCE LENGTH {length:.3f}, by step {[round(c, 3) for c in chance]}", flush=True)


if __name__ == "__main__":
    main()
