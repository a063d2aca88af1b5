"""Seeded training, dev and test splits, the same on every machine.

Examples are put in the order of ``sha256(f"{seed}:{id}")``; no random generator of a library takes part. Training takes
the first ``num_train`` of the training split, dev the next ``num_dev``. Test rows come from the test split in an order
that does not depend on the seed, and keep the order of the file.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slzo.errors import SlzoError
from slzo.tasks.base import Example

_TEST_ORDER = "test"


@dataclass(frozen=True, slots=True)
class Splits:
    """What was drawn.

    Attributes:
        train: Training examples, in the drawn order.
        dev: Examples that choose the checkpoint, in the drawn order.
        test: Held-out examples, in the order of the file.
        notes: Sentences for the log where fewer were taken than asked for, or some left out.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]


def draw_splits(
    train_pool: Sequence[Example] | None,
    test_pool: Sequence[Example],
    *,
    num_train: int,
    num_dev: int,
    num_test: int | None,
    seed: int,
) -> Splits:
    """Draw the splits; no two of them share an id or a prompt.

    A pool too small for ``num_train + num_dev`` is divided in their proportion, dev getting at most a third of it
    unless training has all it asked for.

    Args:
        train_pool: Rows for training and dev; ``None`` if only test rows are needed.
        test_pool: Rows for test.
        num_train: Training examples, at least 1.
        num_dev: Dev examples, 0 or more.
        num_test: Test examples, at least 1; ``None`` takes all. Rows of one group are not parted, so a few less.
        seed: Seed of the training and dev draw.

    Raises:
        SlzoError: A number is out of range, or no training example is left.
    """
    for option, value, least in (("num_train", num_train, 1), ("num_dev", num_dev, 0), ("num_test", num_test, 1)):
        if value is not None and value < least:
            raise SlzoError(f"data.{option} {value}: must be a whole number of at least {least}; raise it")
    notes: list[str] = []
    test = _draw_test(test_pool, num_test, notes)
    if train_pool is None:
        return Splits((), (), test, tuple(notes))
    pool = _without_repeats(train_pool, test_pool, notes)
    take_train, take_dev = divide(len(pool), num_train, num_dev)
    if take_train < num_train or take_dev < num_dev:
        notes.append(
            f"The training split has {len(pool)} usable rows: took {take_train} of {num_train} training examples and"
            f" {take_dev} of {num_dev} dev examples."
        )
    ordered = sorted(pool, key=lambda example: order_key(str(seed), example.id))
    return Splits(tuple(ordered[:take_train]), tuple(ordered[take_train : take_train + take_dev]), test, tuple(notes))


def order_key(salt: str, id: str) -> tuple[bytes, str]:
    """Sort key of an id in the drawing order of a salt (the seed)."""
    return hashlib.sha256(f"{salt}:{id}".encode()).digest(), id


def divide(size: int, num_train: int, num_dev: int) -> tuple[int, int]:
    """Training and dev examples to take of ``size``, see :func:`draw_splits`."""
    if size >= num_train + num_dev:
        return num_train, num_dev
    share = min(size * num_dev // (num_train + num_dev), size // 3)
    dev = min(num_dev, max(share, size - num_train))
    return min(num_train, size - dev), dev


def _draw_test(pool: Sequence[Example], num_test: int | None, notes: list[str]) -> tuple[Example, ...]:
    if num_test is None or len(pool) <= num_test:
        if num_test is not None and len(pool) < num_test:
            notes.append(f"The test split has {len(pool)} rows: took all, {num_test} were asked for.")
        return tuple(pool)
    groups: dict[str, list[int]] = {}
    for position, example in enumerate(pool):
        key = f"id:{example.id}" if example.group is None else f"group:{example.group}"
        groups.setdefault(key, []).append(position)
    taken: list[int] = []
    for key in sorted(groups, key=lambda key: order_key(_TEST_ORDER, key)):
        if taken and len(taken) + len(groups[key]) > num_test:
            break
        taken.extend(groups[key])
    if len(taken) != num_test:
        notes.append(f"Took {len(taken)} test rows, {num_test} were asked for: rows of one question stay together.")
    return tuple(pool[position] for position in sorted(taken))


def _without_repeats(pool: Sequence[Example], test_pool: Iterable[Example], notes: list[str]) -> list[Example]:
    """The pool without rows that are also in the test split, each prompt once (the first in the file)."""
    test_ids = {example.id for example in test_pool}
    test_prompts = {example.prompt for example in test_pool}
    seen: set[str] = set()
    kept: list[Example] = []
    leaked = 0
    for example in pool:
        if example.id in test_ids or example.prompt in test_prompts:
            leaked += 1
        elif example.prompt not in seen:
            seen.add(example.prompt)
            kept.append(example)
    repeated = len(pool) - leaked - len(kept)
    if leaked:
        notes.append(f"Left out {leaked} training rows that are also in the test split.")
    if repeated:
        notes.append(f"Left out {repeated} training rows whose prompt is there twice.")
    if not kept:
        raise SlzoError(
            f"data.num_train: none of the {len(pool)} training rows is usable, all are in the test split too; give a"
            " training split of other rows"
        )
    return kept
