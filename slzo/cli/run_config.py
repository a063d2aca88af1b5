"""The config of the run that a command works on, read without being named on the command line."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from slzo.checkpoints.checkpoint import run_folder_of
from slzo.checkpoints.find import NAMES, RUNS, named_checkpoint
from slzo.cli.config_files import read_config_file
from slzo.cli.given import option_values
from slzo.commands.registry import Command
from slzo.export.exported import Exported
from slzo.export.facts import FACTS_FILE
from slzo.utils.config_code import TRUST, code_in
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded
from slzo.utils.run_layout import CHECKPOINTS_FOLDER, CONFIG_FILE


def with_run_config(command: Command, args: Sequence[str]) -> list[str]:
    """Return the options, preceded by the config of the run that the checkpoint or the replayed run folder belongs to.

    The options of an exported folder come first, also next to a config; if it is a whole model, a config cannot name another.

    ``last`` and ``best`` become the path of the checkpoint. If only a config names the logger's folder, the trainer finds them.

    Raises:
        SlzoError: There is no such checkpoint, or the config would run code that did not come with slzo.
    """
    checkpoints, has_config = option_values(args, "--ckpt_path"), bool(option_values(args, "--config"))
    if checkpoints and command.reads_run_config and (exported := Exported.at(checkpoints[-1])) is not None:
        # a whole model has its own tokenizer, whichever model a config names
        own_model = exported.is_whole and not option_values(args, "--model.model")
        last = [f"--model.model={exported.folder}"] if own_model else []
        return [*_of_export(exported, args, has_config), *args, *last]
    if has_config:
        return list(args)
    runs = option_values(args, "--run") if command.name == "replay" else []
    if runs and (config := expanded(runs[-1]) / CONFIG_FILE).is_file():
        return [_checked(config, args), *args]
    if not checkpoints:
        return list(args)
    checkpoint = checkpoints[-1]
    folders = option_values(args, "--trainer.logger.save_dir", "--trainer.logger.init_args.save_dir")
    roots = option_values(args, "--trainer.default_root_dir")
    folder = expanded(folders[-1] if folders else str(Path(roots[-1]) / RUNS) if roots else RUNS)
    run: Path | None = None
    if checkpoint in NAMES and Path(folder).is_dir():
        found, run = named_checkpoint(checkpoint, folder)
        checkpoint = found.path
        args = [*args, f"--ckpt_path={checkpoint}"]
    path = expanded(checkpoint)
    is_run = (path / CHECKPOINTS_FOLDER).is_dir()
    config = (path if is_run else run or run_folder_of(path)) / CONFIG_FILE
    if command.reads_run_config and (is_run or path.is_file()) and config.is_file():
        return [_checked(config, args), *args]
    return list(args)


def _of_export(exported: Exported, args: Sequence[str], has_config: bool) -> list[str]:
    """Return the options that score an exported folder; a config has the task, and may name the model."""
    models = option_values(args, "--model.model")
    try:
        options = exported.options(models[-1] if models else None)
    except SlzoError:
        if not has_config:
            raise
        return []
    if has_config:
        options = {name: value for name, value in options.items() if not name.startswith("data.")}
    if code := code_in({"data": {"task": options.get("data.task")}}, ()):
        raise SlzoError(
            f"{code[0]} in {str(exported.folder / FACTS_FILE)!r}: would run code that did not come with slzo; give the config of "
            "the task with --config"
        )
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in options.items()]


def _checked(config: Path, args: Sequence[str]) -> str:
    """Return the option for a run's config; refuse code in it, since the folder may come from somebody else."""
    trusted = f"model.{TRUST} " if option_values(args, f"--model.{TRUST}") else None
    for entry in code_in(read_config_file(config), (config.parent, Path.cwd())):
        option = f" or --model.{TRUST} true" if entry.startswith(f"model.{TRUST} ") else ""
        if trusted is None or not entry.startswith(trusted):
            raise SlzoError(
                f"{entry} in {str(config)!r}: would run code that did not come with slzo, and a run's folder may come from "
                f"somebody else; if you trust it, give {shlex.join(['--config', str(config)])}{option}"
            )
    return f"--config={config}"
