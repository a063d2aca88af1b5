"""Classes in equal shares: the class of each training row, and an order that draws all classes alike."""

from collections import Counter
from collections.abc import Sequence
from math import ceil

import torch

from slzo.tasks.base import Example, Kind, Task
from slzo.utils.errors import SlzoError
from slzo.utils.seeding import derive_seed


def check_has_classes(task: Task) -> None:
    """Refuse a task whose rows belong to no classes.

    Raises:
        SlzoError: It generates answers, or each row has candidates of its own.
    """
    if task.kind is not Kind.CLASSIFICATION:
        what = "generates answers" if task.kind is Kind.GENERATION else "has other candidates in each row"
        raise SlzoError(
            f"data.balanced true: task {task.name!r} {what}, and there are no classes to balance; leave it out"
        )


def classes_of(examples: Sequence[Example]) -> list[int]:
    """The class of each labelled row: its first right candidate, by number.

    Raises:
        SlzoError: The rows do not have the same candidates, or one is right in none of them.
    """
    candidates = examples[0].candidates
    if any(example.candidates != candidates for example in examples):
        raise SlzoError(
            "data.balanced true: the rows have different candidates, and no classes to balance; leave it out"
        )
    classes = [example.gold[0] for example in examples]
    for number, candidate in enumerate(candidates):
        if number not in classes:
            raise SlzoError(
                f"data.balanced true: none of the {len(examples)} training rows has class {candidate.strip()!r}; raise "
                "data.num_train, give rows of it, or leave data.balanced out"
            )
    return classes


def describe_balance(examples: Sequence[Example], classes: Sequence[int]) -> str:
    """In a line, how many rows each class has, and how many of it an epoch draws."""
    counts = Counter(classes)
    told = ", ".join(f"{examples[0].candidates[own].strip()!r} {counts[own]}" for own in sorted(counts))
    each = ceil(len(classes) / len(counts))
    return f"Balanced batches: training rows by class {told}; an epoch of {len(classes)} draws about {each} of each."


def balanced_order(classes: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Rows of an epoch, as many as there are: one of each class in turn, the classes of a turn in random order.

    Each class goes through its rows in a random order, then in another, across the epochs: all rows of a class come equally
    often, those of a small one several times an epoch, those of a large one not in every epoch. Drawn from (seed, epoch).

    Args:
        classes: Of each row.
        seed: Of the draws.
        epoch: Counted from 0.
    """
    rows: dict[int, list[int]] = {own: [] for own in sorted(set(classes))}
    for row, own in enumerate(classes):
        rows[own].append(row)
    turns = ceil(len(classes) / len(rows))
    drawn = [_in_turn(members, (seed, own), epoch * turns, turns) for own, members in rows.items()]
    generator = torch.Generator().manual_seed(derive_seed("classes", seed, epoch))
    places = [torch.randperm(len(drawn), generator=generator).tolist() for _ in range(turns)]
    return [drawn[place][turn] for turn, order in enumerate(places) for place in order][: len(classes)]


def epochs_for_all(classes: Sequence[int]) -> int:
    """Epochs in which every row has come, but for those that the end of an epoch cut off."""
    counts = Counter(classes)
    return ceil(max(counts.values()) / ceil(len(classes) / len(counts)))


def _in_turn(rows: Sequence[int], key: tuple[int, int], first: int, count: int) -> list[int]:
    """Some of an endless series of permutations of rows."""
    found: list[int] = []
    for number in range(first // len(rows), ceil((first + count) / len(rows))):
        generator = torch.Generator().manual_seed(derive_seed("class", *key, number))
        found += [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
    skipped = first % len(rows)
    return found[skipped : skipped + count]
