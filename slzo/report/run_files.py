"""Reads the files of a run folder, without loading a model."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from slzo.checkpoints.step_log import NAME as STEP_LOG
from slzo.checkpoints.step_log import read_step_log
from slzo.pictures.curves import CurvePoint, HeldOut, RunCurves
from slzo.utils.errors import SlzoError

SUMMARY_FILE = "summary.json"
ENVIRONMENT_FILE = "environment.json"
HISTORY_FILE = "history.json"
"""What each validation found."""

SAMPLES_FILE = "samples.json"
"""Predictions of some held-out rows."""

REPORT_FILE = "report.html"

_SHARES = ("accuracy", "exact_match")


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; what is not there is empty.

    Attributes:
        folder: Of the run.
        name: What it is called beside others.
        config: Options by dotted name.
        summary: As in summary.json.
        environment: As in environment.json.
        profile: As in outlier_profile.json.
        points: One a validation.
        train: Step and training loss.
        samples: Records of some held-out rows.
    """

    folder: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[CurvePoint, ...] = ()
    train: tuple[tuple[int, float], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()

    @property
    def metric(self) -> str:
        """The task's metric."""
        return str(self.summary.get("metric", "score"))

    @property
    def model(self) -> str:
        """What the model is called: the last part of its path."""
        given = self.summary.get("model") or self.config.get("model.model") or ""
        return str(given).rstrip("/").rpartition("/")[2]

    @property
    def task(self) -> str:
        """The task's name, or class."""
        given = self.summary.get("task") or self.config.get("data.task") or ""
        return str(given).rpartition(".")[2]

    def held_out(self, when: str) -> HeldOut | None:
        """The held-out score ``before`` or ``after``, at its step, with a standard error where it is a share of the rows."""
        value = self.summary.get(f"score_{when}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        rows = self.summary.get("num_rows") or 0
        error = math.sqrt(value * (1 - value) / rows) if self.metric in _SHARES and rows else None
        return HeldOut(self._kept_step() if when == "after" else 0, float(value), error)

    def _kept_step(self) -> int:
        """The step of the checkpoint that was scored, by its name; without one the last step."""
        kept = Path(str(self.summary.get("best_checkpoint") or "")).stem.rpartition("=")[2]
        return int(kept) if kept.isdecimal() else int(self.summary.get("steps") or 0)

    @property
    def curves(self) -> RunCurves:
        """What is drawn of it."""
        before, after = self.held_out("before"), self.held_out("after")
        return RunCurves(self.name, self.metric, self.points, self.train, before, after)


def read_run(folder: Path, name: str = "") -> RunFiles:
    """Read a run folder.

    Raises:
        SlzoError: It is none, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise SlzoError(f"run {str(folder)!r}: no such folder; give the folder of a run, such as runs/version_0")
    summary, environment = _json(folder / SUMMARY_FILE), _json(folder / ENVIRONMENT_FILE)
    profile, config = _json(folder / "outlier_profile.json"), _config(folder)
    if not (summary or environment or profile or config):
        below = sorted(path.name for path in folder.glob("version_*"))
        hint = f"{folder / below[-1]} is one" if below else "give one such as runs/version_0"
        raise SlzoError(f"run {str(folder)!r}: not the folder of a run; {hint}")
    points, train = _points(folder, summary), _step_losses(folder)
    samples = _json(folder / SAMPLES_FILE).get("rows", ())
    return RunFiles(folder, name or folder.name, config, summary, environment, profile, points, train, tuple(samples))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SlzoError(f"run {str(path.parent)!r}: its {path.name} cannot be read ({error}); remove it") from error
    return found if isinstance(found, dict) else {}


def _config(folder: Path) -> dict[str, Any]:
    """The options that the command line saved; of a run in Python those that its step log has."""
    try:
        return flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        log = folder / STEP_LOG
        return flat(dict(read_step_log(log).settings)) if log.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SlzoError(f"run {str(folder)!r}: its config.yaml cannot be read; remove it") from error


def flat(options: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Options by dotted name; classes without their modules' names, and their arguments below them."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        name = before + str(key)
        if isinstance(value, Mapping) and "class_path" in value:
            found[name] = str(value["class_path"]).rpartition(".")[2]
            found |= flat(value.get("init_args") or {}, f"{name}.")
        elif isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _points(folder: Path, summary: Mapping[str, Any]) -> tuple[CurvePoint, ...]:
    metric = f"val/{summary.get('metric', 'accuracy')}"
    points = _json(folder / HISTORY_FILE).get("points", [])
    return tuple(
        CurvePoint(p["step"], p["seconds"], p["loss"], p["metrics"].get(metric), p["peak_memory_gb"]) for p in points
    )


def _step_losses(folder: Path) -> tuple[tuple[int, float], ...]:
    """The mean of the losses that each step evaluated."""
    if not (folder / STEP_LOG).is_file():
        return ()
    steps = read_step_log(folder / STEP_LOG).steps.values()
    means = ((record.step + 1, fmean(record.losses)) for record in steps if record.losses)
    return tuple((step, loss) for step, loss in means if math.isfinite(loss))
