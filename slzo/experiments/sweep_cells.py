"""The cells of a sweep: their folder and settings; compute them, and report each of them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slzo.data.fingerprint import DataFingerprint
from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore
from slzo.models.fingerprint import Fingerprint
from slzo.utils.console import say
from slzo.utils.duration import duration


def sweep_folder(trials: LayerTrials) -> Path:
    """Return the default folder of the results of a sweep."""
    return Path("sweeps") / f"{Path(trials.options.model).name}-{trials.rows.task.name}"


def sweep_settings(trials: LayerTrials) -> dict[str, Any]:
    """Return the settings that the results depend on, in addition to steps and seeds, as primitives.

    Rows and weights are compared by their hashes, since files can change under the same name.
    """
    options, rows = trials.options, trials.rows
    data = DataFingerprint.of(rows.encoder.tokenizer, {split: rows.rows(split) for split in ("train", "dev")})
    reward = {} if rows.reward is None else {"reward code": rows.reward.runner.code_hash()}
    return {
        **options.flat(),
        **rows.task_settings,
        **reward,
        "noise_seed": options.noise_seed,
        "batch_size": rows.batch_size,
        "seed": rows.seed,
        **data.hashes(),
        "weights": Fingerprint.of(trials.parts.model).short_hash(),
    }


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
