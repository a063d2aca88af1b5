"""A race between layers: short trainings of equal work or steps, of which the worse half end early."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slzo.console import say
from slzo.errors import SlzoError
from slzo.experiments.sweep import BESIDE_LAYERS
from slzo.experiments.trial import Score, Trial, Workbench
from slzo.models.prefix_cache import PrefixCache
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection import Choice, LargestFall, Race
from slzo.zo.selection.race import Equal

# Evaluations that measuring a step takes at most, on average.
_MEASURING = 25
# Fewer steps say nothing.
_FEWEST = 5
# Batches that all take again and again: the states below a layer are computed once for each of their rows.
_NUM_BATCHES = 20


@dataclass(frozen=True)
class Costs:
    """What things cost, in rows times layers that they go through.

    Attributes:
        num_layers: Of the model.
        batch_size: Rows of a step.
        evaluations: Of the batch, in a step.
        measuring: Evaluations before the first step.
        measured: Layers in which that has been done.
        caches: States that enter a layer are kept.
        carries: They are run on to the next layer; not if keeping them rounds.
        total_steps: Of the training that the race is for.
        train_rows: That it has.
        dev_rows: Rows of a dev loss.
        beside_layers: What comes beside the layers, as a number of layers.
    """

    num_layers: int
    batch_size: int
    evaluations: int
    measuring: int
    total_steps: int
    train_rows: int
    dev_rows: int
    beside_layers: float = BESIDE_LAYERS
    measured: frozenset[int] = frozenset()
    caches: bool = True
    carries: bool = True

    def layers(self, lowest: int) -> float:
        """Layers that are run where ``lowest`` is tuned."""
        return self.num_layers - (lowest if self.caches else 0) + self.beside_layers

    def step(self, layer: int) -> float:
        """One step in a layer."""
        return self.evaluations * self.batch_size * self.layers(layer)

    def measure(self, layer: int) -> float:
        """Measuring the step in a layer."""
        return self.measuring * self.batch_size * self.layers(layer)

    def spared(self, entrants: Iterable[int]) -> float:
        """Measuring that has been done."""
        return sum(self.measure(layer) for layer in self.measured.intersection(entrants))

    def training(self, layer: int) -> float:
        """The whole training in a layer, with the states of each row below it; without the scoring of dev rows."""
        states = min(self.train_rows, self.total_steps * self.batch_size) * layer if self.caches else 0
        return self.total_steps * self.step(layer) + states

    def beside(self, entrants: Sequence[int]) -> float:
        """What the race takes besides measuring and steps: dev losses, and states that the winner's training has no use for."""
        rows = self.dev_rows + min(self.train_rows, _NUM_BATCHES * self.batch_size)
        lost = (max(entrants) if self.carries else sum(entrants)) - min(entrants) if self.caches else 0
        return rows * lost + sum(2 * self.dev_rows * self.layers(layer) for layer in entrants)


@dataclass(frozen=True)
class RacePlan:
    """Who runs how far.

    Attributes:
        steps: By layer, rising; empty if there is no room for a race.
        left_out: Entrants for whose steps there is no room.
        share: Expected cost as a share of the whole training in the layer that it is held against.
    """

    steps: Mapping[int, int]
    left_out: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class RaceResult:
    """What came of a race.

    Attributes:
        choice: The winner.
        trials: By layer, rising.
        states: Those that enter the winner, for its training to go on with.
    """

    choice: Choice
    trials: Mapping[int, Trial]
    states: PrefixCache | None = None

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for JSON."""
        trials = {str(layer): trial.to_dict() for layer, trial in self.trials.items()}
        return {"layer": self.choice.layer, "reason": self.choice.reason, "trials": trials}


def plan_race(entrants: Sequence[int], share: float, equal: Equal, costs: Costs, reference: int) -> RacePlan:
    """Steps of each entrant so that all cost at most ``share`` of the training in the layer ``reference``, which stays in."""
    training = costs.training(reference)
    running = sorted(entrants)
    while len(running) > 1:
        left = share * training - costs.beside(running) + costs.spared(running)
        if equal == "work":
            own = left / len(running)
            steps = {layer: int((own - costs.measure(layer)) / costs.step(layer)) for layer in running}
        else:
            steps = dict.fromkeys(
                running, int((left - sum(map(costs.measure, running))) / sum(map(costs.step, running)))
            )
        steps = {layer: min(number, costs.total_steps) for layer, number in steps.items()}
        if min(steps.values()) >= _FEWEST:
            runs = sum(costs.measure(layer) + number * costs.step(layer) for layer, number in steps.items())
            cost = costs.beside(running) + runs - costs.spared(running)
            return RacePlan(steps, tuple(sorted(set(entrants) - set(running))), cost / training)
        running.remove(next(layer for layer in running if layer != reference))
    return RacePlan({}, tuple(entrants), 0.0)


def race(bench: Workbench, rule: Race, layers: list[LayerStatistics], total_steps: int) -> RaceResult:
    """Run one and say how it goes; without room for it, or if nobody gains, the choice is that of LargestFall.

    Args:
        bench: Of the training to come.
        rule: With its options.
        layers: The profile.
        total_steps: Of the training that it is for.

    Raises:
        SlzoError: There are no dev rows, or no dominant layer.
    """
    module = bench.module
    if not module.scope.needs_layer:
        raise SlzoError(
            f"profiler.rule Race: compares dominant layers, and model.scope {module.scope.describe()} has none; choose another "
            "rule"
        )
    if not bench.datamodule.rows("dev"):
        raise SlzoError("profiler.rule Race: compares dev losses, and there are no dev rows; set data.num_dev")
    entrants = rule.entrants(layers)
    plan = plan_of(bench, rule, layers, total_steps)
    if not plan.steps:
        no_room = f"{total_steps} steps leave profiler.rule.share {rule.share:g} no room for a race of layers {_listed(entrants)}"
        return RaceResult(_fallback(layers, no_room), {})
    say(_announcement(plan, rule, rule.reference(layers)))
    bench.dev_rows = rule.dev_rows
    seed = module.noise_seed or 0
    trials: dict[int, Trial] = {}
    halfway: list[float] = []
    best, states = -1, None

    def goes_on(score: Score) -> bool:
        if math.isfinite(score.loss):
            halfway.append(score.loss)
        return bool(halfway) and score.loss <= statistics.median(halfway)

    for layer, steps in plan.steps.items():
        checks = {max(1, steps // 3): goes_on}
        try:
            bench.move_prefix(layer)
            trials[layer] = bench.trial(layer, steps=steps, seed=seed, num_batches=_NUM_BATCHES, checks=checks)
        except SlzoError as error:  # the others may well run
            say(f"layer {layer:3d}: out of the race, {error}")
            continue
        say(_line(layer, trials[layer], steps))
        if best < 0 or trials[layer].gain > trials[best].gain:
            best, states = layer, bench.prefix
    bench.forget_prefix()
    before = bench.before.loss if bench.before is not None else 0.0
    if best < 0 or trials[best].gain <= 0:
        return RaceResult(_fallback(layers, f"no layer lowered the dev loss of {before:.4f} in the race"), trials)
    what = "work" if rule.equal == "work" else "steps"
    reason = (
        f"lowest dev loss of {len(trials)} layers after equal {what}, {before:.4f} -> {trials[best].scores[-1].loss:.4f} "
        f"in {trials[best].scores[-1].step} steps"
    )
    return RaceResult(Choice(best, reason, "race winner"), trials, states)


def plan_of(bench: Workbench, rule: Race, layers: list[LayerStatistics], total_steps: int) -> RacePlan:
    """The plan of a race of a workbench's module and rows; see :func:`race`."""
    costs = _costs(bench, rule, len(layers), total_steps)
    return plan_race(rule.entrants(layers), rule.share, rule.equal, costs, rule.reference(layers))


def _costs(bench: Workbench, rule: Race, num_layers: int, total_steps: int) -> Costs:
    data, module, engine = bench.datamodule, bench.module, bench.module.engine
    measures = module.optimizer_choice.automatic or module.step_options.eps is None
    return Costs(
        num_layers=num_layers,
        batch_size=data.batch_size,
        evaluations=2 * module.step_options.num_queries,
        measuring=_MEASURING if measures else 0,
        total_steps=total_steps,
        train_rows=len(data.rows("train")),
        dev_rows=min(rule.dev_rows, len(data.rows("dev"))),
        beside_layers=BESIDE_LAYERS + bench.head_layers(),
        measured=frozenset(filter(bench.knows_step, range(num_layers))),
        caches=engine.cache_gb > 0,
        carries=not PrefixCache(0, engine.cache_gb, engine.states_dtype).rounds(module.parts.model.dtype),
    )


def _fallback(layers: list[LayerStatistics], why: str) -> Choice:
    return LargestFall().select(layers)._replace(note=f"LargestFall has chosen: {why}.")


def _announcement(plan: RacePlan, rule: Race, reference: int) -> str:
    runs = ", ".join(f"{layer} ({steps} steps)" for layer, steps in plan.steps.items())
    words = f"Race       layers {runs}; costs about {plan.share:.0%} of the whole training in layer {reference}"
    if plan.left_out:
        words += f"; without {_listed(plan.left_out)}, for which profiler.rule.share {rule.share:g} has no room"
    return words


def _line(layer: int, trial: Trial, steps: int) -> str:
    last = trial.scores[-1]
    if trial.diverged:
        return f"layer {layer:3d}: diverged, {trial.diverged}"
    early = "" if last.step >= steps else ", in the worse half so far: ends here"
    steps_and_time = f"{last.step} steps ({last.seconds:.1f} s)"
    return f"layer {layer:3d}: dev loss {trial.scores[0].loss:.4f} -> {last.loss:.4f} in {steps_and_time}{early}"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
