"""The commands by name; this module does not import torch.

A command is a file ``slzo/commands/NAME.py`` with a function NAME, and a line in this list. The function's arguments are its
options, and its docstring is their help. With ``has_app``, the default, the command also takes the options of trainer, model and
data, and the function's first argument is ``app``, which holds the objects made from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Name of the command, of its file and of its function.
        help: What it does, in one line.
        has_app: Whether it takes the options of trainer, model and data.
        reads_rows: Whether it needs a task.
        runs_model: Whether it runs a model; otherwise torch is not imported.
        reads_run_config: Whether it reads the config of the checkpoint's run if none is given.
        resumes: Whether the same command continues where it stopped after an interrupt.
        words: Option that takes the words before the first option; empty for none.
    """

    name: str
    help: str
    has_app: bool = True
    reads_rows: bool = True
    runs_model: bool = True
    reads_run_config: bool = True
    resumes: bool = False
    words: str = ""


_ALL = (
    Command("fit", "find the dominant layer and tune it", reads_run_config=False),
    Command("validate", "score dev rows"),
    Command("test", "score held-out rows"),
    Command("predict", "write predictions of held-out rows as JSON Lines"),
    Command("plan", "estimate the memory that fit would take, without loading the model"),
    Command("profile", "find the dominant layer without tuning it, and save the outlier profile"),
    Command("sweep", "train every layer, or one layer with several learning rates, and compare", resumes=True),
    Command(
        "replay",
        "rebuild the tuned weights of any step from the log of a run with weight perturbation",
        reads_rows=False,
    ),
    Command(
        "export",
        "write the tuned model as an adapter, a delta or a Hugging Face folder, with a model card",
        has_app=False,
    ),
    Command(
        "generate",
        "answer prompts with the untuned and the tuned model: a text, or the probabilities of candidates",
        has_app=False,
    ),
    Command(
        "report",
        "write a page about a run, or about several side by side",
        has_app=False,
        runs_model=False,
        words="runs",
    ),
)
COMMANDS: Mapping[str, Command] = {command.name: command for command in _ALL}
