"""Where the gradient of a decoder layer lies: each linear map's share, and what an activation subspace keeps of it.

    python tools/gradient_share.py --task sst2 --data_dir DIR --layer 11 --ranks 2 16

The mean gradient over some batches is taken by back-propagation on the untuned model.
"""

import argparse

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.datamodule import TaskDataModule
from slzo.module import ZOModule
from slzo.trainer import ZOTrainer
from slzo.zo.estimators import Backprop, Request
from slzo.zo.scopes import ActivationSubspace, LayerScope, ScopeContext
from slzo.zo.scopes.linear_maps import linears
from slzo.zo.tuned_model import TunedModel


def mean_gradients(tuned_model: TunedModel, datamodule: TaskDataModule, batches: int) -> dict[str, Tensor]:
    """Mean gradient of each of the tuned tensors over the first training batches, float32."""
    total = {name: torch.zeros_like(master) for name, master in tuned_model.tensors.named_masters().items()}
    for _, batch in zip(range(batches), datamodule.train_dataloader(), strict=False):
        loss = tuned_model.loss(batch.to(tuned_model.parts.model.device), datamodule.objective)
        gradient = Backprop().estimate(Request(tuned_model.tensors, loss, seed=0, step=0)).gradient
        for name in total:
            total[name] += gradient[name] / batches
    return total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as model.model")
    parser.add_argument("--task", default="movie_reviews", help="as data.task")
    parser.add_argument("--data_dir", help="as data.data_dir")
    parser.add_argument("--layer", type=int, default=11, help="decoder layer, counted from 0")
    parser.add_argument("--batches", type=int, default=12, help="of 16 training rows")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 16], help="of the subspaces")
    args = parser.parse_args()
    module = ZOModule(args.model, estimator=Backprop(), seed=0)
    rows = TaskDataModule(args.task, tokenizer=args.model, data_dir=args.data_dir, num_dev=200, seed=0)
    datamodule = ZOTrainer(logger=False, enable_checkpointing=False).attach(module, rows)
    parts = module.parts
    gradients = mean_gradients(TunedModel.of_scope(parts, LayerScope(), args.layer), datamodule, args.batches)
    squares = sum(float(gradient.square().sum()) for gradient in gradients.values())

    def prompts(num_sequences: int) -> list[PackedBatch]:
        return [batch.to(parts.model.device) for batch in datamodule.profile_batches(num_sequences, batch_size=16)]

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
