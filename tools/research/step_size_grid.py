"""Compare ``lr: auto`` with a grid of constant learning rates: dev loss after the same steps on the same rows.

    python tools/research/step_size_grid.py --data_dir DIR --output grids
    python tools/research/step_size_grid.py --data_dir DIR --output grids --models gemma3-270m --tasks sst2 --scopes layer lora

A cell is a model, a task and a scope. It has one training with measured step sizes and five with constant rates, a factor of 3
apart, around the rate that was measured before the first step. eps is measured for all. Results are saved at once, and the same
command continues where it stopped. --report prints the table of the finished cells.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore
from slzo.module import ZOModule
from slzo.zo.estimators import SPSA
from slzo.zo.scopes import ActivationSubspace, AllParameters, LayerScope, LoRA, Scope
from slzo.zo.selection import OutlierRemovingLayer

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import chosen_layers, load, task_rows
from options import command, option, parse
from tables import finished, markdown_table

SCOPES: dict[str, Callable[[], Scope]] = {
    "layer": LayerScope,
    "subspace": lambda: ActivationSubspace(rank=16),
    "lora": LoRA,
    "all": AllParameters,
}
# training, dev and held-out rows; CB and COPA have few
ROWS = {"cb": (200, 50, 50), "copa": (300, 100, 100)}
FACTORS = {"auto": None, "0": 1 / 9, "1": 1 / 3, "2": 1.0, "3": 3.0, "4": 9.0}
CLOSE = 0.05


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    models: list[str] = option(["smollm2-135m", "gemma3-270m"], "models, as in model.model")
    tasks: list[str] = option(["sst2", "copa", "cb"], "tasks, as in data.task")
    scopes: list[str] = option(list(SCOPES), "what is tuned", choices=list(SCOPES))
    data_dir: str = option(help="folder of the data, as in data.data_dir")
    steps: int = option(100, "steps of each training")
    output: str = option("step_size_grid", "folder of the results")
    report: bool = option(False, "print the table without training")


class Cell(NamedTuple):
    """A training; ``rate`` is a key of ``FACTORS``."""

    model: str
    task: str
    scope: str
    rate: str


@lru_cache(maxsize=1)
def setting_of(model: str, task: str, scope: str, data_dir: str) -> tuple[LayerTrials, int | None, float, float | None]:
    """Return trials, the layer that removes the outlier, and the learning rate and eps that are measured there."""
    options = ZOModule(model, scope=SCOPES[scope](), estimator=SPSA(), seed=0).options
    data = task_rows(model, task, data_dir, ROWS.get(task, (1000, 200, 200)))
    parts = load(options, data)
    layer = chosen_layers(parts, data, OutlierRemovingLayer())[0] if options.scope.needs_layer else None
    trials = LayerTrials(parts, options, data)
    return trials, layer, *trials.own_step(layer)


def train(cell: Cell, data_dir: str, steps: int) -> dict[str, Any]:
    """Train with a multiple of the measured rate, or with ``auto``."""
    trials, layer, lr, eps = setting_of(cell.model, cell.task, cell.scope, data_dir)
    factor = FACTORS[cell.rate]
    own: dict[str, Any] = {} if factor is None else {"lr": lr * factor, "eps": eps}
    trial = trials.run(layer, steps=steps, seed=0, **own)
    last = trial.scores[-1]
    return {
        **cell._asdict(),
        "layer": layer,
        "lr": own.get("lr"),
        "eps": eps,
        "before": trial.scores[0].loss,
        "loss": None if trial.diverged else last.loss,
        "metric": last.metric,
        "seconds": last.seconds,
        "diverged": trial.diverged,
    }


def report(results: dict[Cell, dict[str, Any]]) -> str:
    """Return the table of the settings whose cells are all finished."""
    rows, close, diverged = [], 0, 0
    for setting in dict.fromkeys((cell.model, cell.task, cell.scope) for cell in results):
        auto, *grid = (results.get(Cell(*setting, rate)) for rate in FACTORS)
        own = [row for row in grid if row is not None]
        if auto is None or len(own) < len(grid):
            continue
        best = min(own, key=_loss)
        edge = " (edge)" if best in (own[0], own[-1]) else ""
        ratio = "" if auto["diverged"] or best["diverged"] else f"{_loss(auto) / _loss(best):.3f}"
        close += not auto["diverged"] and _loss(auto) <= (1 + CLOSE) * _loss(best)
        diverged += bool(auto["diverged"])
        layer, at = "" if auto["layer"] is None else auto["layer"], f"{best['lr']:.2g}{edge}"
        rows.append([*setting, layer, f"{auto['before']:.4f}", _after(auto), _after(best), at, ratio])
    head = ["model", "task", "scope", "layer", "before", "auto", "best of the grid", "at lr", "auto / best"]
    words = f"auto is within {CLOSE:.0%} of the best in {close} of {len(rows)} cells; it diverged in {diverged}."
    return f"{markdown_table(head, rows, left=3)}\n\n{words}"


def _after(row: dict[str, Any]) -> str:
    return "diverged" if row["diverged"] else f"{row['loss']:.4f}"


def _loss(row: dict[str, Any]) -> float:
    return math.inf if row["loss"] is None else float(row["loss"])


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing trainings and print the table."""
    options = parse(Options, __doc__, argv)
    store = CellStore(options.output, {"steps": options.steps})
    every = product(options.tasks, options.models, options.scopes, FACTORS)
    cells = [Cell(model, task, scope, rate) for task, model, scope, rate in every]
    results = finished(store, cells, lambda cell: train(cell, options.data_dir, options.steps), options.report)
    print(report(dict(results)))


if __name__ == "__main__":
    sys.exit(main())
