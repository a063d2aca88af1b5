"""Show where the gradient of a decoder layer lies: the share of each linear map, and the part in an activation subspace.

    python tools/research/gradient_share.py --task sst2 --data_dir DIR --layer 11 --ranks 2 16

The mean gradient over some batches is computed by back-propagation on the untuned model.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.module import ZOModule
from slzo.task_rows import TaskRows
from slzo.training.build import make_stepper
from slzo.zo.estimators import Backprop, Request
from slzo.zo.options import TrainingOptions
from slzo.zo.scopes import ActivationSubspace, LayerScope, ScopeContext
from slzo.zo.scopes.linear_maps import linears
from slzo.zo.tuned_model import TunedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import load
from options import command, option, parse
from tables import markdown_table


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    model: str = option("smollm2-135m", "model, as in model.model")
    task: str = option("movie_reviews", "task, as in data.task")
    data_dir: str | None = option(None, "folder of the data, as in data.data_dir")
    layer: int = option(11, "decoder layer, counted from 0")
    batches: int = option(12, "number of batches of 16 training rows")
    ranks: list[int] = option([2, 16], "ranks of the subspaces")


def mean_gradients(model: TunedModel, options: TrainingOptions, rows: TaskRows, batches: int) -> dict[str, Tensor]:
    """Return the mean gradient of each of the tuned tensors over the first training batches, float32."""
    stepper = make_stepper(model, options, rows)
    total = {name: torch.zeros_like(master) for name, master in model.tensors.named_masters().items()}
    for batch in islice(rows.training_batches(), batches):
        loss = stepper.loss(batch.to(model.parts.model.device))
        gradient = Backprop().estimate(Request(model.tensors, loss, seed=0, step=0)).gradient
        for name in total:
            total[name] += gradient[name] / batches
    return total


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parse(Options, __doc__, argv)
    training = ZOModule(options.model, estimator=Backprop(), eps=1e-3, seed=0).options
    rows = TaskRows(options.task, tokenizer=options.model, data_dir=options.data_dir, num_dev=200, seed=0)
    parts = load(training, rows)
    model = TunedModel.from_scope(parts, LayerScope(), options.layer)
    gradients = mean_gradients(model, training, rows, options.batches)
    squares = sum(float(gradient.square().sum()) for gradient in gradients.values())

    def prompts(num_sequences: int) -> list[PackedBatch]:
        return [batch.to(parts.model.device) for batch in rows.profile_batches(num_sequences)]

    context = ScopeContext(parts, options.layer, prompts)
    kept = [dict(ActivationSubspace(rank).tensors(context).items()) for rank in options.ranks]
    lines = []
    for linear in linears(parts, options.layer):
        gradient = gradients[linear.name]
        own = float(gradient.square().sum())
        shares = [own / squares, *(float(each[linear.name].pull_back(gradient).square().sum()) / own for each in kept)]
        lines.append([linear.short_name, *(f"{share:.3f}" for share in shares)])
    print(markdown_table(["map", "share", *(f"in rank {rank}" for rank in options.ranks)], lines))


if __name__ == "__main__":
    sys.exit(main())
