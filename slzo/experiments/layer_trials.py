"""Short trainings in one process that share the model, the rows and the states that enter the tuned layer."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from torch.optim import Optimizer

from slzo.batches.packing import PackedBatch
from slzo.data.batch import EvalBatch, TrainBatch
from slzo.models.logits import last_layer_share
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.task_data import TaskData
from slzo.training.build import auto_rate, make_stepper, measure_step, tune
from slzo.training.options import TrainingOptions
from slzo.training.prefix_plan import fill_prefix, plan_prefix, prefix_blocks
from slzo.training.time_plan import RunTimes, TimeBudget, TimePlan
from slzo.training.timing import measure_times, spaced_batches
from slzo.zo.auto_step import HALF_DTYPES, AutoRate, AutoStep
from slzo.zo.objectives import LogitObjective
from slzo.zo.stepper import Stepper
from slzo.zo.trial import Score, StepCost, Trial, Trials
from slzo.zo.tuned_model import TunedModel

# A training diverged if its dev loss is this many times the loss before training, or is not finite.
_DIVERGED = 1.5
# Steps at which a curve is scored.
_CURVE = tuple(10 * 2**power for power in range(16))
# Average number of evaluations that measuring a step size takes, at most.
_MEASURING = 25
# Cost of whole-vocabulary logits and their softmax relative to the matrix product alone: COPA, both built-in models, two cores.
_LOGITS = 2.7
# cost of a layer's keys and values alone, as a share of the layer
_KEYS_AND_VALUES = 0.2


class LayerTrials(Trials):
    """Runs trainings and measurements, each of which starts from the untuned model.

    Args:
        parts: The untuned model.
        options: Options of the trainings.
        data: Rows that are set up for ``fit`` and adapted to the model.
        steps: Steps of the main training, which the trials prepare.
        time: The time of the run, which decides the steps instead; ``None`` if it is not limited.
    """

    def __init__(
        self,
        parts: ModelParts,
        options: TrainingOptions,
        data: TaskData,
        steps: int = 0,
        time: TimeBudget | None = None,
    ) -> None:
        self.parts, self.options, self.data, self.steps, self.time = parts, options, data, steps, time
        self.measures_rate = (
            options.optimizer.automatic
            and options.estimator.perturbs == "weights"
            and parts.model.dtype not in HALF_DTYPES
        )
        self.generates = data.objective.generates
        self.num_train, self.num_dev = len(data.rows("train")), len(data.rows("dev"))
        self._before: dict[tuple[int | None, int | None], Score] = {}
        self._cache: PrefixCache | None = None
        self._measured: dict[int, AutoStep] = {}
        self._times: dict[int, RunTimes] = {}

    # ---- used by selection rules, see slzo.zo.trial.Trials ---------------------------------------------------------------

    def planned_steps(self, layer: int, share: float) -> int:
        """See :meth:`slzo.zo.trial.Trials.planned_steps`."""
        if self.time is None:
            return self.steps
        if layer not in self._times:
            with self.tuned(layer) as model:
                self._times[layer] = measure_times(model, self.options, self.data, self.time)
        time_alone = TimePlan.of(self._times[layer], replace(self.time, max_steps=-1), self.time.left)
        # if all steps fit next to the trials, the run is that without a limit of time
        steps = int(time_alone.new_steps / (1 + share))
        return steps if self.time.max_steps < 0 else min(steps, self.time.max_steps - self.time.done)

    def cost(self, dev_rows: int) -> StepCost:
        """See :meth:`slzo.zo.trial.Trials.cost`."""
        options, batch = self.options, next(self.data.training_batches(0)).packed
        return StepCost(
            num_layers=self.parts.num_layers,
            batch_size=self.data.batch_size,
            evaluations=options.estimator.evaluations(options.step.num_queries),
            measuring=_MEASURING if options.estimator.perturbs == "weights" and options.uses_auto else 0,
            dev_rows=min(dev_rows, self.num_dev),
            head_cost=self._head_cost(batch),
            last_layer=min(1.0, last_layer_share(self.parts, batch) + _KEYS_AND_VALUES),
            measured=frozenset(self._measured),
            caches=options.engine.cache_gb > 0,
        )

    def step_size(self, layer: int) -> AutoStep:
        """See :meth:`slzo.zo.trial.Trials.step_size`."""
        if layer not in self._measured:
            with self.tuned(layer) as model:
                self._measured[layer] = measure_step(model, self.options, self.data)
        return self._measured[layer]

    def train(
        self,
        layer: int,
        steps: int,
        *,
        dev_rows: int,
        num_batches: int | None = None,
        checks: Mapping[int, Callable[[Score], bool]] | None = None,
    ) -> tuple[Trial, PrefixCache | None]:
        """See :meth:`slzo.zo.trial.Trials.train`."""
        trial = self.run(
            layer, steps=steps, seed=self.options.noise_seed, dev_rows=dev_rows, num_batches=num_batches, checks=checks
        )
        return trial, self._cache

    # ---- used by sweeps --------------------------------------------------------------------------------------------------

    def run(
        self,
        layer: int | None,
        *,
        steps: int,
        seed: int,
        lr: float | None = None,
        eps: float | None = None,
        seconds: float | None = None,
        num_batches: int | None = None,
        checks: Mapping[int, Callable[[Score], bool]] | None = None,
        dev_rows: int | None = None,
    ) -> Trial:
        """Train for some steps, score the dev rows, and restore the untuned weights.

        With the noise seed of the options, the steps are those of ``fit``. Other seeds give other directions and other batches of
        the same rows; the initial values of added matrices stay the same.

        Args:
            layer: Layer to tune; ``None`` for scopes that need none.
            steps: Number of steps; fewer are taken if the loss is not finite, more if ``seconds`` allows.
            seed: Seed of directions and batches.
            lr: Learning rate; ``None`` for that of the options.
            eps: Size of the perturbation; ``None`` for that of the options.
            seconds: Continue until this training time is used, and score the dev rows on the way too. The states that enter
                the tuned layer are computed beforehand, since their time depends on the layers tuned before.
            num_batches: Use only this many batches, in a cycle; ``None`` for all.
            checks: After these numbers of steps, score the dev rows, and stop if the function returns ``False``.
            dev_rows: Score about this many dev rows, in complete batches; ``None`` for all.
        """
        self.carry_prefix(layer)
        losses: list[float] = []
        slopes: list[float] = []
        scores: list[Score] = []
        with self.tuned(layer) as model:
            stepper, optimizer, scheduler, used = self._training(layer, model, seed, lr, eps)
            batches: Iterator[TrainBatch] = self.data.training_batches(self._row_seed(seed))
            if num_batches is not None:
                batches = cycle(islice(batches, num_batches))
            # the same for every trial, unless the model is quantized except for the tuned layer
            key = (dev_rows, None if model.full_precision is None else layer)
            if key not in self._before:
                self._before[key] = self._score(model, dev_rows)
            scores.append(self._before[key])
            continues = dict(checks or {})
            if seconds is not None:
                fill_prefix(model, self.data)
                continues = {step: lambda _: True for step in (*_CURVE, steps)} | continues
            step = -1
            while (step := step + 1) < steps or (seconds is not None and used < seconds):
                if step in continues:
                    scores.append(self._score(model, dev_rows, step, stepper.num_evaluations, used))
                    if not continues[step](scores[-1]):
                        break
                started = time.perf_counter()
                batch = next(batches).to(model.parts.model.device)
                estimate = stepper.step(batch, step, optimizer, scheduler).estimate
                used += time.perf_counter() - started
                if not estimate.finite:
                    why = f"the loss was not finite at step {step}"
                    return Trial(tuple(scores), tuple(losses), _mean(slopes), why)
                losses.append(estimate.loss)
                slopes += [abs(slope) for slope in estimate.slopes]
            if losses and scores[-1].step < len(losses):
                scores.append(self._score(model, dev_rows, len(losses), stepper.num_evaluations, used))
        return Trial(tuple(scores), tuple(losses), _mean(slopes), self._divergence(scores[0].loss, scores[-1].loss))

    def own_step(self, layer: int | None) -> tuple[float, float | None]:
        """Return learning rate and eps of the options; ``auto`` is measured, and such a rate has one significant digit.

        eps is ``None`` if the estimator has none.
        """
        choice, estimator, step = self.options.optimizer, self.options.estimator, self.options.step
        if not self.options.uses_auto:
            return choice.lr, step.eps
        with self.tuned(layer) as model:
            measured = self._rate(layer, model, self.options)
            if not choice.automatic:
                return choice.lr, measured.eps
            rate = measured.rate(choice.make(model.tensors.masters), estimator, step.num_queries)
            return float(f"{rate:.1g}"), measured.eps

    @contextmanager
    def tuned(self, layer: int | None) -> Iterator[TunedModel]:
        """Tune the scope within the context; restore the untuned weights afterwards."""
        model = tune(self.parts, self.options, self.data, layer, self._cache)
        initial = model.tensors.clone_masters()
        try:
            plan_prefix(model, self.data)
            self._cache = model.forward.cache
            yield model
        finally:
            model.tensors.load(initial)
            model.release()

    def carry_prefix(self, layer: int | None) -> None:
        """Run cached states from their layer to the next layer to tune, so that the layers in between run only once."""
        cache, parts = self._cache, self.parts
        if cache is None or layer is None or not 0 < cache.start < layer:
            return
        moved = PrefixCache(layer, cache.budget / 2**30, cache.directory)
        with torch.no_grad():
            for block in prefix_blocks(self.data):  # in the same blocks as they were computed
                if not all(key in cache for key in block.keys):
                    continue
                batch = block.pack()
                hidden = cache.gather(batch.example_index, {}, parts.model.device)
                states = parts.run(batch.to(parts.model.device), cache.start, layer, hidden)
                moved.put(batch.example_index, batch.example_tokens, states)
        self._cache = moved

    def clear_prefix(self) -> None:
        """Drop all cached states."""
        self._cache = None

    # ---- helpers ---------------------------------------------------------------------------------------------------------

    def _training(
        self, layer: int | None, model: TunedModel, seed: int, lr: float | None, eps: float | None
    ) -> tuple[Stepper, Optimizer, Any, float]:
        """Return stepper, optimizer and scheduler of a training, and the seconds that measuring its step sizes took.

        ``lr`` and ``eps`` replace those of the options.
        """
        step = self.options.step if eps is None else replace(self.options.step, eps=eps)
        # the trial itself ends at an infinite loss
        options = replace(self.options, step=step, seed=seed, max_nonfinite=None)
        sets_rate = lr is None and options.optimizer.automatic
        auto, started = None, time.perf_counter()
        if sets_rate or options.measures_eps:
            auto = self._rate(layer, model, options)
        used = 0.0 if auto is None else time.perf_counter() - started
        stepper = make_stepper(model, options, self.data, auto=auto, sets_rate=sets_rate)
        optimizer, scheduler = options.optimizer.build(model.tensors.masters, lr)
        return stepper, optimizer, scheduler, used

    def _row_seed(self, seed: int) -> int:
        """Return the seed of the batches: with the noise seed of the options, the rows' own seed, as in ``fit``."""
        return self.data.seed or 0 if seed == self.options.noise_seed else seed

    def _rate(self, layer: int | None, model: TunedModel, options: TrainingOptions) -> AutoRate:
        """Return the rate of ``auto``; a step size that was measured in the layer with this eps and seed is used again."""
        own, seed = self.options, options.noise_seed
        if layer in self._measured and (options.step, seed) == (own.step, own.noise_seed):
            return replace(self._measured[layer], evaluations=0)
        return auto_rate(model, options, self.data, self._row_seed(seed))

    def _score(
        self, model: TunedModel, dev_rows: int | None, step: int = 0, evaluations: float = 0, seconds: float = 0.0
    ) -> Score:
        """Score the dev rows with the live weights."""
        data, metric = self.data, self.data.selection_metric
        batches: Iterable[EvalBatch] = data.eval_batches("dev")
        if dev_rows is not None:
            batches = spaced_batches(batches, dev_rows)
        found = data.score(data.evaluator(model), batches, keep_prefix=True)
        return Score(step, round(evaluations), seconds, metric.distance(found), found.get(metric.metric, math.nan))

    def _divergence(self, before: float, after: float) -> str:
        metric = self.data.selection_metric
        if not math.isfinite(after):
            return f"the {metric.loss_name} is not finite"
        risen = after > metric.upper_bound(before, _DIVERGED, before)
        return f"the {metric.loss_name} rose from {before:.3g} to {after:.3g}" if risen else ""

    def _head_cost(self, batch: PackedBatch) -> float:
        """Return the cost of a batch's whole-vocabulary logits, as a number of layers; 0 if the loss needs none."""
        objective, parts = self.data.objective, self.parts
        if not isinstance(objective, LogitObjective) or not objective.needs_vocabulary(batch):
            return 0.0
        config, layer = parts.model.config.get_text_config(), parts.layers[-1]
        head = config.vocab_size * config.hidden_size * batch.logit_positions.numel() / batch.num_tokens
        return float(_LOGITS * head / sum(parameter.numel() for parameter in layer.parameters()))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
