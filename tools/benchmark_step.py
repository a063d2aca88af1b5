"""Compare the time of one training step: published MeZO, MeZO on one layer, two forward passes, and slzo.

    python tools/benchmark_step.py --task sst2 --data_dir DIR --dtype float32 --threads 1 --json FILE
    python tools/benchmark_step.py --device cuda --dtype bfloat16                # on a GPU: seconds and peaks only

All variants get the same random batches of real rows, in alternation, in one process. ``mezo`` and ``mezo-layer`` are those of
``published_step.py``:

* mezo: every candidate is a separate sequence, left-padded to a multiple of 8; log-softmax over the whole vocabulary at all
  positions; three perturbation passes and one update pass over all parameters, each of which draws z again.
* mezo-layer: the same, but only one layer is perturbed and updated, as in the Dominant-Layer paper.
* forward2: two plain forward passes on one sequence per example; ``forward2-onednn`` runs their linear layers through oneDNN.
* spsa: the step of ``SPSA`` with a warm prefix cache; ``spsa-cold`` is the same without a cache.
* default: the step of ``LayerOutputPerturbation`` and AdamW in the layer that the default rule chooses, with a warm prefix cache.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from measuring import Clock, clock_of, in_new_process, prepare_process, timed
from options import command, option, parse
from published_step import encoded_rows, pad_left, published_step, unmap
from slzo.batches.encoded import EncodedExample
from slzo.models.linear import with_onednn
from slzo.models.load import load_model
from slzo.models.startup_check import split_and_verify
from slzo.tasks.registry import get_task
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json
from slzo.utils.runtime import peak_memory_gb
from slzo.zo.estimators import LayerOutputPerturbation
from slzo.zo.objectives import LOSS_OBJECTIVES, LogitObjective
from slzo_step import Profile, SlzoStep, profile_of


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    task: str = option("movie_reviews", "task name")
    data_dir: str | None = option(None, "folder with the task's rows (see data.data_dir)")
    model: str = option("smollm2-135m", "built-in name, folder, .gguf file or Hub id")
    layer: int = option(11, "tuned layer")
    threads: int = option(1, "torch threads")
    batch_size: int = option(16, "rows per step")
    batches: int = option(7, "random batches, each timed once with each variant")
    seed: int = option(0, "seed of the batches")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the weights")
    device: Literal["cpu", "cuda"] = option("cpu", "device of the model")
    default_layer: int = option(28, "tuned layer of default")
    cpu_time: bool = option(False, "CPU time instead of time; for one thread next to other jobs")
    ablations: bool = option(False, "also time slzo with each optimization changed")
    no_memory: bool = option(False, "do not measure peak memory")
    json: Path | None = option(None, "write the figures to this file")


def seconds_of(function: Callable[[], Any], clock: Clock) -> float:
    """Return the seconds of a call with those of the GPU, if there is one."""

    def run() -> None:
        function()
        wait_for_device()

    wait_for_device()
    return timed(run, clock)[0]


def wait_for_device() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def loaded(options: Options) -> Any:
    """Load the model on its device."""
    model: Any = load_model(options.model, options.dtype)
    return model.to(options.device)


def load_rows(options: Options) -> tuple[list[EncodedExample], LogitObjective]:
    """Return tokenized training rows of the task, and the loss that the task is trained with."""
    rows = encoded_rows(options.model, options.task, options.data_dir, 1000)
    return rows, LOSS_OBJECTIVES[get_task(options.task).kind]()


def draw_batches(rows: list[EncodedExample], options: Options) -> list[list[EncodedExample]]:
    """Return random batches without replacement."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    count = min(options.batches, len(order) // options.batch_size)
    return [[rows[i] for i in order[b * options.batch_size : (b + 1) * options.batch_size]] for b in range(count)]


SWITCHES: dict[str, dict[str, Any]] = {
    "paired always": {"paired": True},
    "paired never": {"paired": False},
    "without oneDNN": {"onednn": False},
    "without packing": {"packed": False},
}


def compare(options: Options) -> tuple[dict[str, list[float]], list[Profile]]:
    """Run all variants in alternation; return the seconds of each on every batch and, on a CPU, the profiles of ``spsa``."""
    rows, objective = load_rows(options)
    batches, clock = draw_batches(rows, options), clock_of(options.cpu_time)
    plain = loaded(options)
    unmap(plain)
    parts = split_and_verify(loaded(options))
    warm = SlzoStep(parts, options.layer, objective, cache_gb=8.0)
    cold = SlzoStep(parts, options.layer, objective, cache_gb=0.0)
    default = SlzoStep(parts, options.default_layer, objective, estimator=LayerOutputPerturbation(), cache_gb=8.0)
    steps = {"spsa": warm, "spsa-cold": cold, "default": default}
    for name, switch in (SWITCHES if options.ablations else {}).items():
        of_parts = {each: value for each, value in switch.items() if each in ("packed", "onednn")}
        own = split_and_verify(loaded(options), **of_parts) if of_parts else parts
        steps[name] = SlzoStep(own, options.layer, objective, cache_gb=8.0, **switch)
    seconds: dict[str, list[float]] = {}
    profiles = []
    for number, examples in enumerate(batches):
        for step in (step for step in steps.values() if step is not cold):
            step.forward.prefix(step.pack(examples))
        runs = published_runs(options, plain, parts.layers_path, examples, objective.only_gold, number)
        runs |= {name: partial(step, examples) for name, step in steps.items()}
        for name, run in runs.items():
            seconds.setdefault(name, []).append(seconds_of(run, clock))
        if options.device == "cpu":
            profiles.append(profile_of(warm, examples, clock))
        found = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items())
        print(f"batch {number + 1} of {len(batches)}: {found}", flush=True)
    return seconds, profiles


def published_runs(
    options: Options, plain: nn.Module, layers_path: str, examples: list[EncodedExample], only_gold: bool, number: int
) -> dict[str, Callable[[], Any]]:
    """Return the variants that do not use slzo, for one batch."""
    everything = list(plain.parameters())
    of_layer = list(plain.get_submodule(f"{layers_path}.{options.layer}").parameters())
    padded = pad_left(examples, only_gold).to(options.device)
    single = pad_left(examples, only_gold=True).to(options.device)

    def forward_twice(model: nn.Module) -> None:
        for _ in range(2):
            model(input_ids=single.input_ids, attention_mask=single.attention_mask)

    runs: dict[str, Callable[[], Any]] = {
        "mezo": lambda: published_step(plain, everything, padded, only_gold, number),
        "mezo-layer": lambda: published_step(plain, of_layer, padded, only_gold, number),
        "forward2": lambda: forward_twice(plain),
    }
    if options.dtype == "float32":
        runs["forward2-onednn"] = lambda: forward_twice(with_onednn(plain))
    return runs


@torch.no_grad()
def memory_of(options: Options, what: str) -> float:
    """Return the peak memory in GiB after plain inference, or after slzo steps on the same batch; run it in a new process."""
    prepare_process(options.threads)
    rows, objective = load_rows(options)
    examples = draw_batches(rows, options)[0]
    model = loaded(options)
    if what == "inference":
        batch = pad_left([EncodedExample(e.index, (e.sequences[0],), (0,)) for e in examples], only_gold=True)
        batch = batch.to(options.device)
        for _ in range(3):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    else:
        step = SlzoStep(split_and_verify(model), options.layer, objective, cache_gb=1.0)
        for _ in range(3):
            step(examples)
    return peak_memory_gb(torch.device(options.device))


def report_of_profiles(profiles: Sequence[Profile]) -> dict[str, Any]:
    """Print the parts of a step on a CPU; return them for the JSON file."""
    parts, shares = mean_of([each.parts for each in profiles]), mean_of([each.shares for each in profiles])
    tokens, operations = [each.tokens for each in profiles], sum(each.operations for each in profiles)
    whole, suffix = sum(parts.values()), len(profiles) * (parts["suffix"] + parts["head"])
    rate, alone = 2 * operations / suffix / 1e9, operations / sum(each.product_seconds for each in profiles) / 1e9
    print("slzo step: " + ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in parts.items()))
    print(
        f"suffix and head: {rate:.0f} GFLOP/s of their matrix products, {statistics.fmean(tokens):.0f} tokens per batch"
    )
    print(f"the products alone: {alone:.0f} GFLOP/s; suffix and head reach {rate / alone:.0%} of it")
    print("shares of a step, by the profiler: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    figures = {"suffix_gflops": rate, "product_gflops": alone, "shares": shares}
    return {"breakdown_s": parts, "tokens": tokens, **figures}


def mean_of(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure."""
    return {name: statistics.fmean(each[name] for each in figures) for name in figures[0]}


def report(
    options: Options, seconds: dict[str, list[float]], profiles: Sequence[Profile], memory: dict[str, float]
) -> dict[str, Any]:
    """Print the tables; return the content of the JSON file."""
    variants = {
        name: {"median_s": statistics.median(values), "mean_s": statistics.fmean(values), "seconds": values}
        for name, values in seconds.items()
    }
    where = f"batch {options.batch_size}, layer {options.layer}, {options.model}"
    print(f"\n{options.task}, {options.dtype}, {options.threads} thread(s), {where}")
    print(f"{'variant':24s} {'median s':>9s} {'mean s':>9s} {'min s':>8s} {'max s':>8s} {'x spsa (median, mean)':>22s}")
    for name, values in seconds.items():
        median, mean = (statistics.median(values), statistics.fmean(values))
        ratios = f"{median / statistics.median(seconds['spsa']):10.2f} {mean / statistics.fmean(seconds['spsa']):10.2f}"
        print(f"{name:24s} {median:9.3f} {mean:9.3f} {min(values):8.3f} {max(values):8.3f} {ratios:>22s}")
    of_parts = report_of_profiles(profiles) if profiles else {}
    for name, peak in memory.items():
        print(f"peak memory {name}: {peak:.3f} GiB")
    if memory:
        print(f"peak memory of slzo over inference: {memory['slzo'] / memory['inference']:.2f}")
    names = ("task", "dtype", "threads", "model", "layer", "default_layer", "batch_size", "device")
    settings = {name: getattr(options, name) for name in names} | {"torch": torch.__version__}
    return {**settings, "variants": variants, **of_parts, "memory_gib": memory}


@torch.no_grad()
@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    options = parse(Options, __doc__, argv)
    prepare_process(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SlzoError("--device cuda: torch finds no GPU; leave it out")
    rows, _ = load_rows(options)  # before long work
    if options.batch_size > len(rows):
        raise SlzoError(
            f"--batch_size {options.batch_size}: there are {len(rows)} training rows; choose at most as many"
        )
    kinds = () if options.no_memory else ("inference", "slzo")
    memory = {what: in_new_process(memory_of, options, what) for what in kinds}
    result = report(options, *compare(options), memory)
    if options.json:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
