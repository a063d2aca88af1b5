"""Write made-up support tickets of four kinds with a config for them: a topical task, in which single words decide.

    python tools/ticket_task.py --output tickets
    slzo fit --config quickstart --config tickets/task.yaml

There are 400 training rows and 120 held-out rows. 6% of the labels are wrong.
"""

import argparse
import json
import random
from pathlib import Path

import yaml

KINDS = {
    "billing": (
        "I was charged twice for {thing}",
        "the invoice for {thing} has a wrong amount",
        "please refund {thing}",
    ),
    "technical": (
        "{thing} crashes when I open it",
        "I get an error when I start {thing}",
        "{thing} is very slow today",
    ),
    "shipping": (
        "my parcel with {thing} has not arrived",
        "where is my delivery of {thing}",
        "the courier lost {thing}",
    ),
    "account": (
        "I cannot log in to change {thing}",
        "my password for {thing} does not work",
        "please delete my profile and {thing}",
    ),
}
THINGS = (
    "the premium plan",
    "my order",
    "the mobile app",
    "the printer",
    "the newsletter",
    "my subscription",
    "the camera",
)
OPENINGS = ("Hello,", "Good morning,", "Hi team,", "To whom it may concern,", "Dear support,")
CLOSINGS = ("Thank you.", "Please help.", "This is urgent.", "Best regards.", "I am waiting since Monday.")
_WRONG = 0.06


def tickets(number: int, generator: random.Random) -> list[dict[str, str]]:
    """Return rows with the fields ``text`` and ``label``."""
    rows = []
    for _ in range(number):
        kind = generator.choice(list(KINDS))
        words = generator.choice(KINDS[kind]).format(thing=generator.choice(THINGS))
        text = f"{generator.choice(OPENINGS)} {words}. {generator.choice(CLOSINGS)}"
        label = generator.choice(list(KINDS)) if generator.random() < _WRONG * 4 / 3 else kind
        rows.append({"text": text, "label": label})
    return rows


def main() -> None:
    """Write rows and config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tickets"), help="folder")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for name, number in (("train", 400), ("test", 120)):
        text = "".join(json.dumps(row) + "\n" for row in tickets(number, generator))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    task = {
        "name": "tickets",
        "train_file": str(folder / "train.jsonl"),
        "test_file": str(folder / "test.jsonl"),
        "prompt": "Ticket: {text}\nCategory:",
        "candidates": [f" {kind}" for kind in KINDS],
        "label_field": "label",
        "labels": list(KINDS),
    }
    data = {
        "task": {"class_path": "slzo.tasks.template.TemplateTask", "init_args": task},
        "num_train": 340,
        "num_dev": 60,
        "num_test": 120,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump({"data": data}, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
