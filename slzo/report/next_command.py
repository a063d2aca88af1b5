"""Suggest a command after a run."""

import shlex
from dataclasses import dataclass

from slzo.report.score_change import DevLoss, ScoreChange


@dataclass(frozen=True)
class AdviceFacts:
    """Inputs of the advice in addition to score and dev loss.

    Attributes:
        config: Config file of the run; ``None`` if the run was not started from the command line.
        last: Last checkpoint; ``None`` if there is none.
        best: Checkpoint that was scored; ``None`` if there is none.
        limit: Option that ends the run, ``max_steps`` or ``max_epochs``, and its value.
        layer: Dominant layer; ``None`` if the scope needs none.
        num_rows: Number of held-out rows.
        requested_rows: Requested number of held-out rows; ``None`` for all.
    """

    config: str | None
    last: str | None
    best: str | None
    limit: tuple[str, int]
    layer: int | None
    num_rows: int
    requested_rows: int | None


def next_command(change: ScoreChange | None, losses: DevLoss | None, run: AdviceFacts) -> str:
    """Return the command to try, with the reason after a #.

    The first case that applies decides. If the dev loss rose, the learning rate may be too large; if it hardly changed, too
    small. If the dev loss fell but the score clearly became worse, another layer may generalize better. If the dev loss was
    lowest at the end, more steps may help. If the score improved within two standard errors, more held-out rows may show it.
    """
    search = _command("sweep", run, "--lrs", "auto")
    if losses is None:
        return f"{search}  # too few validations to find the reason: compares learning rates"
    if losses.rose:
        return f"{search}  # the learning rate may be too large"
    if not losses.fell:
        return f"{search}  # the dev loss hardly moved: the learning rate may be too small"
    if change is not None and change.worse and change.shown:
        if run.layer is None:
            return f"{search}  # the dev loss fell but the score became worse: compares learning rates"
        look = _command("fit", run, "--model.layer", "null", "--profiler.rule", "Race")
        return f"{look}  # the dev loss fell but the score became worse: compares layers by short trainings"
    if losses.best == losses.last and run.last is not None and run.limit[1] > 0:
        options = ("--ckpt_path", run.last, f"--trainer.{run.limit[0]}", str(2 * run.limit[1]))
        return f"{_command('fit', run, *options)}  # the dev loss was still falling: takes more steps"
    if (
        change is not None
        and not change.worse
        and change.change != 0
        and run.best is not None
        and run.num_rows == run.requested_rows
    ):
        options = ("--data.num_test", str(4 * run.num_rows), "--ckpt_path", run.best)
        return f"{_command('test', run, *options)}  # more held-out rows; repeat without --ckpt_path to compare"
    return f"{search}  # compares learning rates"


def first_order_command(run: AdviceFacts, memory_gb: float) -> str:
    """Return the command that trains the same tensors by back-propagation, with its memory after a #."""
    layer = () if run.layer is None else ("--model.layer", str(run.layer))
    chosen = ("--model.estimator", "Backprop", "--model.optimizer", "AdamW", "--model.optimizer.lr", "auto")
    return f"{_command('fit', run, *layer, *chosen)}  # first order fits (about {memory_gb:.2f} GiB) and may learn more"


def _command(name: str, run: AdviceFacts, *options: str) -> str:
    config = ("--config", run.config) if run.config is not None else ()
    return shlex.join(["slzo", name, *config, *options])
