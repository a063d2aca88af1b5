"""Classes of rows: how often the most frequent one comes, and an order of training rows that draws all equally often."""

from collections import Counter
from collections.abc import Sequence
from math import ceil

import torch

from slzo.tasks.base import Example, Kind, Task
from slzo.utils.errors import SlzoError
from slzo.utils.seeding import derive_seed


def check_has_classes(task: Task) -> None:
    """Check that the rows of a task belong to classes.

    Raises:
        SlzoError: If the task generates answers, or the candidates differ between rows.
    """
    if task.kind is not Kind.CLASSIFICATION:
        reason = "generates answers" if task.kind is Kind.GENERATION else "has different candidates in each row"
        raise SlzoError(
            f"data.balanced true: task {task.name!r} {reason}, so there are no classes to balance; leave it out"
        )


def common_candidates(examples: Sequence[Example]) -> tuple[str, ...] | None:
    """Return the candidates that all rows have; ``None`` if they differ, or if there are fewer than two."""
    found = {example.candidates for example in examples}
    candidates = found.pop() if len(found) == 1 else ()
    return candidates if len(candidates) > 1 else None


def one_class_warning(task: Task, examples: Sequence[Example]) -> str | None:
    """Return a warning if all training rows of a classification task have the same answer."""
    labelled = [example for example in examples if example.gold]
    answers = {example.candidates[example.gold[0]] for example in labelled}
    if task.kind is not Kind.CLASSIFICATION or len(labelled) < 2 or len(answers) > 1:
        return None
    return (
        f"data.task {task.name!r}: all {len(labelled)} training rows have the same answer, {answers.pop()!r}, so training can "
        "only learn to always give it; add rows of other classes, or raise data.num_train"
    )


def unlabelled_warning(name: str, examples: Sequence[Example]) -> str | None:
    """Return a warning if some rows of a split, called ``name``, have no label and so no score."""
    missing = sum(not example.is_labelled for example in examples)
    return f"{missing} of {len(examples)} {name} rows have no label and are not scored" if missing else None


def classes_of(examples: Sequence[Example]) -> list[int]:
    """Return the class of each labelled row: the index of its first correct candidate.

    Raises:
        SlzoError: If the rows have different candidates, or a candidate is never correct.
    """
    candidates = common_candidates(examples)
    if candidates is None:
        raise SlzoError(
            "data.balanced true: the rows have different candidates, so there are no classes to balance; leave it out"
        )
    classes = [example.gold[0] for example in examples]
    for number, candidate in enumerate(candidates):
        if number not in classes:
            raise SlzoError(
                f"data.balanced true: none of the {len(examples)} training rows has class {candidate.strip()!r}; raise "
                "data.num_train, add rows of this class, or leave data.balanced out"
            )
    return classes


def majority_share(examples: Sequence[Example]) -> float | None:
    """Return the share of labelled rows whose class is the most frequent one; ``None`` if the rows have no common classes."""
    labelled = [example for example in examples if example.gold and example.candidates]
    if not labelled or any(example.candidates != labelled[0].candidates for example in labelled):
        return None
    counts = Counter(label for example in labelled for label in example.gold)
    return max(counts.values()) / len(labelled)


def describe_balance(examples: Sequence[Example], classes: Sequence[int]) -> str:
    """Describe in one line how many rows each class has, and how many rows of each class an epoch draws."""
    counts = Counter(classes)
    sizes = ", ".join(f"{examples[0].candidates[label].strip()!r} {counts[label]}" for label in sorted(counts))
    each = ceil(len(classes) / len(counts))
    return f"Balanced batches: training rows by class {sizes}; an epoch of {len(classes)} draws about {each} of each."


def balanced_order(classes: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Draw as many rows for an epoch as there are: one row of each class per round, the classes of a round in random order.

    Across epochs, each class runs through one random permutation of its rows after another. All rows of a class are drawn
    equally often: rows of a small class several times per epoch, rows of a large class not in every epoch.

    Args:
        classes: Class of each row.
        seed: Seed of the draws.
        epoch: Number of the epoch, from 0.
    """
    rows: dict[int, list[int]] = {label: [] for label in sorted(set(classes))}
    for row, label in enumerate(classes):
        rows[label].append(row)
    rounds = ceil(len(classes) / len(rows))
    drawn = [_draw_rows(members, (seed, label), epoch * rounds, rounds) for label, members in rows.items()]
    generator = torch.Generator().manual_seed(derive_seed("classes", seed, epoch))
    orders = [torch.randperm(len(drawn), generator=generator).tolist() for _ in range(rounds)]
    return [drawn[position][number] for number, order in enumerate(orders) for position in order][: len(classes)]


def epochs_for_all(classes: Sequence[int]) -> int:
    """Return the number of epochs that draw every row, except for rows cut off at the end of an epoch."""
    counts = Counter(classes)
    return ceil(max(counts.values()) / ceil(len(classes) / len(counts)))


def _draw_rows(rows: Sequence[int], key: tuple[int, int], first: int, count: int) -> list[int]:
    """Return ``count`` rows from position ``first`` on in an endless series of permutations."""
    drawn: list[int] = []
    for number in range(first // len(rows), ceil((first + count) / len(rows))):
        generator = torch.Generator().manual_seed(derive_seed("class", *key, number))
        drawn += [rows[position] for position in torch.randperm(len(rows), generator=generator).tolist()]
    skipped = first % len(rows)
    return drawn[skipped : skipped + count]
