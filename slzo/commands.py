"""The commands of slzo in one table; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_MODEL_AND_DATA = frozenset({"model", "datamodule"})
_EVALUATE = _MODEL_AND_DATA | {"dataloaders"}


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Of the command, and of the trainer's method that runs it.
        help: One line.
        filled: Arguments of that method that the command line provides itself.
        takes_run_config: With a checkpoint and no config, the config of the checkpoint's run is taken up.
        goes_on: Given again after an interrupt, it goes on where it stopped.
    """

    name: str
    help: str
    filled: frozenset[str] = _MODEL_AND_DATA
    takes_run_config: bool = True
    goes_on: bool = False


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        command.name: command
        for command in (
            Command(
                "fit",
                "find the dominant layer and tune it with forward passes only",
                filled=_MODEL_AND_DATA | {"train_dataloaders", "val_dataloaders"},
                takes_run_config=False,
            ),
            Command("validate", "score dev rows", filled=_EVALUATE),
            Command("test", "score held-out rows", filled=_EVALUATE),
            Command(
                "predict",
                "write predictions of held-out rows as JSON Lines",
                filled=_EVALUATE | {"return_predictions"},
            ),
            Command("profile", "only find the dominant layer: print, draw and save the outlier profile"),
            Command(
                "sweep",
                "tune every layer for the same steps and compare: does the first outlier layer win?",
                goes_on=True,
            ),
            Command("lr_search", "try learning rates for a few steps and recommend one", goes_on=True),
            Command("export", "write the tuned model as a Hugging Face folder"),
        )
    }
)
