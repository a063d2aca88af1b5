"""The LightningCLI of slzo: YAML and options in, one clear line out when they are wrong."""

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.callbacks.last_checkpoint import BestCheckpoint, LastCheckpoint
from slzo.callbacks.loss_guard import LossGuard
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.run_report import RunReport
from slzo.callbacks.run_summary import RunSummary
from slzo.callbacks.sample_predictions import SamplePredictions
from slzo.callbacks.step_watch import StepWatch
from slzo.checkpoint_names import NAMES, named_checkpoint
from slzo.class_paths import imported_path, told_error, told_place
from slzo.cli_auto import spelled_out, with_words
from slzo.cli_errors import check_nulls, one_line, with_option
from slzo.cli_help import add_help_all, in_order, short_help
from slzo.commands import COMMANDS, FILLED, Command
from slzo.config_files import check_config_file
from slzo.console import say
from slzo.constructor_errors import constructors_told
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.folder_logger import FolderLogger
from slzo.module import ZOModule
from slzo.renames import translate
from slzo.run_trainer import CHECKPOINT_DEFAULTS, LOGGER_DEFAULTS, RUNS, TRAINER_DEFAULTS, runs_below
from slzo.runtime import bound_kernel_caches, keep_freed_memory
from slzo.tasks.template import TemplateTask  # noqa: F401  --data.task.help knows it by its name then
from slzo.trainer import ZOTrainer
from slzo.zo.optim import AUTO_LR

_TRAINER_DEFAULTS = {
    "logger": {
        "class_path": f"{TensorBoardLogger.__module__}.TensorBoardLogger",
        "init_args": dict(LOGGER_DEFAULTS),
    },
    **TRAINER_DEFAULTS,
}
# how Lightning begins the config that it saves in a run folder
_SAVED_CONFIG = "# lightning.pytorch=="


class SlzoParser(LightningArgumentParser):
    """Reports a mistake in one line instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a SlzoError with the parser's message on one line."""
        raise SlzoError(one_line(message, self)) from ex

    command: Command | None = None
    """That its options are of; a parser of a class has none."""

    def format_help(self) -> str:  # type: ignore[override]
        """The short help of a command; of a class all there is."""
        if self.command is None:
            return str(super().format_help())
        return short_help(self, self.command.name, self.command.own_help)

    def format_all(self) -> str:
        """Every option: the command's own first, Lightning's last."""
        self._action_groups[:] = in_order(self._action_groups)  # type: ignore[index]
        self.usage = f"slzo {self.command.name if self.command else ''} [--config FILE] [--OPTION VALUE ...]"
        return str(super().format_help())

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The config as YAML, as a user would write it."""
        return with_words(str(super().dump(*args, **kwargs)))


class SlzoCLI(LightningCLI):
    """Adds the profiler, the checkpoint and the summary, each with options of its own."""

    def __init__(self, *args: Any, command: Command | None, typed: str | None, **kwargs: Any) -> None:
        self._command = command  # the other commands' options are not looked up: that would take most of a short run
        self._typed = typed
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beyond trainer, model and data."""
        parser.add_lightning_class_args(OutlierProfiler, "profiler")
        parser.add_lightning_class_args(LossGuard, "guard")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.add_lightning_class_args(SamplePredictions, "samples")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(StepWatch, "watch")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                "profiler.rule": {"class_path": "slzo.zo.selection.Auto"},
                "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": AUTO_LR}},
                **{f"checkpoint.{name}": value for name, value in CHECKPOINT_DEFAULTS.items()},
            }
        )
        parser.link_arguments("model.model", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command and the arguments of its method that are no options."""
        return {} if self._command is None else {self._command.name: set(FILLED)}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        add_help_all(parser)
        parser.command = COMMANDS[subcommand]  # type: ignore[attr-defined]
        for name, kind in (("ckpt_path", str | None), ("weights_only", bool | None)):
            if name not in self._subcommand_method_arguments[subcommand]:
                note = "Not used; accepted so that a config saved by fit can be given."
                parser.add_argument(f"--{name}", type=kind, default=None, help=note)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what a user's own file raises when it is imported for a class path is one line."""
        try:
            super().parse_arguments(parser, args)
        except SlzoError:
            raise
        except Exception as error:
            path = imported_path(error.__traceback__)
            if path is None:
                raise
            told = f"{path.rpartition('.')[0]} cannot be imported ({told_error(error)}){told_place(error)}"
            raise SlzoError(f"class path {path!r}: {told}") from error

    def before_instantiate_classes(self) -> None:
        """Refuse what the parser lets pass; runs land below ``trainer.default_root_dir`` where it is given."""
        config = self.config.get(str(self.subcommand), self.config)
        check_nulls(self._parser(self.subcommand), config)
        root, place = config.get("trainer.default_root_dir"), "trainer.logger.init_args.save_dir"
        if root is not None and config.get(place) == RUNS:
            config[place] = runs_below(root)

    def instantiate_classes(self) -> None:
        """Make trainer, model and data; what a class says of its arguments is one line."""
        with constructors_told():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; a run without a logger has a folder of its own too."""
        if self._get(self.config_init, "trainer.logger") is False:
            if self._command is None or self._get(self.config_init, "trainer.default_root_dir") is not None:
                self.save_config_callback = None
            else:
                kwargs["logger"] = FolderLogger(RUNS)
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer, ZOTrainer):
            trainer.command_line = self._typed
        return trainer

    def _set_seed(self) -> None:
        """Seed everything; a seed out of range is a SlzoError."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise SlzoError(f"seed_everything: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Keep the options that were given: a checkpoint's own would silently win otherwise."""


def _options(args: Sequence[str], *names: str) -> list[tuple[int, str, str]]:
    """Where some options have their values on the command line, what stands before each in its place, and the value."""
    found = []
    for position, arg in enumerate(args):
        name, given, value = arg.partition("=")
        if name in names and given:
            found.append((position, f"{name}=", value))
        elif name in names and position + 1 < len(args):
            found.append((position + 1, "", args[position + 1]))
    return found


def _resolve_checkpoint(args: Sequence[str]) -> list[str]:
    """Options in which ``last`` or ``best`` is the newest run's checkpoint, and its config is taken up where that is wanted.

    Where the logger's folder is known only from a config, the trainer looks for it there.
    """
    if _options(args, "-c", "--config"):
        return list(args)
    runs = _options(args, "--run") if args[0] == "replay" else []
    if runs and (config := Path(runs[-1][2]) / "config.yaml").is_file():
        return [args[0], f"--config={config}", *args[1:]]
    checkpoints = _options(args, "--ckpt_path")
    if not checkpoints:
        return list(args)
    checkpoint = checkpoints[-1][2]
    folders = _options(args, "--trainer.logger.save_dir", "--trainer.logger.init_args.save_dir")
    roots = _options(args, "--trainer.default_root_dir")
    folder = folders[-1][2] if folders else runs_below(roots[-1][2]) if roots else RUNS
    if checkpoint in NAMES and Path(folder).is_dir():
        name, checkpoint = checkpoint, str(named_checkpoint(checkpoint, folder))
        say(f"Using the {name} checkpoint of the newest run, {checkpoint}")
        args = [*args, f"--ckpt_path={checkpoint}"]
    config = Path(checkpoint).parent.parent / "config.yaml"
    if COMMANDS[args[0]].takes_run_config and Path(checkpoint).is_file() and config.is_file():
        return [args[0], f"--config={config}", *args[1:]]
    return list(args)


def _read_configs(args: Sequence[str]) -> list[str]:
    """Options in which configs saved by former versions are handed over with the present names; others are only looked at."""
    translated = list(args)
    for place, before, value in _options(args, "-c", "--config"):
        path = Path(value)
        if not _exists(path):  # options themselves, or nothing: the parser says so
            continue
        config = check_config_file(path)
        saved = path.read_text(encoding="utf-8").startswith(_SAVED_CONFIG)
        renamed = translate(config) if saved else []
        if renamed:
            say(f"{value}: saved by a former version; read {', '.join(renamed)}")
            translated[place] = before + yaml.safe_dump(config)
    return translated


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # options in the place of a path may be too long for one
        return False


def run(args: Sequence[str]) -> None:
    """Parse ``COMMAND --config FILE --OPTION VALUE ...`` and run it.

    Raises:
        SlzoError: Something about the options or files is wrong.
    """
    _filter_warnings()
    keep_freed_memory()
    bound_kernel_caches()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # class paths of the user's own files
    try:
        build(_read_configs(_resolve_checkpoint(args)), typed=shlex.join(["slzo", *args]))
    except SlzoError as error:
        raise SlzoError(with_option(str(error), args)) from error
    except MisconfigurationException as error:  # Lightning's word for a user's mistake that only shows in the run
        raise SlzoError(f"trainer: {' '.join(str(error).split())}") from error


class _ParserOnly(SlzoCLI):
    """Builds the parser and ends there."""

    def __init__(self, **kwargs: Any) -> None:
        with suppress(_Built):
            super().__init__(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> NoReturn:
        """There are none."""
        raise _Built


class _Built(Exception):  # noqa: N818
    """The parser is there."""


def command_parser(command: str) -> Any:
    """The parser of a command's options."""
    commands: Any = _ParserOnly(**_cli_arguments(COMMANDS[command], None, [], True)).parser._subcommands_action
    return commands._name_parser_map[command]


def build(args: Sequence[str], run: bool = True, typed: str | None = None) -> SlzoCLI:
    """Run a command with its options; with ``run=False`` there is none, and trainer, model and data are only built.

    ``typed`` is the command as the user gave it, for the run's summary.
    """
    return SlzoCLI(**_cli_arguments(COMMANDS[args[0]] if run else None, typed, args, run))


def _cli_arguments(command: Command | None, typed: str | None, args: Sequence[str], run: bool) -> dict[str, Any]:
    return {
        "model_class": ZOModule,
        "datamodule_class": TaskDataModule,
        "trainer_class": ZOTrainer,
        "trainer_defaults": _TRAINER_DEFAULTS,
        "seed_everything_default": 0,
        "parser_class": SlzoParser,
        "parser_kwargs": {} if command is None else {command.name: {"description": command.help}},
        "auto_configure_optimizers": False,
        "args": spelled_out(args),
        "run": run,
        "command": command,
        "typed": typed,
    }


def _filter_warnings() -> None:
    """Silence advice that does not apply to forward-only training, and noise of the libraries below."""
    for message in (
        ".*does not have many workers.*",  # the rows are tokenized in memory, loading takes microseconds
        ".*every_n_train_steps.*",  # written for automatic optimization; manual optimization counts the same steps here
        ".*args parameter is intended to run from within Python.*",  # main([...]) is meant to
        ".*module\\(s\\) in eval mode.*",  # both evaluations of a step must see the same function: no dropout
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 with torch 2.13
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*your dataloader is not resumable.*",  # its batches follow from the step
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        # an advertisement; and what the summary says too, behind the bar
        lambda record: not re.search("litlogger|stopped: `max_(steps|epochs)", record.getMessage())
    )
    transformers.utils.logging.disable_progress_bar()
