"""A look at the layer that statistics have chosen: is the choice clear, and does a step there promise something?"""

from dataclasses import replace

from slzo.console import say
from slzo.errors import SlzoError
from slzo.experiments.race import RaceResult, plan_of, race
from slzo.experiments.trial import Workbench
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection import Auto, Choice, Race
from slzo.zo.selection.margin import CLEAR
from slzo.zo.step_size import HALF


def checked_choice(bench: Workbench, rule: Auto, layers: list[LayerStatistics], total_steps: int) -> RaceResult:
    """The layer of the rule's statistics, or where there is doubt and room for it the winner of a race.

    Args:
        bench: Of the training to come.
        rule: With its options.
        layers: The profile.
        total_steps: Of the training that it is for.
    """
    choice, to_run = rule.select(layers), rule.race(layers)
    if to_run is None or not _has_room(bench, to_run, layers, total_steps):
        return RaceResult(choice, {})
    doubt = _doubt(bench, rule, choice)
    if not doubt:
        return RaceResult(choice, {})
    say(f"Layer {choice.layer} ({choice.reason}): {doubt}. A race decides; --model.layer {choice.layer} goes without.")
    result = race(bench, to_run, layers, total_steps)
    note = f"Layer {choice.layer} is LargestFall's: {doubt}. {result.choice.note}".rstrip()
    return replace(result, choice=result.choice._replace(note=note))


def _has_room(bench: Workbench, to_run: Race, layers: list[LayerStatistics], total_steps: int) -> bool:
    data = bench.datamodule
    if data.objective.generates or not data.rows("dev"):
        return False
    return bool(plan_of(bench, to_run, layers, total_steps).steps)


def _doubt(bench: Workbench, rule: Auto, choice: Choice) -> str:
    """Why the choice may be a poor one, a clause; empty: it is not known to be."""
    if choice.margin is not None and choice.margin.errors < CLEAR:
        return f"not clear, {choice.margin.words}"
    if not bench.module.optimizer_choice.automatic or bench.module.parts.model.dtype in HALF:
        return ""
    try:
        step = bench.measured_step(choice.layer)
    except SlzoError:  # the training, which measures too, tells it
        return ""
    if step.largest > 0 or step.promise >= rule.promise:  # of matrices that begin at 0 the first step says nothing
        return ""
    return f"the first step there is to lower the loss by {step.promise:.2%}, less than profiler.rule.promise, {rule.promise:.2%}"
