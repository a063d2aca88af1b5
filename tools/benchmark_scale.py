"""Measure a step on models of several sizes: seconds, ratio to two plain forward passes, and peak memory.

    OMP_NUM_THREADS=2 python tools/benchmark_scale.py --threads 2 --output FILE.json --figure docs/images

The models are Llamas of a given shape with random bfloat16 weights (``write_shape.py``). Candidates have one token. The prefix
cache is warm. Each shape and layer runs in a separate process, in which steps and forward passes of the same rows alternate. Peak
memory is measured in two more processes, one for the steps and one for the forward passes.
"""

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from measuring import clock_of, in_new_process, prepare_process, timed
from options import command, option, parse
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.load import load_model
from slzo.models.startup_check import split_and_verify
from slzo.plots.style import BLUE, GREY, ORANGE, new_figure, style_axis, svg_of
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json, write_text
from slzo.utils.runtime import peak_memory_gb
from slzo.zo.estimators import SPSA
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.scopes import LayerScope
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned_model import TunedModel
from write_shape import Shape, write_shape

# The layers of SmolLM2-135M and -360M with an untied head for fewer tokens, a wider model, and Llama-2-7B.
SHAPES = {
    "0.13B": Shape(layers=30, hidden=576, inner=1536, heads=9, kv_heads=3, vocabulary=24000),
    "0.36B": Shape(layers=32, hidden=960, inner=2560, heads=15, kv_heads=5, vocabulary=24000),
    "1.2B": Shape(layers=24, hidden=2048, inner=5632, heads=32, kv_heads=8, vocabulary=32000),
    "7B": Shape(),
}
_EPS = 1e-3
What = Literal["step", "forward2", "both"]


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    shapes: list[str] = option(["0.13B", "0.36B", "1.2B"], "sizes to measure; 7B takes 14 GiB", choices=list(SHAPES))
    tokens: int = option(32, "tokens per prompt")
    batch_size: int = option(8, "rows per step")
    rounds: int = option(5, "number of timed steps and pairs of passes, in alternation")
    threads: int = option(1, "torch threads")
    cpu_time: bool = option(False, "measure processor seconds, for a machine that does other work too")
    seed: int = option(0, "seed of the rows")
    output: Path | None = option(None, "add the figures to this JSON file")
    figure: Path | None = option(None, "draw scale.svg in this folder")

    def settings(self) -> dict[str, Any]:
        """Return the settings that figures in one file must share."""
        names = ("threads", "cpu_time", "tokens", "batch_size", "rounds")
        return {"torch": torch.__version__, **{name: getattr(self, name) for name in names}}


def rows_of(options: Options, vocabulary: int) -> list[EncodedExample]:
    """Make rows of random tokens, each with two candidates of one token."""
    generator = random.Random(options.seed)
    rows = []
    for index in range(options.batch_size):
        prompt = tuple(generator.choices(range(3, vocabulary), k=options.tokens))
        rows.append(EncodedExample(index, tuple(EncodedSequence((*prompt, word), 1) for word in (5, 7)), (index % 2,)))
    return rows


class Steps:
    """Takes steps on one layer with a warm prefix cache."""

    def __init__(self, model: Any, layer: int, rows: Sequence[EncodedExample]) -> None:
        tuned = TunedModel.from_scope(split_and_verify(model), LayerScope(), layer, engine=Engine(cache_gb=8.0))
        self.stepper = Stepper(tuned, CandidateCrossEntropy(), SPSA(), StepOptions(_EPS))
        self.batch = TrainBatch(pack(rows), ())
        self.optimizer = torch.optim.SGD(tuned.tensors.masters, lr=1e-6)
        self.count = 0

    def __call__(self) -> None:
        """Take one step."""
        self.stepper.step(self.batch, self.count, self.optimizer)
        self.count += 1


def forward_twice(model: Any, ids: Tensor) -> None:
    """Run two plain forward passes on the same prompts, with the last position's logits only."""
    for _ in range(2):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def measure(options: Options, folder: str, layer: int, what: What, rounds: int) -> dict[str, Any]:
    """Return the seconds of each step and pair of passes, and the peak memory; run it in a new process."""
    prepare_process(options.threads)
    model = load_model(folder, "bfloat16")
    rows = rows_of(options, model.config.vocab_size)
    ids = torch.tensor([row.sequences[0].ids[:-1] for row in rows])
    runs: dict[str, Callable[[], None]] = {}
    if what != "forward2":
        runs["step"] = Steps(model, layer, rows)
    if what != "step":
        runs["forward2"] = lambda: forward_twice(model, ids)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first is not counted: it fills the cache and reads the files
        for name, run in runs.items():
            spent, _ = timed(run, clock_of(options.cpu_time))
            seconds[name] += [spent] if number else []
    return {"seconds": seconds, "peak_gib": peak_memory_gb(torch.device("cpu"))}


def run_shape(options: Options, name: str, folder: str) -> list[dict[str, Any]]:
    """Return the figures of one shape, one entry per layer."""
    shape = SHAPES[name]
    parameters = write_shape(shape, Path(folder))
    plain = in_new_process(measure, options, folder, 0, "forward2", 1)["peak_gib"]
    found = []
    for layer in (1, shape.layers // 2):
        seconds = in_new_process(measure, options, folder, layer, "both", options.rounds)["seconds"]
        step, forward2 = (statistics.median(seconds[what]) for what in ("step", "forward2"))
        entry = {
            "shape": name,
            "parameters": parameters,
            "layers": shape.layers,
            "layer": layer,
            "step_s": step,
            "forward2_s": forward2,
            "share": step / forward2,
            "seconds": seconds,
            "peak_gib": in_new_process(measure, options, folder, layer, "step", 1)["peak_gib"],
            "forward_peak_gib": plain,
        }
        found.append(entry)
        print(line_of(entry), flush=True)
    return found


def line_of(entry: dict[str, Any]) -> str:
    """Return one row of the table."""
    peaks = f"{entry['peak_gib']:.2f} | {entry['forward_peak_gib']:.2f}"
    seconds = f"{entry['step_s']:.2f} | {entry['forward2_s']:.2f} | {entry['share']:.2f}"
    size = f"{entry['parameters'] / 1e9:.2f}e9 | {entry['layer']} of {entry['layers']}"
    return f"| {entry['shape']} | {size} | {seconds} | {peaks} |"


HEAD = (
    "| shape | parameters | layer | step, s | two forward passes, s | ratio | peak of steps, GiB | of forward passes, GiB |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def draw(entries: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw seconds and peak memory over the number of parameters, as ``scale.svg``."""
    figure = new_figure(8.4, 3.3, "A step over the size of the model", "random bfloat16 weights, medians")
    left, right = figure.subplots(1, 2)
    of_layers = {
        "layer 1": [e for e in entries if e["layer"] == 1],
        "a middle layer": [e for e in entries if e["layer"] != 1],
    }
    for (label, own), colour in zip(of_layers.items(), (BLUE, ORANGE), strict=True):
        size = [entry["parameters"] / 1e9 for entry in own]
        left.plot(size, [entry["step_s"] for entry in own], marker="o", color=colour, label=f"step, {label}")
        right.plot(size, [entry["peak_gib"] for entry in own], marker="o", color=colour, label=f"steps, {label}")
    size = [entry["parameters"] / 1e9 for entry in of_layers["layer 1"]]
    plain = {what: [entry[what] for entry in of_layers["layer 1"]] for what in ("forward2_s", "forward_peak_gib")}
    left.plot(size, plain["forward2_s"], "--", marker="o", color=GREY, label="two plain forward passes")
    right.plot(size, plain["forward_peak_gib"], "--", marker="o", color=GREY, label="plain forward passes")
    for axis, words in ((left, "seconds"), (right, "peak memory, GiB")):
        style_axis(axis, "parameters, billions", words, whole=False)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    write_text(folder / "scale.svg", f'<?xml version="1.0" encoding="utf-8"?>\n{svg_of(figure, "scale")}')


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure all shapes."""
    options = parse(Options, __doc__, argv)
    prepare_process(options.threads)
    print(HEAD)
    entries = kept(options)
    for name in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            entries = [entry for entry in entries if entry["shape"] != name] + run_shape(options, name, folder)
        if options.output is not None:
            entries.sort(key=lambda entry: entry["parameters"])
            write_json(options.output, {**options.settings(), "entries": entries})
    if options.figure is not None:
        draw(entries, options.figure)
    return 0


def kept(options: Options) -> list[dict[str, Any]]:
    """Return the figures in the output file, so that shapes can be measured one after another.

    Raises:
        SlzoError: They were measured with other settings.
    """
    if options.output is None or not options.output.is_file():
        return []
    found: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
    entries: list[dict[str, Any]] = found.pop("entries")
    if found != options.settings():
        raise SlzoError(f"--output {str(options.output)!r}: was measured with {found}; give another file")
    return entries


if __name__ == "__main__":
    sys.exit(main())
