"""Reads WordNet 3.0's database files (wndb(5WN)) into one `Entry` per headword and part of speech.

Only common one-word entries are kept: those that WordNet's own tagged texts attest at least once.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
POS_NAME = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
HEADWORD = re.compile(r"[a-z]{3,14}")
PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z' -]{1,23}")
LONGEST_DEFINITION, LONGEST_EXAMPLE = 120, 90
# A demonstration has no need of insults; WordNet marks most of them in the gloss.
SENSITIVE = re.compile(
    r"offensive|disparag|derogat|slur|obscene|vulgar|insult|sex|genital|prostitut|\bsla(ng|ve)|"
    r"\brac(e|es|ist|ial)\b|ethnic|negro|intercourse|\brape|suicid|\bjews?\b|excre|copulat|penis|vagina",
    re.I,
)


@dataclass
class Synset:
    """One meaning: its words, its definition, its example sentences and its pointers."""

    words: list
    definition: str
    examples: list
    pointers: list  # (symbol, target key, source word number, target word number)
    sensitive: bool  # left out of the text


@dataclass
class Entry:
    """A headword with one part of speech and its first sense (and the second, when there is one)."""

    word: str
    pos: str  # noun, verb, adjective, adverb
    definition: str
    examples: list
    synonyms: list = field(default_factory=list)
    hypernyms: list = field(default_factory=list)  # the chain upwards, nearest first
    hyponyms: list = field(default_factory=list)
    parts: list = field(default_factory=list)
    antonym: tuple = ()  # (word, its definition)
    second: str = ""  # definition of the second sense
    synsets: list = field(default_factory=list)  # keys of the synsets whose text may appear


def clean_definition(gloss):
    """The gloss without examples, remarks in parentheses and later alternatives."""
    text = re.sub(r'"[^"]*"?', "", gloss)
    text = re.sub(r"\([^()]*\)", "", text)
    if "(" in text or ")" in text:
        return ""
    parts = [" ".join(p.split()).strip(" ,:.-") for p in text.split(";")]
    parts = [p.replace(" ,", ",").replace("`", "'") for p in parts if p]
    return parts[0] if parts and len(parts[0]) <= LONGEST_DEFINITION else ""


def clean_example(text):
    """An example as a sentence, or nothing when it is too short or too long to be one."""
    text = " ".join(text.split()).strip(" ;,")
    if not 15 <= len(text) <= LONGEST_EXAMPLE or len(text.split()) < 4 or not text[0].isalpha():
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


def parse_synset(line):
    """One line of a data file."""
    head, _, gloss = line.partition("|")
    fields = head.split()
    count = int(fields[3], 16)
    words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
    at = 4 + 2 * count
    pointers = []
    for i in range(int(fields[at])):
        symbol, offset, pos, ends = fields[at + 1 + 4 * i : at + 5 + 4 * i]
        pointers.append((symbol, pos + offset, int(ends[:2], 16), int(ends[2:], 16)))
    examples = [e for e in map(clean_example, re.findall(r'"([^"]*)"', gloss)) if e]
    sensitive = bool(SENSITIVE.search(gloss + " " + " ".join(words)))
    return Synset(words, clean_definition(gloss), examples, pointers, sensitive)


def read_synsets(folder):
    """All synsets by key: part-of-speech letter and file offset."""
    synsets = {}
    for name, letter in POS.items():
        for line in (Path(folder) / f"data.{name}").read_text("utf-8", "replace").splitlines():
            if line[:1].isdigit():
                synsets[letter + line[:8]] = parse_synset(line)
    return synsets


def first_words(synsets, keys, exclude, limit):
    """The first plain word of each synset, without repeats."""
    found = []
    for key in keys:
        word = synsets[key].words[0]
        if synsets[key].sensitive:
            continue
        if PLAIN_WORD.fullmatch(word) and word not in found and word not in exclude:
            found.append(word)
    return found[:limit]


def targets(synset, *symbols):
    """Keys of the synsets that pointers with one of these symbols lead to."""
    return [key.replace("s", "a", 1) for symbol, key, _, _ in synset.pointers if symbol in symbols]


def hypernym_chain(synsets, synset, exclude):
    """Up to three ever wider kinds."""
    chain = []
    while len(chain) < 3 and (up := targets(synset, "@", "@i")):
        synset = synsets[up[0]]
        chain += first_words(synsets, up[:1], exclude | set(chain), 1)
    return chain


def antonym(synsets, synset, word):
    """The word's own antonym with its definition."""
    for symbol, key, source, target in synset.pointers:
        if symbol == "!" and source and synset.words[source - 1] == word:
            other = synsets[key.replace("s", "a", 1)]
            if other.definition and not other.sensitive and PLAIN_WORD.fullmatch(other.words[target - 1]):
                return other.words[target - 1], other.definition, key.replace("s", "a", 1)
    return ()


def make_entry(synsets, word, name, keys):
    """The entry of one index line, or None when its first sense has no usable definition."""
    sense = synsets[keys[0]]
    if sense.sensitive or len(sense.definition) < 12 or re.search(rf"\b{word}\b", sense.definition):
        return None
    opposite = antonym(synsets, sense, word)
    second = "" if len(keys) < 2 or synsets[keys[1]].sensitive else synsets[keys[1]].definition
    return Entry(
        word=word,
        pos=POS_NAME[name],
        definition=sense.definition,
        examples=[e for e in sense.examples if re.search(rf"\b{word[:max(3, len(word) - 2)]}", e, re.I)],
        synonyms=[w for w in sense.words if w.lower() != word and PLAIN_WORD.fullmatch(w)][:3],
        hypernyms=hypernym_chain(synsets, sense, {word}),
        hyponyms=first_words(synsets, targets(sense, "~"), {word}, 4),
        parts=first_words(synsets, targets(sense, "%p"), {word}, 4),
        antonym=opposite[:2],
        second=second if len(second) >= 12 else "",
        synsets=keys[:2] + ([opposite[2]] if opposite else []),
    )


def read_entries(folder):
    """Every kept entry, in the order of WordNet's index files."""
    synsets = read_synsets(folder)
    entries = []
    for name, letter in POS.items():
        for line in (Path(folder) / f"index.{name}").read_text("utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            attested = int(fields[int(fields[3]) + 5])
            if attested and HEADWORD.fullmatch(fields[0]):
                keys = [letter + offset for offset in fields[int(fields[3]) + 6 :]]
                entries.append(make_entry(synsets, fields[0], name, keys))
    return [e for e in entries if e]
