"""Compare a step on one process with the same step on several, which divide its rows or its points: time, bytes, memory.

    python tools/benchmark_processes.py --data_dir DIR
    python tools/benchmark_processes.py --data_dir DIR --processes 4 --estimator LayerOutputPerturbation --json FILE

A process has one thread and 16 rows of its own, or with divided directions the same 16 rows as the others; with SPSA a step has 4
queries. Each round starts the processes of every variant once, in alternation, and counts the last steps, whose rows are in the
prefix cache. Tokens are those of different rows. In every second step a process waits for the others before each exchange, and
``exchange`` is the time of these. The other steps give the time of a step. With shared layers (``trainer.strategy sharded``)
the processes divide the rows and the weights of the layers; there ``exchange`` is the time of the process that waits least, and
``exchange`` and ``bytes`` include the gathering of layers. The speed-up, in tokens a second, is the median over the rounds.
``separate runs`` are as many runs of one process at the same time, which exchange nothing: what the machine can do.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from measuring import in_new_process, prepare_process
from options import command, option, parse
from slzo.models.shard_group import ShardGroup
from slzo.module import ZOModule
from slzo.task_data import TaskData
from slzo.training.build import adapt_rows, auto_rate, load_parts, make_stepper, tune
from slzo.training.prefix_plan import plan_prefix
from slzo.utils.files import write_json
from slzo.utils.runtime import peak_memory_gb
from slzo.zo import estimators
from slzo.zo.optim import set_rate
from slzo.zo.processes import Processes
from tables import markdown_table

_CPU = torch.device("cpu")
_SHARED = "rows and layers"
_SEPARATE = "separate runs"
_EPS, _QUERIES = 1e-3, 4
_STEPS, _WARM = 24, 4  # the first epoch, of 4 steps, fills the cache


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    model: str = option("smollm2-135m", "model, as in model.model")
    task: str = option("sst2", "task, as in data.task")
    data_dir: str = option(help="folder of the data, as in data.data_dir")
    layer: int = option(11, "tuned layer")
    estimator: Literal["SPSA", "LayerOutputPerturbation"] = option("SPSA", "as in model.estimator")
    processes: int = option(2, "processes that divide a step")
    rounds: int = option(3, "runs of each variant")
    json: Path | None = option(None, "also write all rounds to this file")


@dataclass
class TimedExchange:
    """Exchanges tensors and counts the seconds and, if it waits for the other processes before, those of waiting."""

    shards: ShardGroup | None
    waits: bool = False
    seconds: float = 0.0
    waiting: float = 0.0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        with self._timed():
            distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked."""
        with self._timed():
            gathered = tensor.new_empty(distributed.get_world_size(), *tensor.shape)
            distributed.all_gather(list(gathered), tensor.contiguous())
        return gathered

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        if self.shards is not None:
            self.shards.barrier()  # counts its seconds itself
        elif self.waits:
            distributed.barrier()
            self.waiting += time.perf_counter() - began
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


class _Rows(TaskData):
    """Rows that are divided over processes."""

    division: Processes = Processes()

    @property
    def processes(self) -> Processes:
        """The processes of this benchmark."""
        return self.division


def run_rank(options: Options, divide: str, number: int, meeting: Path, rank: int) -> dict[str, Any]:
    """Take the steps of one process; return seconds, seconds of exchange, tokens and bytes of a step, and the peak in GiB.

    Args:
        options: Options of the command.
        divide: What the processes divide.
        number: Number of processes that divide a step.
        meeting: File by which they find each other.
        rank: Number of this process.
    """
    prepare_process(threads=1)
    if number > 1:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=number)
    directions = number if divide == "directions" else 1
    shards = ShardGroup(_CPU) if divide == _SHARED else None
    exchange = TimedExchange(shards)
    rows = _Rows(
        options.task,
        tokenizer=options.model,
        data_dir=options.data_dir,
        num_train=64 * (number // directions),
        num_dev=2,
        num_test=2,
        batch_size=16,
        seed=0,
    )
    rows.division = Processes(
        number, rank, directions, sum_rows=exchange.sum, sum_points=exchange.sum, gather_rows=exchange.gather
    )
    rows.setup("fit")
    estimator = getattr(estimators, options.estimator)()
    weights: dict[str, Any] = {} if estimator.perturbs == "output" else {"eps": _EPS, "num_queries": _QUERIES}
    training = ZOModule(options.model, estimator=estimator, seed=0, **weights).options
    parts = load_parts(training, _CPU, shards)
    adapt_rows(rows, parts, training)
    model = tune(parts, training, rows, options.layer)
    plan_prefix(model, rows)
    optimizer = training.optimizer.make(model.tensors.masters)
    set_rate(optimizer, 1e-4)
    auto = auto_rate(model, training, rows) if estimator.perturbs == "output" else None
    stepper, batches = make_stepper(model, training, rows, auto=auto), rows.training_batches(None)
    taken: list[dict[str, float]] = []
    for step in range(_STEPS):
        exchange.waits = step % 2 == 1
        before, waited, received = exchange.seconds, exchange.waiting, 0
        if shards is not None:
            before, received = before + shards.seconds, shards.num_bytes
        batch, started = next(batches), time.perf_counter()
        result = stepper.step(batch, step, optimizer)
        taken.append(
            {
                "seconds": time.perf_counter() - started,
                "exchange": exchange.seconds + (0 if shards is None else shards.seconds) - before,
                "waiting": exchange.waiting - waited,
                "bytes": result.exchanged_bytes + (0 if shards is None else shards.num_bytes - received),
                "tokens": batch.packed.num_tokens,
            }
        )
    if shards is not None:
        shards.barrier()
    if number > 1:
        distributed.destroy_process_group()
    peak = peak_memory_gb(_CPU)
    waiting, others = taken[_WARM + 1 :: 2], taken[_WARM::2]  # steps that wait before the sums, and those that do not
    steps = {name: waiting if name in ("exchange", "waiting") else others for name in taken[0]}
    return {name: statistics.median(each[name] for each in own) for name, own in steps.items()} | {"peak": peak}


def measure(options: Options, number: int, divide: str) -> dict[str, float]:
    """Start the processes of a variant; return the figures of the slowest, and the shortest exchange."""
    together = 1 if divide == _SEPARATE else number
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(number) as threads:

        def run(process: int) -> dict[str, Any]:
            return in_new_process(run_rank, options, divide, together, Path(folder) / "meeting", process % together)

        found = list(threads.map(run, range(number)))
    tokens = found[0]["tokens"] if divide == "directions" else sum(each["tokens"] for each in found)
    slowest = {name: max(each[name] for each in found) for name in found[0]}
    total = max(each["exchange"] + each["waiting"] for each in found)
    shortest = min(each["exchange"] for each in found)
    return slowest | {"tokens": tokens, "rate": tokens / slowest["seconds"], "total": total, "exchange": shortest}


def report(rounds: Mapping[str, list[dict[str, float]]]) -> str:
    """Return the table: medians over the rounds, and the speed-up over one process in the same round."""
    head = ["processes", "seconds a step", "speed-up", "tokens/s", "bytes a step", "exchange and waiting", "exchange"]
    rows = []
    alone = rounds["1"]
    for name, found in rounds.items():
        middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
        faster = statistics.median(each["rate"] / one["rate"] for one, each in zip(alone, found, strict=True))
        shares = [f"{middle[key] / middle['seconds']:.1%}" for key in ("total", "exchange")]
        rates = [f"{middle['seconds']:.3f}", f"{faster:.2f}", f"{middle['rate']:.0f}", f"{middle['bytes']:.0f}"]
        rows.append([name, *rates, *shares, f"{middle['peak']:.2f}"])
    return markdown_table([*head, "peak, GiB"], rows)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run all variants in alternation and print the table."""
    options = parse(Options, __doc__, argv)
    number = options.processes
    divided = {f"{number}, {each}": (number, each) for each in (_SEPARATE, "rows", "directions", _SHARED)}
    variants = {"1": (1, "rows"), **divided}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            rounds[name].append(measure(options, *variant))
            print(f"{name}: {rounds[name][-1]['seconds']:.3f} s", flush=True)
    print(report(rounds))
    if options.json:
        write_json(options.json, rounds)


if __name__ == "__main__":
    sys.exit(main())
