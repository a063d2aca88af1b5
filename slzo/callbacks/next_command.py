"""What to try after a run that brought nothing."""

import shlex
from dataclasses import dataclass

from slzo.callbacks.score_change import DevLoss, ScoreChange


@dataclass(frozen=True)
class RunFacts:
    """What the advice depends on beside score and dev loss.

    Attributes:
        config: The run's config file; ``None``: the run was not started by the command line.
        last: The run's last checkpoint; ``None``: there is none.
        best: The checkpoint that was scored; ``None``: there is none.
        limit: The option that ended the run, max_steps or max_epochs.
        limit_value: Its value.
        layer: The dominant layer; ``None``: the scope needs none.
        more_rows: How many held-out rows to ask for; ``None``: there are no more.
    """

    config: str | None
    last: str | None
    best: str | None
    limit: str
    limit_value: int
    layer: int | None
    more_rows: int | None


def next_command(change: ScoreChange | None, losses: DevLoss | None, run: RunFacts) -> str:
    """The command to try, and behind a # why.

    In order: a dev loss that rose says that the learning rate is too large; one that did not move, that it is too small; one
    that fell while the score clearly fell, that another layer may generalize better; one that was lowest at the end, that
    more steps may help; one that fell while the score rose within its standard error, that more held-out rows may show it.
    """
    search = _command("lr_search", run)
    if losses is None:
        return f"{search}  # too few validations to say why; compares learning rates"
    if losses.rose:
        return f"{search}  # the learning rate may be too large"
    if not losses.fell:
        return f"{search}  # the dev loss hardly moved: the learning rate may be too small"
    if change is not None and change.worse and change.shown:
        if run.layer is None:
            return f"{search}  # the dev loss fell and the score too; compares learning rates"
        look = _command("sweep", run, "--sensitivity_only", "true")
        return f"{look}  # the dev loss fell and the score too: another layer than {run.layer} (--model.layer)?"
    if losses.best == losses.last and run.last is not None and run.limit_value > 0:
        options = ("--ckpt_path", run.last, f"--trainer.{run.limit}", str(2 * run.limit_value))
        return f"{_command('fit', run, *options)}  # the dev loss was still falling: more steps"
    if (
        change is not None
        and not change.worse
        and change.change != 0
        and run.best is not None
        and run.more_rows is not None
    ):
        options = ("--data.num_test", str(run.more_rows), "--ckpt_path", run.best)
        return f"{_command('test', run, *options)}  # more held-out rows; and without --ckpt_path, to compare"
    return f"{search}  # compares learning rates"


def _command(name: str, run: RunFacts, *options: str) -> str:
    config = ("--config", run.config) if run.config is not None else ()
    return shlex.join(["slzo", name, *config, *options])
