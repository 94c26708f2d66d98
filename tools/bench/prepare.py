"""The same work as `cargo bench -p specforge-data --bench prepare`, the way Python frameworks do it, for comparison.

    python tools/bench/prepare.py assets/quickstart/target CONVERSATIONS.jsonl [ROWS]

Needs transformers and datasets. A row is rendered with the chat template and encoded; then both ends of every answer
are encoded from the beginning of the text to count their tokens. Arrays are NumPy's; torch is not needed. One process.
"""

import json
import os
import re
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import numpy as np
from transformers import AutoTokenizer

MAX_LENGTH = 2048
ANSWER = re.compile(re.escape("<|im_start|>assistant\n") + r"([\s\S]*?(?:" + re.escape("<|im_end|>\n") + r"|$))")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, truncation=True, max_length=MAX_LENGTH)["input_ids"]


def row(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = np.array(encode(tokenizer, text))
    mask = np.zeros_like(ids)
    for answer in ANSWER.finditer(text):
        start, end = (len(encode(tokenizer, text[:edge])) for edge in answer.span(1))
        mask[start:end] = 1
    return ids, mask


def main(target, path, rows):
    tokenizer = AutoTokenizer.from_pretrained(target)
    datasets.disable_progress_bars()

    def read():
        with open(path) as lines:
            for _, line in zip(range(rows), lines):
                yield {"conversations": json.dumps(json.loads(line)["conversations"])}

    def batch(rows):
        both = [row(tokenizer, json.loads(messages)) for messages in rows["conversations"]]
        return {"input_ids": [ids[None] for ids, _ in both], "loss_mask": [mask[None] for _, mask in both]}

    with tempfile.TemporaryDirectory() as cache:
        start = time.process_time()
        data = datasets.Dataset.from_generator(read, cache_dir=cache)
        data = data.map(batch, batched=True, batch_size=1000, remove_columns=["conversations"])
        seconds = time.process_time() - start
        tokens = sum(len(row["input_ids"][0]) for row in data)
    print(f"{rows} rows, {tokens} tokens, {seconds:.2f} CPU seconds, {tokens / seconds:.0f} tokens per CPU second")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2000)
