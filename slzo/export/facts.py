"""Facts about an exported run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.models.load import auto_class
from slzo.models.origin import Origin
from slzo.models.peft_files import PeftFiles
from slzo.tasks.base import HubSource
from slzo.utils.files import read_json
from slzo.utils.run_layout import SUMMARY_FILE
from slzo.version import __version__
from slzo.zo.tuned_model import TunedModel

_KEPT = (
    "task",
    "chat",
    "system_prompt",
    "chat_template",
    "candidates",
    "stop",
    "max_length",
    "prompt_length",
    "num_demonstrations",
)

FACTS_FILE = "slzo.json"
"""File of an exported folder that holds its facts."""


@dataclass(frozen=True)
class Facts:
    """Facts for the model card.

    Attributes:
        format: Format of the export.
        origin: Origin of the base model.
        metadata: The checkpoint's metadata, see :func:`slzo.checkpoints.metadata.checkpoint_metadata`.
        step: Number of steps that were taken.
        scope: Description of the scope.
        num_tuned: Number of tuned parameters.
        num_layers: Number of decoder layers of the model.
        auto_class: Name of the transformers class that loads the model.
        adapter: Files of an adapter; ``None`` in other formats, or if the change does not have a low rank.
        summary: The run's ``summary.json``; empty if there is none.
        scored: Whether the summary's score after training is that of this checkpoint.
    """

    format: str
    origin: Origin
    metadata: Mapping[str, Any]
    step: int
    scope: str
    num_tuned: int
    num_layers: int
    auto_class: str
    adapter: PeftFiles | None
    summary: Mapping[str, Any] = field(default_factory=dict)
    scored: bool = False

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.metadata["settings"]["data.task"])

    @property
    def data_set(self) -> HubSource | None:
        """The data set of the Hub that the rows came from, with its commit; ``None`` for other rows."""
        found = self.metadata["hub"]
        path = found.get("data_set")
        return (
            None
            if path is None
            else HubSource(
                path,
                found["data_config"],
                test=found.get("data_split") or "validation",
                revision=found["data_commit"],
            )
        )

    def num_rows(self, split: str) -> int:
        """Return how many rows of ``train``, ``dev`` or ``test`` the run used."""
        return len(self.metadata["data"]["rows"].get(split, ()))

    @property
    def rank(self) -> int | None:
        """Rank of a LoRA adapter; ``None`` for anything else."""
        return None if self.adapter is None else self.adapter.config.get("r")

    def to_dict(self) -> dict[str, Any]:
        """Return the facts to store next to the weights; they identify the base model, so that another one is rejected."""
        # for slzo predict and generate; the chat template only if it is not the tokenizer's own
        kept = {name: self.metadata.get(name) for name in _KEPT}
        return {
            "slzo": __version__,
            "format": self.format,
            "base_model": self.origin.to_dict(),
            "scope": self.scope,
            "layer": self.metadata["layer"],
            "steps": self.step,
            "dtype": self.metadata["dtype"],
            "tensors": {name: list(entry["shape"]) for name, entry in self.metadata["tensors"].items()},
            "fingerprint": self.metadata["base"],
            **{name: value for name, value in kept.items() if value},
        }


def facts_of(
    checkpoint: Checkpoint, format: str, origin: Origin, tuned_model: TunedModel, adapter: PeftFiles | None
) -> Facts:
    """Collect the facts from a checkpoint and from the folder of its run."""
    metadata, summary = checkpoint.metadata, _summary_of(checkpoint)
    best = summary.get("best_checkpoint")
    return Facts(
        format,
        origin,
        metadata,
        checkpoint.step,
        str(checkpoint.content.get("hyper_parameters", {}).get("scope", metadata["scope"]["class"])),
        tuned_model.tensors.num_elements,
        tuned_model.parts.num_layers,
        auto_class(tuned_model.parts.model.config).__name__,
        adapter,
        summary,
        best is not None
        and Path(best).name == Path(checkpoint.path).name
        and summary.get("score_after") is not None,  # null if it is not a number
    )


def _summary_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the summary of a checkpoint's run; if it was stopped early, of a run that continued it and has scored this state."""
    folder = checkpoint.run_folder
    own = read_json(folder / SUMMARY_FILE)
    if own:
        return own
    for file in folder.parent.glob(f"*/{SUMMARY_FILE}"):
        summary = read_json(file)
        if Path(summary.get("best_checkpoint") or "").resolve() == Path(checkpoint.path).resolve():
            return summary
    return own
