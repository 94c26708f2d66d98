"""Trains the target's tokenizer (byte-level BPE, ChatML turns) on the text of make_text.py.

    python train_tokenizer.py --text WORK/text.jsonl --out WORK/tokenizer

writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.
"""
import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
PAD, START, END = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def text_of(path):
    """The contents of all turns, and the role lines, so that the roles become single tokens."""
    for line in path.read_text("utf-8").splitlines():
        for turn in json.loads(line)["conversations"]:
            yield turn["role"] + "\n"
            yield turn["content"]


def train(path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text_of(path), trainer)
    return tokenizer


def config(length):
    """tokenizer_config.json as Hugging Face writes it for a fast tokenizer."""
    added = {
        str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for i, t in enumerate(SPECIAL)
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [START],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": length,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(args.text)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    special = {"additional_special_tokens": [START], "eos_token": END, "pad_token": PAD}
    for name, content in (("tokenizer_config", config(2048)), ("special_tokens_map", special)):
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
