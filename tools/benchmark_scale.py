"""Measure a step on models of several sizes: seconds, ratio to two plain forward passes, and peak memory.

    OMP_NUM_THREADS=2 python tools/benchmark_scale.py --threads 2 --output FILE.json --figure docs/images

The models are Llamas of a given shape with random bfloat16 weights (``write_shape.py``). Candidates have one token. The prefix
cache is warm. Each shape and layer runs in a separate process, in which steps and forward passes of the same rows alternate. Peak
memory is measured in two more processes, one for the steps and one for the forward passes.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "research"))
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.load import load_model
from slzo.models.startup_check import split_and_verify
from slzo.pictures.style import BLUE, GREY, ORANGE, new_figure, style_axis, svg_of
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json, write_text
from slzo.utils.runtime import bound_kernel_caches, keep_freed_memory, peak_memory_gb
from slzo.zo.estimators import SPSA
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.scopes import LayerScope
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned_model import TunedModel
from write_shape import parse, write_shape

# The layers of SmolLM2-135M and -360M with an untied head for fewer tokens, a wider model, and Llama-2-7B.
SHAPES: dict[str, dict[str, int]] = {
    "0.13B": {"layers": 30, "hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 24000},
    "0.36B": {"layers": 32, "hidden": 960, "inner": 2560, "heads": 15, "kv_heads": 5, "vocabulary": 24000},
    "1.2B": {"layers": 24, "hidden": 2048, "inner": 5632, "heads": 32, "kv_heads": 8, "vocabulary": 32000},
    "7B": {"layers": 32, "hidden": 4096, "inner": 11008, "heads": 32, "kv_heads": 32, "vocabulary": 32000},
}
_SMALL = ["0.13B", "0.36B", "1.2B"]
_EPS = 1e-3


def rows_of(args: argparse.Namespace, vocabulary: int) -> list[EncodedExample]:
    """Make rows of random tokens, each with two candidates of one token."""
    generator = random.Random(args.seed)
    rows = []
    for index in range(args.batch_size):
        prompt = tuple(generator.choices(range(3, vocabulary), k=args.tokens))
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
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each step and pair of passes, or the peak memory of one kind; run it in a separate process."""
    model = load_model(args.folder, "bfloat16")
    rows = rows_of(args, model.config.vocab_size)
    ids = torch.tensor([row.sequences[0].ids[:-1] for row in rows])
    seconds: dict[str, list[float]] = {"step": [], "forward2": []}
    clock = time.process_time if args.cpu_time else time.perf_counter
    runs: dict[str, Any] = {}
    if args.measure in ("step", "both"):
        runs["step"] = Steps(model, args.layer, rows)
    if args.measure in ("forward2", "both"):
        runs["forward2"] = lambda: forward_twice(model, ids)
    for number in range(args.rounds + 1):  # the first is not counted: it fills the cache and reads the files
        for name, run in runs.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return {**seconds, "peak_gib": peak_memory_gb(torch.device("cpu"))}


def measure_apart(args: argparse.Namespace, folder: str, layer: int, what: str) -> dict[str, Any]:
    """Run the same measurement in a separate process."""
    options = {"tokens": args.tokens, "batch_size": args.batch_size, "threads": args.threads, "seed": args.seed}
    options["rounds"] = args.rounds if what == "both" else 1
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--cpu_time"] if args.cpu_time else []
    command = [sys.executable, __file__, *words, "--folder", folder, "--layer", str(layer), "--measure", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlzoError(f"--shapes: a measurement failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_shape(args: argparse.Namespace, name: str, folder: str) -> list[dict[str, Any]]:
    """Return the figures of one shape, one entry per layer."""
    sizes = SHAPES[name]
    words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    parameters = write_shape(parse(["--output", folder, *words]))
    plain = measure_apart(args, folder, 0, "forward2")["peak_gib"]
    found = []
    for layer in (1, sizes["layers"] // 2):
        timed = measure_apart(args, folder, layer, "both")
        step, forward2 = (statistics.median(timed[what]) for what in ("step", "forward2"))
        entry = {
            "shape": name,
            "parameters": parameters,
            "layers": sizes["layers"],
            "layer": layer,
            "step_s": step,
            "forward2_s": forward2,
            "share": step / forward2,
            "seconds": {what: timed[what] for what in ("step", "forward2")},
            "peak_gib": measure_apart(args, folder, layer, "step")["peak_gib"],
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
    "| shape | parameters | layer | step, s | two forward passes, s | share | peak of steps, GiB | of forward passes, GiB |\n"
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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=_SMALL, help="sizes to measure; 7B takes 14 GiB"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step")
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of timed steps and pairs of passes, in alternation"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--cpu_time", action="store_true", help="measure processor seconds, for a machine that does other work too"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows")
    parser.add_argument("--output", type=Path, help="add the figures to this JSON file")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="draw scale.svg in this folder")
    parser.add_argument("--weights", type=Path, help="temporary folder for the weights (default: the system's)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--layer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=["step", "forward2", "both"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all shapes; return 2 after a user error."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the slzo command does
    bound_kernel_caches()
    if args.measure:
        print(json.dumps(measure(args)))
        return 0
    print(HEAD)
    try:
        entries = kept(args)
        for name in args.shapes:
            with tempfile.TemporaryDirectory(dir=args.weights) as folder:
                entries = [entry for entry in entries if entry["shape"] != name] + run_shape(args, name, folder)
            if args.output is not None:
                entries.sort(key=lambda entry: entry["parameters"])
                write_json(args.output, {**settings(args), "entries": entries})
    except (SlzoError, OSError) as error:
        print(f"benchmark_scale: error: {error}", file=sys.stderr)
        return 2
    if args.figure is not None:
        draw(entries, args.figure)
    return 0


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that figures in one file must share."""
    names = ("threads", "cpu_time", "tokens", "batch_size", "rounds")
    return {"torch": torch.__version__, **{name: getattr(args, name) for name in names}}


def kept(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures in the output file, so that shapes can be measured one after another.

    Raises:
        SlzoError: They were measured with other settings.
    """
    if args.output is None or not args.output.is_file():
        return []
    found: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8"))
    entries: list[dict[str, Any]] = found.pop("entries")
    if found != settings(args):
        raise SlzoError(f"--output {str(args.output)!r}: was measured with {found}; give another file")
    return entries


if __name__ == "__main__":
    sys.exit(main())
