"""The Trainer of Lightning with the checks and extra commands that slzo needs."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.prediction_writer import PredictionWriter
from slzo.callbacks.step_progress import StepProgressBar
from slzo.checkpoint import newest_checkpoint, read_checkpoint
from slzo.console import say
from slzo.errors import SlzoError
from slzo.export import export_checkpoint
from slzo.module import ZOModule

_FULL_PRECISION = (None, 32, "32", "32-true")


class ZOTrainer(Trainer):
    """Lightning's Trainer, with ``profile`` and ``export``, and ``predict`` to a file.

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
                "accumulation, raise data.batch_size or model.num_queries instead"
            )
        if kwargs.get("val_check_interval") == 0:
            raise SlzoError(
                "trainer.val_check_interval 0: give the number of steps between two validations, at least 1"
            )
        self.resume_path: str | None = None
        callbacks = kwargs.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        if kwargs.get("enable_progress_bar") is not False and not kwargs.get("barebones"):
            callbacks += [] if any(isinstance(c, ProgressBar) for c in callbacks) else [StepProgressBar()]
        if kwargs.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        kwargs["callbacks"] = callbacks
        # the data module shards rows itself, so that a step sees the same rows on any number of processes
        kwargs["use_distributed_sampler"] = False
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise SlzoError(f"trainer: {' '.join(str(error).split())}") from error

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Find the dominant layer and tune it.

        Args:
            model: A ZOModule.
            train_dataloaders: Not needed with a data module.
            val_dataloaders: Not needed with a data module.
            datamodule: A TaskDataModule.
            ckpt_path: Checkpoint to continue from, or ``last`` for the newest run's.
            weights_only: Passed to torch.load.
        """
        self.resume_path = self._find(ckpt_path)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, self.resume_path, weights_only)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Score held-out rows.

        Args:
            model: A ZOModule.
            dataloaders: Not needed with a data module.
            ckpt_path: Checkpoint whose tuned layer is scored, or ``last``; without it the untuned model is scored.
            verbose: Print the result.
            datamodule: A TaskDataModule.
            weights_only: Passed to torch.load.
        """
        self._announce(model, ckpt_path)
        return super().test(model, dataloaders, self._find(ckpt_path), verbose, datamodule, weights_only)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Score dev rows.

        Args:
            model: A ZOModule.
            dataloaders: Not needed with a data module.
            ckpt_path: Checkpoint whose tuned layer is scored, or ``last``; without it the untuned model is scored.
            verbose: Print the result.
            datamodule: A TaskDataModule.
            weights_only: Passed to torch.load.
        """
        self._announce(model, ckpt_path)
        return super().validate(model, dataloaders, self._find(ckpt_path), verbose, datamodule, weights_only)

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
            ckpt_path: Checkpoint whose tuned layer is used, or ``last``; without it the untuned model is used.
            weights_only: Passed to torch.load.
            output: File to write; left out, predictions.jsonl in the run's folder.
        """
        writer = PredictionWriter(output)
        self._announce(model, ckpt_path)
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        callbacks.append(writer)
        try:
            return super().predict(
                model, dataloaders, datamodule, bool(return_predictions), self._find(ckpt_path), weights_only
            )
        finally:
            callbacks.remove(writer)

    def profile(
        self,
        model: ZOModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Only find the dominant layer: print, draw and save the outlier profile.

        Args:
            model: A ZOModule.
            datamodule: A TaskDataModule, whose prompts are used.
            ckpt_path: Not used; accepted so that a config saved by fit can be given.
            weights_only: Not used, as ckpt_path.
        """
        profiler = next((c for c in self.callbacks if isinstance(c, OutlierProfiler)), None)  # type: ignore[attr-defined]
        if profiler is None:
            raise SlzoError("trainer.callbacks: no OutlierProfiler among them; add one to profile")
        if datamodule is None:
            raise SlzoError("profile needs a TaskDataModule: pass datamodule=...")
        self._data_connector.attach_data(model, datamodule=datamodule)
        datamodule.prepare_data()
        datamodule.setup("fit")
        profiler.run(self, model)
        if self.logger is not None:
            self.logger.finalize("success")
        if self.log_dir is not None:
            say(f"Files      {self.log_dir}")

    def export(
        self,
        model: ZOModule,
        output: str,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the model with the tuned layer merged, as a Hugging Face folder.

        Args:
            model: Not used; the checkpoint names its base model.
            output: Folder to write.
            datamodule: Not used.
            ckpt_path: Checkpoint whose tuned layer is merged, or ``last``.
            weights_only: Not used; accepted so that a config saved by fit can be given.
        """
        found = self._find(ckpt_path)
        if found is None:
            raise SlzoError("ckpt_path: export needs a checkpoint; give --ckpt_path FILE, or --ckpt_path last")
        say(f"Wrote {export_checkpoint(found, output)}")

    def _find(self, ckpt_path: str | Path | None) -> str | None:
        """A checked path; ``last`` becomes the newest run's last checkpoint."""
        if ckpt_path is None:
            return None
        if str(ckpt_path) == "last":
            root = self.logger.save_dir if self.logger is not None else self.default_root_dir
            ckpt_path = newest_checkpoint(root or self.default_root_dir)
            say(f"Using the newest checkpoint, {ckpt_path}")
        read_checkpoint(ckpt_path)
        return str(ckpt_path)

    def _announce(self, model: LightningModule | None, ckpt_path: str | Path | None) -> None:
        # a module that was just fitted is not untuned
        if ckpt_path is None and getattr(model, "tuned", None) is None:
            say("No --ckpt_path given: scoring the untuned model.")
