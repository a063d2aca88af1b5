"""Compare ``lr: auto`` with a grid of constant learning rates: dev loss after the same steps on the same rows.

    python tools/research/step_size_grid.py --data_dir DIR --output grids
    python tools/research/step_size_grid.py --data_dir DIR --output grids --models gemma3-270m --tasks sst2 --scopes layer lora

A cell is a model, a task and a scope. It has one training with measured step sizes and five with constant rates, a factor of 3
apart, around the rate that was measured before the first step. eps is measured for all. Results are saved at once, and the same
command continues where it stopped. --report prints the table of the finished cells.
"""

import argparse
import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore
from slzo.module import ZOModule
from slzo.profiling import ProfileOptions, choose, profile_model
from slzo.task_rows import TaskRows
from slzo.training import adapt_rows, load_parts
from slzo.zo.estimators import SPSA
from slzo.zo.scopes import ActivationSubspace, AllParameters, LayerScope, LoRA, Scope
from slzo.zo.selection import OutlierRemovingLayer

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

Cell = tuple[str, str, str]  # model, task, scope


@lru_cache(maxsize=1)
def setting_of(model: str, task: str, scope: str, data_dir: str) -> tuple[LayerTrials, int | None, float, float | None]:
    """Return trials, the layer that removes the outlier, and the learning rate and eps that are measured there."""
    options = ZOModule(model, scope=SCOPES[scope](), estimator=SPSA(), seed=0).options
    sizes: dict[str, Any] = dict(
        zip(("num_train", "num_dev", "num_test"), ROWS.get(task, (1000, 200, 200)), strict=True)
    )
    rows = TaskRows(task, tokenizer=model, data_dir=data_dir, **sizes, batch_size=16, seed=0)
    rows.setup("fit")
    parts = load_parts(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    adapt_rows(rows, parts, options)
    layer = None
    if options.scope.needs_layer:
        profiler = ProfileOptions(OutlierRemovingLayer(), 16, None)
        layer = choose(profile_model(parts, rows, profiler), profiler.rule, "no trials are needed", rows).layer
    trials = LayerTrials(parts, options, rows)
    return trials, layer, *trials.own_step(layer)


def train(cell: Cell, factor: float | None, data_dir: str, steps: int) -> dict[str, Any]:
    """Train with a multiple of the measured rate, or with ``auto``."""
    trials, layer, lr, eps = setting_of(*cell, data_dir)
    own: dict[str, Any] = {} if factor is None else {"lr": lr * factor, "eps": eps}
    trial = trials.run(layer, steps=steps, seed=0, **own)
    last = trial.scores[-1]
    return {
        **dict(zip(("model", "task", "scope"), cell, strict=True)),
        "layer": layer,
        "lr": own.get("lr"),
        "eps": eps,
        "before": trial.scores[0].loss,
        "loss": None if trial.diverged else last.loss,
        "metric": last.metric,
        "seconds": last.seconds,
        "diverged": trial.diverged,
    }


def name_of(cell: Cell, key: str) -> str:
    """Return the name of a training."""
    model, task, scope = cell
    return f"{Path(model).name}-{task}-{scope}-{key}"


def report(store: CellStore, cells: list[Cell]) -> str:
    """Return the table of the finished cells."""
    lines = [
        "| model | task | scope | layer | before | auto | best of the grid | at lr | auto / best |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    close = done = diverged = 0
    for cell in cells:
        auto, *grid = (store.result(name_of(cell, key)) for key in FACTORS)
        if auto is None or None in grid:
            continue
        best = min(grid, key=_loss)
        edge = "" if best not in (grid[0], grid[-1]) else " (edge)"
        found = "diverged | " if best["diverged"] else f"{best['loss']:.4f} | {best['lr']:.2g}{edge}"
        both = not auto["diverged"] and not best["diverged"]
        is_close = not auto["diverged"] and _loss(auto) <= (1 + CLOSE) * _loss(best)
        done, close, diverged = done + 1, close + is_close, diverged + bool(auto["diverged"])
        own = auto["diverged"] or f"{auto['loss']:.4f}"
        lines.append(
            f"| {' | '.join(cell)} | {'' if auto['layer'] is None else auto['layer']} | "
            f"{auto['before']:.4f} | {own} | {found} | {f'{_loss(auto) / _loss(best):.3f}' if both else ''} |"
        )
    return "\n".join(
        [*lines, "", f"auto is within {CLOSE:.0%} of the best in {close} of {done} cells; it diverged in {diverged}."]
    )


def _loss(row: dict[str, Any]) -> float:
    return math.inf if row["loss"] is None else float(row["loss"])


def main() -> None:
    """Run the missing trainings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["smollm2-135m", "gemma3-270m"], help="models, as in model.model"
    )
    parser.add_argument("--tasks", nargs="+", default=["sst2", "copa", "cb"], help="tasks, as in data.task")
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES), choices=list(SCOPES))
    parser.add_argument("--data_dir", required=True, help="folder of the data, as in data.data_dir")
    parser.add_argument("--steps", type=int, default=100, help="steps of each training")
    parser.add_argument("--output", default="step_size_grid", help="folder of the results")
    parser.add_argument("--report", action="store_true", help="print the table without training")
    args = parser.parse_args()
    store = CellStore(args.output, {"steps": args.steps})
    cells = [(model, task, scope) for task, model, scope in product(args.tasks, args.models, args.scopes)]

    def say(name: str, row: dict[str, Any]) -> None:
        rate = "auto" if row["lr"] is None else f"{row['lr']:.3g}"
        after = "diverged" if row["diverged"] else f"{row['loss']:.4f}"
        print(f"{name}: lr {rate}, dev loss {row['before']:.4f} -> {after}", flush=True)

    if not args.report:
        work = {
            name_of(cell, key): partial(train, cell, factor, args.data_dir, args.steps)
            for cell in cells
            for key, factor in FACTORS.items()
        }
        store.complete(work, say)
    print(report(store, cells))


if __name__ == "__main__":
    main()
