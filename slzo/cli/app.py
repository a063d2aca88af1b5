"""The LightningCLI of slzo: parses options and YAML, and reports an error in one line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.callbacks.defaults import DEFAULTS
from slzo.checkpoints.find import RUNS, find_checkpoint
from slzo.cli.auto_values import decode_words, encode_words, with_value
from slzo.cli.class_defaults import class_defaults
from slzo.cli.constructors import constructor_problem
from slzo.cli.diagnose import check_class_paths, check_values
from slzo.cli.given import parents
from slzo.cli.parser import CommandParser, add_command_arguments, command_function, read_given
from slzo.cli.run_config import with_run_config
from slzo.commands.registry import Command
from slzo.datamodule import TaskDataModule
from slzo.export.exported import Exported
from slzo.lightning.loggers import FolderLogger
from slzo.lightning.trainer import ZOTrainer
from slzo.lightning.trainer_options import TRAINER_DEFAULTS, limit_defaults
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.training.build import adapt_rows, load_parts
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.run_layout import CONFIG_FILE

_MAX_SEED = 2**32 - 1
_UNCHANGED = ("data.reward", "data.objective.init_args.functions")


@dataclass(frozen=True)
class App:
    """The objects that a command works with."""

    trainer: ZOTrainer
    model: ZOModule
    datamodule: TaskDataModule

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.trainer.strategy.root_device

    def check_one_process(self, command: str) -> None:
        """Raise SlzoError if the trainer has several processes; ``command`` is the name of a command that uses one."""
        if (number := self.trainer.world_size) > 1:
            raise SlzoError(
                f"trainer.devices, trainer.num_nodes: make {number} processes, and slzo {command} runs on one device; set both "
                "to 1"
            )

    def set_up_data(self) -> TaskDataModule:
        """Read the rows, for work outside of Lightning's loops."""
        self.datamodule.trainer = self.trainer
        self.datamodule.follow_model(self.model.options.model, self.model.options.trust_remote_code)
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        return self.datamodule

    def load(self) -> tuple[ModelParts, TaskDataModule]:
        """Read the rows, load the model and adapt them to each other."""
        data = self.set_up_data()
        parts = load_parts(self.model.options, self.device)
        adapt_rows(data, parts, self.model.options)
        return parts, data

    def load_if_exported(self, ckpt_path: str | None) -> str | None:
        """Load an exported folder into the model, and return ``None``; any other path is returned for the trainer to load."""
        exported = None if ckpt_path is None else Exported.at(ckpt_path)
        if exported is None:
            return ckpt_path
        options = self.model.options
        for name in ("quantization", "device_map"):
            if getattr(options, name) is not None:
                raise SlzoError(f"model.{name}: does not apply to the exported folder {ckpt_path!r}; leave it out")
        self.model.use_tuned(exported.load_model(options.model, options.dtype, options.trust_remote_code))
        return None


class AppParser(CommandParser, LightningArgumentParser):
    """Parser of a command's options together with those of trainer, model, data and callbacks."""

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """Return the config as YAML, as a user would write it."""
        kept, marks = cfg.clone(), {}
        for name in _UNCHANGED:  # jsonargparse would write texts in them as numbers, lists and others
            value = kept.get(name)
            if isinstance(value, list | dict):
                kept[name], marks[name] = f"value of {name}", value
        dumped = decode_words(str(super().dump(kept, *args, **kwargs)))
        for name, value in marks.items():
            dumped = with_value(dumped, f"value of {name}", value)
        return dumped


class _RunConfig(SaveConfigCallback):
    """Saves the options of trainer, model, data and callbacks in the run's folder, without the command's own options."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        kept = config.clone()
        assert isinstance(parser, AppParser)
        for name in ("config", *parser.own):
            kept.pop(name, None)
        loggers = kept.get("trainer.logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and logger.get("init_args.version") is not None:
                logger["init_args.version"] = None  # this run has the version; the config is for other runs
        super().__init__(parser, kept, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config; refuse a folder that already has one."""
        try:
            super().setup(trainer, pl_module, stage)
        except RuntimeError as error:
            folder = trainer.log_dir
            if folder is None or not (Path(folder) / CONFIG_FILE).is_file():
                raise
            raise SlzoError(
                f"trainer.logger: its folder {folder!r} holds another run; give it another version or name, or leave them out"
            ) from error


class SlzoCLI(LightningCLI):
    """Options of trainer, model, data and callbacks, and those of one command.

    Args:
        command: The command.
        args: Its options, each one word, ``--NAME=VALUE``.
    """

    parser: AppParser

    def __init__(self, command: Command, args: Sequence[str]) -> None:
        self._command = command
        super().__init__(
            ZOModule,
            TaskDataModule,
            save_config_callback=_RunConfig,
            trainer_class=ZOTrainer,
            seed_everything_default=0,
            parser_class=AppParser,
            parser_kwargs={"description": command.help, "allow_abbrev": False},
            auto_configure_optimizers=False,
            args=list(args),
            run=False,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the command's own options, then model, data and callbacks, and Lightning's trainer last."""
        assert isinstance(parser, AppParser)
        add_command_arguments(parser, self._command)
        parser.add_lightning_class_args(ZOModule, "model")
        parser.add_lightning_class_args(TaskDataModule, "data")
        for name, kind in DEFAULTS.items():
            parser.add_lightning_class_args(kind, name)
        parser.add_lightning_class_args(ZOTrainer, "trainer")
        parser.set_defaults(
            {
                **{f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()},
                "trainer.logger": {"class_path": "slzo.lightning.loggers.RunLogger", "init_args": {"save_dir": RUNS}},
                "profiler.rule": {"class_path": "slzo.zo.selection.Auto"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options, and refuse unusable values that the parser accepts."""
        assert isinstance(parser, AppParser)
        parser.given = read_given(args)
        check_class_paths(parser, parser.given)
        parser.set_defaults(class_defaults(parser.given))
        super().parse_arguments(parser, encode_words(args))
        check_values(parser, self.config)
        self._check_task()
        seed = self.config.get("seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed <= _MAX_SEED:
            raise SlzoError(f"seed_everything {seed}: give a number from 0 to {_MAX_SEED}")

    def _check_task(self) -> None:
        """Refuse a command without a task if it reads rows."""
        if self.config.get("data.task") is not None:
            return
        if not self._command.reads_rows:
            self.config["data.task"] = "movie_reviews"  # the data module is made, but no row is read
            return
        start, path = f"slzo {self._command.name}", self.config.get("ckpt_path")
        if path is None:
            raise SlzoError(
                f"data.task: no task is given; begin with a config, as in {start} --config quickstart, or with a task, as in "
                f"{start} --data.task movie_reviews"
            )
        if Exported.at(path) is not None:
            raise SlzoError(
                f"data.task: the exported folder {path!r} does not hold its task, a class of your own; give its config, as in "
                f"{start} --ckpt_path {path} --config my_task.yaml"
            )
        find_checkpoint(path, RUNS)  # a wrong path is the first error to correct
        if not self._command.reads_run_config:
            raise SlzoError(
                f"data.task: {start} does not read the config of the run; repeat the command of the run with "
                "--ckpt_path, or give --config RUN/config.yaml"
            )
        raise SlzoError(
            f"data.task: the run of ckpt_path {path!r} has no config.yaml, as those from Python; give a config, as in {start} "
            f"--ckpt_path {path} --config my_task.yaml"
        )

    def before_instantiate_classes(self) -> None:
        """Write runs below ``trainer.default_root_dir`` if it is given; a limit of time or epochs replaces that of steps."""
        given = {name for option in self.parser.given for name in (option.name, *parents(option.name))}
        limits = ("max_time", "max_steps", "max_epochs", "check_val_every_n_epoch")
        own = {name: self.config.get(f"trainer.{name}") for name in limits}
        if "trainer.max_steps" not in given:
            del own["max_steps"]
        for name, value in limit_defaults(own).items():
            if f"trainer.{name}" not in given:
                self.config[f"trainer.{name}"] = value
        if self.config.get("trainer.logger") == []:
            self.config["trainer.logger"] = False
        root, place = self.config.get("trainer.default_root_dir"), "trainer.logger.init_args.save_dir"
        if root is not None and self.config.get(place) == RUNS:
            self.config[place] = str(Path(root) / RUNS)

    def instantiate_classes(self) -> None:
        """Make trainer, model and data; report an error of a class in one line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, OSError, MisconfigurationException) as error:
            problem = constructor_problem(self.config.as_dict(), DEFAULTS)
            if problem is None:
                raise
            raise problem from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; a run without a logger also gets its own folder."""
        options = self.config_init["trainer"]
        if options.get("logger") is False and options.get("default_root_dir") is None:
            kwargs["logger"] = FolderLogger(RUNS)
        return super().instantiate_trainer(**kwargs)


def run_with_app(command: Command, args: Sequence[str]) -> None:
    """Run a command that takes the options of trainer, model and data.

    Raises:
        SlzoError: An option or a file is wrong.
    """
    try:
        cli = SlzoCLI(command, with_run_config(command, args))
        assert isinstance(cli.trainer, ZOTrainer)
        app = App(cli.trainer, cli.model, cli.datamodule)
        own = {name: cli.config_init.get(name) for name in cli.parser.own}
        command_function(command)(app, **own)
    except MisconfigurationException as error:  # Lightning found a user's error during the run
        raise SlzoError(f"trainer: {one_line(error, None)}") from error
