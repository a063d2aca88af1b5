"""The cells of a sweep: their folder and settings; compute them, and report each of them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slzo.data.fingerprint import DataFingerprint
from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore
from slzo.models.fingerprint import Fingerprint
from slzo.task_rows import TaskRows
from slzo.training.options import TrainingOptions
from slzo.utils.console import say
from slzo.utils.duration import duration
from slzo.utils.seeding import global_seed

# Groups of the options of a sweep, by the first part of a setting's name
_GROUPS = {
    **dict.fromkeys(("model", "dtype", "quantization", "scope", "estimator", "optimizer", "lr_scheduler"), "model"),
    **dict.fromkeys(("eps", "num_queries", "layer"), "model"),
    **dict.fromkeys(("task", "objective", "reward", "batch_size", "seed"), "data"),
}
_HASHES = {
    "train rows": "other training rows, see data.num_train, data.num_dev, data.seed and the files",
    "dev rows": "other dev rows",
    "tokenizer": "another tokenizer",
    "weights": "other weights of the model",
    "reward code": "other code of data.reward",
}


def sweep_folder(options: TrainingOptions, rows: TaskRows) -> Path:
    """Return the default folder of the results of a sweep."""
    return Path("sweeps") / f"{Path(options.model).name}-{rows.task.name}"


def option_settings(options: TrainingOptions, rows: TaskRows) -> dict[str, Any]:
    """Return the settings that the results depend on and that are known before rows and model are read."""
    return {
        **options.flat(),
        **rows.task_settings,
        "noise_seed": options.noise_seed,
        "batch_size": rows.batch_size,
        "seed": global_seed() if rows.seed is None else rows.seed,
    }


def sweep_settings(trials: LayerTrials) -> dict[str, Any]:
    """Return the settings that the results depend on, in addition to steps and seeds, as primitives.

    Rows and weights are compared by their hashes, since files can change under the same name.
    """
    rows = trials.rows
    data = DataFingerprint.of(rows.encoder.tokenizer, {split: rows.rows(split) for split in ("train", "dev")})
    reward = {} if rows.reward is None else {"reward code": rows.reward.runner.code_hash()}
    return {
        **option_settings(trials.options, rows),
        **reward,
        **data.hashes(),
        "weights": Fingerprint.of(trials.parts.model, trials.parts.placement).short_hash(),
    }


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the settings of a sweep that differ, by the names of the options: ``model.eps: 0.001 -> 0.002``.

    The arguments of a class that differs are left out, and so are hashes.
    """
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    kept = [name for name in changed if name.partition(".")[0] not in changed - {name}]
    both = ("noise_seed", "seed")
    names = {name: f"{_GROUPS[name.partition('.')[0]]}.{name}" for name in kept if name.partition(".")[0] in _GROUPS}
    names["noise_seed"] = "model.seed"
    if set(both) <= changed and all(side["noise_seed"] == side["seed"] for side in (old, new)):
        names["noise_seed"] = "seed_everything (or model.seed and data.seed)"
        kept.remove("seed")
    values = sorted(
        f"{names.get(name, name)}: {old.get(name)} -> {new.get(name)}" for name in kept if name not in _HASHES
    )
    return "; ".join([*values, *(text for name, text in _HASHES.items() if name in kept)])


def complete_cells(store: CellStore, cells: Mapping[str, Callable[[], Any]], loss: str) -> None:
    """Compute cells of one kind; report each of them, and the time for the others at the pace of all processes so far."""

    def num_left() -> int:
        return sum(store.result(name) is None for name in cells)

    started, at_start = time.monotonic(), num_left()

    def report(name: str, result: Mapping[str, Any]) -> None:
        if "scores" in result:
            last = result["scores"][-1]
            found = result["diverged"] or f"{loss} {last['loss']:.4f}, metric {last['metric']:.4f}"
        else:
            found = f"{result['mean']:.4g} +- {result['standard_error']:.2g}, {result['directions']} directions"
        left = num_left()
        seconds = left * (time.monotonic() - started) / max(1, at_start - left)
        say(f"{name}: {found} ({f'{left} left, about {duration(seconds)}' if left else 'done'})")

    store.complete(cells, report)
