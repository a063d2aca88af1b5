"""The LightningCLI of slzo: YAML and options in, one clear line out when they are wrong."""

import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from slzo.__main__ import COMMANDS
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.run_summary import RunSummary
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.module import ZOModule
from slzo.trainer import ZOTrainer

_EVALUATE = {"model", "dataloaders", "datamodule"}


class SlzoParser(LightningArgumentParser):
    """Reports a mistake in one line instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turn the parser's message into one line.

        Raises:
            SlzoError: Always.
        """
        raise SlzoError(one_line(message, self)) from ex


def one_line(message: str, parser: LightningArgumentParser) -> str:
    """The parser's message on one line, with what is allowed and the nearest known option or class."""
    text = " ".join(message.split())
    unknown = re.search(r"[Kk]ey '?\"?([\w.]+)'?\"? is not expected|[Uu]nrecognized arguments: (--[\w.]+)", text)
    unknown = unknown or re.search(r"No action for key '?\"?([\w.]+)", text) or re.search(r"does not accept nested key '?\"?([\w.]+)", text)
    if unknown:
        name = next(group for group in unknown.groups() if group).lstrip("-")
        known = sorted({action.dest for action in parser._actions if "." in action.dest})
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        return f"{name}: unknown option" + (f"; did you mean {near[0]}?" if near else "; see slzo COMMAND --help")
    return text


class SlzoCLI(LightningCLI):
    """Adds the profiler, the checkpoint and the summary, each with options of its own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beyond trainer, model and data."""
        parser.add_lightning_class_args(OutlierProfiler, "profiler")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.set_defaults(
            {
                "profiler.rule": {"class_path": "slzo.zo.selection.FirstOutlierLayer"},
                "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 3e-4}},
                "checkpoint.monitor": "val/loss",
                "checkpoint.mode": "min",
                "checkpoint.save_last": True,
                "checkpoint.save_on_exception": True,
                "checkpoint.filename": "step={step}",
                "checkpoint.auto_insert_metric_name": False,
            }
        )
        parser.link_arguments("model.model", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands and the arguments that the command line provides itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": _EVALUATE,
            "test": _EVALUATE,
            "profile": {"model", "datamodule"},
            "export": {"model", "datamodule"},
        }

    def _parse_ckpt_path(self) -> None:
        """Keep the options that were given: a checkpoint's own would silently win otherwise."""


def _run_config(args: Sequence[str]) -> list[str]:
    """The config that fit saved beside a checkpoint, for commands on that checkpoint without a config of their own."""
    if args[0] == "fit" or any(arg.split("=")[0] in ("-c", "--config") for arg in args):
        return []
    for position, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == "--ckpt_path":
            path = Path(value or (args[position + 1] if position + 1 < len(args) else ""))
            config = path.parent.parent / "config.yaml"
            return ["--config", str(config)] if path.is_file() and config.is_file() else []
    return []


def run(args: Sequence[str]) -> None:
    """Parse ``COMMAND --config FILE --OPTION VALUE ...`` and run it.

    Raises:
        SlzoError: Something about the options or files is wrong.
    """
    command, rest = args[0], list(args[1:])
    _filter_warnings()
    SlzoCLI(
        ZOModule,
        TaskDataModule,
        trainer_class=ZOTrainer,
        trainer_defaults={
            "logger": {"class_path": f"{TensorBoardLogger.__module__}.TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "", "default_hp_metric": False}},
            "max_steps": 1000,
            "val_check_interval": 100,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        parser_class=SlzoParser,
        parser_kwargs={name: {"description": text} for name, text in COMMANDS.items()},
        auto_configure_optimizers=False,
        args=[command, *_run_config(args), *rest],
    )


def _filter_warnings() -> None:
    """Silence advice that does not apply to forward-only training."""
    # the rows are packed in memory already, loading takes microseconds
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # written for automatic optimization; manual optimization counts the same steps here
    warnings.filterwarnings("ignore", message=".*every_n_train_steps.*")
    # the args are given on purpose, also when a test calls main([...])
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
