"""The Trainer of Lightning with the checks and extra commands that slzo needs."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.base_scores import scores_on
from slzo.callbacks.answer_log import AnswerLog
from slzo.callbacks.exact_resume import ExactResume, FinishingFitLoop
from slzo.callbacks.last_checkpoint import BestCheckpoint
from slzo.callbacks.layer_turns import LayerTurns
from slzo.callbacks.memory_planner import MemoryPlanner, format_plan, free_bytes, setup_of
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.prediction_writer import PredictionWriter
from slzo.callbacks.replay_log import ReplayLog
from slzo.callbacks.run_forecast import RunForecast
from slzo.callbacks.run_history import RunHistory
from slzo.callbacks.run_record import RunRecord
from slzo.callbacks.run_report import RunReport
from slzo.callbacks.sample_predictions import SamplePredictions
from slzo.callbacks.step_progress import StepProgressBar
from slzo.callbacks.step_watch import StepWatch
from slzo.callbacks.stop_on_signal import FitSignals, StopOnSignal
from slzo.checkpoint import Checkpoint, read_checkpoint
from slzo.checkpoint_io import CheckpointFiles
from slzo.checkpoint_names import NAMES, named_checkpoint
from slzo.checkpoint_note import FIRST_WITH_FINGERPRINT
from slzo.console import say
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.experiments.lr_search import lr_search, make_grid
from slzo.experiments.replay import replay_run
from slzo.experiments.sweep import sweep
from slzo.experiments.sweep_plan import MAX_ERROR, NUM_ROWS, plan_sweep
from slzo.experiments.trial import Workbench
from slzo.export import ExportOptions, export_checkpoint
from slzo.export.facts import Format
from slzo.models.placement import to_device
from slzo.module import ZOModule
from slzo.run_folder import disk_faults_in_one_line, folder_of_run, run_folder
from slzo.trainer_checks import check_callbacks, check_trainer_options

_FULL_PRECISION = (None, 32, "32", "32-true")


class ZOTrainer(Trainer):
    """Lightning's Trainer, with ``profile``, ``sweep``, ``lr_search`` and ``export``, and ``predict`` to a file.

    Takes every option of :class:`lightning.pytorch.Trainer`. Those that only make sense with back-propagation are refused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        precision = kwargs.get("precision")
        if precision not in _FULL_PRECISION:
            raise SlzoError(
                f"trainer.precision {precision!r}: the masters of the tuned layer stay in float32, leave it at 32-true; for a "
                "model in half precision set model.dtype to bfloat16 or float16"
            )
        if kwargs.get("gradient_clip_val") is not None:
            raise SlzoError(
                f"trainer.gradient_clip_val {kwargs['gradient_clip_val']}: there is no back-propagated gradient to clip; "
                "lower model.optimizer.init_args.lr instead"
            )
        if kwargs.get("accumulate_grad_batches", 1) != 1:
            raise SlzoError(
                f"trainer.accumulate_grad_batches {kwargs['accumulate_grad_batches']}: a forward-only step needs no "
                "accumulation, raise data.batch_size or model.num_queries; data.tokens_per_pass runs a large batch in parts"
            )
        if kwargs.get("val_check_interval") == 0:
            raise SlzoError(
                "trainer.val_check_interval 0: give the number of steps between two validations, at least 1"
            )
        check_trainer_options(kwargs)
        self.command_line: str | None = None  # that started it, if one did
        callbacks = kwargs.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        if kwargs.get("enable_progress_bar") is not False and not kwargs.get("barebones"):
            # first, so that its line is finished before others say something at the end
            callbacks = [
                *([] if any(isinstance(c, ProgressBar) for c in callbacks) else [StepProgressBar()]),
                *callbacks,
            ]
        if kwargs.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, CheckpointCallback)]
        # then there is no run folder, and Lightning would write into the current one
        self._writes = kwargs.get("logger") is not False or kwargs.get("default_root_dir") is not None
        if not self._writes and kwargs.get("enable_checkpointing") is not False:
            callbacks = [c for c in callbacks if not isinstance(c, CheckpointCallback) or getattr(c, "dirpath", None)]
            kwargs["enable_checkpointing"] = any(isinstance(c, CheckpointCallback) for c in callbacks)
        for kind in (StepWatch, AnswerLog, LayerTurns):
            callbacks += [] if any(isinstance(c, kind) for c in callbacks) else [kind()]
        callbacks += [] if kwargs.get("fast_dev_run") or kwargs.get("barebones") else [RunForecast()]
        self._signals = StopOnSignal()
        callbacks += [] if any(isinstance(c, SamplePredictions) for c in callbacks) else [SamplePredictions()]
        callbacks.sort(key=lambda callback: isinstance(callback, RunReport))  # it reads what the others write
        records: list[Callback] = [] if kwargs.get("enable_checkpointing") is False else [ReplayLog()]
        records += [RunRecord(), MemoryPlanner(), RunHistory()]
        kwargs["callbacks"] = [ExactResume(), self._signals, *records, *callbacks]
        # the data module shards rows itself, so that a step sees the same rows on any number of processes
        kwargs["use_distributed_sampler"] = False
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise SlzoError(f"trainer: {' '.join(str(error).split())}") from error
        if isinstance(self.strategy.launcher, _MultiProcessingLauncher):
            raise SlzoError(
                f"trainer.strategy {kwargs.get('strategy')!r}: copies this process, which slzo cannot work with; use ddp"
            )
        self._signal_connector = FitSignals(self, self._signals)
        epochs, steps = self.fit_loop, self.fit_loop.epoch_loop
        self.fit_loop = FinishingFitLoop(self, epochs.min_epochs, epochs.max_epochs)
        self.fit_loop.epoch_loop = _TrainingEpochLoop(self, steps.min_steps, steps.max_steps)
        self._files = CheckpointFiles(self.strategy.checkpoint_io)
        self.strategy.checkpoint_io = self._files

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Find the dominant layer and tune it.

        Args:
            model: A ZOModule.
            train_dataloaders: Not needed with a data module, which may come in their place.
            val_dataloaders: Not needed with a data module.
            datamodule: A TaskDataModule.
            ckpt_path: Checkpoint to continue from, or ``last`` or ``best`` for the newest run's.
            args: Passed on.
            kwargs: Passed on.
        """
        if datamodule is None and isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        if isinstance(model, ZOModule) and isinstance(datamodule, TaskDataModule):
            model.check_training(datamodule)
            for callback in self.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, BestCheckpoint):
                    callback.watch(f"val/{datamodule.judge.name}", datamodule.judge.mode)
            check_callbacks(self.callbacks, datamodule.metric_names("val"))  # type: ignore[attr-defined]
            model.optimizer_choice.check_schedule(self.max_steps or -1)
        checkpoint = self._find(ckpt_path)
        if isinstance(model, ZOModule):
            _check_layer(model, checkpoint)
            model.start_from(checkpoint)
        path, begun = (None, 0) if checkpoint is None else (checkpoint.path, int(checkpoint.content["global_step"]))
        with run_folder(self, begun), self._signals.handling(self.world_size):
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, path, *args, **kwargs)

    @property
    def log_dir(self) -> str | None:
        """One of each run; without a logger none, unless ``default_root_dir`` is given."""
        return (folder_of_run(self) or super().log_dir) if self._writes else None

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Score held-out rows.

        Args:
            model: A ZOModule.
            dataloaders: Not needed with a data module.
            ckpt_path: Checkpoint whose tuned layer is scored, or ``last`` or ``best``; without it the untuned model is scored.
            args: Passed on.
            kwargs: Passed on.
        """
        with run_folder(self):
            return super().test(model, dataloaders, self._path(ckpt_path, model), *args, **kwargs)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Score dev rows.

        Args:
            model: A ZOModule.
            dataloaders: Not needed with a data module.
            ckpt_path: Checkpoint whose tuned layer is scored, or ``last`` or ``best``; without it the untuned model is scored.
            args: Passed on.
            kwargs: Passed on.
        """
        with run_folder(self):
            return super().validate(model, dataloaders, self._path(ckpt_path, model), *args, **kwargs)

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        output: str | None = None,
    ) -> Any:
        """Write predictions of the held-out rows as JSON Lines.

        Args:
            model: A ZOModule.
            dataloaders: Not needed with a data module.
            datamodule: A TaskDataModule.
            return_predictions: Also return what predict_step returned, batch by batch.
            ckpt_path: Checkpoint whose tuned layer is used, or ``last`` or ``best``; without it the untuned model is used.
            weights_only: Passed on.
            output: File to write; left out, predictions.jsonl in the run's folder.
        """
        writer = PredictionWriter(output)
        path = self._path(ckpt_path, model)
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        callbacks.append(writer)
        try:
            with run_folder(self):
                return super().predict(model, dataloaders, datamodule, bool(return_predictions), path, weights_only)
        finally:
            callbacks.remove(writer)

    def plan(self, model: ZOModule, datamodule: LightningDataModule | None = None) -> None:
        """Estimate what memory fit would take, from the model's config and the rows; the model is not loaded.

        Args:
            model: A ZOModule.
            datamodule: A TaskDataModule.
        """
        rows = self._attach_rows(model, datamodule)
        device = self.strategy.root_device
        say(format_plan(setup_of(model, rows, self.max_steps, device), free_bytes(device)))

    def profile(self, model: ZOModule, datamodule: LightningDataModule | None = None) -> None:
        """Only find the dominant layer: print, draw and save the outlier profile.

        Args:
            model: A ZOModule.
            datamodule: A TaskDataModule, whose prompts are used.
        """
        profiler = self._profiler()
        with run_folder(self):
            self.attach(model, datamodule)
            profiler.run(self, model)
            if self.logger is not None:
                self.logger.finalize("success")
        if self.log_dir is not None:
            say(f"Files      {self.log_dir}")

    def replay(
        self,
        model: ZOModule,
        datamodule: LightningDataModule | None = None,
        run: str = "",
        step: int | None = None,
        output: str | None = None,
    ) -> None:
        """Rebuild the tuned weights of a run at any step from its log, without data and forward passes.

        Args:
            model: A ZOModule with the options of the run; the command line takes them from it.
            datamodule: Not needed.
            run: Folder of the run.
            step: How many steps; left out, all of the log.
            output: Checkpoint to write, for validate, test, predict and export; left out, checkpoints/replay-step=STEP.ckpt in
                the run's folder.
        """
        with disk_faults_in_one_line():
            replay_run(model, Path(run), step, self.max_steps, None if output is None else Path(output))

    def sweep(
        self,
        model: ZOModule,
        datamodule: LightningDataModule | None = None,
        layers: list[int] | None = None,
        steps: int = 120,
        seeds: list[int] | None = None,
        directions: int = 20,
        num_rows: int = NUM_ROWS,
        max_error: float = MAX_ERROR,
        seconds: float | None = None,
        sensitivity_only: bool = False,
        output: str | None = None,
    ) -> None:
        """Tune every decoder layer for the same steps and seeds and compare: sweep.csv, sweep.json, sweep.png.

        Interrupted, it goes on where it stopped when the command is given again. The same command in several terminals, or on
        several machines that share the folder, shares the work out; give each its processor cores (OMP_NUM_THREADS).

        Args:
            model: A ZOModule; its scope is tuned in each layer.
            datamodule: A TaskDataModule.
            layers: Layers to train, counted from 0; left out, all. The sensitivity is measured in all layers.
            steps: Steps of each training.
            seeds: One training a layer for each; left out, that of seed_everything.
            directions: Random directions for the sensitivity of a layer, at most; at least 20.
            num_rows: Training rows that the sensitivity is measured on, the same for all layers.
            max_error: A layer's measurement ends when its standard error is below this share of it; 0 takes all directions.
            seconds: Layers that are done earlier go on until this much training time is used. The states that enter them are
                computed before. The dev rows are scored on the way: sweep_curves.png shows the loss over steps
                and over seconds, and the verdict is about both.
            sensitivity_only: Train nothing.
            output: Folder of the results; left out, sweeps/MODEL-TASK.
        """
        with disk_faults_in_one_line():
            bench = self._bench(model, datamodule, "sweep")
            steps = 0 if sensitivity_only else steps
            num_layers, own_seeds = model.parts.num_layers, bench.seeds(seeds)
            plan = plan_sweep(num_layers, layers, steps, own_seeds, directions, num_rows, seconds, max_error)
            sweep(bench, plan, lambda: self._profiler().measure(self, model), output)

    def lr_search(
        self,
        model: ZOModule,
        datamodule: LightningDataModule | None = None,
        lrs: list[float] | None = None,
        eps: list[float] | None = None,
        steps: int = 40,
        seeds: list[int] | None = None,
        output: str | None = None,
    ) -> None:
        """Try learning rates (and eps) for a few steps each and recommend one: lr_search.json.

        All trials start from the same weights and see the same rows and directions. Interrupted, it goes on where it stopped.

        Args:
            model: A ZOModule.
            datamodule: A TaskDataModule.
            lrs: Learning rates to try; left out, seven around the configured or measured one, from 1/30 to 30 times of it.
            eps: Sizes of the perturbation to try; left out, the configured one.
            steps: Steps of each trial.
            seeds: Each pair is tried with each; left out, that of seed_everything.
            output: Folder of the results; left out, lr_searches/MODEL-TASK.
        """
        with run_folder(self):
            bench = self._bench(model, datamodule, "lr_search")

            @cache
            def layer() -> int | None:
                known = model.layer is not None or not model.scope.needs_layer
                return model.layer if known else self._profiler().run(self, model).dominant_layer

            grid = make_grid(lrs, eps, steps, bench.seeds(seeds), lambda: bench.own_step(layer()))
            lr_search(bench, grid, layer(), output)

    def _bench(self, model: ZOModule, datamodule: LightningDataModule | None, command: str) -> Workbench:
        rows = self.attach(model, datamodule)
        model.check_training(rows)
        if self.world_size > 1:
            raise SlzoError(
                f"trainer.devices {self.world_size}: {command} shares out whole trainings, not rows; set trainer.devices to 1"
            )
        return Workbench(model, rows)

    def attach(self, model: ZOModule, datamodule: LightningDataModule | None) -> TaskDataModule:
        """Give model and rows to each other and load them, for work outside of Lightning's loops."""
        rows = self._attach_rows(model, datamodule)
        model.load(rows)
        to_device(model.model, self.strategy.root_device)
        return rows

    def _attach_rows(self, model: ZOModule, datamodule: LightningDataModule | None) -> TaskDataModule:
        """The same without the model."""
        if not isinstance(datamodule, TaskDataModule):
            raise SlzoError("this command needs a TaskDataModule: pass datamodule=...")
        self._data_connector.attach_data(model, datamodule=datamodule)
        datamodule.prepare_data()
        datamodule.setup("fit")
        return datamodule

    def _profiler(self) -> OutlierProfiler:
        profiler = next((c for c in self.callbacks if isinstance(c, OutlierProfiler)), None)  # type: ignore[attr-defined]
        if profiler is None:
            raise SlzoError("trainer.callbacks: no OutlierProfiler among them; add one, or set model.layer")
        return profiler

    def export(
        self,
        model: ZOModule,
        output: str,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        format: Format | None = None,
        base_model: str | None = None,
        base: str | None = None,
        push_to_hub: str | None = None,
    ) -> None:
        """Write what was tuned to a folder that others can use, with a model card.

        Args:
            model: Only its trust_remote_code is used; the checkpoint names its base model.
            output: Folder to write.
            datamodule: Its rows are scored with base.
            ckpt_path: Checkpoint to export, or ``last`` or ``best`` of the newest run.
            format: adapter (peft and, for LoRA and ActivationSubspace, vLLM; kilobytes), merged (a Hugging Face folder), or delta
                (the tuned tensors alone), or gguf (one file for llama.cpp; Llama models); left out, an adapter where what was
                tuned is of low rank, else merged.
            base_model: Hub id of the base model, where slzo does not know it: adapter and card name it.
            base: Another copy of the base model (folder, GGUF file or Hub id); the adapter is scored on it, for the card.
            push_to_hub: Also upload the folder to this repository of the Hugging Face Hub, as in me/my-model.
        """
        found = self._find(ckpt_path)
        if found is None:
            raise SlzoError("ckpt_path: export needs a checkpoint; give --ckpt_path FILE, or --ckpt_path best")
        options = ExportOptions(output, format, base_model, push_to_hub, model.trust_remote_code)
        score = None
        if base is not None and isinstance(datamodule, TaskDataModule):
            score = partial(scores_on, base, found, datamodule)
        with disk_faults_in_one_line():
            done = export_checkpoint(found, options, score)
            say(f"Wrote {done.folder}, {done.base}")

    def _find(self, ckpt_path: str | Path | None) -> Checkpoint | None:
        """A checkpoint, read; ``last`` and ``best`` are the newest run's."""
        if ckpt_path is None:
            return None
        if str(ckpt_path) in NAMES:
            root = self.logger.save_dir if self.logger is not None else self.default_root_dir
            name, ckpt_path = ckpt_path, named_checkpoint(str(ckpt_path), root or self.default_root_dir)
            say(f"Using the {name} checkpoint of the newest run, {ckpt_path}")
        self._files.known = found = read_checkpoint(ckpt_path)
        if found.note["format"] < FIRST_WITH_FINGERPRINT:
            say(
                f"{found.path} is of a former format, without a fingerprint: whether the base model is the same is not checked"
            )
        return found

    def _path(self, ckpt_path: str | Path | None, model: LightningModule | None) -> str | None:
        """Path of the checkpoint to score, which is found; says that there is none, unless the model was just fitted."""
        checkpoint = self._find(ckpt_path)
        if checkpoint is None and getattr(model, "tuned_model", None) is None:
            say("No --ckpt_path given: scoring the untuned model.")
        return None if checkpoint is None else checkpoint.path


def _check_layer(model: ZOModule, checkpoint: Checkpoint | None) -> None:
    """Refuse to continue a checkpoint with another layer than its own."""
    tuned = None if checkpoint is None else checkpoint.note["layer"]
    if tuned is not None and model.layer not in (None, tuned):
        raise SlzoError(
            f"model.layer {model.layer}: the checkpoint tunes layer {tuned}; leave model.layer out to continue it, or "
            "start without --ckpt_path"
        )
