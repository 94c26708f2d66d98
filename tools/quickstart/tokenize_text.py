"""Tokenises conversations for training: one array of tokens, the loss mask and the rows' ends.

    python tokenize_text.py --tokenizer WORK/tokenizer --text WORK/text.jsonl --out WORK/text.npz
"""
import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def pieces(turns):
    """The chat template's text in pieces, each with whether the target is to learn it (answer and end of turn)."""
    for turn in turns:
        yield f"<|im_start|>{turn['role']}\n", False
        yield f"{turn['content']}<|im_end|>", turn["role"] == "assistant"
        yield "\n", False


def encode(tokenizer, path):
    """All rows one after the other. Pieces meet at line ends, where the tokenizer never merges."""
    rows = [list(pieces(json.loads(line)["conversations"])) for line in path.read_text("utf-8").splitlines()]
    encoded = iter(tokenizer.encode_batch([text for row in rows for text, _ in row], add_special_tokens=False))
    ids, mask, ends = [], [], []
    for row in rows:
        for _, learned in row:
            new = next(encoded).ids
            ids += new
            mask += [learned] * len(new)
        ends.append(len(ids))
    return np.array(ids, np.uint16), np.array(mask, bool), np.array(ends, np.int64)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ids, mask, ends = encode(Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")), args.text)
    np.savez_compressed(args.out, ids=ids, mask=mask, ends=ends)
    lengths = np.diff(ends, prepend=0)
    print(f"{len(ends)} rows, {len(ids)} tokens, {mask.mean():.3f} learned, length {lengths.mean():.1f} max {lengths.max()}")


if __name__ == "__main__":
    main()
