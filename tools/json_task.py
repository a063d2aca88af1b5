"""Write a task with a reward: sentences about made-up people, and their jobs as JSON.

    python tools/json_task.py --output json_task
    slzo fit --config configs/json_reward.yaml

No sentence is in both train.jsonl and test.jsonl. The config names :func:`right_fields` as the reward.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_NUM_TRAIN, _NUM_TEST = 600, 200
_NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ines Jonas Karin Leo Mira Nils Olga Paul Rosa Simon Tilda Urs"
_CITIES = "Bonn Bern Graz Oslo Lyon Porto Turin Ghent Malmo Cork Basel Riga Gdansk Split Seville Tartu"
_JOBS = "baker teacher nurse pilot painter farmer lawyer singer plumber chemist"
_SENTENCES = (
    "{name} is {age} years old, works as a {job} and lives in {city}.",
    "{name}, a {job} from {city}, is {age}.",
    "In {city} there is a {job} called {name}, {age} years old.",
    "The {job} {name} lives in {city}. Age: {age}.",
)


def people(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return made-up people: ``name``, ``age``, ``job``, ``city`` and ``text``, a sentence with all four. All texts differ."""
    generator = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        name, city, job = (generator.choice(words.split()) for words in (_NAMES, _CITIES, _JOBS))
        sentence = generator.choice(_SENTENCES)
        person = {"name": name, "age": generator.randint(18, 80), "job": job, "city": city}
        text = sentence.format(**person)
        found[text] = {**person, "text": text}
    return list(found.values())


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with ``text`` and the ``fields`` that an answer should have. All texts differ."""
    return [{"text": person["text"], "fields": {"job": person["job"]}} for person in people(count, seed)]


def right_fields(completions: Sequence[str], fields: Sequence[dict[str, Any]], **columns: Any) -> list[float]:
    """0 if an answer is not a JSON object, else 0.2 plus 0.8 times the share of wanted and given keys with the right value."""
    return [_score(answer, wanted) for answer, wanted in zip(completions, fields, strict=True)]


def _score(answer: str, wanted: dict[str, Any]) -> float:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    right = sum(name in found and found[name] == value for name, value in wanted.items())
    return 0.2 + 0.8 * right / len(wanted.keys() | found.keys())


def write_task(make_rows: Callable[[int, int], list[dict[str, Any]]], doc: str | None, folder: str) -> None:
    """Parse the options, and write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(folder), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows")
    options = parser.parse_args()
    rows = make_rows(_NUM_TRAIN + _NUM_TEST, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:_NUM_TRAIN]), ("test", rows[_NUM_TRAIN:])):
        path = options.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"Wrote {path} ({len(part)} rows)")


if __name__ == "__main__":
    write_task(make_rows, __doc__, "json_task")
