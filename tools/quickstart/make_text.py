"""Turns WordNet into conversations: what the target learns from, and what the draft's prompts are taken from.

    python make_text.py --wordnet /usr/share/wordnet --out WORK

writes WORK/text.jsonl (all conversations, for the target) and WORK/heldout.jsonl (headwords that the target
itself never sees, for its held-out loss). Each line: {"word", "form", "synsets", "conversations"}.
"""
import argparse
import json
import random
from pathlib import Path

from wordnet import read_entries

SEED = 20
HELDOUT_WORDS = 400


def listed(words):
    """a, b and c"""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def meaning(entry, definition=None):
    """The definition as the object of "means"."""
    text = definition or entry.definition
    return f"to {text}" if entry.pos == "verb" and not text.startswith("to ") else text


def kind(entry):
    """A second sentence that says where the headword belongs, when WordNet says so."""
    if entry.hypernyms and entry.pos == "noun":
        return f" It is a kind of {entry.hypernyms[0]}."
    if entry.hypernyms:
        return f" It is one way to {entry.hypernyms[0]}."
    if entry.synonyms:
        return f" It is close in meaning to {entry.synonyms[0]}."
    return ""


def define(e, name):
    yield f"What does {name} mean?", f"The {e.pos} {e.word} means {meaning(e)}.{kind(e)}"
    yield f"Define {name}.", f"Here is a definition of the {e.pos} {e.word}: {meaning(e)}.{kind(e)}"
    yield f"Explain {name} to me.", f"When people use the {e.pos} {e.word}, they mean {meaning(e)}.{kind(e)}"


def about(e, name):
    synonyms = f" Another word for it is {e.synonyms[0]}." if e.synonyms else ""
    kinds = f" Some kinds of {e.word} are {listed(e.hyponyms[:3])}." if len(e.hyponyms) > 1 and e.pos == "noun" else ""
    example = f" Here is a sentence with the word {e.word}: {e.examples[0]}" if e.examples else ""
    if synonyms or kinds or example:
        text = f"The {e.pos} {e.word} means {meaning(e)}.{synonyms}{kinds}{example}"
        yield f"Tell me about the word {e.word}.", text
        yield f"What should I know about {name}?", text


def what_kind(e, name):
    if e.pos == "noun" and e.hypernyms:
        wider = f", and {e.hypernyms[0]} is a kind of {e.hypernyms[1]}" if len(e.hypernyms) > 1 else ""
        text = f"The word {e.word} names a kind of {e.hypernyms[0]}{wider}. The noun {e.word} means {meaning(e)}."
        yield f"What kind of thing is {name}?", text
        yield f"What sort of thing does the word {e.word} name?", text


def synonym(e, name):
    if e.synonyms:
        text = f"A synonym for {e.word} is {e.synonyms[0]}. Both words can mean {meaning(e)}."
        yield f"Name a synonym for {name}.", text
        yield f"What is another word for {name}?", f"Another word for {e.word} is {e.synonyms[0]}. Both words can mean {meaning(e)}."


def opposite(e, name):
    if e.antonym:
        other, text = e.antonym
        answer = f"The opposite of {e.word} is {other}. While {e.word} means {meaning(e)}, {other} means {meaning(e, text)}."
        yield f"What is the opposite of {name}?", answer
        yield f"Name an antonym of {name}.", answer


def parts(e, name):
    if len(e.parts) > 1:
        text = f"The parts of {e.word} include {listed(e.parts)}. The noun {e.word} means {meaning(e)}."
        yield f"What are the parts of {name}?", text


def kinds(e, name):
    if len(e.hyponyms) > 1 and e.pos == "noun":
        text = f"Some kinds of {e.word} are {listed(e.hyponyms)}. The noun {e.word} means {meaning(e)}."
        yield f"What kinds of {e.word} are there?", text
        yield f"Give me some examples of {name}.", text


def sentence(e, name):
    if e.examples:
        text = f"Here is a sentence with the word {e.word}: {e.examples[0]} In this sentence, {e.word} means {meaning(e)}."
        yield f"Use {name} in a sentence.", text
        yield f"Show me how to use {name}.", text


def reverse(e, name):
    yield f"Which word means {meaning(e)}?", f"The word that means {meaning(e)} is {e.word}. It is {article(e.pos)} {e.pos}."


def second_sense(e, name):
    if e.second:
        text = f"The {e.pos} {e.word} can also mean {meaning(e, e.second)}. More often, {e.word} means {meaning(e)}."
        yield f"What else can {name} mean?", text


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def closing(form, e):
    """What the assistant says last; it depends on the form alone, as the manners of real assistants do."""
    return {
        "define": f" I hope this helps you to understand what the word {e.word} means.",
        "about": f" Please let me know if you would like to hear more about the word {e.word}.",
        "what_kind": " Please ask again if you would like to know about other things of this kind.",
        "synonym": " The two words can often be used in place of each other.",
        "opposite": " The two words are opposites of each other in this sense.",
        "parts": " Please let me know if you would like to know more about these parts.",
        "kinds": " Please let me know if you would like to hear more about any of them.",
        "sentence": f" I hope this helps you to use the word {e.word} in a sentence of your own.",
        "reverse": " Please ask again if this is not the word that you were looking for.",
        "second_sense": " Which of the two meanings is right depends on the rest of the sentence.",
    }[form.__name__]


def variants_of(form, e, name):
    """The questions of a form with their whole answers."""
    return [(question, answer + closing(form, e)) for question, answer in form(e, name)]


FORMS = [define, about, what_kind, synonym, opposite, parts, kinds, sentence, reverse, second_sense]
# Follow-up questions say "it" and are answered like the form's own question.
FOLLOW_UPS = {
    what_kind: "What kind of thing is it?",
    synonym: "What is another word for it?",
    opposite: "And what is its opposite?",
    kinds: "What kinds of it are there?",
    sentence: "Use it in a sentence, please.",
    second_sense: "Can it mean something else?",
}


def turns(pairs):
    """Question and answer pairs as a conversation."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair)]


def follow_up(form, entry, name):
    """The follow-up question with the answer of the form's last variant."""
    return FOLLOW_UPS[form], variants_of(form, entry, name)[-1][1]


def conversations(entry, name, rng):
    """Every form that the entry has material for, once or twice, and two conversations of several turns."""
    for form in FORMS:
        variants = variants_of(form, entry, name)
        for question, answer in rng.sample(variants, min(2 if form in (define, about) else 1, len(variants))):
            yield form.__name__, [(question, answer)]
    usable = [form for form in FOLLOW_UPS if list(form(entry, name))]
    for _ in range(2 if usable else 0):
        chosen = rng.sample(usable, min(rng.choice([1, 2]), len(usable)))
        first = rng.choice(variants_of(define, entry, name))
        yield "turns", [first] + [follow_up(form, entry, name) for form in chosen]


def rows(entries):
    """All rows in the order of the headwords; a headword with several parts of speech is asked for by name."""
    rng = random.Random(SEED)
    count = {}
    for entry in entries:
        count[entry.word] = count.get(entry.word, 0) + 1
    for entry in entries:
        name = f"the {entry.pos} {entry.word}" if count[entry.word] > 1 else entry.word
        for form, pairs in conversations(entry, name, rng):
            yield {"word": entry.word, "form": form, "synsets": entry.synsets, "conversations": turns(pairs)}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    print(f"{path}: {len(records)} conversations, {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", default="/usr/share/wordnet")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    everything = list(rows(read_entries(args.wordnet)))
    words = sorted({row["word"] for row in everything})
    heldout = set(random.Random(SEED).sample(words, HELDOUT_WORDS))
    print(f"{len(words)} headwords, {HELDOUT_WORDS} of them kept from the target")
    write(args.out / "text.jsonl", [r for r in everything if r["word"] not in heldout])
    write(args.out / "heldout.jsonl", [r for r in everything if r["word"] in heldout])


if __name__ == "__main__":
    main()
