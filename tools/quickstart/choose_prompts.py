"""Chooses the questions that the target will answer: for the training conversations and for the held-out prompts.

    python choose_prompts.py --text WORK/text.jsonl --out WORK

writes WORK/train_prompts.jsonl and WORK/heldout_prompts.jsonl, each line {"form", "questions"}. No headword and no
meaning (synset) of a held-out prompt occurs in a training prompt.
"""
import argparse
import json
import random
from pathlib import Path

from make_text import write

SEED = 21
TRAIN, HELDOUT = 4400, 240
# How often each form of question is wanted; "reverse" answers repeat the question, so they are kept few.
WEIGHTS = {
    "turns": 38, "define": 20, "about": 18, "what_kind": 6, "synonym": 5, "opposite": 3,
    "parts": 1, "kinds": 3, "sentence": 3, "reverse": 1, "second_sense": 2,
}


def choose(rows, number, rng):
    """Rows drawn by the weights of their forms, no headword more than twice."""
    by_form = {form: rng.sample(group, len(group)) for form, group in grouped(rows).items()}
    used, chosen = {}, []
    while len(chosen) < number:
        form = rng.choices(list(WEIGHTS), WEIGHTS.values())[0]
        row = by_form[form].pop()
        if used.get(row["word"], 0) < 2:
            used[row["word"]] = used.get(row["word"], 0) + 1
            chosen.append(row)
    return chosen


def grouped(rows):
    groups = {}
    for row in rows:
        groups.setdefault(row["form"], []).append(row)
    return groups


def questions(row):
    return {"form": row["form"], "questions": [t["content"] for t in row["conversations"] if t["role"] == "user"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(SEED)
    rows = [json.loads(line) for line in args.text.read_text("utf-8").splitlines()]
    heldout = choose(rows, HELDOUT, rng)
    words = {row["word"] for row in heldout}
    synsets = {key for row in rows if row["word"] in words for key in row["synsets"]}
    free = [row for row in rows if row["word"] not in words and not synsets.intersection(row["synsets"])]
    write(args.out / "heldout_prompts.jsonl", [questions(row) for row in heldout])
    write(args.out / "train_prompts.jsonl", [questions(row) for row in choose(free, TRAIN, rng)])


if __name__ == "__main__":
    main()
