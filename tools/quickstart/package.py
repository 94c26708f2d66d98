"""Puts the results where the repository keeps them and writes their README with the measured figures.

    python package.py --work WORK --out assets/quickstart --date 2026-11-24
"""
import argparse
import json
import shutil
from pathlib import Path
from string import Template

from tokenizers import Tokenizer

from check_draft import rows_of
from safetensors import safe_open

HARD_LIMIT = 8_000_000
TARGET_FILES = [
    "config.json", "generation_config.json", "model.safetensors",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
]


def copy(work, out):
    """Target folder, conversations and prompts; returns their sizes in bytes."""
    (out / "target").mkdir(parents=True, exist_ok=True)
    sources = {f"target/{name}": work / "target" / name for name in TARGET_FILES}
    sources |= {name: work / "data" / name for name in ("conversations.jsonl", "prompts.jsonl")}
    for name, source in sources.items():
        shutil.copyfile(source, out / name)
    sizes = {name: source.stat().st_size for name, source in sources.items()}
    assert sum(sizes.values()) < HARD_LIMIT, f"{sum(sizes.values())} bytes are too many"
    return sizes


def parameters(path):
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())


def figures(work, out, sizes):
    """Everything that README.template.md names."""
    config = json.loads((out / "target/config.json").read_text("utf-8"))
    record = json.loads((work / "target.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(out / "target/tokenizer.json"))
    rows = list(rows_of(out / "conversations.jsonl", tokenizer))
    prompts = list(rows_of(out / "prompts.jsonl", tokenizer))
    return config | {
        "parameters": f"{parameters(out / 'target/model.safetensors'):,}",
        "steps": f"{record['steps']:,}",
        "train_loss": f"{record['train_loss']:.3f}",
        "heldout_loss": f"{record['heldout_loss']:.3f}",
        "rows": len(rows),
        "row_tokens": f"{sum(len(ids) for ids, _ in rows) / len(rows):.1f}",
        "longest_row": max(len(ids) for ids, _ in rows),
        "row_supervised": f"{sum(sum(mask) for _, mask in rows) / len(rows):.1f}",
        "prompts": len(prompts),
        "answer_tokens": f"{sum(sum(mask) for _, mask in prompts) / len(prompts):.1f}",
        "bytes": f"{sum(sizes.values()):,}",
        "sizes": "\n".join(f"| `{name}` | {size:,} |" for name, size in sizes.items()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--date", required=True, help="when the target was trained")
    args = parser.parse_args()
    values = figures(args.work, args.out, copy(args.work, args.out)) | {"date": args.date}
    template = Template((Path(__file__).parent / "README.template.md").read_text("utf-8"))
    (args.out / "README.md").write_text(template.substitute(values), "utf-8")
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
