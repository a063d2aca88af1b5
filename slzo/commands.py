"""The commands of slzo in one table; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

FILLED = frozenset(
    {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "return_predictions", "weights_only"}
)
"""Arguments of the trainer's methods that are no options: the command line provides them, or nothing depends on them."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Of the command, and of the trainer's method that runs it.
        help: One line.
        takes_run_config: With a checkpoint and no config, the config of the checkpoint's run is taken up.
        goes_on: Given again after an interrupt, it goes on where it stopped.
        module: Whose function ``run`` runs it.
        own_help: Its help shows its own options only: few others matter.
    """

    name: str
    help: str
    takes_run_config: bool = True
    goes_on: bool = False
    module: str = "slzo.cli"
    own_help: bool = False


_PROMPTING = "slzo.prompting.commands"
_WORDS = "slzo.cli_completion"
_REPORT = "slzo.report.command"
_ALL = (
    Command("fit", "find the dominant layer and tune it with forward passes only", takes_run_config=False),
    Command("validate", "score dev rows"),
    Command("test", "score held-out rows"),
    Command("predict", "write predictions of held-out rows as JSON Lines"),
    Command("plan", "estimate the memory that fit would take, without loading the model"),
    Command("profile", "only find the dominant layer: print, draw and save the outlier profile"),
    Command("sweep", "tune every layer for the same steps and compare: does the chosen layer win?", goes_on=True),
    Command("lr_search", "try learning rates for a few steps and recommend one", goes_on=True),
    Command("replay", "rebuild the tuned weights of a run at any step from its log"),
    Command(
        "export",
        "write what was tuned as an adapter, a delta, a Hugging Face folder or a GGUF file, with a model card",
        own_help=True,
    ),
    Command("generate", "continue prompts with the untuned and the tuned model", False, module=_PROMPTING),
    Command("chat", "talk to the untuned and the tuned model", False, module=_PROMPTING),
    Command("completion", "print a script that completes commands and options in bash or zsh", False, module=_WORDS),
    Command("schema", "print the JSON schema of a command's YAML, for editors", False, module=_WORDS),
    Command("report", "write a page on a run, or on several side by side: slzo report RUN...", False, module=_REPORT),
)
COMMANDS: Mapping[str, Command] = MappingProxyType({command.name: command for command in _ALL})
