"""Classes of rows: their candidates, how often the most frequent one occurs, and warnings."""

from collections import Counter
from collections.abc import Sequence

from slzo.tasks.base import Example, Kind, Task


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


def majority_share(examples: Sequence[Example]) -> float | None:
    """Return the share of labelled rows whose class is the most frequent one; ``None`` if the rows have no common classes."""
    labelled = [example for example in examples if example.gold]
    if not labelled or common_candidates(labelled) is None:
        return None
    counts = Counter(label for example in labelled for label in example.gold)
    return max(counts.values()) / len(labelled)
