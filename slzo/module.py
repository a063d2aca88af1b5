"""The LightningModule: zeroth-order steps on one decoder layer, with manual optimization."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from slzo.data.batch import EvalBatch, TrainBatch
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.metrics import TaskMetrics
from slzo.evaluation.scoring import LossKind, stack
from slzo.models.load import DType, load_model
from slzo.models.prefix_cache import PrefixCache
from slzo.models.split import SplitModel, split_model
from slzo.runtime import peak_memory_gb
from slzo.tasks.base import Example
from slzo.zo.estimators import SPSA, Estimate, Point
from slzo.zo.objective import LayerObjective
from slzo.zo.optim import check_optimizer
from slzo.zo.scopes import tune_layer
from slzo.zo.tuned import TunedTensors

OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler]


TrainOn = Literal["loss", "metric"]


def sgd(params: Iterable) -> Optimizer:
    """The optimizer when none is given: plain SGD, learning rate 3e-4."""
    return torch.optim.SGD(params, lr=3e-4)


class ZOModule(LightningModule):
    """Tunes the dominant decoder layer of a language model by zeroth-order optimization.

    Args:
        model: Built-in name (smollm2-135m), local Hugging Face folder, .gguf file or Hub id.
        layer: Decoder layer to tune, counted from 0; left out, the outlier profile chooses it.
        eps: Size of the perturbation, absolute, > 0.
        num_queries: Directions per step; each costs two evaluations of the suffix.
        queries_at_once: Directions evaluated together; more than 1 fills the processor with small batches, and takes the memory
            of the tuned tensors for each.
        optimizer: Any torch optimizer that takes a dense gradient.
        lr_scheduler: Learning-rate scheduler, stepped once per training step.
        dtype: Type of the model's weights. The tuned tensors have a float32 master copy in any case.
        seed: Seed of the directions; left out, that of seed_everything.
        prefix_cache_gb: CPU memory in GiB for hidden states that enter the tuned layer, kept per example.
        prefix_cache_dtype: Type in which they are kept; left out, that of the model.
        prefix_cache_dir: Keep them in a memory-mapped file in this folder instead of in memory.
        packed: Run batches without padding.
        candidate_rows: Compute only the candidates' rows of the head where the loss allows it.
        paired: Run the layers above the tuned one once for both evaluations; left out, for small batches only.
        onednn: Run float32 linear layers on the CPU through oneDNN; left out, a trial decides.
        compile: Compile the decoder layers with torch.compile; falls back with a warning.
        train_on: "loss" minimizes the task's loss, "metric" what is left to win in its metric: 1 - accuracy, or 1 - F1 of
            generated answers (SQuAD, DROP). That has no gradient, and zeroth-order steps need none.
        max_nonfinite: Stop after this many steps in a row whose loss is infinite or NaN.
        trust_remote_code: Run model code that comes with a Hub repository.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        layer: int | None = None,
        eps: float = 1e-3,
        num_queries: int = 1,
        queries_at_once: int = 1,
        optimizer: OptimizerCallable = sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: DType = "float32",
        seed: int | None = None,
        prefix_cache_gb: float = 2.0,
        prefix_cache_dtype: DType | None = None,
        prefix_cache_dir: str | None = None,
        packed: bool = True,
        candidate_rows: bool = True,
        paired: bool | None = None,
        onednn: bool | None = None,
        compile: bool = False,
        train_on: TrainOn = "loss",
        max_nonfinite: int = 10,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model_name = model
        self.layer = layer
        self.layer_origin = "set by model.layer" if layer is not None else ""
        self.estimator = SPSA(eps, num_queries, queries_at_once)
        trial = check_optimizer(optimizer)
        self.save_hyperparameters({"optimizer": type(trial).__name__, "lr": trial.param_groups[0]["lr"]})
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.dtype_name: DType = dtype
        self.noise_seed = seed
        self.packed = packed
        self.candidate_rows = candidate_rows
        if prefix_cache_gb < 0:
            raise SlzoError(f"model.prefix_cache_gb {prefix_cache_gb}: give 0 to switch the cache off, or more")
        if max_nonfinite < 1:
            raise SlzoError(f"model.max_nonfinite {max_nonfinite}: at least 1 step is needed before giving up")
        if train_on not in get_args(TrainOn):
            raise SlzoError(f"model.train_on {train_on!r}: choose one of {', '.join(get_args(TrainOn))}")
        self.train_on = train_on
        self.max_nonfinite = max_nonfinite
        self.trust_remote_code = trust_remote_code
        self.paired = paired
        self.onednn = onednn
        self.compile_layers = compile
        cache_dtype = None if prefix_cache_dtype is None else getattr(torch, prefix_cache_dtype)
        self.prefix_cache = PrefixCache(prefix_cache_gb, cache_dtype, prefix_cache_dir)
        self.model: Any = None
        self.tuned: TunedTensors | None = None
        self.metrics: TaskMetrics | None = None
        self.loss_metric = MeanMetric()
        self._split: SplitModel | None = None
        self._objective: LayerObjective | None = None
        self._nonfinite_in_row = 0
        self.num_nonfinite = 0

    # ---- construction -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model; calling it again changes nothing."""
        if self.model is None:
            self.model = load_model(self.model_name, self.dtype_name, self.trust_remote_code)
            # outside of the module tree: its views share the model's weights
            self.__dict__["_split"] = split_model(self.model, self.packed, self.onednn, self.compile_layers)
            self._limit_length()

    def _limit_length(self) -> None:
        """Cut prompts to the positions that the model knows."""
        datamodule = getattr(self._trainer, "datamodule", None)
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(datamodule, TaskDataModule) and isinstance(limit, int) and limit < datamodule.encoder.max_length:
            rank_zero_info(f"Prompts are cut to {limit} tokens, the longest that {self.model_name} takes.")
            datamodule.encoder.max_length = limit

    @property
    def split(self) -> SplitModel:
        """The model's parts."""
        assert self._split is not None, "configure_model has not run"
        return self._split

    @property
    def objective(self) -> LayerObjective:
        """The loss as a function of the tuned layer."""
        assert self._objective is not None, "no layer has been chosen"
        return self._objective

    def choose_layer(self, layer: int, origin: str) -> None:
        """Make ``layer`` the tuned one; masters are made from the model's present weights.

        Args:
            layer: Counted from 0.
            origin: Who chose it, for the summary.

        Raises:
            SlzoError: The model has no such layer.
        """
        self.configure_model()
        self.tuned = tune_layer(self.split, layer).to(self.model.device)
        self.layer, self.layer_origin = layer, origin
        self._objective = LayerObjective(self.split, layer, self.prefix_cache, self.candidate_rows, self.paired)
        self.prefix_cache.clear()

    def setup(self, stage: str) -> None:
        """Load the model and make the masters of the tuned layer."""
        self.configure_model()
        self.prefix_cache.clear()  # its keys are those of one data module
        if stage == "fit":
            self._datamodule().trains_on_metric = self.train_on == "metric"
        if self.noise_seed is None:
            self.noise_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        if self.tuned is None and self.layer is not None:
            self.choose_layer(self.layer, self.layer_origin)
        if stage == "fit" and self.tuned is None:
            raise SlzoError(
                "model.layer is not set and no OutlierProfiler is among the callbacks: set one or the other"
            )

    def configure_optimizers(self) -> Any:
        """The optimizer over the masters."""
        assert self.tuned is not None
        optimizer = self.make_optimizer(list(self.tuned.masters))
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    # ---- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: TrainBatch, batch_idx: int) -> None:
        """One zeroth-order step."""
        assert self.tuned is not None and self.noise_seed is not None
        started = time.perf_counter()
        with torch.no_grad():
            # generation runs the whole model: it needs keys and values of every layer
            hidden = None if batch.loss is LossKind.GENERATION else self.objective.prefix(batch.packed)

            def evaluate(points: Any) -> Tensor:
                return self._global_losses(batch, hidden, points)

            try:
                estimate = self.estimator.estimate(self.tuned, evaluate, self.noise_seed, self.global_step)
                update_norm = self._update(estimate)
            finally:
                self.tuned.restore()
        self._log_step(batch, estimate, update_norm, time.perf_counter() - started)

    def _global_losses(self, batch: TrainBatch, hidden: Tensor | None, points: list[Point]) -> Tensor:
        """Losses at the points, over the rows of every process, shape (P,)."""
        assert self.tuned is not None
        if batch.loss is LossKind.GENERATION:
            sums = self._generation_losses(batch, points)
        else:
            sums = self.objective.losses(batch.packed, hidden, self.tuned, points, batch.loss, batch.right)
        if self.trainer.world_size > 1:
            # a few bytes; averages of ranks with different token counts would be another loss
            sums = cast("Tensor", self.trainer.strategy.reduce(sums, reduce_op="sum"))
        return sums[0] / sums[1]

    def _generation_losses(self, batch: TrainBatch, points: Sequence[Point]) -> Tensor:
        """Sums of 1 - F1 and row counts at the points, shape (2, P)."""
        assert self.tuned is not None
        sums = []
        for point in points:
            self.tuned.write(point.direction, point.scale)
            sums.append(self.evaluator.missing_f1(batch.rows))
        return stack(sums)

    def _update(self, estimate: Estimate) -> float | None:
        """Step the optimizer, or skip a step without a finite loss. Returns the update's norm on steps that log it."""
        assert self.tuned is not None
        optimizer = cast("Any", self.optimizers())
        every = getattr(self.trainer, "log_every_n_steps", 1)
        logged = every > 0 and (self.global_step + 1) % every == 0
        before = [master.clone() for master in self.tuned.masters] if logged and estimate.finite else None
        # without gradients this only counts: global_step, and with it max_steps, moves with the optimizer's steps
        optimizer.step()
        self._count_nonfinite(estimate)
        self.tuned.zero_grad()
        scheduler = cast("Any", self.lr_schedulers())
        if scheduler is not None:
            scheduler.step()
        if before is None:
            return None
        changes = [(master - old).norm() for master, old in zip(self.tuned.masters, before, strict=True)]
        return float(torch.stack(changes).norm())

    def _count_nonfinite(self, estimate: Estimate) -> None:
        if estimate.finite:
            self._nonfinite_in_row = 0
            return
        self.num_nonfinite += 1
        self._nonfinite_in_row += 1
        if self._nonfinite_in_row >= self.max_nonfinite:
            raise SlzoError(
                f"training diverged: the loss was infinite or NaN {self._nonfinite_in_row} steps in a row, the last at step "
                f"{self.global_step}; lower the learning rate (model.optimizer.init_args.lr) or model.eps, or use "
                "model.dtype bfloat16 or float32"
            )

    def _log_step(self, batch: TrainBatch, estimate: Estimate, update_norm: float | None, seconds: float) -> None:
        optimizer = cast("Any", self.optimizers())
        projected = torch.tensor(estimate.projected_grad)
        values = {
            "train/loss_plus": estimate.loss_plus,
            "train/loss_minus": estimate.loss_minus,
            "train/projected_grad": float(projected.mean()),
            "train/abs_projected_grad": float(projected.abs().mean()),
            "train/lr": optimizer.param_groups[0]["lr"],
            "train/step_seconds": seconds,
            "train/tokens_per_second": batch.packed.num_tokens / seconds,
            "train/peak_memory_gb": peak_memory_gb(self.device),
            "train/skipped_steps": float(self.num_nonfinite),
        }
        if update_norm is not None:
            values["train/update_norm"] = update_norm
        self.log_dict(values, batch_size=batch.packed.num_examples)
        self.log("loss", (estimate.loss_plus + estimate.loss_minus) / 2, prog_bar=True, logger=False, batch_size=1)

    # ---- evaluation ---------------------------------------------------------------------------------------------------

    @property
    def evaluator(self) -> Evaluator:
        """Scores rows with the live weights."""
        datamodule = self._datamodule()
        return Evaluator(self.split, datamodule.encoder.tokenizer, self._objective, datamodule.tokens_per_pass)

    def _datamodule(self) -> TaskDataModule:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, TaskDataModule):
            raise SlzoError("evaluation needs a TaskDataModule: pass datamodule=... to the trainer")
        return datamodule

    def evaluate(self, batches: Iterable[EvalBatch], metrics: TaskMetrics) -> dict[str, float]:
        """Metrics of the live weights over some rows, outside of Lightning's loops.

        Args:
            batches: The rows of this process.
            metrics: Fresh counters; they add up over processes.
        """
        metrics = metrics.to(self.device)
        evaluator = self.evaluator
        for batch in batches:
            metrics.update(batch.examples, evaluator(batch.to(self.device)).predictions)
        return {name: float(value) for name, value in metrics.compute().items()}

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._start_metrics()

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        self._start_metrics()

    def _start_metrics(self) -> None:
        self.metrics = self._datamodule().make_metrics().to(self.device)
        self.loss_metric.reset()

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Score one batch of dev rows."""
        self._evaluation_step(batch)

    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Score one batch of held-out rows."""
        self._evaluation_step(batch)

    def _evaluation_step(self, batch: EvalBatch) -> None:
        assert self.metrics is not None
        # dev rows are scored again and again, and their prefix is worth keeping
        outcome = self.evaluator(batch, keep_prefix=self.trainer.validating or self.trainer.state.fn == "fit")
        self.metrics.update(batch.examples, outcome.predictions)
        total, weight = outcome.loss
        if weight > 0:
            self.loss_metric.update(total / weight, weight=weight)

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[tuple[int, dict[str, Any]]]:
        """Predict one batch of held-out rows.

        Returns:
            For each row its position in the split and what is written of it: id, prompt, prediction (candidate index or
            generated text), prediction_text, scores (log-likelihoods of the candidates, ``None`` for a generated answer) and gold
            (candidate index, a list of them if there are several right ones, accepted answers, or ``None`` without a label).
        """
        outcome = self.evaluator(batch)
        records = []
        for number, (row, prediction) in enumerate(zip(batch.rows, outcome.predictions, strict=True)):
            example = row.example
            record = {
                "id": example.id,
                "prompt": example.prompt,
                "prediction": prediction,
                "prediction_text": example.candidates[prediction] if isinstance(prediction, int) else prediction,
                "scores": outcome.scores[number] if outcome.scores else None,
                "gold": _gold(example, generated=isinstance(prediction, str)),
            }
            records.append((row.position, record))
        return records

    def on_validation_epoch_end(self) -> None:
        """Log the dev metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the held-out metrics."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        assert self.metrics is not None
        values = {**self.metrics.compute(), "loss": self.loss_metric.compute()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=stage == "val")

    # ---- checkpoints: the tuned layer only ----------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tuned tensors by the model's names, float32; the frozen model is not part of a checkpoint."""
        return {} if self.tuned is None else {k: v.detach() for k, v in self.tuned.named_masters().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tuned tensors into the masters and the model.

        Raises:
            SlzoError: They do not fit the model or the tuned layer.
        """
        self.configure_model()
        expected = dict(self.model.named_parameters()) if self.tuned is None else self.tuned.named_masters()
        wrong = [name for name, t in state_dict.items() if name not in expected or expected[name].shape != t.shape]
        missing = [] if self.tuned is None else [name for name in expected if name not in state_dict]
        if wrong or missing:
            raise SlzoError(
                f"ckpt_path: tensor {(wrong + missing)[0]!r} of the checkpoint does not fit model {self.model_name!r} "
                f"with tuned layer {self.layer}; use the model and layer it was trained with"
            )
        if self.tuned is not None:
            self.tuned.load(state_dict)
        else:
            with torch.no_grad():
                for name, tensor in state_dict.items():
                    expected[name].copy_(tensor)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what is needed to use the tensors elsewhere."""
        checkpoint["slzo"] = {
            "format": 1,
            "model": self.model_name,
            "layer": self.layer,
            "layer_origin": self.layer_origin,
            "dtype": self.dtype_name,
            "trust_remote_code": self.trust_remote_code,
            "noise_seed": self.noise_seed,
            "num_nonfinite": self.num_nonfinite,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the counters and say where this run's options differ from those of the checkpoint."""
        note = checkpoint.get("slzo")
        if note is None:
            raise SlzoError("ckpt_path: not a checkpoint written by slzo; give a file from a run's checkpoints folder")
        self.num_nonfinite = note["num_nonfinite"]
        self.noise_seed = note["noise_seed"]  # the directions go on as they began
        saved, mine = checkpoint.get("hyper_parameters", {}), dict(self.hparams)
        different = [k for k in saved if k in mine and saved[k] != mine[k] and k[0] != "_"]
        if different:
            rank_zero_warn(
                "these model options differ from the checkpoint's: "
                + "; ".join(f"model.{k}: {saved[k]} -> {mine[k]}" for k in different)
                + "; the new ones are used, but seed, optimizer state and learning rate go on from the checkpoint"
            )

    def on_fit_start(self) -> None:
        """Say what is tuned."""
        assert self.tuned is not None
        total = sum(p.numel() for p in self.model.parameters())
        rank_zero_info(
            f"Tuning layer {self.layer} of {self.split.num_layers} ({self.layer_origin}): {self.tuned.num_elements:,} of "
            f"{total:,} parameters, forward passes only."
        )


def _gold(example: Example, generated: bool) -> int | list[int] | list[str] | None:
    if generated:
        return list(example.references) or None
    return example.gold[0] if len(example.gold) == 1 else list(example.gold) or None
