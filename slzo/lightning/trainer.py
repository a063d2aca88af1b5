"""Lightning's Trainer with slzo's defaults: its callbacks, its checkpoint files and one folder per run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.callbacks.defaults import with_defaults
from slzo.callbacks.rank_watch import RankWatch
from slzo.callbacks.run_record import RunRecord
from slzo.callbacks.time_limit import TimeLimit
from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.find import NAMES, RUNS, checkpoint_of_job, find_checkpoint
from slzo.lightning.checkpoint_io import AtomicCheckpointIO
from slzo.lightning.loggers import FolderLogger, RunLogger, log_dir_of, run_folder
from slzo.lightning.strategy import SHARDED, ShardedStrategy
from slzo.lightning.trainer_options import (
    TRAINER_DEFAULTS,
    check_callbacks,
    check_checkpoint_io,
    check_launcher,
    check_options,
    check_saving,
    limit_defaults,
    listed,
    take_time_limit,
)
from slzo.lightning.trainer_state import callback_of, folder_of, is_quick
from slzo.module import NO_ROWS, NOT_COMPILED, ZOModule
from slzo.private.lightning import is_compiled
from slzo.task_data import TaskData
from slzo.utils.console import rank_zero_print
from slzo.utils.environment import command_line
from slzo.utils.errors import SlzoError, one_line, short_repr
from slzo.utils.files import check_local
from slzo.utils.run_layout import CHECKPOINTS_FOLDER
from slzo.utils.signals import interrupts_restored
from slzo.utils.slurm import is_restarted, job_id


class ZOTrainer(Trainer):
    """Lightning's Trainer as the command line makes it: a run has a folder, checkpoints, a summary and a report.

    :mod:`slzo` has a complete example.

    Takes the options of :class:`lightning.pytorch.Trainer`, but refuses those that only make sense with back-propagation. It
    adds the missing callbacks of :mod:`slzo.callbacks.defaults`. Runs are written to ``runs/``, or below ``default_root_dir``.

    Its methods take a :class:`ZOModule` and, instead of data loaders, a :class:`slzo.datamodule.TaskDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        for name, value in {**TRAINER_DEFAULTS, **limit_defaults(kwargs)}.items():
            kwargs.setdefault(name, value)
        check_options(kwargs)
        check_local("trainer.default_root_dir", kwargs.get("default_root_dir"))
        limit = take_time_limit(kwargs)
        kwargs["logger"] = _run_logger(kwargs.get("logger"), kwargs.get("default_root_dir"))
        self._writes = kwargs["logger"] is not False
        callbacks = [*listed(kwargs.get("callbacks")), *([] if limit is None else [limit])]
        saves = kwargs.get("enable_checkpointing") is not False
        check_saving(callbacks, saves, self._writes)
        if saves and not self._writes:  # Lightning would write into the current folder
            callbacks = [c for c in callbacks if not isinstance(c, CheckpointCallback) or getattr(c, "dirpath", None)]
            saves = kwargs["enable_checkpointing"] = any(isinstance(c, CheckpointCallback) for c in callbacks)
        progress = kwargs.get("enable_progress_bar") is not False
        kwargs["callbacks"] = with_defaults(callbacks, checkpoints=saves, progress=progress)
        plugins = listed(kwargs.pop("plugins", None))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        if kwargs.get("strategy") == SHARDED:
            kwargs["strategy"] = ShardedStrategy()
        self._run_folders: set[Path] = set()
        self._has_fitted = False
        self._fitted: Path | None = None  # folder of the last fit, if it has checkpoints
        self._trained: tuple[LightningModule, LightningDataModule | None] | None = None
        cluster = None
        if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            try:
                # slzo saves and requeues the job between two steps; Lightning would do both in the middle of one
                plugins.append(cluster := SLURMEnvironment(auto_requeue=False))
            except RuntimeError as error:
                raise SlzoError(f"trainer: {one_line(error, None)}") from error
        try:
            super().__init__(**kwargs, plugins=plugins)
            if cluster is not None:
                cluster.validate_settings(self.num_devices, self.num_nodes)
            check_launcher(self, kwargs.get("strategy"))
            check_checkpoint_io(self.strategy.checkpoint_io)
        # RuntimeError: two callbacks would have the same state
        except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
            raise SlzoError(f"trainer: {one_line(error, None)}") from error

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

        Arguments are those of :meth:`lightning.pytorch.Trainer.fit`. ``ckpt_path`` can also be a run folder, or ``last`` or
        ``best`` of the newest run.

        Raises:
            SlzoError: The model is no :class:`ZOModule`, an option does not apply, or, without a checkpoint, an earlier fit of
                this trainer had another model or other rows.
        """
        model = _checked(model)
        limit = self.limit_test_batches
        if not is_quick(self) and (isinstance(limit, int) or limit != 1.0):  # 1 is one batch, 1.0 all of them
            raise SlzoError(
                f"trainer.limit_test_batches {limit}: fit scores all held-out rows; leave it out, and set "
                "data.num_test to the number of rows"
            )
        for clock in (callback_of(self, TimeLimit), callback_of(self, RunRecord)):
            if clock is not None:
                clock.begin()
        if datamodule is None and isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        _check_rows(train_dataloaders, datamodule)
        if isinstance(datamodule, TaskData):
            model.options.check_objective(datamodule.objective)
            metrics, maximized = datamodule.metric_names, datamodule.maximized_metrics
            check_callbacks(self.callbacks, metrics, maximized, logs_more=type(model) is not ZOModule)
        checkpoint = self._find(ckpt_path, to_continue=True)
        path, begun = (None, 0) if checkpoint is None else (checkpoint.path, checkpoint.step)
        if path is None and self._trained is not None and self._trained != (model, datamodule):
            # its callbacks keep the untuned score and the best state
            raise SlzoError(
                "fit: this trainer has trained before; make a new ZOTrainer for another model or other rows"
            )
        if checkpoint is not None and 0 < self.max_steps <= begun:
            more = "raise trainer.max_steps to continue, or score it"
            if not checkpoint.is_resumable:
                more = "it holds weights only, which cannot be trained further; score it"
            self._set_known(None)
            rank_zero_print(
                f"The checkpoint {path} already has all {begun} steps (trainer.max_steps {self.max_steps}); {more} with "
                "slzo test"
            )
            return
        del checkpoint  # so that its tensors can be freed after Lightning has loaded them
        with self._running(begun):
            try:
                super().fit(
                    model,
                    train_dataloaders,
                    val_dataloaders,
                    datamodule=datamodule,
                    ckpt_path=path,
                    weights_only=weights_only,
                )
            finally:
                if self.global_step > begun:
                    self._trained = (model, datamodule)
        folder = folder_of(self)
        self._has_fitted = True
        # absolute, since a script may change the current folder
        self._fitted = folder.absolute() if folder is not None and (folder / CHECKPOINTS_FOLDER).is_dir() else None

    @property
    def log_dir(self) -> str | None:
        """Folder of the run; ``None`` without a logger, unless ``default_root_dir`` is given."""
        return (log_dir_of(self) or super().log_dir) if self._writes else None

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

        Arguments are those of :meth:`lightning.pytorch.Trainer.test`. ``ckpt_path`` can also be ``last`` or ``best``; without it
        the current weights are scored, untuned or tuned.
        """
        with self._scoring(ckpt_path, model, dataloaders, datamodule) as path:
            return super().test(
                model, dataloaders, ckpt_path=path, verbose=verbose, datamodule=datamodule, weights_only=weights_only
            )

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Score dev rows; for ``ckpt_path`` see :meth:`test`."""
        with self._scoring(ckpt_path, model, dataloaders, datamodule) as path:
            return super().validate(
                model, dataloaders, ckpt_path=path, verbose=verbose, datamodule=datamodule, weights_only=weights_only
            )

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predict held-out rows; for ``ckpt_path`` see :meth:`test`."""
        with self._scoring(ckpt_path, model, dataloaders, datamodule) as path:
            return super().predict(
                model,
                dataloaders,
                datamodule=datamodule,
                return_predictions=return_predictions,
                ckpt_path=path,
                weights_only=weights_only,
            )

    @contextmanager
    def _running(self, begun: int = 0) -> Iterator[None]:
        """Prepare the context in which Lightning runs; see :func:`slzo.lightning.loggers.run_folder`."""
        if (watch := callback_of(self, RankWatch)) is not None:
            watch.watch_launcher(self)
        with interrupts_restored(), run_folder(self, self._run_folders, begun):
            yield

    def _find(self, ckpt_path: str | Path | None, to_continue: bool = False) -> Checkpoint | None:
        """Read a checkpoint; ``last`` and ``best`` are those of this trainer's run, otherwise of the newest one.

        Without a path, a training (``to_continue``) by slzo's command line in a SLURM job that was restarted continues the newest
        run of this job.
        """
        runs = RUNS if self.logger is None else self.logger.save_dir or self.default_root_dir
        root = runs if self._fitted is None else os.path.relpath(self._fitted)
        if ckpt_path is not None and str(ckpt_path) in NAMES and self._has_fitted and self._fitted is None:
            raise SlzoError(
                f"ckpt_path {str(ckpt_path)!r}: the run of this trainer has no checkpoints; leave out "
                "enable_checkpointing=False and logger=False, or give a file"
            )
        # a script may fit several times, and all its runs have the same command
        job = job_id() if to_continue and is_restarted() and command_line() is not None else None
        found = None
        if ckpt_path is not None:
            found = find_checkpoint(ckpt_path, root, to_continue=to_continue)
        elif job is not None:
            found = checkpoint_of_job(root, job)
        self._set_known(found)
        return found

    def _set_known(self, checkpoint: Checkpoint | None) -> None:
        if isinstance(self.strategy.checkpoint_io, AtomicCheckpointIO):
            self.strategy.checkpoint_io.known = checkpoint

    @contextmanager
    def _scoring(
        self, ckpt_path: str | Path | None, model: LightningModule | None, loaders: object, datamodule: object
    ) -> Iterator[str | None]:
        """Run Lightning with the path of the checkpoint to score; print that there is none, unless the model is tuned.

        Without a model, Lightning takes the one that was fitted, and its best checkpoint.
        """
        scored = None if model is None else _checked(model)
        _check_rows(loaders, datamodule)
        with self._running():
            checkpoint = self._find(ckpt_path)
            if checkpoint is None and scored is not None and not scored.is_tuned:
                rank_zero_print("No ckpt_path given: scoring the untuned model.")
            yield None if checkpoint is None else checkpoint.path


def _checked(model: object) -> ZOModule:
    """Refuse modules of other classes, which slzo's callbacks cannot use."""
    if is_compiled(model):
        raise SlzoError(NOT_COMPILED)
    if not isinstance(model, ZOModule):
        raise SlzoError(
            f"model {type(model).__name__}: ZOTrainer takes a ZOModule; use lightning.Trainer for other modules"
        )
    return model


def _check_rows(loaders: object, datamodule: object) -> None:
    """Refuse a call without rows, for which Lightning asks for methods of the module, and rows that are no data module."""
    if loaders is None and datamodule is None:
        raise SlzoError(NO_ROWS)
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise SlzoError(f"datamodule {short_repr(datamodule)}: is a {type(datamodule).__name__}; give a TaskDataModule")


def _run_logger(given: Any, root: str | Path | None) -> Any:
    """Return the loggers of a trainer: the given ones, or one that makes run folders below ``root``; ``False`` for none."""
    runs = RUNS if root is None else str(Path(root) / RUNS)
    if given in (None, True):
        return RunLogger(runs)
    if given is False or not listed(given):
        return False if root is None else FolderLogger(runs)
    for logger in listed(given):
        check_local("trainer.logger.save_dir", getattr(logger, "save_dir", None))
    return given
