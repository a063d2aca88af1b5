"""Compare a step on one process with the same step on several, which divide its rows or its points: time, bytes, memory.

    python tools/benchmark_processes.py --data_dir DIR
    python tools/benchmark_processes.py --data_dir DIR --processes 4 --estimator LayerOutputPerturbation --json FILE

A process has one thread and 16 rows of its own, or with divided directions the same 16 rows as the others; with SPSA a step has 4
queries. Each round starts the processes of every variant once, in alternation, and counts the last steps, whose rows are in the
prefix cache. Tokens are those of different rows. In every second step a process first waits for the others and then sums:
``exchange`` is the time of these sums. The other steps give the time of a step. With shared layers (``trainer.strategy sharded``)
the processes divide the rows and the weights of the layers; there ``exchange`` is the time of the process that waits least, and
``exchange`` and ``bytes`` include the gathering of layers. The speed-up, in tokens a second, is the median over the rounds.
``separate runs`` are as many runs of one process at the same time, which exchange nothing: what the machine can do.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from slzo.models.shard_group import ShardGroup
from slzo.module import ZOModule
from slzo.prefix_plan import plan_prefix
from slzo.task_rows import TaskRows
from slzo.training import adapt_rows, auto_rate, load_parts, make_stepper, tune
from slzo.utils.runtime import bound_kernel_caches, keep_freed_memory, peak_memory_gb
from slzo.zo import estimators
from slzo.zo.optim import set_rate
from slzo.zo.processes import Processes

_CPU = torch.device("cpu")
_SHARED = "rows and layers"
_SEPARATE = "separate runs"
_EPS, _QUERIES = 1e-3, 4
_STEPS, _WARM = 24, 4  # the first epoch, of 4 steps, fills the cache


@dataclass
class TimedSum:
    """An all-reduce that counts its seconds and, if it waits for the other processes before, those of waiting."""

    shards: ShardGroup | None
    waits: bool = False
    seconds: float = 0.0
    waiting: float = 0.0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        began = time.perf_counter()
        if self.shards is not None:
            self.shards.barrier()  # counts its seconds itself
        elif self.waits:
            distributed.barrier()
            self.waiting += time.perf_counter() - began
        started = time.perf_counter()
        distributed.all_reduce(tensor)
        self.seconds += time.perf_counter() - started
        return tensor


class _Rows(TaskRows):
    """Rows that are divided over processes."""

    division: Processes = Processes()

    @property
    def processes(self) -> Processes:
        """The processes of this benchmark."""
        return self.division


def run_rank(args: argparse.Namespace) -> dict[str, Any]:
    """Take the steps of one process; return seconds, seconds of exchange, tokens and bytes of a step, and the peak in GiB."""
    number, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK"))
    keep_freed_memory()  # as the slzo command does
    bound_kernel_caches()
    torch.set_num_threads(1)
    if number > 1:
        distributed.init_process_group("gloo")
    directions = number if args.divide == "directions" else 1
    shards = ShardGroup(_CPU) if args.divide == _SHARED else None
    exchange = TimedSum(shards)
    rows = _Rows(
        args.task,
        tokenizer=args.model,
        data_dir=args.data_dir,
        num_train=64 * (number // directions),
        num_dev=2,
        num_test=2,
        batch_size=16,
        seed=0,
    )
    rows.division = Processes(number, rank, directions, exchange, exchange)
    rows.setup("fit")
    estimator = getattr(estimators, args.estimator)()
    weights: dict[str, Any] = {} if estimator.perturbs_output else {"eps": _EPS, "num_queries": _QUERIES}
    options = ZOModule(args.model, estimator=estimator, seed=0, **weights).options
    parts = load_parts(options, _CPU, shards)
    adapt_rows(rows, parts, options)
    model = tune(parts, options, rows, args.layer)
    plan_prefix(model, rows)
    optimizer = options.optimizer.make(model.tensors.masters)
    set_rate(optimizer, 1e-4)
    auto = auto_rate(make_stepper(model, options, rows), rows) if estimator.perturbs_output else None
    stepper, batches = make_stepper(model, options, rows, auto=auto), rows.training_batches(None)
    figures: dict[str, list[float]] = {name: [] for name in ("seconds", "exchange", "waiting", "bytes", "tokens")}
    for step in range(_STEPS):
        exchange.waits = step % 2 == 1
        before, waited, received = exchange.seconds, exchange.waiting, 0
        if shards is not None:
            before, received = before + shards.seconds, shards.num_bytes
        batch, started = next(batches), time.perf_counter()
        result = stepper.step(batch, step, optimizer)
        taken = (
            time.perf_counter() - started,
            exchange.seconds + (0 if shards is None else shards.seconds) - before,
            exchange.waiting - waited,
            result.exchanged_bytes + (0 if shards is None else shards.num_bytes - received),
            batch.packed.num_tokens,
        )
        for values, value in zip(figures.values(), taken, strict=True):
            values.append(value)
    if shards is not None:
        shards.barrier()
    if number > 1:
        distributed.destroy_process_group()
    peak = peak_memory_gb(_CPU)
    # of the steps with the waiting before the sums, or of the others
    first = {name: _WARM + (name in ("exchange", "waiting")) for name in figures}
    return {name: statistics.median(values[first[name] :: 2]) for name, values in figures.items()} | {"peak": peak}


def measure(args: argparse.Namespace, number: int, divide: str) -> dict[str, float]:
    """Start the processes of a variant; return the figures of the slowest, and the shortest exchange."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    together = 1 if divide == _SEPARATE else number
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(together), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank", "--divide", divide]
    command += [f"--{name}={getattr(args, name)}" for name in ("model", "task", "data_dir", "layer", "estimator")]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank % together)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(number)
    ]
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a process of {number}, {divide}, has failed")
    found = [json.loads(text.strip().splitlines()[-1]) for text in texts]
    tokens = found[0]["tokens"] if divide == "directions" else sum(each["tokens"] for each in found)
    slowest = {name: max(each[name] for each in found) for name in found[0]}
    total = max(each["exchange"] + each["waiting"] for each in found)
    shortest = min(each["exchange"] for each in found)
    return slowest | {"tokens": tokens, "rate": tokens / slowest["seconds"], "total": total, "exchange": shortest}


def report(rounds: Mapping[str, list[dict[str, float]]]) -> str:
    """Return the table: medians over the rounds, and the speed-up over one process in the same round."""
    lines = [
        "| processes | seconds a step | speed-up | tokens/s | bytes a step | exchange and waiting | exchange | peak, GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    alone = rounds["1"]
    for name, found in rounds.items():
        middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
        faster = statistics.median(each["rate"] / one["rate"] for one, each in zip(alone, found, strict=True))
        lines.append(
            f"| {name} | {middle['seconds']:.3f} | {faster:.2f} | {middle['rate']:.0f} | "
            f"{middle['bytes']:.0f} | {middle['total'] / middle['seconds']:.1%} | "
            f"{middle['exchange'] / middle['seconds']:.1%} | {middle['peak']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all variants in alternation and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="model, as in model.model")
    parser.add_argument("--task", default="sst2", help="task, as in data.task")
    parser.add_argument("--data_dir", required=True, help="folder of the data, as in data.data_dir")
    parser.add_argument("--layer", type=int, default=11)
    parser.add_argument("--estimator", default="SPSA", choices=["SPSA", "LayerOutputPerturbation"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write all rounds to this file")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--divide", default="rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(run_rank(args)))
        return
    variants = {
        "1": (1, "rows"),
        **{f"{args.processes}, {each}": (args.processes, each) for each in (_SEPARATE, "rows", "directions", _SHARED)},
    }
    measured = partial(measure, args)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, variant in variants.items():
            rounds[name].append(measured(*variant))
            print(f"{name}: {rounds[name][-1]['seconds']:.3f} s", flush=True)
    print(report(rounds))
    if args.json:
        Path(args.json).write_text(json.dumps(rounds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
