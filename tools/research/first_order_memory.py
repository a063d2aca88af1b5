"""Measure memory and time of a step for the default, SPSA and first order on the same layer, next to the plan.

    python tools/research/first_order_memory.py --data_dir DIR --output memory
    python tools/research/first_order_memory.py --data_dir DIR --output memory --models gemma3-270m --layers 2 16

A cell is a model, a task, a layer and a method. It runs ``slzo fit`` for a few steps in a process of its own and reads planned
and peak memory and the time of a step from the summary. Results are saved at once, and the same command continues where it
stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slzo.experiments.store import CellStore

METHODS = {
    "output": [],
    "spsa": ["--model.estimator=SPSA"],
    "first order": ["--model.estimator=Backprop"],
}


def measure(model: str, task: str, layer: int, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a few steps and return planned and peak memory, GiB, and the seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [f"--data.num_train={args.rows}", "--data.num_dev=16", "--data.num_test=16", "--data.batch_size=16"]
        quiet = ["--trainer.enable_progress_bar=false", "--record.test_before=false", "--record.reference=false"]
        run = [f"--trainer.max_steps={args.steps}", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
        data = [f"--data.task={task}", f"--data.data_dir={args.data_dir}", "--guard.factor=null"]
        chosen = [f"--model.model={model}", f"--model.layer={layer}", "--seed_everything=0", *METHODS[method]]
        # the profile is not needed for a given layer
        command = [sys.executable, "-m", "slzo", "fit", "--config=quickstart", *chosen, *data, *rows, *run, *quiet]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("runs/*/summary.json"))
        if not found:
            return {"problem": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        summary = json.loads(found[0].read_text(encoding="utf-8"))
    return {
        "planned": summary["planned_memory_gb"],
        "peak": summary["peak_memory_gb"],
        "seconds": summary["train_seconds"],
    }


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, int, str]]:
    """Iterate over the cells: model, task, layer, method."""
    for model in args.models:
        for task in args.tasks:
            for layer in args.layers:
                for method in args.methods:
                    yield model, task, layer, method


def name_of(model: str, task: str, layer: int, method: str) -> str:
    """Return the name of a cell."""
    return f"{Path(model).stem}-{task}-{layer}-{method.replace(' ', '-')}"


def report(store: CellStore, args: argparse.Namespace) -> str:
    """Return the table of the finished cells, and how far the plans are from the peaks."""
    lines = [
        "| model | task | layer | method | planned, GiB | peak, GiB | planned / peak |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    ratios = []
    for model, task, layer, method in cells(args):
        row = store.result(name_of(model, task, layer, method))
        if row is None:
            continue
        start = f"| {Path(model).stem} | {task} | {layer} | {method} |"
        if "problem" in row:
            lines.append(f"{start} {row['problem']} | | |")
            continue
        ratios.append(row["planned"] / row["peak"])
        lines.append(f"{start} {row['planned']:.2f} | {row['peak']:.2f} | {ratios[-1]:.2f} |")
    if ratios:
        lines.append(f"planned / peak: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")
    return "\n".join(lines)


def main() -> None:
    """Run the missing cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="models, as in model.model")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "drop"], help="tasks, as in data.task")
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 28])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--data_dir", required=True, help="folder of the data, as in data.data_dir")
    parser.add_argument("--rows", type=int, default=200, help="training rows")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run")
    parser.add_argument("--output", default="memory", help="folder of the results")
    parser.add_argument("--report", action="store_true", help="print the table without running anything")
    args = parser.parse_args()
    store = CellStore(args.output, {"rows": args.rows, "steps": args.steps, "threads": torch.get_num_threads()})
    for cell in [] if args.report else cells(args):
        with store.claim(name_of(*cell)) as mine:
            if mine:
                store.save(name_of(*cell), measure(*cell, args))
                print(f"{name_of(*cell)}: {store.result(name_of(*cell))}", flush=True)
    print(report(store, args))


if __name__ == "__main__":
    main()
