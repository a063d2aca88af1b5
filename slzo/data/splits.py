"""Seeded training, dev and test splits that are the same on every machine.

Examples are sorted by ``sha256(f"{seed}:{id}")``, without any library's random generator. Training takes the first ``num_train``
rows of the training split. Dev takes the next ``num_dev`` rows, or the first rows of a dev split. Test rows come from the test
split, or from the training split if there is none. Their choice does not depend on the seed, and they keep the file's order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slzo.data.sources import RowSource
from slzo.tasks.base import Example, HubSource, Split
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize

_TEST_ORDER = "test"
# Test rows drawn from the training split are at most one row in this many.
_LARGEST_TEST_SHARE = 5


@dataclass(frozen=True, slots=True)
class Splits:
    """The splits of a task.

    Attributes:
        train: Training examples, in the drawn order.
        dev: Examples for choosing the checkpoint, in the drawn order.
        test: Held-out examples, in the order of the file.
        notes: Sentences for the log about missing or omitted rows.
        origin: Description of the file if all splits come from a single one; else empty.
        hub: The data set of the Hub that the test split comes from, with the commit that was loaded; else ``None``.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]
    origin: str = ""
    hub: HubSource | None = None


def draw_from(
    source: RowSource, *, num_train: int, num_dev: int, num_test: int | None, seed: int, needs_train: bool
) -> Splits:
    """Read the rows of a task and draw its splits, see :func:`draw_splits`; the only file of a custom task is divided among them.

    Without ``needs_train``, there are no training and dev rows.

    Raises:
        SlzoError: A required split is missing or broken, or has too few rows.
    """
    files, origin = source.task.files, ""
    divided = "train" in files and "test" not in files
    wanted: dict[Split, bool] = {
        "test": not divided,
        "train": needs_train or divided,
        "dev": needs_train and "dev" in files,
    }
    read = {split: source.read(split) for split, is_needed in wanted.items() if is_needed}
    notes = [rows.note for rows in read.values() if rows.note]
    test, train, dev = (read[split].examples if split in read else None for split in ("test", "train", "dev"))
    if all(rows.hub is None for rows in read.values()):  # nobody can change ids on the Hub
        check_shared_ids(*_id_option(source), test or (), train or (), dev or ())
    if divided and train is not None:
        origin = f"drawn from the {len(train)} of {files['train']} (seed {seed}; the same held-out rows for every seed)"
        least = least_rows(num_train, 0 if dev else num_dev) if needs_train else 0
        train, test, repeats = split_off_test(train, num_test, least)
        notes += repeats
    drawn = draw_splits(
        train if needs_train else None,
        test or [],
        num_train=num_train,
        num_dev=num_dev,
        num_test=None if divided else num_test,
        seed=seed,
        dev_pool=dev,
    )
    hub = next((rows.hub for rows in read.values() if rows.hub is not None), None)
    return replace(drawn, notes=(*notes, *drawn.notes), origin=origin, hub=hub)


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
    """Draw the splits so that no two share an id, or a prompt with the same candidates.

    A pool with fewer than ``num_train + num_dev`` rows is divided in proportion, but dev gets up to a fifth of it in any case,
    since few rows do not tell good weights from others. Dev gets at least one row, and at most a third of the pool unless
    training gets all its rows.

    Args:
        train_pool: Rows for training and dev; ``None`` if only test rows are needed.
        test_pool: Rows for test.
        num_train: Number of training examples, at least 1.
        num_dev: Number of dev examples, 0 or more.
        num_test: Number of test examples, at least 1; ``None`` for all. Groups are not divided, so there may be fewer.
        seed: Seed of the training and dev draw.
        dev_pool: Rows for dev; ``None`` takes them from ``train_pool``.

    Raises:
        SlzoError: A number is out of range, or there are too few rows for a requested split.
    """
    notes: list[str] = []
    test = _draw_test(test_pool, num_test, notes)
    if train_pool is None:
        return Splits((), (), test, tuple(notes))
    pool = _without_repeats(train_pool, test_pool, notes)
    if dev_pool is not None:
        dev = _without_repeats(dev_pool, test_pool, notes, "dev") if num_dev else []
        pool = _without_repeats(pool, dev_pool, notes, other="dev")
        if len(pool) < num_train or len(dev) < num_dev:
            notes.append(
                f"Took {min(num_train, len(pool))} of {num_train} training examples and {min(num_dev, len(dev))} of {num_dev} "
                "dev examples: there are no more usable rows."
            )
        train, dev = _in_drawn_order(pool, seed)[:num_train], _in_drawn_order(dev, seed)[:num_dev]
        return Splits(tuple(train), tuple(dev), test, tuple(notes))
    take_train, take_dev = divide(len(pool), num_train, num_dev)
    if num_dev and not take_dev:
        raise SlzoError(
            f"data.num_dev {num_dev}: dev rows are drawn from the training rows; this needs at least"
            f" {least_rows(num_train, num_dev)} rows with different prompts, and there are {len(pool)}; add rows, give"
            " separate dev rows, or set data.num_dev 0"
        )
    if take_train < num_train or take_dev < num_dev:
        notes.append(
            f"The training split has {pluralize(len(pool), 'usable row')}: took {take_train} of {num_train} training examples and"
            f" {take_dev} of {num_dev} dev examples."
        )
    ordered = _in_drawn_order(pool, seed)
    return Splits(tuple(ordered[:take_train]), tuple(ordered[take_train : take_train + take_dev]), test, tuple(notes))


def split_off_test(
    pool: Sequence[Example], num_test: int | None, least: int = 0
) -> tuple[list[Example], list[Example], tuple[str, ...]]:
    """Divide the rows of a task without test rows into training and test rows, and return them with notes for the log.

    A fifth of the rows are kept for test. Among rows of one :attr:`Example.content`, only the first is drawn.
    No seed affects the draw.

    ``num_test`` of them are taken, ``None`` for all. The others are not trained on, since a later command may take more;
    ``least`` rows with different prompts must stay for the other splits.

    Raises:
        SlzoError: There are too few rows.
    """
    ids = {example.content: example.id for example in reversed(pool)}  # the first row of each prompt
    if len(ids) <= least:
        raise SlzoError(
            f"data.task.train_file: held-out rows are drawn from it too; this needs at least {least + 1} rows with different"
            f" prompts, and it has {len(ids)}; add rows, or give data.task.test_file"
        )
    most = max(1, len(ids) // _LARGEST_TEST_SHARE)
    wanted = most if num_test is None else min(num_test, most)
    first = sorted(ids, key=lambda content: order_key(_TEST_ORDER, ids[content]))
    kept, taken = set(first[:most]), set(first[:wanted])
    test = [example for example in pool if example.content in taken and example.id == ids[example.content]]
    train = [example for example in pool if example.content not in kept]
    repeats = len(pool) - len(train) - len(kept)
    notes = (f"Left out {pluralize(repeats, 'row')} with the prompt of a held-out row.",) if repeats else ()
    return train, test, notes


def _id_option(source: RowSource) -> tuple[str, str]:
    """Return the option that the rows' ids come from, with its value, and what to do if ids are not unique."""
    if source.data_dir is None and not source.task.files:
        return f"data.task {source.task.name!r}", "give each row its own id across all splits"
    advice = "give each row its own id across all files"
    if not source.task.files:
        return f"data.data_dir {source.data_dir!r}", advice
    field = source.task.id_field
    option = "data.task.id_field, left out" if field is None else f"data.task.id_field {field!r}"
    return option, f"{advice}, or name another field"


def check_shared_ids(option: str, advice: str, *pools: Sequence[Example]) -> None:
    """Check that rows with the same id in different splits have the same prompt and candidates.

    ``option`` is where the ids come from, and ``advice`` what to do otherwise.

    Raises:
        SlzoError: They do not; the message names both rows.
    """
    seen: dict[str, Example] = {}
    for example in (example for pool in pools for example in pool):
        other = seen.setdefault(example.id, example)
        if other.content != example.content:
            raise SlzoError(f"{option}: {example.place} has id {example.id!r}, as does {other.place}; {advice}")


def order_key(salt: str, id: str) -> tuple[bytes, str]:
    """Return the sort key of an id; the salt is the seed."""
    return hashlib.sha256(f"{salt}:{id}".encode()).digest(), id


def divide(size: int, num_train: int, num_dev: int) -> tuple[int, int]:
    """Return the numbers of training and dev examples to take from ``size`` rows, see :func:`draw_splits`."""
    if size >= num_train + num_dev:
        return num_train, num_dev
    in_proportion, a_fifth = size * num_dev // (num_train + num_dev), min(num_dev, size // 5)
    share = min(max(1, in_proportion, a_fifth), size // 3)
    dev = min(num_dev, max(share, size - num_train))
    return min(num_train, size - dev), dev


def least_rows(num_train: int, num_dev: int) -> int:
    """Return the fewest rows for which :func:`divide` leaves no requested split empty."""
    return next(size for size in (1, 2, 3) if num_dev == 0 or divide(size, num_train, num_dev)[1])


def _in_drawn_order(rows: Sequence[Example], seed: int) -> list[Example]:
    return sorted(rows, key=lambda example: order_key(str(seed), example.id))


def _draw_test(pool: Sequence[Example], num_test: int | None, notes: list[str]) -> tuple[Example, ...]:
    if num_test is None or len(pool) <= num_test:
        if num_test is not None and len(pool) < num_test:
            notes.append(f"The test split has {pluralize(len(pool), 'row')}: took all; {num_test} were requested.")
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
        notes.append(
            f"Took {pluralize(len(taken), 'test row')}; {num_test} were requested, but rows of one question stay together."
        )
    return tuple(pool[position] for position in sorted(taken))


def _without_repeats(
    pool: Sequence[Example], others: Sequence[Example], notes: list[str], name: str = "training", other: str = "test"
) -> list[Example]:
    """Drop rows that are also in another split, and all but the first row of those with one :attr:`Example.content`."""
    other_ids = {example.id for example in others}
    other_contents = {example.content for example in others}
    seen: set[object] = set()
    kept: list[Example] = []
    leaked = 0
    for example in pool:
        if example.id in other_ids or example.content in other_contents:
            leaked += 1
        elif example.content not in seen:
            seen.add(example.content)
            kept.append(example)
    repeated = len(pool) - leaked - len(kept)
    if leaked:
        notes.append(f"Left out {pluralize(leaked, f'{name} row')} also found in the {other} split.")
    if repeated:
        notes.append(f"Left out {pluralize(repeated, f'{name} row')} with a repeated prompt.")
    if not kept:
        split = "num_train" if name == "training" else f"num_{name}"
        raise SlzoError(
            f"data.{split}: none of the {len(pool)} {name} rows can be used, because all are also in the {other} split; give"
            f" other {name} rows"
        )
    return kept
