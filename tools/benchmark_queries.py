"""Times a step of several queries of low rank: the tuned layer at all points in one run, and written point by point.

    python tools/benchmark_queries.py --task sst2 --data_dir DIR --layer 11 --queries 8

Both take the same batches of real rows in alternation, in one process, with a warm prefix cache, all queries at once. Of each it
prints medians over the batches in processor seconds, the median of the ratios, and how far apart the losses are.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmark_step import draw_batches, load_rows, step_parser
from slzo.batches.encoded import EncodedExample
from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.utils.errors import SlzoError
from slzo.models.engine import Engine
from slzo.models.load import load_model
from slzo.models.startup_check import split_and_verify
from slzo.utils.runtime import keep_freed_memory
from slzo.zo.estimators import LOZO, SPSA, Estimator, EvolutionStrategy
from slzo.zo.objectives import LogitObjective
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA, Scope
from slzo.zo.stepper import StepOptions
from slzo.zo.tuned_model import TunedModel

EPS, RATE = 1e-3, 1e-6


@dataclass(frozen=True)
class Method:
    """What is tuned, and how gradients are estimated."""

    scope: Scope
    estimator: Estimator


METHODS = {
    "LOZO": Method(LayerScope(), LOZO()),
    "EvolutionStrategy": Method(LayerScope(), EvolutionStrategy(direction_rank=1)),
    "subspace": Method(ActivationSubspace(rank=16, num_sequences=16), SPSA()),
    "LoRA": Method(LoRA(), SPSA()),
}


def times(
    method: Method, args: argparse.Namespace, batches: list[list[EncodedExample]], objective: LogitObjective
) -> tuple[dict[bool, list[float]], float]:
    """Processor seconds of each step, by whether points are run together, and the largest distance of two losses."""
    parts = split_and_verify(load_model(args.model, "float32"))
    engine = Engine(cache_gb=8.0, queries_at_once=args.queries)
    model = TunedModel.of_scope(
        parts, method.scope, args.layer, prompts=lambda count: [pack(batches[0][:count])], engine=engine
    )
    optimizer = torch.optim.SGD(model.tensors.masters, lr=RATE)
    options = StepOptions(EPS, num_queries=args.queries)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    far = 0.0
    for number, examples in enumerate(batches):
        packed = pack(examples)
        model.forward.prefix(packed)
        start, losses = model.tensors.copy_of_masters(), []
        for together in (True, False) if number % 2 else (False, True):
            model.tensors.load(start)
            model.forward.together = together
            began = time.process_time()
            loss = model.loss(TrainBatch(packed, ()), objective)
            result = model.step(loss, method.estimator, optimizer, options, seed=0, step=number)
            seconds[together].append(time.process_time() - began)
            if model.forward.together != together:
                raise SlzoError(f"--model {args.model}: its layers cannot run at several points together")
            losses.append(result.estimate)
        far = max(far, abs(losses[0].loss_plus - losses[1].loss_plus), abs(losses[0].loss_minus - losses[1].loss_minus))
    model.release()
    return seconds, far


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the tool."""
    parser = step_parser(__doc__)
    parser.add_argument("--queries", type=int, default=8, help="directions a step")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="what to time")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 2 after a mistake that the user can mend."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    try:
        rows, objective = load_rows(args)
        batches = draw_batches(rows, args)
        tokens = statistics.median(pack(examples).num_tokens for examples in batches)
        print(f"{args.task}, {args.batch_size} rows ({tokens:g} tokens), layer {args.layer}, {args.queries} queries")
        print(f"{'method':20s} {'one by one s':>12s} {'together s':>12s} {'ratio':>6s} {'losses apart':>13s}")
        for name in args.methods:
            seconds, far = times(METHODS[name], args, batches, objective)
            ratio = statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=True))
            before, after = statistics.median(seconds[False]), statistics.median(seconds[True])
            print(f"{name:20s} {before:12.3f} {after:12.3f} {ratio:6.2f} {far:13.1e}", flush=True)
    except SlzoError as error:
        print(f"benchmark_queries: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
