"""The cells of a sweep: their folder and settings; compute them, and report each of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from slzo.data.fingerprint import DataFingerprint
from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore
from slzo.models.fingerprint import Fingerprint
from slzo.task_data import TaskData
from slzo.training.options import TrainingOptions
from slzo.utils.console import rank_zero_print
from slzo.utils.duration import duration


def option_settings(options: TrainingOptions, data: TaskData) -> dict[str, Any]:
    """Return the settings that the results depend on and that are known before rows and model are read, except the layer."""
    settings = options.step_settings(None, options.noise_seed) | data.step_settings()
    # the rows are compared by their hash, so data.num_train may be larger than their number
    return {name: value for name, value in settings.items() if name not in ("model.layer", "data.num_train")}


def sweep_settings(trials: LayerTrials) -> dict[str, Any]:
    """Return the settings that the results depend on, in addition to steps and seeds, as primitives.

    Rows and weights are compared by their hashes, since files can change under the same name.
    """
    data = trials.data
    fingerprint = DataFingerprint.of(data.encoder.tokenizer, {split: data.rows(split) for split in ("train", "dev")})
    reward = {} if data.reward is None else {"reward code": data.reward.runner.code_hash()}
    return {
        **option_settings(trials.options, data),
        **reward,
        **fingerprint.hashes(),
        "weights": Fingerprint.of(trials.parts.model, trials.parts.placement).short_hash(),
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
            found = f"{result['mean']:.4g} ± {result['standard_error']:.2g}, {result['directions']} directions"
        left = num_left()
        seconds = left * (time.monotonic() - started) / max(1, at_start - left)
        rank_zero_print(f"{name}: {found} ({f'{left} left, about {duration(seconds)}' if left else 'done'})")

    store.complete(cells, report)
