"""Read the files of a run folder, without loading a model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from slzo.checkpoints.step_log import NAME as STEP_LOG
from slzo.checkpoints.step_log import read_step_log
from slzo.plots.curves import CurvePoint, RunCurves, ScorePoint
from slzo.report.score_change import score_error
from slzo.utils.config_code import code_in
from slzo.utils.errors import SlzoError
from slzo.utils.files import read_json
from slzo.utils.run_layout import CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE, PROFILE_FILE, SAMPLES_FILE, SUMMARY_FILE
from slzo.utils.settings import options_in

_REMOVE = "remove it"


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run folder; the value of a missing file is empty.

    Attributes:
        folder: Folder of the run.
        name: Name of the run among others.
        config: Options by dotted name.
        summary: Content of summary.json.
        environment: Content of environment.json.
        profile: Content of outlier_profile.json.
        points: One point per validation.
        train: Steps and training losses.
        samples: Records of some held-out rows.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    profile: Mapping[str, Any]
    points: tuple[CurvePoint, ...]
    train: tuple[tuple[int, float], ...]
    samples: tuple[Mapping[str, Any], ...]

    @property
    def metric(self) -> str:
        """The task's metric."""
        return str(self.summary.get("metric", "score"))

    @property
    def model(self) -> str:
        """The model's name: the last part of its path."""
        given = self.summary.get("model") or self.config.get("model.model") or ""
        return str(given).rstrip("/").rpartition("/")[2]

    @property
    def task(self) -> str:
        """The task's name, or class."""
        return str(self.summary.get("task") or str(self.config.get("data.task") or "").rpartition(".")[2])

    def held_out(self, when: str) -> ScorePoint | None:
        """Return the held-out score ``before`` or ``after``, with its standard error if it is known."""
        value = self.summary.get(f"score_{when}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        if when == "after":
            error = self.summary.get("score_standard_error")
        else:
            error = score_error(self.metric, value, {}, self.summary.get("num_rows") or 0)
        return ScorePoint(self._scored_step() if when == "after" else 0, float(value), error)

    def _scored_step(self) -> int:
        """Return the step in the name of the scored checkpoint; the last step without one."""
        step = re.search(r"step=(\d+)", Path(str(self.summary.get("best_checkpoint") or "")).stem)
        return int(step[1] if step is not None else self.summary.get("steps") or 0)

    @property
    def curves(self) -> RunCurves:
        """The curves to draw."""
        before, after = self.held_out("before"), self.held_out("after")
        return RunCurves(self.name, self.metric, self.points, self.train, before, after)


def read_run(folder: Path, name: str = "") -> RunFiles:
    """Read a run folder.

    Raises:
        SlzoError: The folder is not that of a run, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise SlzoError(f"run {str(folder)!r}: no such folder; give the folder of a run, runs/version_N")
    summary, environment = read_json(folder / SUMMARY_FILE, _REMOVE), read_json(folder / ENVIRONMENT_FILE, _REMOVE)
    profile, config = read_json(folder / PROFILE_FILE, _REMOVE), _config(folder)
    if not (summary or environment or profile or config):
        newest = max(folder.glob("version_*"), key=lambda path: path.stat().st_mtime, default=None)
        hint = f"{newest} is one" if newest is not None else "give one such as runs/version_0"
        raise SlzoError(f"run {str(folder)!r}: not the folder of a run; {hint}")
    points, train = _points(folder, summary), _step_losses(folder)
    samples = read_json(folder / SAMPLES_FILE, _REMOVE).get("rows", ())
    return RunFiles(folder, name or folder.name, config, summary, environment, profile, points, train, tuple(samples))


def code_of(config: Path) -> list[str]:
    """Return what a run's config runs besides slzo, torch and Lightning, see :func:`slzo.utils.config_code.code_in`."""
    return code_in(yaml.safe_load(config.read_text(encoding="utf-8")) or {}, (config.parent, Path.cwd()))


def _config(folder: Path) -> dict[str, Any]:
    """Read the options that the command line saved; for a run from Python, those in its step log."""
    try:
        return flat(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        log = folder / STEP_LOG
        return flat(dict(read_step_log(log).settings)) if log.is_file() else {}
    except OSError as error:
        raise SlzoError(
            f"run {str(folder)!r}: its config.yaml cannot be read ({error.strerror}); check its permissions and the disk"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise SlzoError(f"run {str(folder)!r}: its config.yaml cannot be read; remove it") from error


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten options to dotted names; a class becomes its name without the module, followed by its arguments."""
    found = options_in(options)
    return {each.name: str(each.value).rpartition(".")[2] if each.is_class_path else each.value for each in found}


def _points(folder: Path, summary: Mapping[str, Any]) -> tuple[CurvePoint, ...]:
    metric = f"val/{summary.get('metric', 'accuracy')}"
    points = read_json(folder / HISTORY_FILE, _REMOVE).get("points", [])
    return tuple(
        CurvePoint(p["step"], p["seconds"], p["loss"], p["metrics"].get(metric), p["peak_memory_gb"]) for p in points
    )


def _step_losses(folder: Path) -> tuple[tuple[int, float], ...]:
    """Return the mean of the losses that each step evaluated."""
    if not (folder / STEP_LOG).is_file():
        return ()
    steps = read_step_log(folder / STEP_LOG).steps.values()
    means = ((record.step + 1, fmean(record.losses)) for record in steps if record.losses)
    return tuple((step, loss) for step, loss in means if math.isfinite(loss))
