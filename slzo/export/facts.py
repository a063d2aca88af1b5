"""What is known of a run whose result is handed on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slzo import __version__
from slzo.checkpoints.checkpoint import Checkpoint
from slzo.models.origin import Origin
from slzo.zo.tuned_model import TunedModel

Format = Literal["adapter", "merged", "delta"]

_SUMMARY = "summary.json"


@dataclass(frozen=True)
class ExportOptions:
    """What was asked for.

    Attributes:
        output: Folder to write.
        format: ``None``: an adapter where what was tuned is of low rank, else merged.
        base_model: Hub id of the base model; ``None``: what is known of it.
        push_to_hub: Repository to upload to; ``None``: none.
        trust_remote_code: Run the model's own code.
    """

    output: str
    format: Format | None = None
    base_model: str | None = None
    push_to_hub: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Of the result.
        base: What it was merged into, or goes on, in words, as in ``merged into smollm2-135m``.
    """

    folder: Path
    base: str


@dataclass(frozen=True)
class Facts:
    """What the card says.

    Attributes:
        format: How it was exported.
        origin: Of the base model.
        note: The checkpoint's, see :func:`slzo.checkpoints.checkpoint.checkpoint_note`.
        step: Steps that were taken.
        scope: What was tuned, in words.
        num_tuned: Tuned numbers.
        num_layers: Decoder layers of the model.
        rank: Of a LoRA adapter; ``None`` for anything else.
        data: What a step's loss depended on: the task, its version and arguments, rows, batch size.
        summary: The run's ``summary.json``; empty if there is none.
        scored: Whether the summary's score after training is this checkpoint's.
    """

    format: str
    origin: Origin
    note: Mapping[str, Any]
    step: int
    scope: str
    num_tuned: int
    num_layers: int
    rank: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    scored: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What is kept beside the weights: enough to tell the base model, and to refuse another."""
        template = self.note.get("chat_template")  # of conversations, where it is not the tokenizer's
        return {
            "slzo": __version__,
            "format": self.format,
            "base_model": self.origin.to_dict(),
            "scope": self.scope,
            "layer": self.note["layer"],
            "steps": self.step,
            "dtype": self.note["dtype"],
            "tensors": {name: list(entry["shape"]) for name, entry in self.note["tensors"].items()},
            "fingerprint": self.note.get("base", {}),
            **({} if template is None else {"chat_template": template}),
        }


def facts_of(checkpoint: Checkpoint, format: str, origin: Origin, tuned_model: TunedModel) -> Facts:
    """Collect them from a checkpoint and its run's folder."""
    note, files = checkpoint.note, tuned_model.peft_files()
    summary = _summary(Path(checkpoint.path))
    best = summary.get("best_checkpoint")
    return Facts(
        format,
        origin,
        note,
        int(checkpoint.content["global_step"]),
        str(
            summary.get("scope")
            or checkpoint.content.get("hyper_parameters", {}).get("scope")
            or note["scope"]["class"]
        ),
        tuned_model.tensors.num_elements,
        tuned_model.parts.num_layers,
        None if files is None or format != "adapter" else files.config.get("r"),
        checkpoint.content.get("TaskDataModule", {}),
        summary,
        best is not None and Path(best).name == Path(checkpoint.path).name,
    )


def _summary(checkpoint: Path) -> dict[str, Any]:
    """The summary of the run that a checkpoint lies in."""
    try:
        found = json.loads((checkpoint.parent.parent / _SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
