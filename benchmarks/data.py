"""Texts to train on and texts to forget, from files on this machine or from installed packages."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import yaml

from benchmarks.experiment import ExperimentError


SPLITS = ("train", "validation", "test")


class Entry(NamedTuple):
    """A term, the text that explains it, the subject that it belongs to, and the split that it is in."""

    term: str
    text: str
    label: str
    split: str


def package_folder(module: str, pip_arguments: str) -> Path:
    """The folder of an installed package that is wanted for its files, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(f"{module} is not installed: run `pip install {pip_arguments}`, or name files by flag.")
    return Path(spec.submodule_search_locations[0])


def read_text(file: Path) -> str:
    """The text of a file, unpacked where its name ends with .gz."""
    if not file.is_file():
        raise ExperimentError(f"There is no file {file}: name an existing one with --data or --other.")
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8", errors="replace") as stream:
        return stream.read()


def split_of(text: str) -> str:
    """Always the same split for the same text, however it is spelled: 80 % train, 10 % validation, 10 % test."""
    digest = hashlib.sha256(re.sub(r"\W+", " ", text.casefold()).strip().encode()).digest()
    return {0: "validation", 1: "test"}.get(digest[0] % 10, "train")


def conversations() -> Iterator[Entry]:
    """Question, answer and topic of each conversation of chatterbot-corpus, once."""
    folder, seen = package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english", set()
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, answer = str(turns[0]).strip(), str(turns[1]).strip() if len(turns) > 1 else ""
            if answer and (question, answer) not in seen:
                seen.add((question, answer))
                yield Entry(question, answer, file.stem, split_of(question))


def entries(file: Path | None) -> list[Entry]:
    """The entries of a .jsonl or .jsonl.gz with `term` and `text`, of the paragraphs of any other text file, or of
    chatterbot-corpus if there is no file. `label` and `split` are columns too, if the file has them.
    """
    if file is None:
        return list(conversations())
    if ".jsonl" not in file.suffixes:
        return [Entry("", text, "", split_of(text)) for text in paragraphs(read_text(file))]
    rows = [json.loads(line) for line in read_text(file).splitlines() if line]
    if missing := [column for column in ("term", "text") if column not in rows[0]]:
        raise ExperimentError(f"{file} has no column {' or '.join(missing)}; it has {', '.join(rows[0])}.")
    return [
        Entry(row["term"], row["text"], str(row.get("label", "")), row.get("split") or split_of(row["term"]))
        for row in rows
    ]


def in_split(rows: list[Entry], split: str, held_out: int | None = None) -> list[Entry]:
    """The entries of a split; of the validation and test splits the first `held_out`, or all for None."""
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise ExperimentError(f"The data has no {split} split; give it one in the column `split`, or more entries.")
    return chosen if split == "train" else chosen[:held_out]


def paragraphs(text: str, least: int = 200) -> list[str]:
    """The paragraphs of at least so many characters, each on one line."""
    blocks = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if len(block) >= least]


def language_reference() -> str:
    """The text that there is when no file is named: Python's language reference, as `help()` shows it."""
    return "\n\n".join(text for _, text in sorted(topics.items()))


def other_texts(file: Path | None, count: int) -> list[str]:
    """`count` paragraphs that nothing trains on, evenly out of a text file, or out of Python's language reference."""
    found = paragraphs(read_text(file) if file else language_reference())
    found = [text for text in found if "::=" not in text]  # a grammar, as in that reference, is no text
    if len(found) < count:
        raise ExperimentError(f"{file} has {len(found)} paragraphs of 200 characters; {count} are needed.")
    return found[:: len(found) // count][:count]


def described(file: Path | None) -> str:
    """The name of a file and the beginning of its SHA-256, which a result notes; no path."""
    if file is None:
        return "default"
    if not file.is_file():
        raise ExperimentError(f"There is no file {file}: name an existing one with --data or --other.")
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
