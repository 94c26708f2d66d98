"""Trains the target on the tokenised conversations and writes its Hugging Face folder.

    python train_target.py --data WORK/text.npz --heldout WORK/heldout.npz --tokenizer WORK/tokenizer \
        --steps 1200 --out WORK/target

`--seconds` sets the number of steps from the measured speed instead, corrects it on the way, and records it.

Loss on answers and ends of turn only. Rows are packed into windows; a row attends to itself alone and starts at
position 0, as it will when served. Any CUDA device; `--device cpu` works for a smoke test.
"""
import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llama import CONFIG, Llama, load_folder, save_folder

SEED = 20
WINDOW, BATCH = 384, 192
PEAK_RATE, LAST_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 3e-5, 250, 0.05


def pack(path, device):
    """Windows [n, WINDOW] of token, loss mask, row number (0 = padding) and position, filled best-fit."""
    data = dict(np.load(path))  # an NpzFile would read an array anew at each use
    starts = np.concatenate([[0], data["ends"][:-1]])
    order = np.random.default_rng(SEED).permutation(len(starts))
    open_windows, windows = [], []
    for row in order:
        length = data["ends"][row] - starts[row]
        fits = [w for w in open_windows if w[0] + length <= WINDOW]
        window = max(fits, key=lambda w: w[0]) if fits else [0, []]
        if not fits:
            open_windows.append(window)
            windows.append(window)
        window[0] += length
        window[1].append(row)
        if len(open_windows) > 24:
            open_windows.remove(max(open_windows, key=lambda w: w[0]))
    packed = np.zeros((4, len(windows), WINDOW), np.int32)
    for at, (_, rows) in enumerate(windows):
        end = 0
        for number, row in enumerate(rows, 1):
            span = slice(starts[row], data["ends"][row])
            length = span.stop - span.start
            for field, values in enumerate((data["ids"][span], data["mask"][span], number, np.arange(length))):
                packed[field, at, end : end + length] = values
            end += length
    print(f"{path}: {len(starts)} rows in {len(windows)} windows, {sum(w[0] for w in windows) / packed[0].size:.3f} full")
    return torch.from_numpy(packed).to(device)


def loss_of(model, ids, learned, rows, positions):
    """Mean cross-entropy over the learned tokens."""
    mask = (rows[:, None, :, None] == rows[:, None, None, :]).tril()
    logits = model(ids, positions, mask)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().long(), reduction="none")
    weight = learned[:, 1:].flatten().float()
    return (losses * weight).sum() / weight.sum()


def learning_rate(step, steps):
    """Linear warm-up, then a cosine down to LAST_RATE."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def train(model, data, args):
    """Returns the mean loss of the last 50 steps and the number of steps."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=args.device == "cuda")
    compiled = torch.compile(loss_of) if args.device == "cuda" and not args.eager else loss_of
    generator = torch.Generator().manual_seed(SEED)
    order, recent, began, step, steps = [], [], time.time(), 0, args.steps or 1 << 30
    while step < steps:
        if len(order) < args.batch:
            order = torch.randperm(data.shape[1], generator=generator).tolist()
        picked, order = order[: args.batch], order[args.batch :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(args.device, torch.bfloat16):
            loss = compiled(model, *data[:, picked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = (recent + [loss.detach()])[-50:]
        step += 1
        if step == 50:  # what comes before is compilation
            marked, mark = time.time(), step
        if step % 250 == 0 or step == steps:
            mean, now = torch.stack(recent).mean().item(), time.time()
            rate = (step - mark) / (now - marked) if step > 50 else 0.0
            marked, mark = now, step
            if args.seconds:
                steps = step + max(0, int(rate * (args.seconds - (now - began))))
            print(f"step {step} of {steps} loss {mean:.4f} {rate:.2f} steps/s", flush=True)
    return torch.stack(recent).mean().item(), steps


@torch.no_grad()
def evaluate(model, data, batch):
    """Mean loss of the exported weights, in float32."""
    parts = [loss_of(model, *part).item() for part in data.split(batch, 1)]
    return sum(parts) / len(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "heldout", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--seconds", type=float)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON that overrides keys of llama.CONFIG")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.backends.cuda.enable_cudnn_sdp(False)  # the packing mask needs the memory-efficient kernel
    model = Llama(CONFIG | args.config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    started = time.time()
    loss, steps = train(model, pack(args.data, args.device), args)
    save_folder(model, args.out)
    for file in args.tokenizer.iterdir():
        shutil.copy(file, args.out)
    exported = load_folder(args.out, args.device)
    heldout = evaluate(exported, pack(args.heldout, args.device), 64)
    record = {"steps": steps, "train_loss": loss, "heldout_loss": heldout, "seconds": time.time() - started}
    (args.out.parent / f"{args.out.name}.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(record)


if __name__ == "__main__":
    main()
