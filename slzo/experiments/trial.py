"""Short trainings in one process, without Lightning's loop, that share model, rows and prefix states."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from slzo.data.batch import TrainBatch
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.models.packing import PackedBatch, pack
from slzo.models.prefix_cache import PrefixCache
from slzo.module import ZOModule
from slzo.settings import constructor_settings, flat_settings
from slzo.zo.estimators import Estimate, Point

# Dev loss this many times that before training, or no finite loss, is divergence.
_DIVERGED = 1.5
# Rows per forward pass when cached states move to another layer.
_ROWS_AT_ONCE = 16


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
        scores: Dev scores, the first before training, the last after it.
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
    """

    def __init__(self, module: ZOModule, datamodule: TaskDataModule) -> None:
        self.module = module
        self.datamodule = datamodule
        self.before: Score | None = None

    def trial(
        self,
        layer: int | None,
        *,
        steps: int,
        seed: int,
        lr: float | None = None,
        eps: float | None = None,
    ) -> Trial:
        """Tune for some steps, score the dev rows, and give the model its untuned weights back.

        With the module's own seed the steps are those of ``slzo fit``; other seeds give other directions and batches of the same
        rows, from the same initial values of added matrices.

        Args:
            layer: Dominant layer; ``None`` for scopes that need none.
            steps: Steps to take; fewer are taken if the loss is not finite.
            seed: Of directions and batches.
            lr: Learning rate in place of the optimizer's own.
            eps: In place of the module's.
        """
        module = self.module
        initial = self._choose(layer)
        try:
            return self._train(steps, seed, lr, module.eps if eps is None else eps)
        finally:
            self._release(initial)

    def sensitivity(self, layer: int, *, directions: int, seed: int, num_rows: int) -> Sensitivity:
        """Measure one layer on the first rows of a run.

        Args:
            layer: The layer.
            directions: Random directions.
            seed: Of directions and rows.
            num_rows: Training rows to take the loss of.
        """
        module = self.module
        rows = next(iter(self._batches(seed, num_rows)))
        initial = self._choose(layer)
        try:
            tuned = module.tuned
            assert tuned is not None
            loss = module.loss_of(rows)
            slopes = []
            with torch.no_grad():
                for query in range(directions):
                    z = tuned.draw(seed, 0, query)
                    high, low = loss.at([Point(z, module.eps), Point(z, -module.eps)]).tolist()
                    slopes.append(abs(high - low) / (2 * module.eps))
        finally:
            self._release(initial)
        error = statistics.stdev(slopes) / math.sqrt(directions) if directions > 1 else math.nan
        return Sensitivity(statistics.fmean(slopes), error, directions)

    def move_prefix(self, layer: int) -> None:
        """Run cached hidden states up to another layer, so that earlier layers are not run again.

        Args:
            layer: The next layer to be tuned, at or above the present one.
        """
        cache = self.module.prefix_cache
        if cache.start is None or not 0 < cache.start < layer:
            return
        split, device = self.module.split, self.module.device
        moved = PrefixCache(cache.budget / 2**30, cache.dtype, cache.directory)
        with torch.no_grad():
            for batch in self._cached_rows():
                hidden = cache.gather(batch.example_index, {}, device, split.model.dtype)
                states = split.run(batch.to(device), cache.start, layer, hidden)
                moved.put(batch.example_index, batch.example_tokens, moved.round(states))
        cache.replace_by(moved, layer)

    def score(self, step: int = 0, evaluations: int = 0, seconds: float = 0.0) -> Score:
        """Score the dev rows with the live weights."""
        module = self.module
        metrics = self.datamodule.make_metrics().to(module.device)
        evaluator = module.evaluator
        total = weight = 0.0
        for batch in self.datamodule.val_dataloader():
            outcome = evaluator(batch.to(module.device), keep_prefix=True)
            metrics.update(batch.examples, outcome.predictions)
            total += float(outcome.loss.total)
            weight += float(outcome.loss.weight)
        found = metrics.compute()
        metric = float(found[self.datamodule.task.metric])
        return Score(step, evaluations, seconds, total / weight if weight else math.nan, metric)

    def _choose(self, layer: int | None) -> dict[str, torch.Tensor]:
        """Make the masters; returns their initial values."""
        module = self.module
        if module.scope.needs_layer:
            assert layer is not None
            module.choose_layer(layer, "")
        else:
            module.tune_scope()
        assert module.tuned is not None
        return {name: master.detach().clone() for name, master in module.tuned.named_masters().items()}

    def _release(self, initial: dict[str, torch.Tensor]) -> None:
        assert self.module.tuned is not None
        self.module.tuned.load(initial)
        self.module.remove_adapter()

    def _train(
        self,
        steps: int,
        seed: int,
        lr: float | None,
        eps: float,
    ) -> Trial:
        module = self.module
        tuned = module.tuned
        assert tuned is not None
        optimizer = module.make_optimizer(list(tuned.masters))
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr
        scheduler = None if module.make_scheduler is None else module.make_scheduler(optimizer)
        if self.before is None:  # the same for every trial
            self.before = self.score()
        scores = [self.before]
        losses: list[float] = []
        slopes: list[float] = []
        evaluations, seconds = 0, 0.0
        batches = self._batches(seed, self.datamodule.batch_size)
        for step in range(steps):
            started = time.perf_counter()
            estimate = self._step(next(batches), seed, step, steps, eps, optimizer)
            if scheduler is not None:
                scheduler.step()
            seconds += time.perf_counter() - started
            evaluations += estimate.num_evaluations
            if not estimate.finite:
                return Trial(tuple(scores), tuple(losses), _mean(slopes), f"the loss was not finite at step {step}")
            losses.append(estimate.loss)
            slopes += [abs(slope) for slope in estimate.projected_grad]
        if steps:
            scores.append(self.score(steps, evaluations, seconds))
        return Trial(tuple(scores), tuple(losses), _mean(slopes), _divergence(scores))

    def _step(
        self, batch: TrainBatch, seed: int, step: int, steps: int, eps: float, optimizer: torch.optim.Optimizer
    ) -> Estimate:
        module = self.module
        assert module.tuned is not None
        with torch.no_grad():
            try:
                estimate = module.estimate(batch, seed, step, module.eps_at(step, steps, eps))
                optimizer.step()
            finally:
                module.tuned.zero_grad()
                module.tuned.restore()
        return estimate

    def _batches(self, seed: int, batch_size: int) -> Iterator[TrainBatch]:
        """The training batches of a run with this seed, without end."""
        datamodule = self.datamodule
        rows = datamodule.rows("train")
        done = 0
        sampler = datamodule.train_sampler(batch_size, seed, batches_done=lambda: done)
        collate = datamodule.train_collator()
        while True:
            for numbers in sampler:
                done += 1
                yield collate([rows[number] for number in numbers]).to(self.module.device)

    def _cached_rows(self) -> Iterator[PackedBatch]:
        """Every training and dev row that the cache holds, packed as it was when it came there."""
        datamodule, cache = self.datamodule, self.module.prefix_cache
        rows = [
            row.encoded for split in ("train", "dev") for row in datamodule.rows(split) if row.encoded.index in cache
        ]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield pack(rows[start : start + _ROWS_AT_ONCE], share_prompts=datamodule.share_prompts)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _divergence(scores: Sequence[Score]) -> str:
    first, last = scores[0], scores[-1]
    if not math.isfinite(last.loss):
        return "the dev loss is not finite"
    if last.loss > _DIVERGED * first.loss:
        return f"the dev loss rose from {first.loss:.3g} to {last.loss:.3g}"
    return ""


def require_one_process(module: ZOModule, command: str) -> None:
    """Refuse Lightning strategies with several processes.

    Raises:
        SlzoError: There are several.
    """
    if module.trainer.world_size > 1:
        raise SlzoError(
            f"trainer.devices {module.trainer.world_size}: {command} shares out whole trainings, not rows; set trainer.devices "
            "to 1"
        )


def experiment_settings(module: ZOModule, datamodule: TaskDataModule) -> dict[str, Any]:
    """What the results of trials depend on, besides steps and seeds: primitives only."""
    model = {name: getattr(module, name) for name in ("eps", "eps_end", "num_queries", "train_on", "noise_seed")}
    data = {
        name: getattr(datamodule, name)
        for name in (
            "hub_path",
            "hub_config",
            "num_train",
            "num_dev",
            "num_demonstrations",
            "batch_size",
            "max_length",
            "length_buckets",
            "seed",
        )
    }
    folder = datamodule.data_dir
    cache_dtype = module.prefix_cache.dtype
    return {
        "model": module.model_name,
        "dtype": module.dtype_name,
        **datamodule.task_settings(),
        **flat_settings("scope", constructor_settings(module.scope)),
        **flat_settings("estimator", constructor_settings(module.estimator)),
        **flat_settings("optimizer", {"class": module.optimizer_class, **module.optimizer_options}),
        "lr_scheduler": _scheduler_settings(module),
        **model,
        "prefix_cache_dtype": None if cache_dtype is None else str(cache_dtype).removeprefix("torch."),
        **data,
        "data_dir": None if folder is None else str(Path(folder).expanduser().resolve()),
    }


def _scheduler_settings(module: ZOModule) -> dict[str, Any] | None:
    if module.make_scheduler is None:
        return None
    scheduler = module.make_scheduler(module.make_optimizer([torch.nn.Parameter(torch.zeros(1))]))
    state = {name: value for name, value in scheduler.state_dict().items() if isinstance(value, int | float | str)}
    return {"class": type(scheduler).__qualname__, **state}
