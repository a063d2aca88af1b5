"""What a run has recorded so far, together with the runs that it continues."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slzo.evaluation.held_out import HeldOutScores


@dataclass
class History:
    """The record of a run up to a step. Checkpoints hold it, so that a resumed run continues it.

    Attributes:
        before: Held-out scores before training; ``None`` if they are not known.
        samples: Predictions for held-out rows before training, by position in the split.
        points: Results of each validation, as in ``history.json``.
        seconds: Seconds since the command began.
        train_seconds: Seconds since the first step.
        peak_memory_gb: Peak memory, GiB.
    """

    before: HeldOutScores | None = None
    samples: dict[int, str] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    train_seconds: float = 0.0
    peak_memory_gb: float = 0.0

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Step, evaluations, seconds and loss of each validation; for a reward, the loss is its distance to the best one."""
        named = ("step", "evaluations", "seconds")
        return [{**{name: point[name] for name in named}, "loss": point["distance"]} for point in self.points]

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "History":
        """Read a record from primitives, as ``asdict`` returns them."""
        before = saved["before"]
        return cls(**{**saved, "before": None if before is None else HeldOutScores(**before)})
