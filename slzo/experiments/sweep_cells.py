"""Compute the cells of a sweep, and report each of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from slzo.experiments.store import CellStore
from slzo.utils.console import say
from slzo.utils.duration import duration


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
