"""The LightningModule: zeroth-order steps on one decoder layer, with manual optimization."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from slzo.checkpoint import CHECKPOINT_FORMAT, checkpoint_note, read_checkpoint, resumed_from
from slzo.data.batch import EvalBatch, TrainBatch
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.generation_loss import GenerationLoss
from slzo.evaluation.metrics import TaskMetrics
from slzo.evaluation.scoring import LossKind
from slzo.models.adapters import Adapter, adapter_from_dict
from slzo.models.attention import LearnedPrefix
from slzo.models.load import DType, load_model
from slzo.models.packing import PackedBatch
from slzo.models.prefix_cache import PrefixCache
from slzo.models.split import SplitModel, split_model
from slzo.runtime import peak_memory_gb
from slzo.settings import constructor_settings, differences
from slzo.tasks.base import Example
from slzo.zo.estimators import SPSA, Estimate, Estimator, Request
from slzo.zo.estimators.base import Loss, check_settings
from slzo.zo.objective import BatchLoss, Objective, Span
from slzo.zo.optim import check_optimizer, check_scheduler, state_copies
from slzo.zo.scopes import LayerScope, Scope, ScopeContext
from slzo.zo.scopes.base import check_layer
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
        layer: Dominant layer, counted from 0; left out, the outlier profile chooses it.
        scope: What is tuned: LayerScope (all of the dominant layer, when left out), OutlierChannels, ActivationSubspace, LoRA,
            PrefixTuning, AllParameters, RandomLayers, SmallestWeights, or your own Scope.
        estimator: How gradients are estimated: SPSA (when left out), OneSided, FZO, LOZO, ForwardGradient, Backprop (the
            first-order reference), or your own Estimator.
        eps: Size of the perturbation, absolute, > 0.
        eps_end: Let eps go to this value over trainer.max_steps, by the same factor each step; left out, it stays.
        num_queries: Directions per step; with SPSA each costs two evaluations of the suffix, see model.estimator for others.
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
        scope: Scope | None = None,
        estimator: Estimator | None = None,
        eps: float = 1e-3,
        eps_end: float | None = None,
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
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "scope", "estimator"])
        self.model_name = model
        self.layer = layer
        self.layer_origin = "set by model.layer" if layer is not None else ""
        self.scope = scope if scope is not None else LayerScope()
        self.estimator = estimator if estimator is not None else SPSA()
        check_settings(eps, num_queries, queries_at_once)
        if eps_end is not None and not 0 < eps_end < float("inf"):
            raise SlzoError(f"model.eps_end {eps_end}: must be a number above 0; leave it out to keep eps")
        self.eps, self.eps_end = eps, eps_end
        self.num_queries, self.queries_at_once = num_queries, queries_at_once
        trial = check_optimizer(optimizer)
        self.optimizer_class = f"{type(trial).__module__}.{type(trial).__qualname__}"
        self.optimizer_options = {
            name: value for name, value in trial.defaults.items() if isinstance(value, int | float | str | tuple | None)
        }
        names = {
            "optimizer": type(trial).__name__,
            "scope": self.scope.describe(),
            "estimator": self.estimator.describe(),
        }
        self.save_hyperparameters({**names, "lr": trial.param_groups[0]["lr"]})
        if lr_scheduler is not None:
            check_scheduler(lr_scheduler, trial)
        self._optimizer_copies = state_copies(trial)
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
        if self.estimator.differentiates and train_on == "metric":
            raise SlzoError(
                f"model.train_on metric: a metric has no derivative for {self.estimator.describe()}; use SPSA"
            )
        for name, value in (("onednn", onednn), ("compile", compile)):
            if self.estimator.differentiates and value:
                raise SlzoError(f"model.{name} true: has no derivative for {self.estimator.describe()}; leave it out")
        self.train_on = train_on
        self.max_nonfinite = max_nonfinite
        self.trust_remote_code = trust_remote_code
        self.paired = paired
        self.onednn = False if self.estimator.differentiates else onednn
        self.compile_layers = compile
        cache_dtype = None if prefix_cache_dtype is None else getattr(torch, prefix_cache_dtype)
        self.prefix_cache = PrefixCache(prefix_cache_gb, cache_dtype, prefix_cache_dir)
        self.model: Any = None
        self.tuned: TunedTensors | None = None
        self.metrics: TaskMetrics | None = None
        self.loss_metric = MeanMetric()
        self._split: SplitModel | None = None
        self._objective: Objective | None = None
        self._adapter: Adapter | None = None
        self._nonfinite_in_row = 0
        self.num_nonfinite = 0
        self.num_evaluations = 0

    # ---- construction -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model; calling it again changes nothing."""
        if self.model is None:
            self.model = load_model(self.model_name, self.dtype_name, self.trust_remote_code)
            # outside of the module tree: its views share the model's weights
            self.__dict__["_split"] = split_model(self.model, self.packed, self.onednn, self.compile_layers)
            self._limit_length(self.scope.num_positions)

    def _limit_length(self, reserved: int) -> None:
        """Cut prompts to the positions that the model knows, less those that come before every sequence."""
        datamodule = getattr(self._trainer, "datamodule", None)
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(datamodule, TaskDataModule) or not isinstance(limit, int):
            return
        limit -= reserved
        if 0 < limit < datamodule.encoder.max_length:
            rank_zero_info(f"Prompts are cut to {limit} tokens, the longest that {self.model_name} takes.")
            datamodule.encoder.max_length = limit

    @property
    def split(self) -> SplitModel:
        """The model's parts."""
        assert self._split is not None, "configure_model has not run"
        return self._split

    @property
    def objective(self) -> Objective:
        """The loss as a function of what is tuned."""
        assert self._objective is not None, "nothing has been chosen to tune"
        return self._objective

    def choose_layer(self, layer: int, origin: str) -> None:
        """Make ``layer`` the dominant one; masters are made from the model's present weights.

        Args:
            layer: Counted from 0.
            origin: Who chose it, for the summary.

        Raises:
            SlzoError: The model has no such layer, or the scope finds nothing to tune.
        """
        self.configure_model()
        self.layer, self.layer_origin = check_layer(layer, self.split.num_layers), origin
        self.tune_scope()

    def tune_scope(self) -> None:
        """Make masters of what the scope names, from the model's present weights.

        Raises:
            SlzoError: The scope finds nothing to tune.
        """
        self.configure_model()
        context = ScopeContext(self.split, self.layer, self._prompts, self.noise_seed or 0)
        self._add_adapter(self.scope.adapter(context))
        self._tune(self.scope.tensors(replace(context, split=self.split)))

    def _tune_as(self, note: Mapping[str, Any]) -> None:
        """Make masters of what a checkpoint holds.

        Raises:
            SlzoError: The checkpoint is of another scope or model.
        """
        self.configure_model()
        fit = self._trainer is not None and self.trainer.state.fn == "fit"
        if fit and note["scope"] != (own := constructor_settings(self.scope)):
            raise SlzoError(
                f"model.scope: this run and the checkpoint differ ({differences(note['scope'], own)}); resume with the options "
                "that it was trained with"
            )
        self.layer, self.layer_origin = note["layer"], note["layer_origin"]
        self._add_adapter(None if note["adapter"] is None else adapter_from_dict(note["adapter"]))
        parameters = dict(self.model.named_parameters())
        subset = self.scope.subset(tuple(note["tensors"]), self.split) if fit else None
        try:
            self._tune(TunedTensors.from_description(parameters, note["tensors"], subset))
        except KeyError as error:
            raise SlzoError(
                f"ckpt_path: tensor {error} of the checkpoint does not fit model {self.model_name!r}; use the model it was "
                "trained with"
            ) from error

    def _add_adapter(self, adapter: Adapter | None) -> None:
        if adapter is not None and self._adapter is None:
            prefix = adapter.inject(self.model)
            self._adapter = adapter
            self._split_again(prefix)
            if prefix is not None:
                self._limit_length(prefix.num_tokens)

    def remove_adapter(self) -> None:
        """Take the scope's extra modules out of the model; its own weights stay as they are."""
        if self._adapter is not None:
            self._adapter.remove(self.model)
            self._adapter = None
            self._split_again()

    def _split_again(self, prefix: LearnedPrefix | None = None) -> None:
        old = self.split
        self.__dict__["_split"] = SplitModel(self.model, old.packed, old.onednn, old.compile, prefix)

    def _tune(self, tuned: TunedTensors) -> None:
        self.tuned = tuned.to(self.model.device)
        span = Span.of(self.split, self.tuned)
        self._objective = Objective(self.split, span, self.prefix_cache, self.candidate_rows, self.paired)

    def _prompts(self, num_sequences: int) -> list[PackedBatch]:
        """Prompts of training rows, for scopes that look at activations."""
        batches = self._datamodule().profile_batches(num_sequences, batch_size=16)
        return [batch.to(self.model.device) for batch in batches]

    def setup(self, stage: str) -> None:
        """Load the model and make the masters of what is tuned."""
        self.configure_model()
        self.prefix_cache.clear()  # its keys are those of one data module
        if self.noise_seed is None:
            self.noise_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        datamodule = self._datamodule()
        self._check_tokenizer(datamodule)
        if stage not in ("fit", "load"):
            return
        datamodule.trains_on_metric = self.train_on == "metric"
        self.estimator.check(self.num_queries, datamodule.batch_size)
        if stage == "load":
            return
        checkpoint = resumed_from(self.trainer)
        if self.tuned is not None:
            return
        if checkpoint is not None:
            self._tune_as(checkpoint_note(read_checkpoint(checkpoint)))
        elif self.layer is not None:
            self.choose_layer(self.layer, self.layer_origin)
        elif not self.scope.needs_layer:
            self.tune_scope()
        else:
            raise SlzoError(
                "model.layer is not set and no OutlierProfiler is among the callbacks: set one or the other"
            )

    def _check_tokenizer(self, datamodule: TaskDataModule) -> None:
        """The command line gives the rows the model's tokenizer; in Python the two may differ by mistake."""
        name, rows = datamodule.tokenizer_name, self.model.get_input_embeddings().weight.shape[0]
        advice = f"give TaskDataModule(tokenizer={self.model_name!r})"
        tokens = len(datamodule.encoder.tokenizer)
        if tokens > rows:
            raise SlzoError(
                f"data.tokenizer {name!r}: has {tokens} tokens, model {self.model_name!r} knows {rows}; {advice}"
            )
        if name != self.model_name:
            rank_zero_warn(f"data.tokenizer {name!r} is not that of model.model {self.model_name!r}; {advice}")

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
            eps = self.eps_at(self.global_step, self.trainer.max_steps)
            try:
                estimate = self.estimate(batch, self.noise_seed, self.global_step, eps)
                update_norm = self._update(estimate)
            finally:
                self.tuned.restore()
        self.num_evaluations += estimate.num_evaluations
        self._log_step(batch, estimate, update_norm, eps, time.perf_counter() - started)

    def estimate(self, batch: TrainBatch, seed: int, step: int, eps: float) -> Estimate:
        """Fill the masters' gradients; the live weights stay wherever the last evaluation put them.

        Args:
            batch: The rows of this process.
            seed: The run's seed.
            step: Training step; directions are drawn from (seed, step, query).
            eps: Size of the perturbation.
        """
        assert self.tuned is not None
        request = Request(self.tuned, self.loss_of(batch), seed, step, eps, self.num_queries, self.queries_at_once)
        return self.estimator.estimate(request)

    def eps_at(self, step: int, max_steps: int, eps: float | None = None) -> float:
        """Size of the perturbation at a step, see ``eps_end``; ``eps`` takes the place of the module's."""
        eps = self.eps if eps is None else eps
        if self.eps_end is None:
            return eps
        return eps * (self.eps_end / eps) ** min(1.0, step / max(1, max_steps - 1))

    def loss_of(self, batch: TrainBatch) -> Loss:
        """The loss of a batch over the rows of every process, as a function of what is tuned."""
        assert self.tuned is not None
        if batch.loss is LossKind.GENERATION:
            return GenerationLoss(self.evaluator, self.tuned, batch, self._sum_over_processes)
        hidden = self.objective.prefix(batch.packed)
        reduce = self._sum_over_processes
        return BatchLoss(self.objective, self.tuned, batch.packed, batch.loss, batch.right, reduce, hidden)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        # sums and what to divide them by: averages of ranks with different token counts would be another loss
        if self.trainer.world_size == 1:
            return values
        return cast("Tensor", self.trainer.strategy.reduce(values, reduce_op="sum"))

    def _update(self, estimate: Estimate) -> float | None:
        """Step the optimizer, or skip a step without a finite loss.

        Returns the update's norm on steps that log it, unless directions are too large to be held.
        """
        assert self.tuned is not None
        optimizer = cast("Any", self.optimizers())
        every = getattr(self.trainer, "log_every_n_steps", 1)
        logged = every > 0 and (self.global_step + 1) % every == 0
        # a copy of a whole model's masters is not worth a figure
        logged = logged and estimate.finite and 4 * self.tuned.num_elements <= self.tuned.hold_bytes
        before = [master.clone() for master in self.tuned.masters] if logged else None
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

    def _log_step(
        self, batch: TrainBatch, estimate: Estimate, update_norm: float | None, eps: float, seconds: float
    ) -> None:
        optimizer = cast("Any", self.optimizers())
        projected = torch.tensor(estimate.projected_grad)
        values = {
            "train/loss_plus": estimate.loss_plus,
            "train/loss_minus": estimate.loss_minus,
            "train/projected_grad": float(projected.mean()),
            "train/abs_projected_grad": float(projected.abs().mean()),
            "train/lr": optimizer.param_groups[0]["lr"],
            "train/eps": eps,
            "train/evaluations": float(self.num_evaluations),
            "train/step_seconds": seconds,
            "train/tokens_per_second": batch.packed.num_tokens / seconds,
            "train/peak_memory_gb": peak_memory_gb(self.device),
            "train/skipped_steps": float(self.num_nonfinite),
        }
        if update_norm is not None:
            values["train/update_norm"] = update_norm
        self.log_dict(values, batch_size=batch.packed.num_examples)
        self.log("loss", estimate.loss, prog_bar=True, logger=False, batch_size=1)

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
        if self.tuned is None:
            raise SlzoError(
                "nothing is tuned yet: a state dictionary alone does not say what its tensors are; use ckpt_path"
            )
        expected = self.tuned.named_masters()
        wrong = [name for name, t in state_dict.items() if name not in expected or expected[name].shape != t.shape]
        missing = [name for name in expected if name not in state_dict]
        if wrong or missing:
            raise SlzoError(
                f"ckpt_path: tensor {(wrong + missing)[0]!r} of the checkpoint does not fit model {self.model_name!r} "
                f"with dominant layer {self.layer} and scope {self.scope.describe()!r}; use the options it was trained with"
            )
        self.tuned.load(state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what is needed to use the tensors elsewhere."""
        assert self.tuned is not None
        checkpoint["slzo"] = {
            "format": CHECKPOINT_FORMAT,
            "scope": constructor_settings(self.scope),
            "adapter": None if self._adapter is None else self._adapter.to_dict(),
            "tensors": self.tuned.description(),
            "num_evaluations": self.num_evaluations,
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
        note = checkpoint_note(checkpoint)
        if self.tuned is None:
            self._tune_as(note)
        self.num_nonfinite = note["num_nonfinite"]
        self.num_evaluations = note["num_evaluations"]
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
        """Say what is tuned, how, and what memory it takes beside the model."""
        assert self.tuned is not None
        if self.eps_end is not None and self.trainer.max_steps < 1:
            raise SlzoError(
                f"model.eps_end {self.eps_end}: eps moves over trainer.max_steps, which is {self.trainer.max_steps}; set it to "
                "the number of steps, or leave model.eps_end out"
            )
        total = sum(p.numel() for p in self.model.parameters())
        layer = (
            ""
            if self.layer is None
            else f" Dominant layer: {self.layer} of {self.split.num_layers} ({self.layer_origin})."
        )
        rank_zero_info(
            f"Tuning {self.scope.describe()}: {self.tuned.num_elements:,} of {total:,} parameters by "
            f"{self.estimator.describe()}.{layer}"
        )
        rank_zero_info(
            "Memory beside the model: " + ", ".join(f"{k} {v:.3g} MiB" for k, v in self.memory_mib().items())
        )

    def memory_mib(self) -> dict[str, float]:
        """What tuning takes beside the model, in MiB, the prefix cache at most; what takes nothing is left out."""
        assert self.tuned is not None
        masters = 4 * self.tuned.num_elements
        at_once = self.estimator.directions_at_once(self.num_queries, self.queries_at_once)
        # the first direction becomes the gradient; later groups of queries are drawn beside it
        copies = at_once + (1 if self.num_queries > at_once else 0)
        held = masters * copies if masters <= self.tuned.hold_bytes else masters
        sizes = {
            "masters": masters,
            "directions and gradient": held,
            "base weights, bases and masks": sum(b.numel() * b.element_size() for b in self.tuned.buffers()),
            f"{self.hparams['optimizer']} state": masters * self._optimizer_copies,
            "prefix cache up to": self.prefix_cache.budget if self.objective.span.start > 0 else 0,
        }
        return {name: size / 2**20 for name, size in sizes.items() if size > 0}


def _gold(example: Example, generated: bool) -> int | list[int] | list[str] | None:
    if generated:
        return list(example.references) or None
    return example.gold[0] if len(example.gold) == 1 else list(example.gold) or None
