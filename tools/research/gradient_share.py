"""Show where the gradient of a decoder layer lies: the share of each linear map, and the part in an activation subspace.

    python tools/research/gradient_share.py --task sst2 --data_dir DIR --layer 11 --ranks 2 16

The mean gradient over some batches is computed by back-propagation on the untuned model.
"""

import argparse
from itertools import islice

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.module import ZOModule
from slzo.task_rows import TaskRows
from slzo.training import adapt_rows, load_parts, make_stepper
from slzo.zo.estimators import Backprop, Request
from slzo.zo.options import TrainingOptions
from slzo.zo.scopes import ActivationSubspace, LayerScope, ScopeContext
from slzo.zo.scopes.linear_maps import linears
from slzo.zo.tuned_model import TunedModel


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="model, as in model.model")
    parser.add_argument("--task", default="movie_reviews", help="task, as in data.task")
    parser.add_argument("--data_dir", help="folder of the data, as in data.data_dir")
    parser.add_argument("--layer", type=int, default=11, help="decoder layer, counted from 0")
    parser.add_argument("--batches", type=int, default=12, help="number of batches of 16 training rows")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 16], help="ranks of the subspaces")
    args = parser.parse_args()
    options = ZOModule(args.model, estimator=Backprop(), eps=1e-3, seed=0).options
    rows = TaskRows(args.task, tokenizer=args.model, data_dir=args.data_dir, num_dev=200, seed=0)
    rows.setup("fit")
    parts = load_parts(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    adapt_rows(rows, parts, options)
    gradients = mean_gradients(TunedModel.from_scope(parts, LayerScope(), args.layer), options, rows, args.batches)
    squares = sum(float(gradient.square().sum()) for gradient in gradients.values())

    def prompts(num_sequences: int) -> list[PackedBatch]:
        return [batch.to(parts.model.device) for batch in rows.profile_batches(num_sequences)]

    context = ScopeContext(parts, args.layer, prompts)
    kept = {rank: dict(ActivationSubspace(rank).tensors(context).items()) for rank in args.ranks}
    print("| map | share | " + " | ".join(f"in rank {rank}" for rank in args.ranks) + " |")
    print("|---|" + "---:|" * (1 + len(args.ranks)))
    for linear in linears(parts, args.layer):
        gradient = gradients[linear.name]
        own = float(gradient.square().sum())
        shares = [float(kept[rank][linear.name].pull_back(gradient).square().sum()) / own for rank in args.ranks]
        print(f"| {linear.short_name} | {own / squares:.3f} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
