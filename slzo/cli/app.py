"""The LightningCLI of slzo: options and YAML in, one clear line out when they are wrong."""

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.callbacks.defaults import BEST_OPTIONS, DEFAULTS
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.checkpoints.checkpoint import NAMES, named_checkpoint
from slzo.cli.auto_values import spelled_out, with_words
from slzo.cli.config_files import check_config_file
from slzo.cli.diagnose import (
    Given,
    check_class_paths,
    check_nulls,
    constructor_problem,
    explain,
    given_options,
)
from slzo.cli.help import add_help_all, short_help
from slzo.commands.registry import COMMANDS, Command
from slzo.datamodule import TaskDataModule
from slzo.fit import RunContext
from slzo.loggers import RUNS, FolderLogger
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.profiling import ProfileOptions
from slzo.tasks.template import TemplateTask  # noqa: F401  --data.task.help knows it by its name then
from slzo.trainer import TRAINER_DEFAULTS, ZOTrainer
from slzo.training import fit_rows, load_parts
from slzo.utils.console import say
from slzo.utils.errors import SlzoError
from slzo.utils.runtime import bound_kernel_caches, keep_freed_memory
from slzo.zo.optim import AUTO_LR

_MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class App:
    """What a command works with.

    Attributes:
        trainer: Runs fit, validate, test and predict.
        model: The options of the model.
        rows: The rows of the task.
    """

    trainer: ZOTrainer
    model: ZOModule
    rows: TaskDataModule

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.trainer.strategy.root_device

    @property
    def runs_folder(self) -> str:
        """Folder above the runs."""
        logger = self.trainer.logger
        return str((logger.save_dir if logger is not None else None) or RUNS)

    @property
    def profiler(self) -> ProfileOptions:
        """How the model is profiled."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(each.options for each in callbacks if isinstance(each, OutlierProfiler))

    def set_up_rows(self) -> TaskDataModule:
        """Read the rows, for work outside of Lightning's loops."""
        self.rows.trainer = self.trainer
        self.rows.prepare_data()
        self.rows.setup("fit")
        return self.rows

    def load(self) -> tuple[ModelParts, TaskDataModule]:
        """Read the rows, load the model and fit them to each other."""
        rows = self.set_up_rows()
        parts = load_parts(self.model.options, self.device)
        fit_rows(rows, parts, self.model.options)
        return parts, rows

    def run_context(self) -> RunContext:
        """The training that ``fit`` would do with these options."""
        return RunContext(
            device=self.device,
            max_steps=self.trainer.max_steps,
            planned_steps=self.model.planned_steps(self.trainer, self.rows),
            profiler=self.profiler,
            quick=bool(getattr(self.trainer, "fast_dev_run", False)),
        )


class CommandParser(LightningArgumentParser):
    """Reports an error in one line instead of the whole usage."""

    command: Command
    given: Sequence[Given] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a SlzoError that names the option, its value and what is allowed."""
        if not hasattr(self, "command"):  # for the arguments of a class: the command's parser reports what it finds
            super().error(message, ex)
        raise SlzoError(explain(self, self.given, message)) from ex

    def format_help(self) -> str:  # type: ignore[override]
        """The short help of a command; of a class all there is."""
        command = getattr(self, "command", None)
        if command is None:
            return str(super().format_help())
        return short_help(self, command.name, command.own_help or not command.has_app)

    def format_all(self) -> str:
        """Every option: the command's own first, the trainer's last."""
        self.usage = f"slzo {self.command.name} [--config FILE] [--OPTION VALUE ...]"
        return str(super().format_help())

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The config as YAML, as a user would write it."""
        return with_words(str(super().dump(*args, **kwargs)))


class RunConfig(SaveConfigCallback):
    """Saves the options of trainer, model, data and callbacks in the run's folder, not those of the command alone."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        kept = config.clone()
        assert isinstance(parser, CommandParser)
        for name in ("config", *_own_arguments(parser.command)):
            kept.pop(name, None)
        super().__init__(parser, kept, **kwargs)


class SlzoCLI(LightningCLI):
    """Options of trainer, model, data and callbacks, and those of one command."""

    def __init__(self, command: Command, args: Sequence[str]) -> None:
        self._command = command
        self._options = [*args]
        super().__init__(
            ZOModule,
            TaskDataModule,
            save_config_callback=RunConfig,
            trainer_class=ZOTrainer,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_class=CommandParser,
            parser_kwargs={"description": command.help},
            auto_configure_optimizers=False,
            args=spelled_out(args),
            run=False,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The command's own options, then model, data and callbacks; Lightning's trainer last."""
        assert isinstance(parser, CommandParser)
        parser.command = self._command
        add_help_all(parser)
        _add_function(parser, self._command)
        parser.add_lightning_class_args(ZOModule, "model")
        parser.add_lightning_class_args(TaskDataModule, "data")
        for name, kind in DEFAULTS.items():
            parser.add_lightning_class_args(kind, name)
        parser.add_lightning_class_args(ZOTrainer, "trainer")
        parser.set_defaults(
            {
                **{f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()},
                "trainer.logger": {"class_path": "slzo.loggers.RunLogger", "init_args": {"save_dir": RUNS}},
                "profiler.rule": {"class_path": "slzo.zo.selection.Auto"},
                "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": AUTO_LR}},
                **{f"checkpoint.{name}": value for name, value in BEST_OPTIONS.items()},
            }
        )
        parser.link_arguments("model.model", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; refuse what the parser accepts and nothing can work with."""
        assert isinstance(parser, CommandParser)
        parser.given = _given(self._options)
        check_class_paths(parser, parser.given)
        super().parse_arguments(parser, args)
        check_nulls(parser, self.config)
        seed = self.config.get("seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed <= _MAX_SEED:
            raise SlzoError(f"seed_everything {seed}: give a number from 0 to {_MAX_SEED}")

    def before_instantiate_classes(self) -> None:
        """Runs are written below ``trainer.default_root_dir`` where it is given."""
        root, place = self.config.get("trainer.default_root_dir"), "trainer.logger.init_args.save_dir"
        if root is not None and self.config.get(place) == RUNS:
            self.config[place] = str(Path(root) / RUNS)

    def instantiate_classes(self) -> None:
        """Make trainer, model and data; what a class says of its arguments is one line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, OSError, MisconfigurationException) as error:
            problem = constructor_problem(self.config, DEFAULTS)
            if problem is None:
                raise
            raise problem from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; a run without a logger has a folder of its own too."""
        options = self.config_init["trainer"]
        if options.get("logger") is False:
            if options.get("default_root_dir") is not None:
                self.save_config_callback = None
            else:
                kwargs["logger"] = FolderLogger(RUNS)
        return super().instantiate_trainer(**kwargs)


def run_command(name: str, args: Sequence[str]) -> None:
    """Run a command with its options.

    Raises:
        SlzoError: Something about the options or files is wrong.
    """
    command = COMMANDS[name]
    _quieten()
    keep_freed_memory()
    bound_kernel_caches()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # class paths of the user's own files
    args = _with_words(command, args)
    if not command.has_app:
        function(command)(**_parse_plain(command, args))
        return
    try:
        cli = SlzoCLI(command, _with_run_config(command, args))
        assert isinstance(cli.trainer, ZOTrainer)
        app = App(cli.trainer, cli.model, cli.datamodule)
        function(command)(app, **{each: cli.config_init.get(each) for each in _own_arguments(command)})
    except MisconfigurationException as error:  # Lightning found an error of the user's in the run
        raise SlzoError(f"trainer: {' '.join(str(error).split())}") from error


def function(command: Command) -> Callable[..., None]:
    """The function that carries a command out."""
    found: Callable[..., None] = getattr(import_module(f"slzo.commands.{command.name}"), command.name)
    return found


def parser_of(command: Command) -> CommandParser:
    """The parser of a command's options."""
    if not command.has_app:
        return _plain_parser(command)
    return _ParserOnly(command).parser


class _ParserOnly(SlzoCLI):
    """Builds the parser and nothing else."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self.trainer_class, self.seed_everything_default = ZOTrainer, 0
        self.parser_class, self.auto_configure_optimizers = CommandParser, False
        self.parser: Any = None
        self.setup_parser(False, {"description": command.help}, {})


def _own_arguments(command: Command) -> list[str]:
    """Names of a command's own options."""
    return [name for name in inspect.signature(function(command)).parameters if name != "app"]


def _add_function(parser: ArgumentParser, command: Command) -> None:
    parser.add_function_arguments(function(command), as_group=False, as_positional=False, skip={"app"})


def _plain_parser(command: Command) -> CommandParser:
    parser = CommandParser(description=command.help)
    parser.command = command
    parser.add_argument("--config", action="config", help="Options in a YAML file.")
    add_help_all(parser)
    _add_function(parser, command)
    return parser


def _parse_plain(command: Command, args: Sequence[str]) -> dict[str, Any]:
    parser = _plain_parser(command)
    parser.given = _given(args)
    options: dict[str, Any] = parser.parse_args(list(args)).as_dict()
    options.pop("config", None)
    return options


def _with_words(command: Command, args: Sequence[str]) -> list[str]:
    """Options in which words without a name are those of the option that takes them."""
    words = []
    rest = list(args)
    while command.words and rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    return [f"--{command.words}={words}", *rest] if words else rest


def _values(args: Sequence[str], *names: str) -> list[str]:
    """Values of some options on the command line."""
    found = []
    for place, arg in enumerate(args):
        name, given, value = arg.partition("=")
        if name in names:
            found.append(value if given else next(iter(args[place + 1 : place + 2]), ""))
    return found


def _given(args: Sequence[str]) -> list[Given]:
    """The options on the command line and in its config files, which are checked first."""
    configs: list[Mapping[str, Any]] = []
    for value in _values(args, "-c", "--config"):
        path = Path(value)
        if _exists(path):  # options themselves, or nothing: the parser says so
            configs.append(check_config_file(path))
    return given_options(args, configs)


def _with_run_config(command: Command, args: Sequence[str]) -> list[str]:
    """Options with the config of the run that a checkpoint, or a replay's run folder, belongs to; and its path.

    Where the logger's folder is known only from a config, the trainer looks for ``last`` and ``best`` there.
    """
    if _values(args, "-c", "--config"):
        return list(args)
    runs = _values(args, "--run") if command.name == "replay" else []
    if runs and (config := Path(runs[-1]) / "config.yaml").is_file():
        return [f"--config={config}", *args]
    checkpoints = _values(args, "--ckpt_path")
    if not checkpoints:
        return list(args)
    checkpoint = checkpoints[-1]
    folders = _values(args, "--trainer.logger.save_dir", "--trainer.logger.init_args.save_dir")
    roots = _values(args, "--trainer.default_root_dir")
    folder = folders[-1] if folders else str(Path(roots[-1]) / RUNS) if roots else RUNS
    if checkpoint in NAMES and Path(folder).is_dir():
        name, checkpoint = checkpoint, str(named_checkpoint(checkpoint, folder))
        say(f"Using the {name} checkpoint of the newest run, {checkpoint}")
        args = [*args, f"--ckpt_path={checkpoint}"]
    config = Path(checkpoint).parent.parent / "config.yaml"
    if command.reads_run_config and Path(checkpoint).is_file() and config.is_file():
        return [f"--config={config}", *args]
    return list(args)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # options in the place of a path may be too long for one
        return False


def _quieten() -> None:
    """Silence advice that does not apply to forward-only training, and noise of other libraries."""
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
        # an advertisement; and what the summary says too
        lambda record: not re.search("litlogger|stopped: `max_(steps|epochs)", record.getMessage())
    )
    transformers.utils.logging.disable_progress_bar()
