"""Seeded training, dev and test splits, the same on every machine.

Examples are put in the order of ``sha256(f"{seed}:{id}")``; no random generator of a library takes part. Training takes
the first ``num_train`` of the training split, dev the next ``num_dev``, or rows of a dev split in that order. Test rows come from
the test split in an order that does not depend on the seed, and keep the order of the file; without a test split they are taken
out of the training split in the same way.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slzo.errors import SlzoError
from slzo.tasks.base import Example

_TEST_ORDER = "test"
# Of the training split, where test rows are drawn from it.
_LARGEST_TEST_SHARE = 5


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
    dev_pool: Sequence[Example] | None = None,
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
        dev_pool: Rows for dev; ``None`` takes them from ``train_pool``.

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
    if dev_pool is not None:
        return _with_dev_pool(pool, dev_pool, test_pool, test, num_train, num_dev, seed, notes)
    take_train, take_dev = divide(len(pool), num_train, num_dev)
    if take_train < num_train or take_dev < num_dev:
        notes.append(
            f"The training split has {len(pool)} usable rows: took {take_train} of {num_train} training examples and"
            f" {take_dev} of {num_dev} dev examples."
        )
    ordered = sorted(pool, key=lambda example: order_key(str(seed), example.id))
    return Splits(tuple(ordered[:take_train]), tuple(ordered[take_train : take_train + take_dev]), test, tuple(notes))


def part_test(pool: Sequence[Example], num_test: int | None) -> tuple[list[Example], list[Example], str]:
    """Training and test rows of a task with training rows only, at most a fifth of them for test, and a sentence for the log.

    Rows whose prompts are equal stay together, in the order of :func:`draw_splits`; the draw does not depend on a seed.

    Args:
        pool: All rows.
        num_test: Test rows wanted; ``None`` for a fifth.
    """
    most = max(1, len(pool) // _LARGEST_TEST_SHARE)
    wanted = most if num_test is None else min(num_test, most)
    ids = {example.prompt: example.id for example in reversed(pool)}  # the first row of each prompt
    first = sorted(ids, key=lambda prompt: order_key(_TEST_ORDER, ids[prompt]))
    taken = set(first[:wanted])
    test = [example for example in pool if example.prompt in taken and example.id == ids[example.prompt]]
    train = [example for example in pool if example.prompt not in taken]
    twins = len(pool) - len(train) - len(test)
    also = f", and left out {twins} rows with the same prompts" if twins else ""
    told = (
        f"No held-out rows are given: drew {len(test)} of the {len(pool)} training rows, the same for every seed{also}."
    )
    return train, test, told


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


def _with_dev_pool(
    pool: list[Example],
    dev_pool: Sequence[Example],
    test_pool: Sequence[Example],
    test: tuple[Example, ...],
    num_train: int,
    num_dev: int,
    seed: int,
    notes: list[str],
) -> Splits:
    dev = _without_repeats(dev_pool, test_pool, notes, "dev") if num_dev else []
    pool = _without_repeats(pool, dev_pool, notes, other="dev") if dev_pool else pool
    if len(pool) < num_train or len(dev) < num_dev:
        notes.append(
            f"Took {min(num_train, len(pool))} of {num_train} training examples and {min(num_dev, len(dev))} of {num_dev} dev "
            "examples: there are no more usable rows."
        )
    train, dev = (sorted(rows, key=lambda example: order_key(str(seed), example.id)) for rows in (pool, dev))
    return Splits(tuple(train[:num_train]), tuple(dev[:num_dev]), test, tuple(notes))


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


def _without_repeats(
    pool: Sequence[Example],
    others: Iterable[Example],
    notes: list[str],
    name: str = "training",
    other: str = "test",
) -> list[Example]:
    """The pool without rows that are also in another split, each prompt once (the first in the file)."""
    others = list(others)
    other_ids = {example.id for example in others}
    other_prompts = {example.prompt for example in others}
    seen: set[str] = set()
    kept: list[Example] = []
    leaked = 0
    for example in pool:
        if example.id in other_ids or example.prompt in other_prompts:
            leaked += 1
        elif example.prompt not in seen:
            seen.add(example.prompt)
            kept.append(example)
    repeated = len(pool) - leaked - len(kept)
    if leaked:
        notes.append(f"Left out {leaked} {name} rows that are also in the {other} split.")
    if repeated:
        notes.append(f"Left out {repeated} {name} rows whose prompt is there twice.")
    if not kept:
        split = "num_train" if name == "training" else f"num_{name}"
        raise SlzoError(
            f"data.{split}: none of the {len(pool)} {name} rows is usable, all are in the {other} split too; give a"
            f" {name} split of other rows"
        )
    return kept
