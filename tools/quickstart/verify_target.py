"""Compares the exported target with transformers on the CPU in float32: logits, chat template, greedy answers.

    python verify_target.py --target WORK/target --data WORK/data
"""
import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from generate import render
from llama import load_folder

PROMPTS = 20


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    ours = load_folder(args.target, "cpu")
    theirs = LlamaForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    worst, equal = 0.0, 0
    records = [json.loads(line) for line in (args.data / "prompts.jsonl").read_text("utf-8").splitlines()][:PROMPTS]
    for record in records:
        text = tokenizer.apply_chat_template(record["conversations"], add_generation_prompt=True, tokenize=False)
        assert text == render(record["conversations"]), "the template and generate.py render differently"
        ids = tokenizer(text, return_tensors="pt").input_ids
        worst = max(worst, (ours(ids) - theirs(ids).logits).abs().max().item())
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False)
        equal += tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True) == record["answer"]
    print(f"largest difference of a logit {worst:.2e}; {equal} of {len(records)} greedy answers equal")


if __name__ == "__main__":
    main()
