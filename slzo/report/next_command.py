"""Suggest a command after a run."""

import math
import shlex

from slzo.report.run_facts import RunFacts
from slzo.report.score_change import DevLoss, ScoreChange

_MANY_EPOCHS = 5.0


def next_command(change: ScoreChange | None, losses: DevLoss | None, run: RunFacts) -> str:
    """Return the command to try, or for a run in Python the argument, with the reason after a #.

    The first case that applies decides. A reward without a finite dev value failed. If the dev loss rose, the model may have
    memorized training rows that it saw often, or the learning rate may be too large; if it hardly changed, too small. A
    reward that never changed may be unable to tell the answers apart. If the dev loss fell but the score clearly became
    worse, another layer may generalize better. If the dev loss was lowest at the end, more steps may help. If the score
    improved within two standard errors, more held-out rows may show it.
    """
    layer = () if run.layer is None else ("--model.layer", str(run.layer))
    output = () if run.folder is None else ("--output", f"{run.folder}/rates")
    options = (*layer, *output, *_one_process(run), *_without_scheduler(run), "--lrs", "auto")
    search = _command("sweep", run, *options, python="ZOModule(optimizer=...)")
    if losses is None:
        needs = "" if run.outcome.history.validations else "; needs dev rows (data.num_dev)"
        return f"{search}  # too few validations to find the reason: try other learning rates{needs}"
    if run.metric.metric == "reward" and not math.isfinite(losses.last[1]):
        again = _command("fit", run, python="ZOTrainer().fit(...)")
        return f"{again}  # the reward function failed on dev rows: see its warnings"
    if losses.rose:
        reason = "the learning rate may be too large"
        if run.epochs >= _MANY_EPOCHS:
            reason = (
                f"each training row was used {run.epochs:.0f} times: the model may have memorized them; give more rows "
                "(data.num_train), or try other learning rates"
            )
        return f"{search}  # {reason}"
    best = run.outcome.best
    if losses.unchanged and run.metric.metric == "reward" and best is not None:
        answers = _command("predict", run, "--ckpt_path", best, python="ZOTrainer().predict(...)")
        return f"{answers}  # the reward never changed: see which answers it rated"
    loss = run.metric.loss_name
    if not losses.fell:
        return f"{search}  # the {loss} hardly moved: the learning rate may be too small"
    if change is not None and change.worse and change.shown:
        if run.layer is None:
            return f"{search}  # the {loss} fell but the score became worse: try other learning rates"
        race = ("--model.layer", "null", "--profiler.rule", "Race", *_one_process(run))
        look = _command("fit", run, *race, python="OutlierProfiler(Race())")
        return f"{look}  # the {loss} fell but the score became worse: compares layers by short trainings"
    (limit, value), last = run.outcome.limit, run.outcome.last
    continues = last is not None and value > 0 and not run.scheduled  # a schedule ends with its steps
    if losses.best == losses.last and last is not None and continues:
        options = ("--ckpt_path", last, f"--trainer.{limit}", str(2 * value))
        longer = _command("fit", run, *options, python=f"ZOTrainer({limit}={2 * value})")
        return f"{longer}  # the {loss} was still falling: takes more steps"
    if (
        change is not None
        and not change.worse
        and change.change != 0
        and best is not None
        and run.num_rows == run.requested_rows
    ):
        rows = str(4 * run.num_rows)
        options = ("--data.num_test", rows, "--ckpt_path", best)
        more = _command("test", run, *options, python=f"TaskDataModule(num_test={rows})")
        return f"{more}  # more held-out rows; repeat without a checkpoint to compare"
    return f"{search}  # try other learning rates"


def first_order_command(run: RunFacts) -> str:
    """Return the command that trains the same tensors by back-propagation, with its memory after a #."""
    layer = () if run.layer is None else ("--model.layer", str(run.layer))
    chosen = ("--model.estimator", "Backprop", "--model.optimizer", "AdamW", "--model.optimizer.lr", "auto")
    command = _command("fit", run, *layer, *chosen, *_without_scheduler(run), python="ZOModule(estimator=Backprop())")
    return f"{command}  # first order fits (about {run.first_order_gb:.2f} GiB) and may learn more"


def _without_scheduler(run: RunFacts) -> tuple[str, ...]:
    """Return the option without the scheduler, which would replace or change the rates that are tried or measured."""
    return ("--model.lr_scheduler", "null") if run.scheduled else ()


def _one_process(run: RunFacts) -> tuple[str, ...]:
    """Return the options that undo those for several processes, which refuse to train layer by layer or rate by rate."""
    if run.processes == 1:
        return ()
    one = ("--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto")
    return (*one, "--model.parallel", "rows")


def _command(name: str, run: RunFacts, *options: str, python: str) -> str:
    """Return a command with the options of the run; ``python`` for a run in Python, which has no config."""
    return python if run.config is None else shlex.join(["slzo", name, "--config", run.config, *options])
