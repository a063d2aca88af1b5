"""The LightningModule: hooks and logging around :class:`slzo.zo.tuned_model.TunedModel`."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from slzo.batches.packing import PackedBatch
from slzo.checkpoint import CHECKPOINT_FORMAT, Checkpoint, changed_options, checkpoint_note
from slzo.data.batch import EvalBatch, TrainBatch
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.evaluation.evaluator import Evaluator, Outcome, RunningScore, records
from slzo.models.device_map import DeviceMap, DeviceMapChoice
from slzo.models.engine import DType, Engine
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.models.placement import load_placed
from slzo.models.prefix_cache import PrefixCache, check_cache_folder
from slzo.models.quantization import Quantization, describe_quantization, method_of
from slzo.models.startup_check import take_apart
from slzo.runtime import peak_memory_gb
from slzo.settings import constructor_settings, differences, with_defaults
from slzo.zo.estimators import SPSA, Estimate, Estimator, Loss
from slzo.zo.optim import AUTO_LR, MakeOptimizer, MakeScheduler, OptimizerChoice
from slzo.zo.recorder import StepRecorder
from slzo.zo.scopes import LayerScope, Scope
from slzo.zo.selection.margin import in_words
from slzo.zo.step import StepOptions, StepResult
from slzo.zo.step_size import StepSize
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_model import TunedModel

_ENGINE = Engine()


def sgd(params: Iterable) -> Optimizer:
    """The optimizer when none is given: plain SGD, its learning rate measured."""
    return torch.optim.SGD(params, lr=AUTO_LR)


class ZOModule(LightningModule):
    """Tunes the dominant decoder layer of a language model by zeroth-order optimization.

    Args:
        model: Built-in name (smollm2-135m, or gemma3-270m, fetched only with SLZO_ACCEPT_LICENSE=gemma in the environment),
            local Hugging Face folder, .gguf file or Hub id.
        layer: Dominant layer, counted from 0; left out, the outlier profile chooses it.
        scope: What is tuned: LayerScope (all of the dominant layer, when left out), OutlierChannels, ActivationSubspace, LoRA,
            PrefixTuning, AllParameters, RandomLayers, SmallestWeights, LayersInTurn, or your own Scope.
        estimator: How gradients are estimated: SPSA (when left out), OneSided, FZO, LOZO, EvolutionStrategy, ForwardGradient,
            Backprop (the first-order reference), or your own Estimator.
        eps: Size of the perturbation, absolute, > 0; auto measures one that changes the loss by a hundredth of it.
        eps_end: Let eps go to this value over trainer.max_steps, by the same factor each step; left out, it stays.
        num_queries: Directions per step; with SPSA each costs two evaluations of the suffix, see model.estimator for others.
        clip_projected_grad: Scale a step down whose projected gradient is above this multiple of the median of the last 100.
        optimizer: Any torch optimizer that takes a dense gradient; lr auto measures the rate and lets it follow the loss.
        lr_scheduler: Learning-rate scheduler, stepped once per training step.
        dtype: Type of the model's weights. The tuned tensors have a float32 master copy in any case.
        quantization: Of the frozen layers: int8, fp8 (torchao), nf4, fp4 (bitsandbytes), or a config of transformers; that
            by its class path, with arguments as class_path and init_args. The tuned layer stays in full precision. A model
            that is quantized already needs none.
        device_map: Where the decoder layers are: auto, balanced, sequential, or a place by module name; auto and balanced take
            all cards, sequential one after the other, each with what does not fit in memory and on disk. A place is the number
            of a card, cpu or disk. What is tuned, embeddings and head are on the trainer's device in any case.
        offload_folder: Folder for layers on disk that the model's files do not hold as they are.
        seed: Seed of the directions; left out, that of seed_everything.
        engine: How the loss is computed: switches of speed and memory.
        max_nonfinite: Stop after this many steps in a row whose loss is infinite or NaN.
        trust_remote_code: Run model code that comes with a Hub repository.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        layer: int | None = None,
        scope: Scope | None = None,
        estimator: Estimator | None = None,
        eps: float | Literal["auto"] = "auto",
        eps_end: float | None = None,
        num_queries: int = 1,
        clip_projected_grad: float | None = None,
        optimizer: MakeOptimizer = sgd,
        lr_scheduler: MakeScheduler | None = None,
        dtype: DType = "float32",
        quantization: Quantization | None = None,
        device_map: DeviceMap | None = None,
        offload_folder: str | None = None,
        seed: int | None = None,
        engine: Engine = _ENGINE,
        max_nonfinite: int = 10,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model_name, self.dtype_name, self.trust_remote_code = model, dtype, trust_remote_code
        self.quantization = quantization
        self.layer = layer
        self.layer_origin = "set by model.layer" if layer is not None else ""
        self.scope = scope if scope is not None else LayerScope()
        self.estimator = estimator if estimator is not None else SPSA()
        self.step_options = self._given_step = StepOptions(
            None if eps == "auto" else eps, eps_end, num_queries, clip_projected_grad
        )
        self.optimizer_choice = OptimizerChoice.of(optimizer, lr_scheduler)
        self.noise_seed = seed
        self.engine = engine.with_derivatives(self.estimator.describe()) if self.estimator.differentiates else engine
        self.device_map = DeviceMapChoice.of(device_map, offload_folder, engine, quantization)
        if max_nonfinite < 1:
            raise SlzoError(f"model.max_nonfinite {max_nonfinite}: at least 1 step is needed before giving up")
        self.max_nonfinite = max_nonfinite
        self.estimator.check(num_queries)
        # before training: a checkpoint could not hold it
        self.scope_settings = constructor_settings(self.scope, "model.scope")
        self.model: Any = None
        self.tuned_model: TunedModel | None = None
        self.tuned_tensors: TunedTensors | None = None
        self.resumed = False
        self._start: Mapping[str, Any] | None = None
        self.step_size: StepSize | None = None
        self.recorder: StepRecorder | None = None
        self.num_nonfinite = self.num_evaluations = 0
        self._nonfinite_in_row = 0
        self._untuned: ModelParts | None = None
        self._score: RunningScore | None = None
        # what loggers and checkpoints show of the options; nothing reads them from there
        self.save_hyperparameters(
            {
                "model": model,
                "dtype": dtype,
                "quantization": describe_quantization(quantization),
                "scope": self.scope.describe(),
                "estimator": self.estimator.describe(),
                "optimizer": self.optimizer_choice.name,
                "lr": self.optimizer_choice.settings["lr"],
                **asdict(self.step_options),
                "eps": eps,
                "seed": seed,
                "layer": layer,
                "max_nonfinite": max_nonfinite,
                "trust_remote_code": trust_remote_code,
                **{f"engine.{name}": value for name, value in asdict(self.engine).items()},
            }
        )

    # ---- construction -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model; calling it again changes nothing."""
        if self.model is not None:
            return
        common = self.model_name, self.dtype_name, self.trust_remote_code
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        if self.device_map is None:
            self.model = load_model(*common, self.quantization, device=device)
        else:  # no submodule, which strategies would move to one device
            vars(self)["model"] = load_placed(*common, self.device_map, device)
        self._untuned = take_apart(cast("Any", self.model), self.engine.packed, self.engine.onednn, self.engine.compile)

    @property
    def parts(self) -> ModelParts:
        """The model's parts, with what the scope added."""
        self.configure_model()
        assert self._untuned is not None
        return self._untuned if self.tuned_model is None else self.tuned_model.parts

    def start_from(self, checkpoint: Checkpoint | None) -> None:
        """The next fit continues a checkpoint (or, with ``None``, begins anew)."""
        self.resumed, self.step_size = checkpoint is not None, None
        if checkpoint is not None:
            checkpoint.check_resumable(self.optimizer_choice.classes)
        self._start = None if checkpoint is None else checkpoint.note
        decided = None if self._start is None else self._start.get("onednn")
        if decided is not None and self.engine.onednn is None and self.model is None:
            # a new timing might end otherwise, and so would the steps
            self.engine = replace(self.engine, onednn=decided)

    def load(self, datamodule: TaskDataModule) -> None:
        """Load the model and fit rows to it.

        Raises:
            SlzoError: The rows' tokenizer is not the model's, or the options do not go together.
        """
        if self.engine.cache_dir is not None:
            check_cache_folder(self.engine.cache_dir)
        if self.noise_seed is None:
            self.noise_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self.configure_model()
        datamodule.fit_to(self.model, self.model_name, self.scope.num_positions, self.parts.longest)

    def check_training(self, datamodule: TaskDataModule) -> None:
        """Refuse options of model and rows that cannot train together.

        Raises:
            SlzoError: With the reason.
        """
        self.estimator.check(self.step_options.num_queries, datamodule.batch_size)
        if self.estimator.differentiates and not datamodule.objective.differentiable:
            raise SlzoError(
                f"data.objective {datamodule.objective.describe()}: has no derivative for {self.estimator.describe()}; use SPSA"
            )

    def choose_layer(self, layer: int, origin: str) -> None:
        """Make ``layer``, counted from 0, the dominant one and begin to tune it; ``origin`` says who chose it.

        Raises:
            SlzoError: The model has no such layer, or the scope finds nothing to tune.
        """
        self.tune(layer)
        self.layer, self.layer_origin = layer, origin

    def tune(self, layer: int | None, cache: PrefixCache | None = None) -> TunedModel:
        """Make masters of what the scope names, from the model's present weights; see :class:`slzo.zo.tuned_model.TunedModel`.

        Raises:
            SlzoError: The scope finds nothing to tune.
        """
        self.stop_tuning()
        seed, engine = self.noise_seed or 0, self.engine
        return self._hold(
            TunedModel.of_scope(
                self.parts, self.scope, layer, prompts=self._prompts, seed=seed, engine=engine, cache=cache
            )
        )

    def _hold(self, tuned_model: TunedModel) -> TunedModel:
        self.tuned_model = tuned_model
        # a submodule: strategies move it to their device and find what requires a gradient
        self.tuned_tensors = tuned_model.tensors
        return tuned_model

    def stop_tuning(self) -> None:
        """Forget what is tuned and take the scope's extra modules out of the model; its own weights stay as they are."""
        if self.tuned_model is not None:
            self.tuned_model.release()
            self.tuned_model = self.tuned_tensors = None

    def _tune_as(self, note: Mapping[str, Any]) -> None:
        """Make masters of what a checkpoint holds, which may be of another scope or model by mistake."""
        training = self._trainer is not None and self.trainer.state.fn == "fit"
        scope = with_defaults(note["scope"], self.scope)
        if training and scope != self.scope_settings:
            raise SlzoError(
                f"model.scope: this run and the checkpoint differ ({differences(scope, self.scope_settings)}); resume with the "
                "options that it was trained with"
            )
        subset = self.scope.subset(tuple(note["tensors"]), self.parts) if training else None
        try:
            tuned_model = TunedModel.of_description(self.parts, note, self.engine, subset)
        except KeyError as error:
            raise SlzoError(
                f"ckpt_path: tensor {error} of the checkpoint does not fit model {self.model_name!r}; use the model it was "
                "trained with"
            ) from error
        self._hold(tuned_model)
        self._take_step_size(note)
        self.layer, self.layer_origin = note["layer"], note["layer_origin"]
        virtual_tokens = tuned_model.parts.virtual_tokens
        if virtual_tokens is not None and self._trainer is not None:
            self.datamodule.fit_to(self.model, self.model_name, virtual_tokens.num_tokens, self.parts.longest)

    def _take_step_size(self, note: Mapping[str, Any]) -> None:
        measured = note.get("step_size")  # older checkpoints have none: it is measured where they are
        self.step_size = None if measured is None else StepSize(**measured)

    def _prompts(self, num_sequences: int) -> list[PackedBatch]:
        """Prompts of training rows, for scopes that look at activations."""
        return [batch.to(self.model.device) for batch in self.datamodule.profile_batches(num_sequences, batch_size=16)]

    @property
    def datamodule(self) -> TaskDataModule:
        """The rows that the trainer gave."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, TaskDataModule):
            raise SlzoError("model: needs the rows of a TaskDataModule; pass datamodule=... to the trainer")
        return datamodule

    def setup(self, stage: str) -> None:
        """Load the model and, for fit, make the masters of what is tuned."""
        if stage == "fit":
            self.check_training(self.datamodule)
        self.load(self.datamodule)
        if self.tuned_model is not None:
            self.tuned_model.forget_prefix()  # its keys are those of one data module
        elif stage == "fit" and self._start is not None:
            note, self._start = self._start, None
            self._tune_as(note)
        elif stage == "fit" and self.scope.needs_layer and self.layer is None:
            raise SlzoError(
                "model.layer is not set and no OutlierProfiler is among the callbacks: set one or the other"
            )
        elif stage == "fit":
            self.tune(self.layer)

    def configure_optimizers(self) -> Any:
        """The optimizer over the masters."""
        assert self.tuned_model is not None
        self._begin_steps(self.tuned_model)
        choice = self.optimizer_choice
        optimizer = choice.make(self.tuned_model.tensors.masters)
        if choice.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": choice.make_scheduler(optimizer)}

    def turn_to(self, layer: int) -> None:
        """Tune this layer from now on, of those that the scope tunes in turn."""
        assert self.tuned_model is not None
        self.tuned_model.focus(layer)
        self.step_size = None
        self._begin_steps(self.tuned_model)

    def _begin_steps(self, tuned_model: TunedModel) -> None:
        """Plan which states are kept, and measure the step."""
        tuned_model.plan_prefix(self.datamodule.prefix_blocks(), self.datamodule.prompt_blocks())
        self._measure_step()

    def _measure_step(self) -> None:
        """Measure what is ``auto`` of the step on the run's first batch; a resumed run goes on with what it has."""
        assert self.tuned_model is not None and self.noise_seed is not None
        given = self._given_step
        if self.step_size is None and (self.optimizer_choice.automatic or given.eps is None):
            batch = next(self.datamodule.training_batches(self.datamodule.batch_size, self.datamodule.seed or 0))
            loss = self.loss_of(batch.to(self.model.device))
            self.step_size = self.tuned_model.measure_step(loss, self.datamodule.objective, given.eps, self.noise_seed)
            self.num_evaluations += self.step_size.evaluations
            rank_zero_info(self.step_size.describe(self.optimizer_choice.automatic))
        if self.step_size is not None and given.eps is None:
            self.step_options = replace(given, eps=self.step_size.eps)

    # ---- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Say what is tuned, how, and what memory it takes beside the model."""
        assert self.tuned_model is not None
        if self.step_options.eps_end is not None and self.trainer.max_steps < 1:
            raise SlzoError(
                f"model.eps_end {self.step_options.eps_end}: eps moves over trainer.max_steps, which is "
                f"{self.trainer.max_steps}; set it to the number of steps, or leave model.eps_end out"
            )
        layer, total = self.layer, self.model.num_parameters()
        chosen = "" if layer is None else f" Dominant layer: {layer} of {self.parts.num_layers} ({self.layer_origin})."
        rank_zero_info(
            f"Tuning {self.scope.describe()}: {self.tuned_model.tensors.num_elements:,} of {total:,} parameters by "
            f"{self.estimator.describe()}.{chosen}"
        )
        exchanged = self.tuned_model.exchanged
        if exchanged is not None and exchanged.quantized:
            rank_zero_info(
                f"Frozen layers are quantized ({method_of(self.model)}); what is tuned is {exchanged.source}."
            )
        memory = self.tuned_model.memory_mib(self.estimator, self.step_options.num_queries, self.optimizer_choice)
        rank_zero_info("Memory beside the model: " + ", ".join(f"{k} {in_words(v)} MiB" for k, v in memory.items()))

    def training_step(self, batch: TrainBatch, batch_idx: int) -> dict[str, Estimate]:
        """One zeroth-order step; callbacks are given what it learned."""
        assert self.tuned_model is not None and self.noise_seed is not None
        started, step = time.perf_counter(), self.global_step
        every = getattr(self.trainer, "log_every_n_steps", 1)
        recorder = self.recorder
        result = self.tuned_model.step(
            self.loss_of(batch, step) if recorder is None else recorder.loss(step, lambda: self.loss_of(batch, step)),
            self.estimator,
            cast("Optimizer", self.optimizers()),
            self.step_options,
            seed=self.noise_seed,
            step=step,
            max_steps=self.trainer.max_steps,
            step_size=self.step_size if self.optimizer_choice.automatic else None,
            measure_update=every > 0 and (step + 1) % every == 0,
            processes=self.datamodule.processes,
        )
        self._count(result.estimate)
        scheduler = cast("Any", self.lr_schedulers())
        if scheduler is not None:
            scheduler.step()
        self._log_step(batch, result, self.step_options.eps_at(step, self.trainer.max_steps), started)
        return {"estimate": result.estimate}

    def loss_of(self, batch: TrainBatch, step: int = 0, seed: int | None = None) -> Loss:
        """The loss of a batch over the rows of every process, as a function of what is tuned; samples are those of a step."""
        assert self.tuned_model is not None
        seed, processes = (self.noise_seed or 0) if seed is None else seed, self.datamodule.processes
        return self.tuned_model.loss(batch, self.datamodule.objective, self.evaluator, processes, seed, step)

    def _count(self, estimate: Estimate) -> None:
        self.num_evaluations += estimate.num_evaluations
        if estimate.finite:
            self._nonfinite_in_row = 0
            return
        self.num_nonfinite += 1
        self._nonfinite_in_row += 1
        if self._nonfinite_in_row >= self.max_nonfinite:
            if problem := self.datamodule.objective.problem():
                raise SlzoError(
                    f"{problem}; no step was taken {self._nonfinite_in_row} times in a row (model.max_nonfinite)"
                )
            raise SlzoError(
                f"training diverged: the loss was infinite or NaN {self._nonfinite_in_row} steps in a row, the last at step "
                f"{self.global_step}; lower the learning rate (model.optimizer.init_args.lr) or model.eps, or use "
                "model.dtype bfloat16 or float32"
            )

    def _log_step(self, batch: TrainBatch, result: StepResult, eps: float, started: float) -> None:
        estimate, seconds = result.estimate, time.perf_counter() - started
        projected = estimate.projected_grad
        values = {
            "train/loss": estimate.loss,
            "train/loss_plus": estimate.loss_plus,
            "train/loss_minus": estimate.loss_minus,
            "train/projected_grad": sum(projected) / len(projected),
            "train/abs_projected_grad": sum(map(abs, projected)) / len(projected),
            "train/lr": cast("Any", self.optimizers()).param_groups[0]["lr"],
            "train/eps": eps,
            "train/evaluations": float(self.num_evaluations),
            "train/step_seconds": seconds,
            "train/tokens_per_second": batch.packed.num_tokens / seconds,
            "train/peak_memory_gb": peak_memory_gb(self.device),
            "train/skipped_steps": float(self.num_nonfinite),
        }
        if result.update_norm is not None:
            values["train/update_norm"] = result.update_norm
        # tensors on the CPU: Lightning copies a number to the device at each step
        self.log_dict({name: torch.tensor(v) for name, v in values.items()}, batch_size=batch.packed.num_examples)
        self.log("loss", torch.tensor(estimate.loss), prog_bar=True, logger=False, batch_size=1)

    # ---- evaluation ---------------------------------------------------------------------------------------------------

    @property
    def evaluator(self) -> Evaluator:
        """Scores rows with the live weights."""
        tuned = self.tuned_model
        if tuned is None:
            return self.datamodule.evaluator(self.parts)
        return self.datamodule.evaluator(self.parts, tuned.logits, tuned.prompt_states)

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._score = RunningScore(self.datamodule.make_metrics(), self.device, self.datamodule.also)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Outcome]:
        """Score one batch of dev or held-out rows; callbacks are given what was found."""
        assert self._score is not None
        # dev rows are scored again and again, and their prefix is worth keeping
        outcome = self.evaluator(batch, keep_prefix=not self.trainer.testing)
        self._score.update(batch, outcome)
        return {"outcome": outcome}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        assert self._score is not None
        stage = "test" if self.trainer.testing else "val"
        values = {f"{stage}/{name}": value for name, value in self._score.compute().items()}
        self.log_dict(values, prog_bar=stage == "val")

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[tuple[int, dict[str, Any]]]:
        """For each held-out row its position in the split and its record, see :func:`slzo.evaluation.evaluator.records`."""
        written = records(batch, self.evaluator(batch))
        return [(row.position, record) for row, record in zip(batch.rows, written, strict=True)]

    # ---- checkpoints: what is tuned only ------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tuned tensors by the model's names, float32; the frozen model is not part of a checkpoint."""
        masters = {} if self.tuned_model is None else self.tuned_model.tensors.named_masters()
        return {name: master.detach() for name, master in masters.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tuned tensors into the masters and the model.

        Raises:
            SlzoError: They do not fit the model or the tuned layer.
        """
        if self.tuned_model is None:
            raise SlzoError(
                "nothing is tuned yet: a state dictionary alone does not say what its tensors are; use ckpt_path"
            )
        if (wrong := self.tuned_model.tensors.misfit(state_dict)) is not None:
            raise SlzoError(
                f"ckpt_path: tensor {wrong!r} of the checkpoint does not fit model {self.model_name!r} "
                f"with dominant layer {self.layer} and scope {self.scope.describe()!r}; use the options it was trained with"
            )
        self.tuned_model.tensors.load(state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what is needed to use the tensors elsewhere."""
        assert self.tuned_model is not None
        checkpoint["slzo"] = {
            "format": CHECKPOINT_FORMAT,
            **self.tuned_model.description(),
            "num_evaluations": self.num_evaluations,
            "model": self.model_name,
            "layer_origin": self.layer_origin,
            "dtype": self.dtype_name,
            "quantization": describe_quantization(self.quantization),
            "trust_remote_code": self.trust_remote_code,
            "noise_seed": self.noise_seed,
            "num_nonfinite": self.num_nonfinite,
            "onednn": self.parts.onednn,
            "step_size": None if self.step_size is None else self.step_size.to_dict(),
            "optimizer": self.optimizer_choice.classes,
            "projected_grads": list(self.tuned_model.history.sizes),
            "chat_template": self.datamodule.chat_template,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the counters and say where this run's options differ from those of the checkpoint."""
        note = checkpoint_note(checkpoint)
        if self.tuned_model is None:
            self._tune_as(note)
        elif not self.tuned_model.fits(note):
            raise SlzoError(
                "ckpt_path: holds other tensors, bases or masks than this module tunes already; load it into a new ZOModule"
            )
        else:
            self.tuned_model.check_base(note)
        self.num_nonfinite = note["num_nonfinite"]
        self.num_evaluations = note["num_evaluations"]
        self._take_step_size(note)
        if self.tuned_model is not None:
            self.tuned_model.history.sizes.extend(note.get("projected_grads", ()))
        self.noise_seed = note["noise_seed"]  # the directions go on as they began
        if different := changed_options(checkpoint, self.hparams):
            rank_zero_warn(
                f"these model options differ from the checkpoint's: {different}; the new ones are used, but seed, optimizer "
                "state and learning rate go on from the checkpoint"
            )
