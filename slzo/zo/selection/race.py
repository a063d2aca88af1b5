"""Compares the layers that the statistics suggest by short trainings."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from slzo.models.prefix_cache import PrefixCache
from slzo.utils.console import rank_zero_print
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize
from slzo.zo.profile import LayerStatistics
from slzo.zo.scopes.base import check_layer
from slzo.zo.selection.base import Choice, SelectionContext, SelectionRule
from slzo.zo.selection.first_outlier import FirstOutlierLayer
from slzo.zo.selection.max_ratio_jump import MaxRatioJump
from slzo.zo.selection.outlier_removing import OutlierRemovingLayer
from slzo.zo.trial import Score, StepCost, Trial, Trials

_MIN_STEPS = 5
# All trials repeat these batches, because the states below a layer are computed once for each row.
_NUM_BATCHES = 20
_NUM_DEV_ROWS = 96


class Race(SelectionRule):
    """The layer with the lowest dev loss after short trainings of equal cost.

    The candidates are the choices of OutlierRemovingLayer, FirstOutlierLayer and MaxRatioJump, the neighbours of the first, the
    last layer, and the middle one as a control. They share rows, directions and the states below them, and each has its own
    measured step size if model.optimizer.lr is auto. After a third of its steps a trial worse than the median stops. A step in a
    late layer is cheap, since only this layer and those above it are run, so a late layer takes more steps at equal cost. The dev
    loss is computed on about 96 rows.

    Args:
        share: Largest cost of the race, as a share of the whole training in OutlierRemovingLayer's layer (in the lowest
            candidate if that layer is not a candidate), > 0; if it is too small for all, the lowest candidates are left out.
        layers: Candidates, counted from 0; by default the candidates named above.
    """

    def __init__(self, share: float = 0.25, layers: list[int] | None = None) -> None:
        if not 0 < share < math.inf:
            raise SlzoError(f"profiler.rule.share {share}: must be above 0; 0.25 is a quarter of the training")
        if layers is not None and len(set(layers)) < 2:
            raise SlzoError(f"profiler.rule.layers {layers}: give at least two, or leave it out")
        self.share = share
        self.layers = layers

    def candidates(self, layers: Sequence[LayerStatistics]) -> tuple[int, ...]:
        """Return the layers to train, in rising order.

        Raises:
            SlzoError: The model does not have one of ``layers``.
        """
        if self.layers is not None:
            for layer in self.layers:
                check_layer(layer, len(layers), "profiler.rule.layers", left_out="the race choose")
            return tuple(sorted(set(self.layers)))
        removing = OutlierRemovingLayer().select(SelectionContext(layers)).layer
        found = {removing - 1, removing, removing + 1, len(layers) - 1, len(layers) // 2, *outlier_layers(layers)}
        return tuple(sorted(layer for layer in found if 0 <= layer < len(layers)))

    def plan(self, layers: Sequence[LayerStatistics], trials: Trials) -> "RacePlan":
        """Return which layers train, and for how many steps."""
        candidates = self.candidates(layers)
        removing = OutlierRemovingLayer().select(SelectionContext(layers)).layer
        reference = removing if removing in candidates else min(candidates)
        steps, cost = trials.planned_steps(reference, self.share), trials.cost(_NUM_DEV_ROWS)
        return plan_race(candidates, self.share, cost, reference, steps, trials.num_train)

    def select(self, context: SelectionContext) -> Choice:
        """Run the race. If there is no room for it, or no layer lowers the dev loss, OutlierRemovingLayer chooses."""
        trials, layers = context.trials, context.layers
        if trials is None:
            raise SlzoError(f"profiler.rule Race: needs short trainings, and {context.no_trials}")
        if not trials.num_dev:
            raise SlzoError(
                "profiler.rule Race: needs dev rows to compare layers, and there are none; set data.num_dev"
            )
        plan = self.plan(layers, trials)
        if not plan.steps:
            candidates = ", ".join(map(str, plan.left_out))
            steps = trials.planned_steps(plan.reference, self.share)
            reason = (
                f"{steps} steps leave no room for a race of layers {candidates} at profiler.rule.share {self.share:g}"
            )
            return _fallback(context, reason)
        rank_zero_print(plan.describe(self.share))
        outcomes: dict[int, Trial] = {}
        early_losses: list[float] = []
        best, states = -1, None

        def continues(score: Score) -> bool:
            if math.isfinite(score.loss):
                early_losses.append(score.loss)
            return bool(early_losses) and score.loss <= statistics.median(early_losses)

        for layer, steps in plan.steps.items():
            checks = {max(1, steps // 3): continues}
            cache: PrefixCache | None
            try:
                outcomes[layer], cache = trials.train(
                    layer, steps, dev_rows=_NUM_DEV_ROWS, num_batches=_NUM_BATCHES, checks=checks
                )
            except SlzoError as error:  # other layers may still be trainable
                rank_zero_print(f"layer {layer:3d}: left out of the race, {error}")
                continue
            rank_zero_print(_line(layer, outcomes[layer], steps))
            if best < 0 or outcomes[layer].gain > outcomes[best].gain:
                best, states = layer, cache
        before = next(iter(outcomes.values())).scores[0].loss if outcomes else 0.0
        if best < 0 or outcomes[best].gain <= 0:
            choice = _fallback(context, f"no layer lowered the dev loss of {before:.4f} in the race")
            return replace(choice, trials=outcomes)
        last = outcomes[best].scores[-1]
        fall = f"{before:.4f} -> {last.loss:.4f} in {pluralize(last.step, 'step')}"
        reason = f"lowest dev loss of {len(outcomes)} layers at equal cost, {fall}"
        return Choice(best, reason, "race winner", trials=outcomes, states=states)


def outlier_layers(layers: Sequence[LayerStatistics]) -> Iterable[int]:
    """Return the choices of the rules that find the layer where outliers appear."""
    for rule in (FirstOutlierLayer(), MaxRatioJump()):
        with suppress(SlzoError):  # no layer qualifies
            yield rule.select(SelectionContext(layers)).layer


@dataclass(frozen=True)
class RacePlan:
    """Steps of each layer in a race.

    Attributes:
        steps: Steps by layer, in rising order of the layers; empty if there is no room for a race.
        left_out: Candidates that are left out for lack of room.
        share: Expected cost, as a share of the whole training in the reference layer.
        reference: Layer whose training the cost is compared with.
    """

    steps: Mapping[int, int]
    left_out: tuple[int, ...]
    share: float
    reference: int

    def describe(self, allowed: float) -> str:
        """Describe the plan in one line; ``allowed`` is the largest share that the user allows."""
        runs = ", ".join(f"{layer} ({pluralize(steps, 'step')})" for layer, steps in self.steps.items())
        line = f"Race       layers {runs}; costs about {self.share:.0%} of the whole training in layer {self.reference}"
        if self.left_out:
            left_out = ", ".join(map(str, self.left_out))
            line += f"; without {left_out}, for which profiler.rule.share {allowed:g} leaves no room"
        return line


def plan_race(
    candidates: Sequence[int], share: float, cost: StepCost, reference: int, total_steps: int, num_train: int
) -> RacePlan:
    """Plan a race that costs at most ``share`` of a training of ``total_steps`` steps in layer ``reference``.

    All candidates get the same cost, including the measurement of the step size. The reference is never left out.
    """
    training = cost.training(reference, total_steps, num_train)
    running = sorted(candidates)
    while len(running) > 1:
        overhead = _overhead(running, cost, num_train)
        budget = (share * training - overhead + cost.already_paid(running)) / len(running)
        steps = {layer: min(int((budget - cost.measure(layer)) / cost.step(layer)), total_steps) for layer in running}
        if min(steps.values()) >= _MIN_STEPS:
            runs = sum(cost.measure(layer) + number * cost.step(layer) for layer, number in steps.items())
            spent = (overhead + runs - cost.already_paid(running)) / training
            return RacePlan(steps, tuple(sorted(set(candidates) - set(running))), spent, reference)
        running.remove(next(layer for layer in running if layer != reference))
    return RacePlan({}, tuple(candidates), 0.0, reference)


def _overhead(candidates: Sequence[int], cost: StepCost, num_train: int) -> float:
    """Return the cost other than measurements and steps: dev losses, and states that the main training cannot reuse."""
    rows = cost.dev_rows + min(num_train, _NUM_BATCHES * cost.batch_size)
    extra_layers = max(candidates) - min(candidates) if cost.caches else 0
    return rows * extra_layers + sum(2 * cost.dev_rows * cost.layers(layer) for layer in candidates)


def _fallback(context: SelectionContext, reason: str) -> Choice:
    return replace(OutlierRemovingLayer().select(context), note=f"OutlierRemovingLayer decided: {reason}.")


def _line(layer: int, trial: Trial, steps: int) -> str:
    last = trial.scores[-1]
    if trial.diverged:
        return f"layer {layer:3d}: diverged, {trial.diverged}"
    early = "" if last.step >= steps else ", worse than the median: stopped"
    steps_and_time = f"{pluralize(last.step, 'step')} ({last.seconds:.1f} s)"
    return f"layer {layer:3d}: dev loss {trial.scores[0].loss:.4f} -> {last.loss:.4f} in {steps_and_time}{early}"
