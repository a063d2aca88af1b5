"""The table config: methods, tasks and seeds, and their runs of slzo."""

import difflib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slzo.tasks.registry import get_task
from slzo.utils.errors import SlzoError, one_line

_KEYS = ("configs", "seeds", "common", "tasks", "methods")
_SET_HERE = re.compile(
    r"config|seed_everything|data\.task|record\..*|trainer\.logger.*|model\.optimizer\.(init_args\.)?lr"
)

Rate = float | str
"""Learning rate: a number, or ``auto`` for the one that slzo chooses."""


def text_of(value: Any) -> str:
    """Return a value as text for the command line."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: Name of the row.
        command: ``fit``, or ``test`` for the untuned model.
        options: Options of slzo by name, as texts.
        lrs: Learning rates to try on the first seed; ``None`` alone for ``test``.
    """

    name: str
    command: str
    options: dict[str, str]
    lrs: tuple[Rate | None, ...]


@dataclass(frozen=True)
class Table:
    """A table config.

    Attributes:
        path: File of the config.
        configs: Configs of slzo for every run.
        common: Options of every run.
        tasks: Options by task.
        methods: The rows by name.
        seeds: Seeds, with one run each; learning rates are chosen on the first.
    """

    path: Path
    configs: tuple[Path, ...]
    common: dict[str, str]
    tasks: dict[str, dict[str, str]]
    methods: dict[str, Method]
    seeds: tuple[int, ...]

    def settings(self) -> dict[str, str]:
        """Return the settings that all cells of an output folder share; those of single cells are stored with the cells."""
        configs = {f"configs {path.name}": _digest(path) for path in self.configs}
        return {"kind": "reproduce_tables", **configs, **{f"common {k}": v for k, v in self.common.items()}}

    def cell(self, method: str, task: str, seed: int, lr: Rate | None) -> "Cell":
        """Return one run."""
        row = self.methods[method]
        options = {"data.task": task, **self.common, **self.tasks[task], **row.options, "seed_everything": str(seed)}
        if lr is not None:
            # the score before training is the same for all methods, so a separate row has it
            options |= {"model.optimizer.lr": text_of(lr), "record.test_before": "false", "record.reference": "false"}
        return Cell(method, task, seed, lr, row.command, tuple(f"--{k}={v}" for k, v in options.items()))

    def grid(self, method: str, task: str) -> list["Cell"]:
        """Return the runs on the first seed."""
        return [self.cell(method, task, self.seeds[0], lr) for lr in self.methods[method].lrs]

    def seeds_of(self, method: str, task: str) -> tuple[int, ...]:
        """Return the seeds of a method; the untuned model needs only one, because held-out rows do not depend on the seed.

        Demonstrations before the prompts do depend on the seed.
        """
        row = self.methods[method]
        options = {**self.common, **self.tasks[task], **row.options}
        drawn = row.command == "fit" or options.get("data.num_demonstrations", "0") != "0"
        return self.seeds if drawn else self.seeds[:1]


@dataclass(frozen=True)
class Cell:
    """One run of slzo.

    Attributes:
        method: Row of the table.
        task: Column of the table.
        seed: Seed of rows and directions.
        lr: Learning rate; ``None`` without training.
        command: ``fit`` or ``test``.
        options: All options except the configs and the run's folder.
    """

    method: str
    task: str
    seed: int
    lr: Rate | None
    command: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"{self.method}-{self.task}-seed-{self.seed}" + ("" if self.lr is None else f"-lr-{text_of(self.lr)}")

    def arguments(self, table: Table) -> list[str]:
        """Return the arguments of slzo."""
        configs = [f"--config={path}" for path in table.configs]
        return [self.command, *configs, *self.options]


def read_table(path: str | Path) -> Table:
    """Read and check a table config.

    Raises:
        SlzoError: It is missing or wrong.
    """
    path = Path(path)
    content = _load(path, "config")
    if not isinstance(content, dict) or "methods" not in content:
        raise SlzoError(
            f"config {str(path)!r}: not a table config, it has no methods; see configs/tables for an example"
        )
    for key in content:
        check_name(str(key), _KEYS, "config", "key")
    common = _options(content.get("common"), "common")
    tasks = {name: _options(value, f"tasks.{name}") for name, value in _named(content.get("tasks"), "tasks").items()}
    for name in tasks:
        get_task(name)
    methods = {name: _method(name, value) for name, value in _named(content["methods"], "methods").items()}
    seeds = content.get("seeds", [0])
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)):
        raise SlzoError(f"seeds {seeds!r}: give a list of whole numbers of at least 0, like [0, 1, 2]")
    configs = _configs(content.get("configs"), path)
    return Table(path, configs, common, tasks, methods, tuple(dict.fromkeys(seeds)))


def _configs(value: Any, table: Path) -> tuple[Path, ...]:
    if not (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
        raise SlzoError(f"configs {value!r}: give a list of slzo's configs, like [../quickstart.yaml]")
    paths = tuple(Path(os.path.relpath(table.parent / name)) for name in value)
    for name, path in zip(value, paths, strict=True):
        if not path.is_file():
            raise SlzoError(f"configs {name!r}: no such file; paths are relative to the table config's folder")
        _load(path, "configs")
    return paths


def _named(value: Any, option: str) -> dict[str, Any]:
    """Return a mapping by name; a list of names means names without options."""
    if isinstance(value, list) and (wrong := [name for name in value if not isinstance(name, str)]):
        raise SlzoError(
            f"{option} {wrong[0]!r}: a list can hold names only; write options as a mapping, like name: {{...}}"
        )
    found = dict.fromkeys(value) if isinstance(value, list) else value
    if not isinstance(found, dict) or not found:
        raise SlzoError(f"{option} {value!r}: give at least one, by name")
    for name in found:
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise SlzoError(
                f"{option} {name!r}: must consist of letters, digits and _ . + -, because files get this name"
            )
    return {str(name): options for name, options in found.items()}


def _mapping(value: Any, option: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise SlzoError(f"{option} {value!r}: give options by name, like data.num_train: 1000")
    return {str(name): item for name, item in (value or {}).items()}


def _options(value: Any, option: str) -> dict[str, str]:
    given = _mapping(value, option)
    for name in given:
        if _SET_HERE.fullmatch(name):
            raise SlzoError(f"{option}.{name}: set by this tool (from configs, tasks, seeds and lr); leave it out")
    return {name: text_of(item) for name, item in given.items()}


def _method(name: str, value: Any) -> Method:
    option = f"methods.{name}"
    given = _mapping(value, option)
    command, lr = given.pop("command", "fit"), given.pop("lr", None)
    if command not in ("fit", "test"):
        raise SlzoError(f"{option}.command {command!r}: choose fit, or test for the untuned model")
    if command == "test" and lr is not None:
        raise SlzoError(f"{option}.lr {lr!r}: nothing is trained with command test; leave it out")
    rates = [_rate(item) for item in (lr if isinstance(lr, list) else ["auto" if lr is None else lr])]
    if not rates or None in rates:
        raise SlzoError(f"{option}.lr {lr!r}: give auto, a learning rate above 0, or a list of them to choose from")
    return Method(name, command, _options(given, option), tuple(dict.fromkeys(rates)) if command == "fit" else (None,))


def _rate(value: Any) -> Rate | None:
    """Return a learning rate, or ``None`` for anything else."""
    with suppress(TypeError, ValueError):  # PyYAML reads 1e-3 as text
        if 0 < float(value) < math.inf:
            return float(value)
    return "auto" if value == "auto" else None


def check_name(name: str, known: Iterable[str], option: str, what: str) -> None:
    """Check that a name is known; the error suggests the nearest one.

    Raises:
        SlzoError: The name is not known.
    """
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SlzoError(f"{option} {name!r}: unknown {what}; {hint}choose from {', '.join(known)}")


def _load(path: Path, option: str) -> Any:
    """Return the content of a YAML file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SlzoError(f"{option} {str(path)!r}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SlzoError(f"{option} {str(path)!r}: not YAML ({one_line(error)})") from error


def _digest(path: Path) -> str:
    """Return a hash of a YAML file's content, without comments."""
    content = json.dumps(_load(path, "configs"), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def check_options(table: Table, methods: Sequence[str]) -> None:
    """Parse the options of each method and each task with slzo, before hours of work.

    Raises:
        SlzoError: An option is wrong.
    """
    from slzo.cli.app import SlzoCLI
    from slzo.commands.registry import COMMANDS

    tasks = list(table.tasks)
    pairs = [(method, tasks[0]) for method in methods] + [(methods[0], task) for task in tasks[1:]]
    with warnings.catch_warnings():
        # the options do not come from this process's command line
        warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
        for method, task in pairs:
            try:
                command, *options = table.grid(method, task)[0].arguments(table)
                SlzoCLI(COMMANDS[command], options)
            except SlzoError as error:
                raise SlzoError(f"method {method}, task {task}: {error}") from error
