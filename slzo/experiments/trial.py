"""Short trainings in one process, without Lightning's loop, that share model, rows and prefix states."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from slzo.data.batch import EvalBatch, TrainBatch
from slzo.datamodule import TaskDataModule
from slzo.evaluation.evaluator import score_rows
from slzo.models.prefix_cache import PrefixCache
from slzo.models.quantization import describe_quantization
from slzo.module import ZOModule
from slzo.settings import constructor_settings, flat_settings
from slzo.zo.estimators import Point
from slzo.zo.objectives.base import LogitObjective
from slzo.zo.step_size import StepSize
from slzo.zo.tuned_model import TunedModel

# Dev loss this many times that before training, or no finite loss, is divergence.
_DIVERGED = 1.5
# Steps at which a curve is scored.
_CURVE = tuple(10 * 2**power for power in range(16))
# Where the slopes are taken if model.eps is auto: layers are compared at one distance.
_SENSITIVITY_EPS = 1e-3
# What whole-vocabulary logits and their softmax cost beside the product alone: COPA on both built-in models, two cores.
_LOGITS = 2.7
# A spread of fewer directions says little of how sure their mean is.
_LEAST_DIRECTIONS = 8


@dataclass(frozen=True)
class Score:
    """The dev rows' score after some steps.

    Attributes:
        step: Steps taken.
        evaluations: Batches evaluated for them.
        seconds: Training seconds spent on them, scoring left out.
        loss: Dev loss.
        metric: The task's metric.
    """

    step: int
    evaluations: int
    seconds: float
    loss: float
    metric: float


@dataclass(frozen=True)
class Trial:
    """What a short training did.

    Attributes:
        scores: Dev scores, the first before training, the last after it; with a curve also at steps 10, 20, 40 and so on.
        losses: Training loss of each step.
        mean_abs_slope: Mean of the magnitudes of all projected gradients.
        diverged: In words how it diverged, or empty.
    """

    scores: tuple[Score, ...]
    losses: tuple[float, ...]
    mean_abs_slope: float
    diverged: str

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Trial":
        """Inverse of :meth:`to_dict`."""
        scores = tuple(Score(**score) for score in data["scores"])
        return cls(**{**data, "scores": scores, "losses": tuple(data["losses"])})

    @property
    def gain(self) -> float:
        """Dev loss before training less that after it; minus infinity if it diverged."""
        return -math.inf if self.diverged else self.scores[0].loss - self.scores[-1].loss


@dataclass(frozen=True)
class Sensitivity:
    """How much the loss changes along random directions before training: |L+ - L-| / (2 eps).

    Attributes:
        mean: Over the directions.
        standard_error: Of the mean.
        directions: Their number.
    """

    mean: float
    standard_error: float
    directions: int


class Workbench:
    """Trains and measures again and again from the same untuned model.

    Args:
        module: Its options are used; ``configure_model`` has run.
        datamodule: Set up for ``fit``, and attached to the module's trainer.

    Attributes:
        dev_rows: Score about so many of the dev rows, whole batches of them; ``None``: all.
    """

    def __init__(self, module: ZOModule, datamodule: TaskDataModule) -> None:
        self.module = module
        self.datamodule = datamodule
        self.dev_rows: int | None = None
        self.before: Score | None = None
        self._cache: PrefixCache | None = None
        self._measured: dict[int, StepSize] = {}

    def seeds(self, given: Sequence[int] | None) -> Sequence[int]:
        """The given seeds; left out, the run's own."""
        return [self.module.noise_seed or 0] if given is None else given

    def settings(self) -> dict[str, Any]:
        """What the results depend on, besides steps and seeds: primitives only."""
        module, data = self.module, self.datamodule
        own = "hub_path hub_config num_train num_dev num_demonstrations batch_size max_length length_buckets balanced seed"
        return {
            "model": module.model_name,
            "dtype": module.dtype_name,
            **({} if module.quantization is None else {"quantization": describe_quantization(module.quantization)}),
            **data.task_settings,
            **flat_settings("scope", module.scope_settings),
            **flat_settings("estimator", constructor_settings(module.estimator, "model.estimator")),
            **flat_settings("optimizer", module.optimizer_choice.settings),
            **{k: v for k, v in asdict(module.step_options).items() if (k, v) != ("clip_projected_grad", None)},
            "eps": module.step_options.eps or "auto",
            "noise_seed": module.noise_seed,
            "cache_dtype": module.engine.cache_dtype,
            **{name: getattr(data, name) for name in own.split()},
            "data_dir": None if data.data_dir is None else str(Path(data.data_dir).expanduser().resolve()),
        }

    def default_folder(self, kind: str) -> Path:
        """Where results go if no folder is given."""
        return Path(kind) / f"{Path(self.module.model_name).name}-{self.datamodule.task.name}"

    def trial(
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
    ) -> Trial:
        """Tune for some steps, score the dev rows, and give the model its untuned weights back.

        With the module's own seed the steps are those of ``slzo fit``; other seeds give other directions and batches of the same
        rows, from the same initial values of added matrices.

        Args:
            layer: Dominant layer; ``None`` for scopes that need none.
            steps: Steps to take; fewer are taken if the loss is not finite, more if there is time left.
            seed: Of directions and batches.
            lr: Learning rate in place of the optimizer's own.
            eps: In place of the module's.
            seconds: Go on until this much training time is used, and score the dev rows on the way too. The states that enter the
                tuned layer are computed beforehand: their time depends on the layers tuned before.
            num_batches: Take the first so many batches again and again; left out, all.
            checks: After so many steps score the dev rows, and go on if the function says so.
        """
        module, choice = self.module, self.module.optimizer_choice
        options = module.step_options if eps is None else replace(module.step_options, eps=eps)
        losses: list[float] = []
        slopes: list[float] = []
        evaluations, used = 0, 0.0
        scores: list[Score] = []
        with self._tuned(layer) as tuned_model:
            optimizer = choice.make(tuned_model.tensors.masters)
            batches = self._training_batches(seed)
            if num_batches is not None:
                batches = cycle(islice(batches, num_batches))
            step_size = None
            if options.eps is None or (lr is None and choice.automatic):
                started = time.perf_counter()
                measured = self._step_of(layer, tuned_model, options.eps, seed)
                options = replace(options, eps=measured.eps)
                step_size = measured if lr is None and choice.automatic else None
                evaluations, used = measured.evaluations, time.perf_counter() - started
            if lr is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            scheduler = None if choice.make_scheduler is None else choice.make_scheduler(optimizer)
            if self.before is None:  # the same for every trial
                self.before = self.score()
            scores.append(self.before)
            if seconds is not None:
                self._fill_prefix(tuned_model)
            step = -1
            while (step := step + 1) < steps or (seconds is not None and used < seconds):
                if seconds is not None and (step in _CURVE or step == steps):
                    scores.append(self.score(step, evaluations, used))
                if checks and step in checks:
                    scores.append(self.score(step, evaluations, used))
                    if not checks[step](scores[-1]):
                        break
                started = time.perf_counter()
                loss = module.loss_of(next(batches).to(tuned_model.parts.model.device), step, seed)
                estimate = tuned_model.step(
                    loss,
                    module.estimator,
                    optimizer,
                    options,
                    seed=seed,
                    step=step,
                    max_steps=steps,
                    step_size=step_size,
                ).estimate
                if scheduler is not None:
                    scheduler.step()
                used += time.perf_counter() - started
                evaluations += estimate.num_evaluations
                if not estimate.finite:
                    why = f"the loss was not finite at step {step}"
                    return Trial(tuple(scores), tuple(losses), _mean(slopes), why)
                losses.append(estimate.loss)
                slopes += [abs(slope) for slope in estimate.projected_grad]
            if losses and scores[-1].step < len(losses):
                scores.append(self.score(len(losses), evaluations, used))
        return Trial(tuple(scores), tuple(losses), _mean(slopes), _divergence(scores[0].loss, scores[-1].loss))

    def head_layers(self) -> float:
        """What whole-vocabulary logits of a training batch cost, as a number of layers; 0 where the loss needs none."""
        objective, data, parts = self.datamodule.objective, self.datamodule, self.module.parts
        if not isinstance(objective, LogitObjective):
            return 0.0
        batch = next(data.training_batches(data.batch_size, 0)).packed
        if not objective.needs_vocabulary(batch):
            return 0.0
        config, layer = parts.model.config.get_text_config(), parts.layers[-1]
        head = config.vocab_size * config.hidden_size * batch.needed.numel() / batch.num_tokens
        return float(_LOGITS * head / sum(parameter.numel() for parameter in layer.parameters()))

    def measured_step(self, layer: int) -> StepSize:
        """What training in a layer would measure before its first step; trials of the module's own seed begin with it."""
        if layer not in self._measured:
            with self._tuned(layer) as tuned_model:
                seed = self.module.noise_seed or 0
                self._measured[layer] = self._measure_step(tuned_model, self.module.step_options.eps, seed)
        return self._measured[layer]

    def knows_step(self, layer: int) -> bool:
        """Whether a layer's step has been measured."""
        return layer in self._measured

    def own_step(self, layer: int | None) -> tuple[float, float]:
        """The module's learning rate and eps, measured where they are auto; a measured rate has one significant digit."""
        module, choice, seed = self.module, self.module.optimizer_choice, self.module.noise_seed or 0
        lr, eps = choice.lr, module.step_options.eps
        if choice.automatic or eps is None:
            with self._tuned(layer) as tuned_model:
                measured = self._measure_step(tuned_model, eps, seed)
                optimizer = choice.make(tuned_model.tensors.masters)
                lr = float(f"{measured.rate(optimizer, module.estimator):.1g}") if choice.automatic else lr
                eps = measured.eps
        return lr, eps

    def _step_of(self, layer: int | None, tuned_model: TunedModel, eps: float | None, seed: int) -> StepSize:
        """A step to begin with: one that was measured before with this eps and seed, or a new one."""
        own = eps == self.module.step_options.eps and seed == (self.module.noise_seed or 0)
        if layer in self._measured and own:
            return replace(self._measured[layer], evaluations=0)
        return self._measure_step(tuned_model, eps, seed)

    def _measure_step(self, tuned_model: TunedModel, eps: float | None, seed: int) -> StepSize:
        first = next(self._training_batches(seed))
        loss = self.module.loss_of(first.to(tuned_model.parts.model.device), seed=seed)
        return tuned_model.measure_step(loss, self.datamodule.objective, eps, seed)

    def _training_batches(self, seed: int) -> Iterator[TrainBatch]:
        """Those of ``slzo fit`` where directions are: rows may have a seed of their own."""
        own = self.module.noise_seed or 0
        return self.datamodule.training_batches(
            self.datamodule.batch_size, self.datamodule.seed or 0 if seed == own else seed
        )

    def _fill_prefix(self, tuned_model: TunedModel) -> None:
        """Compute the states of every row that the cache has room for."""
        for block in self.datamodule.prefix_blocks():
            tuned_model.forward.prefix(block.pack().to(tuned_model.parts.model.device))

    def sensitivity(
        self, layer: int, *, directions: int, seed: int, num_rows: int, max_error: float = 0.0
    ) -> Sensitivity:
        """Measure one layer along random directions, by the loss of the first ``num_rows`` training rows of a run.

        Args:
            layer: Counted from 0.
            directions: At most.
            seed: Of directions and rows, so both are the same for every layer.
            num_rows: Rows whose mean loss is looked at.
            max_error: Enough directions are drawn, but at least 8, when the standard error is below this share of the mean.
        """
        eps = self.module.step_options.eps or _SENSITIVITY_EPS
        rows = next(self.datamodule.training_batches(num_rows, seed)).to(self.module.parts.model.device)
        slopes: list[float] = []
        with self._tuned(layer) as tuned_model, torch.no_grad():
            loss = self.module.loss_of(rows)
            for query in range(directions):
                z = tuned_model.tensors.draw(seed, 0, query)
                high, low = loss.at([Point(z, eps), Point(z, -eps)]).tolist()
                slopes.append(abs(high - low) / (2 * eps))
                if len(slopes) >= _LEAST_DIRECTIONS and _standard_error(slopes) < max_error * statistics.fmean(slopes):
                    break
        return Sensitivity(statistics.fmean(slopes), _standard_error(slopes), len(slopes))

    @property
    def prefix(self) -> PrefixCache | None:
        """The states that enter the layer tuned last."""
        return self._cache

    def forget_prefix(self) -> None:
        """Let go of all cached states."""
        self._cache = None

    def move_prefix(self, layer: int) -> None:
        """Run cached hidden states up to the next layer to be tuned, so that earlier layers are not run again."""
        cache, parts = self._cache, self.module.parts
        if cache is None or not 0 < cache.start < layer:
            return
        if cache.rounds(parts.model.dtype):  # rounding again at each layer would add up
            self._cache = None
            return
        data, moved = self.datamodule, cache.empty_for(layer)
        with torch.no_grad():
            for block in data.prefix_blocks():  # as they came there
                if not all(key in cache for key in block.keys):
                    continue
                batch = block.pack()
                hidden = cache.gather(batch.example_index, {}, parts.model.device, parts.model.dtype)
                states = parts.run(batch.to(parts.model.device), cache.start, layer, hidden)
                moved.put(batch.example_index, batch.example_tokens, states)
        self._cache = moved

    def score(self, step: int = 0, evaluations: int = 0, seconds: float = 0.0) -> Score:
        """Score the dev rows with the live weights."""
        data = self.datamodule
        batches = data.val_dataloader() if self.dev_rows is None else _some(data.val_dataloader(), self.dev_rows)
        found = score_rows(self.module.evaluator, batches, data.make_metrics(), keep_prefix=True, also=data.also)
        return Score(step, evaluations, seconds, data.judge.distance(found), found[data.judge.metric])

    @contextmanager
    def _tuned(self, layer: int | None) -> Iterator[TunedModel]:
        """Tune the scope for a while; the model gets its untuned weights back."""
        tuned_model = self.module.tune(layer, self._cache)
        tuned_model.plan_prefix(self.datamodule.prefix_blocks(), self.datamodule.prompt_blocks())
        self._cache = tuned_model.forward.cache
        initial = tuned_model.tensors.copy_of_masters()
        try:
            yield tuned_model
        finally:
            tuned_model.tensors.load(initial)
            self.module.stop_tuning()


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _some(batches: Iterable[EvalBatch], rows: int) -> list[EvalBatch]:
    """Whole batches of about so many rows, evenly spaced: they come by length, or by text."""
    found = list(batches)
    all_rows = sum(len(batch.rows) for batch in found)
    number = min(len(found), math.ceil(len(found) * rows / max(1, all_rows)))
    return [found[int((place + 0.5) * len(found) / number)] for place in range(number)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _divergence(before: float, after: float) -> str:
    if not math.isfinite(after):
        return "the dev loss is not finite"
    return f"the dev loss rose from {before:.3g} to {after:.3g}" if after > _DIVERGED * before else ""
