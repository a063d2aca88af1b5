"""Measure peak memory and seconds of a step: slzo, AdamW on the same layer, and what is used without slzo.

    python tools/research/memory_and_time.py --data_dir DIR --output memory
    python tools/research/memory_and_time.py --data_dir DIR --output memory --models qwen.gguf --layers 2 21 --tasks drop --rows 4

A cell is a model, a task, a number of rows a step, a method and, for methods that tune one layer, a layer. Each cell runs in a
process of its own: slzo's methods through the Trainer, the others in ``plain_training.py``. The time is the median of the steps
that find their rows in the prefix cache. Cells above --most GiB, and those of the shape of Llama-2-7B (--models llama-7b), are
arithmetic and marked with "~". Results are saved at once, and the same command continues where it stopped; several processes can
share the folder. --report prints the table, and how far slzo's plans are from the peaks.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from slzo import TaskDataModule, ZOModule, ZOTrainer
from slzo.experiments.store import CellStore
from slzo.models.shape import ModelShape, model_shape, shape_of, skeleton_of
from slzo.training.memory_estimate import MemoryInputs, Workload
from slzo.utils.errors import one_line
from slzo.zo.estimators import SPSA, Backprop, Estimator, LayerOutputPerturbation

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import in_new_process
from memory_table import MODELS
from options import command, option, parse
from plain_training import batches, pad_left
from tables import finished, markdown_table

_GB = 2**30
OF_LAYER: dict[str, type[Estimator]] = {"slzo": LayerOutputPerturbation, "spsa": SPSA, "adamw-layer": Backprop}
TITLES = {
    "slzo": "slzo",
    "spsa": "slzo with SPSA",
    "adamw-layer": "AdamW on the layer",
    "mezo": "MeZO on all weights",
    "lora": "LoRA in all layers",
    "lora-checkpointing": "LoRA, checkpointing",
    "adamw": "AdamW on all weights",
}
SHAPE_7B = "llama-7b"
# float32 numbers per token and entry of the vocabulary: logits, log-probabilities, and with a gradient those of both
_LOGITS, _LOGITS_WITH_GRADIENT = 2, 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    models: list[str] = option(["smollm2-135m"], "models, as in model.model")
    tasks: list[str] = option(["sst2"], "tasks, as in data.task")
    layers: list[int] = option([2, 28], "layers of the methods that tune one")
    methods: list[str] = option([method for method in TITLES if method != "spsa"], "methods", choices=list(TITLES))
    data_dir: str = option(help="folder of the data, as in data.data_dir")
    rows: int = option(16, "rows of a step")
    steps: int = option(3, "steps of methods without slzo; the first is not timed")
    most: float = option(20, "cells above this are arithmetic, GiB")
    output: str = option("memory", "folder of the results")
    report: bool = option(False, "print the table without running anything")


class Cell(NamedTuple):
    """A measurement.

    Attributes:
        model: Name of the model, or ``llama-7b`` for arithmetic.
        task: Name of the task.
        rows: Rows of a step.
        method: A key of ``TITLES``.
        layer: Tuned layer; ``None`` for methods that tune all.
    """

    model: str
    task: str
    rows: int
    method: str
    layer: int | None


class StepSeconds(Callback):
    """Collects the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the seconds of a step."""
        self.seconds.append(float(trainer.callback_metrics["train/step_seconds"]))


def fit(cell: Cell, data_dir: str) -> dict[str, float]:
    """Take six steps on three batches in this process; return ``planned`` and ``peak`` in GiB and ``seconds`` of a late step."""
    times = StepSeconds()
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {"num_train": 3 * cell.rows, "num_dev": 2, "num_test": 2, "batch_size": cell.rows}
        data = TaskDataModule(cell.task, tokenizer=cell.model, data_dir=data_dir, **sizes)
        model = ZOModule(cell.model, layer=cell.layer, estimator=OF_LAYER[cell.method](), seed=0)
        trainer = ZOTrainer(
            max_steps=6,
            val_check_interval=6,
            log_every_n_steps=1,  # so that each step has its seconds
            default_root_dir=folder,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=[times],
        )
        trainer.fit(model, datamodule=data)
        (found,) = Path(folder).glob("runs/*/summary.json")
        summary = json.loads(found.read_text(encoding="utf-8"))
    return {
        "planned": summary["planned_memory_gb"],
        "peak": summary["peak_memory_gb"],
        "seconds": statistics.median(times.seconds[3:]),
    }


def measure(cell: Cell, data_dir: str, steps: int) -> dict[str, Any]:
    """Run a cell in a process of its own, which has imported only what its method needs."""
    if cell.method in OF_LAYER:
        try:
            return dict(in_new_process(fit, cell, data_dir))
        except Exception as error:  # the other cells do not depend on it
            return {"problem": one_line(error)}
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "plain_training.py"),
        "--data_dir",
        data_dir,
        "--model",
        cell.model,
    ]
    command += ["--task", cell.task, "--rows", str(cell.rows), "--steps", str(steps), "--method", cell.method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def arithmetic(cell: Cell, shape: ModelShape, dtype: torch.dtype, tokens: int) -> float:
    """Return the peak memory in GiB of a step on ``tokens`` tokens, from the constants of slzo's plan."""
    frozen = MemoryInputs(
        shape=shape,
        dtype=dtype,
        quantization=None,
        tuned={},
        full_layers=0,
        start=0,
        workload=Workload(tokens, train_tokens=tokens),
        cache_bytes=2 * _GB,
    )
    if cell.layer is not None:
        first_order = cell.method == "adamw-layer"
        copies = 2 if cell.method == "spsa" else 4  # master and gradient, and the two moments of AdamW
        inputs = replace(
            frozen,
            tuned={"tuned": 4 * copies * (shape.linear + shape.layer_rest)},
            full_layers=1,
            start=cell.layer,
            workload=replace(frozen.workload, cached_tokens=3 * tokens),
            differentiated=shape.num_layers - cell.layer if first_order else int(cell.method == "slzo"),
            records=cell.method == "slzo",
        )
        return inputs.plan().total / _GB
    parts = replace(frozen, differentiated=1).plan().parts
    of_layer, activations = parts["activations for the derivative"], parts["activations"]
    base, logits = parts["program"] + parts["weights"], 4 * tokens * shape.vocabulary
    if cell.method == "mezo":
        sequences = 2 if cell.task == "sst2" else 1  # each candidate is a sequence
        return (base + sequences * (activations + logits * _LOGITS)) / _GB
    total = base + logits * _LOGITS_WITH_GRADIENT
    if cell.method == "lora-checkpointing":
        return (total + of_layer + shape.num_layers * tokens * shape.hidden * dtype.itemsize) / _GB
    if cell.method == "adamw":
        # gradient and two moments; with weights in half precision also a float32 master
        total += shape.num_parameters * (dtype.itemsize + (8 if dtype == torch.float32 else 12))
    return (total + shape.num_layers * of_layer) / _GB


def shape_and_dtype(model: str) -> tuple[ModelShape, torch.dtype]:
    """Return the shape of a model and the type in which it is trained: float32, and bfloat16 for the shape of Llama-2-7B."""
    if model == SHAPE_7B:
        return shape_of(skeleton_of(MODELS["Llama-2-7B"])), torch.bfloat16
    return model_shape(model)[0], torch.float32


# ---- table --------------------------------------------------------------------------------------------------------------


def cells(options: Options) -> list[Cell]:
    """Return the cells."""
    found = []
    for model, task, method in product(options.models, options.tasks, options.methods):
        layers = options.layers if method in OF_LAYER else [None]
        found += [Cell(model, task, options.rows, method, layer) for layer in layers]
    return found


def row_of(cell: Cell, result: dict[str, Any]) -> list[object]:
    """Return the row of a finished cell."""
    layer = "" if cell.layer is None else cell.layer
    start = [Path(cell.model).name, cell.task, cell.rows, TITLES[cell.method], layer]
    if "problem" in result:
        return [*start, result["problem"], "", ""]
    if "peak" not in result:
        return [*start, f"~{result['arithmetic']:.1f}", "", ""]
    planned = f"{result['planned']:.2f}" if "planned" in result else ""
    return [*start, f"{result['peak']:.2f}", planned, f"{result['seconds']:.2f}"]


def report(results: list[tuple[Cell, dict[str, Any]]]) -> str:
    """Return the table of the finished cells, and how far the plans are from the peaks."""
    head = ["model", "task", "rows", "method", "layer", "peak, GiB", "planned, GiB", "seconds a step"]
    lines = [markdown_table(head, [row_of(*each) for each in results], left=4)]
    for name in ("planned", "arithmetic"):
        if values := [result[name] / result["peak"] for _, result in results if "peak" in result and name in result]:
            figures = f"{min(values):.2f} to {max(values):.2f}, median {statistics.median(values):.2f}"
            lines.append(f"{name} / peak: {figures}")
    return "\n".join(lines)


def tokens_of(cell: Cell, data_dir: str) -> int:
    """Return the tokens of the largest of three batches: packed for slzo, else padded to the longest row."""
    model = "smollm2-135m" if cell.model == SHAPE_7B else cell.model
    own, _ = batches(model, cell.task, data_dir, cell.rows, 3)
    if cell.layer is not None:
        return max(sum(len(row.sequences[row.gold[0]].ids) for row in rows) for rows in own)
    return max(pad_left(rows, only_gold=True).input_ids.numel() for rows in own)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing cells and print the table."""
    options = parse(Options, __doc__, argv)
    store = CellStore(options.output, {"threads": torch.get_num_threads()})

    def compute(cell: Cell) -> dict[str, Any]:
        tokens = tokens_of(cell, options.data_dir)
        result: dict[str, Any] = {"arithmetic": arithmetic(cell, *shape_and_dtype(cell.model), tokens)}
        runs = result["arithmetic"] <= options.most and cell.model != SHAPE_7B
        return result | measure(cell, options.data_dir, options.steps) if runs else result

    print(report(finished(store, cells(options), compute, options.report)))


if __name__ == "__main__":
    sys.exit(main())
