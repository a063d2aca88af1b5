"""Compare ``lr: auto`` with a grid of constant learning rates: dev loss after the same steps on the same rows.

    python tools/research/step_size_grid.py --data_dir DIR --output grids
    python tools/research/step_size_grid.py --data_dir DIR --output grids --models gemma3-270m --tasks sst2 --scopes layer lora

A cell is a model, a task and a scope. It has one training with measured step sizes and five with constant rates, a factor of 3
apart, around the rate that was measured before the first step (--lrs sets other rates). eps is measured for all. Results are
saved at once, and the same command continues where it stopped. --report prints the table of the finished cells.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore
from slzo.module import ZOModule
from slzo.task_rows import TaskRows
from slzo.training import adapt_rows, load_parts
from slzo.zo.estimators import SPSA
from slzo.zo.profile import profile_layers
from slzo.zo.scopes import ActivationSubspace, AllParameters, LayerScope, LoRA, Scope
from slzo.zo.selection import OutlierRemovingLayer, SelectionContext

SCOPES: dict[str, Callable[[], Scope]] = {
    "layer": LayerScope,
    "subspace": lambda: ActivationSubspace(rank=16),
    "lora": LoRA,
    "all": AllParameters,
}
# training, dev and held-out rows; CB and COPA have few
ROWS = {"cb": (200, 50, 50), "copa": (300, 100, 100)}
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
CLOSE = 0.05


def trials_of(model: str, task: str, scope: Scope, data_dir: str, layer: int | None) -> tuple[LayerTrials, int | None]:
    """Return trials, and the layer to tune: the given one, or the one that removes the outlier."""
    train, dev, test = ROWS.get(task, (1000, 200, 200))
    options = ZOModule(model, scope=scope, estimator=SPSA(), seed=0).options
    rows = TaskRows(
        task, tokenizer=model, data_dir=data_dir, num_train=train, num_dev=dev, num_test=test, batch_size=16, seed=0
    )
    rows.setup("fit")
    parts = load_parts(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    adapt_rows(rows, parts, options)
    if scope.needs_layer and layer is None:
        batches = [batch.to(parts.model.device) for batch in rows.profile_batches(16)]
        layer = OutlierRemovingLayer().select(SelectionContext(profile_layers(parts, batches)[0])).layer
    return LayerTrials(parts, options, rows), layer if scope.needs_layer else None


def run_cell(store: CellStore, name: str, model: str, task: str, scope: str, args: argparse.Namespace) -> None:
    """Run the missing trainings of a cell."""
    tried = [store.result(f"{name}-auto"), *(store.result(f"{name}-{number}") for number in range(len(FACTORS)))]
    if None not in tried:
        return
    trials, layer = trials_of(model, task, SCOPES[scope](), args.data_dir, args.layer)
    lr, eps = trials.own_step(layer)
    rates = [lr * factor for factor in FACTORS] if args.lrs is None else args.lrs
    for number, rate in [(-1, None), *enumerate(rates)]:
        key = f"{name}-auto" if rate is None else f"{name}-{number}"
        if store.result(key) is not None:
            continue
        trial = trials.run(layer, steps=args.steps, seed=0, lr=rate, eps=eps if rate is not None else None)
        last = trial.scores[-1]
        row = {
            "model": model,
            "task": task,
            "scope": scope,
            "layer": layer,
            "lr": rate,
            "eps": eps,
            "before": trial.scores[0].loss,
        }
        loss = None if trial.diverged else last.loss
        store.save(
            key, row | {"loss": loss, "metric": last.metric, "seconds": last.seconds, "diverged": trial.diverged}
        )
        print(
            f"{key}: lr {'auto' if rate is None else f'{rate:.3g}'}, dev loss {trial.scores[0].loss:.4f} -> {last.loss:.4f}",
            flush=True,
        )


def report(store: CellStore, names: list[str]) -> str:
    """Return the table of the finished cells."""
    lines = [
        "| model | task | scope | layer | before | auto | best of the grid | at lr | auto / best |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    close = done = diverged = 0
    for name in names:
        auto, grid = store.result(f"{name}-auto"), [store.result(f"{name}-{number}") for number in range(len(FACTORS))]
        if auto is None or None in grid:
            continue
        best = min(grid, key=_loss)
        edge = "" if best not in (grid[0], grid[-1]) else " (edge)"
        found = "diverged | " if best["diverged"] else f"{best['loss']:.4f} | {best['lr']:.2g}{edge}"
        ratio = _loss(auto) / _loss(best) if not auto["diverged"] and not best["diverged"] else math.nan
        is_close = not auto["diverged"] and _loss(auto) <= (1 + CLOSE) * _loss(best)
        done, close, diverged = done + 1, close + is_close, diverged + bool(auto["diverged"])
        own = auto["diverged"] or f"{auto['loss']:.4f}"
        lines.append(
            f"| {auto['model']} | {auto['task']} | {auto['scope']} | {'' if auto['layer'] is None else auto['layer']} | "
            f"{auto['before']:.4f} | {own} | {found} | {'' if math.isnan(ratio) else f'{ratio:.3f}'} |"
        )
    return "\n".join(
        [*lines, "", f"auto is within {CLOSE:.0%} of the best in {close} of {done} cells; it diverged in {diverged}."]
    )


def _loss(row: dict[str, Any]) -> float:
    return math.inf if row["loss"] is None else float(row["loss"])


def main() -> None:
    """Run the missing cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["smollm2-135m", "gemma3-270m"], help="models, as in model.model"
    )
    parser.add_argument("--tasks", nargs="+", default=["sst2", "copa", "cb"], help="tasks, as in data.task")
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES), choices=list(SCOPES))
    parser.add_argument("--data_dir", required=True, help="folder of the data, as in data.data_dir")
    parser.add_argument("--layer", type=int, help="layer to tune (default: the layer that removes the outlier)")
    parser.add_argument("--lrs", type=float, nargs=5, help="learning rates (default: five around the measured rate)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each training")
    parser.add_argument("--output", default="step_size_grid", help="folder of the results")
    parser.add_argument("--report", action="store_true", help="print the table without training")
    parser.add_argument("--json", help="also write all results to this file")
    args = parser.parse_args()
    store = CellStore(args.output, {"steps": args.steps, "layer": args.layer, "lrs": args.lrs})
    cells = [(m, t, s) for t in args.tasks for m in args.models for s in args.scopes]
    names = {cell: "-".join([Path(cell[0]).name, *cell[1:]]) for cell in cells}
    for cell in cells:
        with store.claim(names[cell]) as mine:
            if mine and not args.report:
                run_cell(store, names[cell], *cell, args)
    print(report(store, list(names.values())))
    if args.json:
        keys = ["auto", *range(len(FACTORS))]
        found = [store.result(f"{name}-{key}") for name in names.values() for key in keys]
        Path(args.json).write_text(
            json.dumps([row for row in found if row is not None], indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
