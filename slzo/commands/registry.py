"""The commands by name; no torch here.

A command is a file ``slzo/commands/NAME.py`` with a function NAME, and a line in this list. The function's arguments are its
options, with the help that its docstring has. With a first argument ``app`` it also gets the options of trainer, model and data,
and what they make.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Name of the command, of its file and of its function.
        help: What it does, in one line.
        has_app: Whether it takes the options of trainer, model and data.
        runs_model: Whether it runs a model; without one, torch is not imported.
        reads_run_config: With a checkpoint and no config, the config of the checkpoint's run is read.
        resumes: Given again after an interrupt, it goes on where it stopped.
        own_help: Its help lists its own options only: few others matter.
        words: Option that takes the words without a name.
    """

    name: str
    help: str
    has_app: bool = True
    runs_model: bool = True
    reads_run_config: bool = True
    resumes: bool = False
    own_help: bool = False
    words: str = ""


_ALL = (
    Command("fit", "find the dominant layer and tune it with forward passes only", reads_run_config=False),
    Command("validate", "score dev rows"),
    Command("test", "score held-out rows"),
    Command("predict", "write predictions of held-out rows as JSON Lines"),
    Command("plan", "estimate the memory that fit would take, without loading the model"),
    Command("profile", "only find the dominant layer: print, draw and save the outlier profile"),
    Command("sweep", "train every layer, or with every learning rate, for the same steps and compare", resumes=True),
    Command("replay", "rebuild the tuned weights of a run at any step from its log"),
    Command(
        "export",
        "write what was tuned as an adapter, a delta or a Hugging Face folder, with a model card",
        own_help=True,
    ),
    Command("generate", "continue prompts with the untuned and the tuned model", has_app=False),
    Command(
        "report", "write a page on a run, or on several side by side", has_app=False, runs_model=False, words="runs"
    ),
)
COMMANDS: Mapping[str, Command] = MappingProxyType({command.name: command for command in _ALL})
