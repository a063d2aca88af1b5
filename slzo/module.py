"""The LightningModule: Lightning's hooks around :mod:`slzo.fit` and :class:`slzo.zo.stepper.Stepper`."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from slzo.callbacks.time_limit import TimeLimit
from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.find import RUNS, find_checkpoint
from slzo.checkpoints.metadata import checkpoint_metadata
from slzo.data.batch import EvalBatch, TrainBatch
from slzo.datamodule import TaskDataModule
from slzo.evaluation.evaluator import Evaluator, Outcome, RunningScore, records
from slzo.fit import prepare
from slzo.lightning.run_context import run_context
from slzo.lightning.strategy import shard_group_of
from slzo.lightning.trainer_checks import check_torch, check_trainer
from slzo.lightning.trainer_state import (
    callback_of,
    folder_of,
    interval_of,
    is_last_step,
    validation_due,
)
from slzo.models.device_map import DeviceMap, DeviceMapOptions
from slzo.models.engine import DType, Engine
from slzo.models.loaded import name_of_loaded
from slzo.models.parts import ModelParts
from slzo.models.quantization import Quantization
from slzo.models.sharded import check_shard_group
from slzo.private.lightning import is_compiled
from slzo.training.build import adapt_rows
from slzo.training.checkpoint_content import make_metadata
from slzo.training.held_model import HeldModel, Place
from slzo.training.options import TrainingOptions
from slzo.training.resume import agreed_settings, apply_changed_settings
from slzo.training.run import Prepared
from slzo.training.scored import check_scored
from slzo.utils.argument_checks import ArgumentTypes, check_types
from slzo.utils.docs import with_lists
from slzo.utils.environment import versions
from slzo.utils.errors import SlzoError
from slzo.utils.process_group import check_agreement
from slzo.utils.runtime import peak_memory_gb
from slzo.utils.settings import flat_settings
from slzo.zo.estimators import ESTIMATORS, Estimator, default_estimator
from slzo.zo.optim import MakeOptimizer, OptimizerOptions, default_optimizer, set_rate
from slzo.zo.processes import Parallel
from slzo.zo.schedules import MakeScheduler
from slzo.zo.scopes import SCOPES, LayerScope, Scope
from slzo.zo.stepper import StepOptions, Stepper, StepResult
from slzo.zo.tuned_model import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_COMPILED = "model: torch.compile does not work with slzo's steps; pass a new ZOModule that is not compiled"
NO_ROWS = "model: needs the rows of a TaskDataModule; pass datamodule=... to the trainer"
_ENGINE = Engine()
_RECORDED = ("model", "dtype", "quantization", "seed", "layer", "max_nonfinite", "trust_remote_code")


@with_lists(SCOPES=SCOPES, ESTIMATORS=ESTIMATORS)
class ZOModule(LightningModule):
    """Tunes the dominant decoder layer of a language model by zeroth-order optimization; :mod:`slzo` has a complete example.

    Args:
        model: Built-in name (smollm2-135m, or gemma3-270m, fetched only with SLZO_ACCEPT_LICENSE=gemma in the environment),
            local Hugging Face folder, .gguf file, Hub id, or ID@REVISION for a branch, a tag or a commit of the Hub.
        layer: Dominant layer, counted from 0; by default the outlier profile chooses it.
        scope: What is tuned: {SCOPES}, or your own Scope; by default LayerScope, all of the dominant layer.
        estimator: How gradients are estimated: {ESTIMATORS}, or your own Estimator;
            by default LayerOutputPerturbation, or SPSA if the scope has several layers or eps or num_queries is given.
            Backprop is the first-order reference.
        eps: Size of the perturbation of weights, absolute, > 0; auto measures one that changes the loss by 1%.
        num_queries: Directions of weights per step; with SPSA each costs two evaluations of the suffix, see model.estimator for
            others.
        optimizer: Any torch optimizer that takes a dense gradient; by default SGD, or AdamW for LayerOutputPerturbation and
            Backprop. lr auto, the default, sets the rate from a measurement, or from the size of the weights. In Python give a
            class, or ``partial(AdamW, lr=1e-4)``.
        lr_scheduler: Learning-rate scheduler, stepped once per training step.
        dtype: Type of the model's weights. The tuned tensors always have a float32 master copy.
        quantization: Quantization of the frozen layers: int8, fp8 (torchao), nf4, fp4 (bitsandbytes), or a transformers config,
            given by its class path, with arguments as class_path and init_args. The tuned layer stays in full precision. A
            model that is already quantized needs none.
        device_map: Where the decoder layers are: auto, balanced, sequential, or a place by module name; auto and balanced use
            all GPUs, sequential fills one after the other. Layers that do not fit are in CPU memory and on disk. A place is
            the number of a GPU, cpu or disk. Tuned tensors, embeddings and head are always on the trainer's device.
        offload_folder: Folder for layers on disk that differ from the model's files.
        seed: Seed of the directions; by default that of seed_everything.
        parallel: What is divided among processes in training, rows or directions. With rows, each process has data.batch_size
            rows of its own. With directions, all processes have the same rows and each evaluates some of the step's points,
            such as the members of a population. A number N divides both: N processes have the same rows.
        engine: How the loss is computed: options for speed and memory.
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
        num_queries: int = 1,
        optimizer: MakeOptimizer | None = None,
        lr_scheduler: MakeScheduler | None = None,
        dtype: DType = "float32",
        quantization: Quantization | None = None,
        device_map: DeviceMap | None = None,
        offload_folder: str | None = None,
        seed: int | None = None,
        parallel: Parallel = "rows",
        engine: Engine = _ENGINE,
        max_nonfinite: int = 10,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # before any other name is set, so that these are the arguments
        check_types("model", _TYPES, {**locals(), "eps": 1.0 if eps == "auto" else eps})
        model = str(model)  # also of a path
        dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]  # also of a type
        scope = LayerScope() if scope is None else scope
        step = StepOptions(None if eps == "auto" else eps, num_queries)
        if estimator is None:
            estimator = default_estimator(scope.one_layer, step.has_weight_options)()
        if optimizer is None:
            optimizer = default_optimizer(estimator.perturbs == "weights")
        self.options = TrainingOptions(
            OptimizerOptions.of(optimizer, lr_scheduler),
            model=model,
            layer=layer,
            scope=scope,
            estimator=estimator,
            step=step,
            dtype=dtype,
            quantization=quantization,
            device_map=DeviceMapOptions.of(device_map, offload_folder, engine, quantization),
            seed=seed,
            parallel=parallel,
            engine=engine,
            max_nonfinite=max_nonfinite,
            trust_remote_code=trust_remote_code,
        )
        self._held = HeldModel(self.options)
        self._is_unchanged = False  # a fit has prepared it from the untuned model, and taken no step
        self._prepared: Prepared | None = None  # of the current or last fit
        self._saved_metrics: Mapping[str, float] = {}  # those of the resumed checkpoint, until a step is taken
        # submodules: strategies move them to their device and find what requires a gradient
        self.model: Any = None
        self.masters = nn.ParameterList()
        self._score: RunningScore | None = None
        # for loggers, checkpoints and model cards
        self.save_hyperparameters(
            {
                **{name: getattr(self.options, name) for name in _RECORDED},
                "scope": scope.describe(),
                "estimator": estimator.describe(),
                "optimizer": self.options.optimizer.name,
                "lr": self.options.optimizer.settings["lr"],
                "eps": eps,
                "num_queries": num_queries,
                **flat_settings("engine", asdict(self.options.engine)),
            }
        )

    @classmethod
    def from_model(cls, model: "PreTrainedModel", **options: Any) -> Self:
        """Tune a model that is already loaded, in place.

        Checkpoints name the folder or Hub id that it comes from (``model.name_or_path``), and other commands load it from there.
        They refuse it if its weights were changed after loading; call ``save_pretrained`` before the fit and load it from that
        folder then. With LoRA and PrefixTuning the model keeps modules of an adapter; export a checkpoint to save it.

        Args:
            model: Model that ``from_pretrained`` of transformers returned, neither quantized nor divided over devices.
            options: Options of :class:`ZOModule`, without model, dtype, quantization, device_map and offload_folder.

        Raises:
            SlzoError: The model or an option cannot be used.
        """
        own = ("model", "dtype", "quantization", "device_map", "offload_folder")
        if wrong := [name for name in own if name in options]:
            raise SlzoError(f"from_model: {wrong[0]} does not apply to a loaded model; leave it out")
        module = cls(model=name_of_loaded(model), dtype=cast("DType", str(model.dtype)), **options)
        module._held.given = model
        return module

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **options: Any,
    ) -> Self:
        """Return the tuned model of a checkpoint, to validate, test, predict, or tune it further.

        The model is loaded when it is first used, on the trainer's device. To continue a run, with its optimizer and its steps,
        call ``trainer.fit(ZOModule(...), datamodule=rows, ckpt_path=path)`` instead.

        Args:
            checkpoint_path: Checkpoint or folder of a run, or last or best of the newest run in runs.
            map_location: Not used: the trainer chooses the device.
            hparams_file: Not supported: a checkpoint has its options.
            strict: Only ``True`` is supported.
            weights_only: Not used: checkpoints hold tensors and primitives only.
            options: Options of :class:`ZOModule`; model, dtype and quantization are those of the checkpoint by default. To tune
                further, give scope, estimator and optimizer.

        Raises:
            SlzoError: The checkpoint cannot be read, an argument is not supported, or the model needs code that is not trusted.
        """
        if hparams_file is not None or strict is False:
            name = "strict=False" if hparams_file is None else "hparams_file"
            raise SlzoError(f"load_from_checkpoint: {name} does not apply to checkpoints of slzo; leave it out")
        start = find_checkpoint(checkpoint_path, RUNS)
        if start.metadata["trust_remote_code"] and not options.get("trust_remote_code"):
            raise SlzoError(
                f"checkpoint_path {start.path!r}: model {start.metadata['model']!r} runs its own code; if you trust it, give "
                "trust_remote_code=True"
            )
        module = cls(**{name: start.metadata[name] for name in ("model", "dtype", "quantization")} | options)
        module._held.start = start
        return module

    # ---- preparation --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Prepare a fit, see :func:`slzo.fit.prepare`; for other stages load the model."""
        trainer = self.trainer
        data = self.datamodule
        if is_compiled(self):
            raise SlzoError(NOT_COMPILED)
        check_torch(fits=stage == "fit")
        # after a stage Lightning leaves the module on the CPU, and moves it back only after this hook
        self.to(trainer.strategy.root_device)
        if self.options.device_map is not None:
            self.options.device_map.check_processes(trainer.world_size)
        if shard_group_of(trainer) is not None:
            self.options.check_shards()
        if self._held.untuned is not None:
            check_shard_group(self._held.untuned.placement, shard_group_of(trainer))
        if stage == "fit":
            if type(self).configure_optimizers is not ZOModule.configure_optimizers:
                raise SlzoError(
                    f"{type(self).__name__}.configure_optimizers: rates and records are those of model.optimizer and "
                    "model.lr_scheduler; do not override the method, and pass them to ZOModule"
                )
            check_trainer(trainer, data)
            # Lightning warns of it; both evaluations of a step must see the same function, so there is no dropout
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode")
            # a checkpoint has the weights after the step, as it should
            warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
            # known to ZOTrainer; a plain Trainer names its checkpoint only when it is loaded
            checkpoint: Checkpoint | None = getattr(trainer.strategy.checkpoint_io, "known", None)
            if self._held.start is not None:
                self._held.restart(self._place, resumes=checkpoint is not None)
                self._register()
            self._prepare(checkpoint)
            return
        adapt_rows(data, self.parts, self.options)
        if self.tuned_model is not None:
            self.tuned_model.clear_prefix()  # its keys are those of one data module

    def use_tuned(self, model: "PreTrainedModel") -> None:
        """Score a tuned model that is already loaded, such as an exported one, in place of ``model`` of the options."""
        self._held.given, self._held.given_is_tuned = model, True

    def _prepare(self, checkpoint: Checkpoint | None) -> None:
        """Do everything before the first step; a model that is already tuned is tuned further."""
        if self._is_unchanged:  # the fit before this one ended before its first step
            self._release()
        held = self._held
        is_new = held.tuned is None and checkpoint is None
        trainer = self.trainer
        data = self.datamodule
        folder = folder_of(trainer)  # a collective call: every process must make it
        run = run_context(trainer, data, folder if trainer.checkpoint_callbacks else None, checkpoint)
        limits = {"max_steps": run.max_steps, "val_check_interval": interval_of(trainer)}
        start = {**versions(), **agreed_settings(self.options, data), **limits}
        check_agreement(start, "start all with the same command and in the same environment")
        try:
            loaded = held.untuned if held.given is None else held.load(self._place)
            earlier = self._prepared.stepper if self._prepared is not None and run.steps_before > 0 else None
            prepared = prepare(self.options, data, run, loaded, held.tuned, earlier)
        except BaseException:
            if held.tuned is None:
                held.drop()  # its weights and modules may have changed
                self._register()
            raise
        prepared.model.parts.placement.barrier()
        done = 0 if checkpoint is None else checkpoint.step
        found = {"weights": prepared.model.base.short_hash(), "layer": prepared.model.layer, "steps": done}
        check_agreement({**prepared.fingerprint.hashes(), **found}, "give all the same files")
        if (limit := callback_of(trainer, TimeLimit)) is not None:
            limit.apply(trainer, prepared.time_plan)
        if held.untuned is None:
            held.untuned = prepared.untuned
        held.tuned = prepared.model
        self._prepared, self._is_unchanged = prepared, is_new
        self._register()

    @property
    def _place(self) -> Place:
        strategy = self.trainer.strategy
        return Place(strategy.root_device, shard_group_of(self.trainer), strategy.broadcast)

    def _register(self) -> None:
        """Make the model and the masters submodules, as far as there are any."""
        held = self._held
        model = None if held.untuned is None else held.untuned.model
        # as a submodule strategies would move it to one device, or send it to all processes
        if model is None or (self.options.device_map is None and self.trainer.world_size == 1):
            self.model = model
        else:
            vars(self)["model"] = model
        # without buffers, which DDP would send in each step
        masters = [] if held.tuned is None else held.tuned.tensors.masters
        if [*map(id, self.masters)] != [*map(id, masters)]:
            self.masters = nn.ParameterList(masters)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the module, together with the constants of the scope, which are not a registered submodule."""
        if self.tuned_model is not None:
            self.tuned_model.tensors.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def cpu(self) -> Self:
        """Move the module to the CPU, as :meth:`to`."""
        if self.tuned_model is not None:
            self.tuned_model.tensors.cpu()
        return super().cpu()

    @property
    def is_tuned(self) -> bool:
        """Whether it scores a tuned model."""
        return self._held.is_tuned

    @property
    def tuned_model(self) -> TunedModel | None:
        """The model with its tuned tensors; ``None`` before there are any."""
        return self._held.tuned

    @property
    def parts(self) -> ModelParts:
        """The model's parts, with the modules that the scope added; loaded when they are first used, which needs a trainer."""
        if self._held.tuned is not None:
            return self._held.tuned.parts
        found = self._held.parts(self._place)
        self._register()
        return found

    @property
    def datamodule(self) -> TaskDataModule:
        """The rows that the trainer was given."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, TaskDataModule):
            raise SlzoError(NO_ROWS)
        return datamodule

    @property
    def prepared(self) -> Prepared:
        """What the current or last fit is made of."""
        if self._prepared is None:
            raise SlzoError(
                "model: nothing was trained; call trainer.fit first, and call super().setup(stage) in a setup of your own"
            )
        return self._prepared

    @property
    def stepper(self) -> Stepper:
        """The stepper of the current fit."""
        return self.prepared.stepper

    def configure_optimizers(self) -> Any:
        """The optimizer over the masters."""
        stepper = self.stepper
        optimizer, scheduler = self.prepared.options.optimizer.build(stepper.model.tensors.masters)
        if stepper.rate is not None:  # for callbacks that log rates before the first step
            set_rate(optimizer, stepper.rate.rate(optimizer, stepper.estimator, stepper.options.num_queries))
        if scheduler is None:
            return optimizer
        # for callbacks that log rates at the interval at which a scheduler is stepped
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: TrainBatch, batch_idx: int) -> dict[str, Any]:
        """Take one training step; callbacks get its loss, its result, and the values that it did not log."""
        _check_batch(batch, TrainBatch)
        self._is_unchanged, self._saved_metrics = False, {}
        started = time.perf_counter()
        trainer = self.trainer
        every = getattr(trainer, "log_every_n_steps", 1)
        is_logged = every > 0 and (self.global_step + 1) % every == 0
        # at other steps no logger or monitor reads most values, and logging them takes up to a twentieth of a short step
        is_read = is_logged or validation_due(trainer) or is_last_step(trainer, self.global_step + 1)
        optimizer = cast("Optimizer", self.optimizers())
        scheduler = self.lr_schedulers()
        group = shard_group_of(trainer)
        before = (0, 0.0) if group is None else (group.num_bytes, group.seconds)
        result = self.stepper.step(batch, self.global_step, optimizer, scheduler, is_read)
        values = self._step_values(batch, result, time.perf_counter() - started)
        if group is not None:
            values["train/gathered_bytes"] = float(group.num_bytes - before[0])
            values["train/gathered_seconds"] = group.seconds - before[1]
        # tensors on the CPU: Lightning copies a number to the device at each step
        loss = torch.tensor(result.estimate.loss)
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=1)
        self.log("train/loss", loss, batch_size=batch.packed.num_examples)
        if is_read:
            self._log_values(values, batch)
            values = {}
        return {"loss": loss, "result": result, "values": values}

    def on_train_batch_end(self, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        """Log the remaining values of a step after which a callback ended the training."""
        if self.trainer.should_stop and (values := outputs.get("values")):  # a subclass may return the loss alone
            self._log_values(values, batch)

    def on_train_epoch_end(self) -> None:
        """Log the metrics of a checkpoint from the end of an epoch again, for callbacks: a resumed run ends this epoch anew."""
        if self._saved_metrics:
            self.log_dict(dict(self._saved_metrics), logger=False, sync_dist=self.trainer.world_size > 1)
            self._saved_metrics = {}

    def _log_values(self, values: Mapping[str, float], batch: TrainBatch) -> None:
        self.log_dict({name: torch.tensor(v) for name, v in values.items()}, batch_size=batch.packed.num_examples)

    def _step_values(self, batch: TrainBatch, result: StepResult, seconds: float) -> dict[str, float]:
        estimate = result.estimate
        values = {
            "train/lr": result.record.lr,
            "train/evaluations": float(self.stepper.num_evaluations),
            "train/step_seconds": seconds,
            "train/tokens_per_second": batch.packed.num_tokens / seconds,
            "train/peak_memory_gb": peak_memory_gb(self.device),
            "train/skipped_steps": float(self.stepper.num_nonfinite),
            **{f"train/{name}": value for name, value in result.report.values.items()},
        }
        if slopes := estimate.projected_grad:
            values["train/loss_plus"], values["train/loss_minus"] = estimate.loss_plus, estimate.loss_minus
            values["train/projected_grad"] = sum(slopes) / len(slopes)
            values["train/abs_projected_grad"] = sum(map(abs, slopes)) / len(slopes)
            values["train/eps"] = result.record.eps
        if estimate.grad_norm is not None:
            values["train/grad_norm"] = estimate.grad_norm
        if self.stepper.processes.world_size > 1:
            values["train/exchanged_bytes"] = float(result.exchanged_bytes)
        if result.update_norm is not None:
            values["train/update_norm"] = result.update_norm
        return values

    def teardown(self, stage: str) -> None:
        """Close the log of losses."""
        self.close_log()

    def close_log(self) -> None:
        """Close the log of losses, if there is one."""
        if self._prepared is not None:
            self.stepper.close_log()

    # ---- evaluation ---------------------------------------------------------------------------------------------------

    @property
    def evaluator(self) -> Evaluator:
        """Scores rows with the live weights."""
        return self.datamodule.evaluator(self.tuned_model or self.parts)

    def on_validation_start(self) -> None:
        """Check that the rows fit the checkpoint that the module was made from, unless another one was just loaded."""
        start = self._held.start
        if start is not None and self.trainer.ckpt_path is None:  # Lightning sets the path after setup
            check_scored(self.options, self.datamodule, start.metadata, self.trainer.state.fn)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_epoch_start(self) -> None:
        """Reset the scores."""
        self._score = self.datamodule.running_score(self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Outcome]:
        """Score one batch of dev or held-out rows; callbacks get the outcome."""
        _check_batch(batch, EvalBatch)
        # a fit scores the dev rows again and again, so their states are worth keeping
        outcome = self.evaluator(batch, keep_prefix=self.trainer.state.fn == "fit", log_likelihoods=False)
        self._running_score.update(batch, outcome)
        return {"outcome": outcome}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self.parts.placement.barrier()
        stage = "test" if self.trainer.testing else "val"
        selection = self.datamodule.selection_metric
        for name, value in self._running_score.compute().items():
            shown = stage == "val" and name in ("loss", selection.name, selection.metric)
            self.log(f"{stage}/{name}", value, prog_bar=shown)

    on_test_epoch_end = on_validation_epoch_end

    @property
    def _running_score(self) -> RunningScore:
        if self._score is None:
            raise SlzoError(
                "model: the scores were not reset; call super() in your on_validation_epoch_start and on_test_epoch_start"
            )
        return self._score

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[tuple[int, dict[str, Any]]]:
        """Return position in the split and record of each held-out row, see :func:`slzo.evaluation.evaluator.records`."""
        _check_batch(batch, EvalBatch)
        written = records(batch, self.evaluator(batch))
        return [(row.position, record) for row, record in zip(batch.rows, written, strict=True)]

    # ---- checkpoints: only what is tuned ------------------------------------------------------------------------------

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
        self._is_unchanged = False
        self.tuned_model.tensors.load(state_dict)
        return torch.nn.Module().load_state_dict({})  # nothing is missing or unexpected

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to use the tensors elsewhere."""
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        checkpoint["slzo"] = {**make_metadata(self.prepared, self.datamodule), "metrics": metrics}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make masters for the tensors of the checkpoint, unless they already fit, and warn of options that differ."""
        metadata = checkpoint_metadata(checkpoint)
        data = self.datamodule
        trainer = self.trainer
        loaded = Checkpoint(str(trainer.ckpt_path), checkpoint)
        in_fit = trainer.state.fn == "fit"
        if in_fit and self._prepared is not None and not self._prepared.resumed:
            # a trainer that did not know the checkpoint at setup, such as Lightning's own
            self._release()
            self._prepare(loaded)
        held = self._held
        is_first = held.tuned is None
        if held.tuned is None:
            held.restore(loaded, self._place)
            self._register()
        else:
            held.tuned.check(metadata)
        if is_first or held.start is not None:
            held.start = Checkpoint(loaded.path, {"slzo": metadata})  # its tensors are in the masters
        if not in_fit:
            if self.parts.virtual_tokens is not None:
                adapt_rows(data, self.parts, self.options)
            check_scored(self.options, data, metadata, trainer.state.fn)
            return
        self._saved_metrics = metadata.get("metrics", {})
        # before Lightning restores the optimizer
        apply_changed_settings(checkpoint, agreed_settings(self.options, data))

    def _release(self) -> None:
        """Remove the tuned tensors, and drop the model, whose weights they have changed."""
        if self._held.tuned is not None:
            self.close_log()
            self._held.release()
            self._prepared, self._is_unchanged = None, False
            self._register()


def _check_batch(batch: object, kind: type[TrainBatch | EvalBatch]) -> None:
    """Refuse a batch of another data loader."""
    if not isinstance(batch, kind):
        raise SlzoError(
            f"data: a batch is a {type(batch).__name__}, not one of TaskDataModule; do not override its data loaders, and pass "
            "your own rows through the task"
        )


# types of the options that are used before TrainingOptions checks the rest
_TYPES: ArgumentTypes = {
    "model": (str | PathLike, "a name or a folder; for a loaded model call ZOModule.from_model"),
    "scope": (Scope | None, "one such as slzo.zo.scopes.LayerScope()"),
    "estimator": (Estimator | None, "one such as slzo.zo.estimators.SPSA()"),
    "layer": (int | None, "a whole number, or None for the dominant layer"),
    "eps": (int | float, "a number, or auto"),
    "num_queries": (int, "a whole number"),
    "optimizer": ((Callable, NoneType), "a class of torch.optim, or functools.partial of one"),
    "lr_scheduler": ((Callable, NoneType), "functools.partial of a class of torch.optim.lr_scheduler"),
    "quantization": (str | dict | None, 'a name such as "int8", or a dictionary with class_path and init_args'),
    "device_map": (str | dict | None, 'a name such as "auto", or a dictionary of devices by module'),
    "seed": (int | None, "a whole number"),
    "parallel": (int | str, "rows, directions, or a number of processes"),
    "engine": (Engine, "one such as slzo.models.engine.Engine()"),
    "max_nonfinite": (int, "a whole number"),
    "trust_remote_code": (bool, "true or false"),
}
