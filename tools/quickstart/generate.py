"""Lets the target answer the chosen questions, greedily and in float32 from its bfloat16 weights.

    python generate.py --target WORK/target --prompts WORK --out WORK/data

writes conversations.jsonl (as many as fit in LIMIT bytes) and prompts.jsonl (held out; the last answer is
removed from the conversation and kept under "answer").
"""
import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llama import load_folder

END = 2
LONGEST_ANSWER, BATCH, LIMIT = 100, 1024, 1_400_000


@torch.no_grad()
def answer(model, tokenizer, prompts, device):
    """The greedy answers to rendered prompts; None where the answer does not end in time."""
    encoded = [e.ids for e in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    length = torch.tensor([len(e) for e in encoded], device=device)
    ids = torch.zeros(len(encoded), int(length.max()) + LONGEST_ANSWER, dtype=torch.long, device=device)
    for row, tokens in zip(ids, encoded):
        row[: len(tokens)] = torch.tensor(tokens)
    at, live = length.clone(), torch.arange(len(encoded), device=device)
    for _ in range(LONGEST_ANSWER):
        ends = at[live]
        states = model.features(ids[live, : int(ends.max())])[-1]
        chosen = model.head(states[torch.arange(len(live), device=device), ends - 1]).argmax(-1)
        ids[live, ends] = chosen
        live = live[chosen != END]
        at[live] += 1
        if not len(live):
            break
    done = torch.ones_like(length, dtype=torch.bool)
    done[live] = False
    texts = [tokenizer.decode(i[s:e].tolist(), skip_special_tokens=False) for i, s, e in zip(ids.cpu(), length, at)]
    return [text if ok else None for text, ok in zip(texts, done.tolist())]


def render(turns):
    """The chat template with the generation prompt."""
    return "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns) + "<|im_start|>assistant\n"


def converse(model, tokenizer, rows, device):
    """Conversations turn by turn; those with an unfinished answer are left out."""
    talks = [[] for _ in rows]
    for turn in range(max(len(row["questions"]) for row in rows)):
        live = [i for i, row in enumerate(rows) if len(row["questions"]) > turn and talks[i] is not None]
        for start in range(0, len(live), BATCH):
            part = live[start : start + BATCH]
            for i in part:
                talks[i].append({"role": "user", "content": rows[i]["questions"][turn]})
            answers = answer(model, tokenizer, [render(talks[i]) for i in part], device)
            for i, text in zip(part, answers):
                talks[i] = None if text is None else talks[i] + [{"role": "assistant", "content": text}]
    finished = [t for t in talks if t is not None]
    print(f"{len(finished)} of {len(rows)} conversations finished", flush=True)
    return finished


def write(path, records, limit):
    """As many records as fit."""
    lines, size = [], 0
    for record in records:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        size += len(line.encode())
        if size > limit:
            break
        lines.append(line)
    path.write_text("".join(lines), "utf-8")
    print(f"{path}: {len(lines)} conversations, {path.stat().st_size} bytes", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_folder(args.target, args.device)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    read = lambda name: [json.loads(line) for line in (args.prompts / name).read_text("utf-8").splitlines()]
    heldout = converse(model, tokenizer, read("heldout_prompts.jsonl"), args.device)
    prompts = [{"conversations": talk[:-1], "answer": talk[-1]["content"]} for talk in heldout]
    write(args.out / "prompts.jsonl", prompts, LIMIT)
    talks = converse(model, tokenizer, read("train_prompts.jsonl"), args.device)
    write(args.out / "conversations.jsonl", [{"conversations": talk} for talk in talks], LIMIT)


if __name__ == "__main__":
    main()
