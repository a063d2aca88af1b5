"""Where the gradient of a decoder layer lies: each linear map's share, and what an activation subspace keeps of it.

    python tools/gradient_share.py --task sst2 --data_dir DIR --layer 11 --ranks 2 16

The mean gradient over some batches is taken by back-propagation on the untuned model.
"""

import argparse

import torch
from torch import Tensor

from slzo.datamodule import TaskDataModule
from slzo.module import ZOModule
from slzo.trainer import ZOTrainer
from slzo.zo.estimators import Backprop
from slzo.zo.scopes import ActivationSubspace, LayerScope, ScopeContext
from slzo.zo.scopes.parts import linears


def mean_gradients(module: ZOModule, datamodule: TaskDataModule, batches: int) -> dict[str, Tensor]:
    """Mean gradient of each of the layer's tensors over the first training batches, float32."""
    assert module.tuned is not None
    masters = module.tuned.named_masters()
    total = {name: torch.zeros_like(master) for name, master in masters.items()}
    for _, batch in zip(range(batches), datamodule.train_dataloader(), strict=False):
        module.estimate(batch, 0, 0, module.eps)
        for name, master in masters.items():
            assert master.grad is not None
            total[name] += master.grad / batches
    module.tuned.zero_grad()
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
    module = ZOModule(args.model, layer=args.layer, scope=LayerScope(), estimator=Backprop(), seed=0)
    rows = TaskDataModule(args.task, tokenizer=args.model, data_dir=args.data_dir, num_dev=200, seed=0)
    datamodule = ZOTrainer(logger=False, enable_checkpointing=False).attach(module, rows)
    module.choose_layer(args.layer, "")
    gradients = mean_gradients(module, datamodule, args.batches)
    squares = sum(float(gradient.square().sum()) for gradient in gradients.values())
    context = ScopeContext(module.split, args.layer, module._prompts, 0)
    kept = {rank: dict(ActivationSubspace(rank).tensors(context).items()) for rank in args.ranks}
    print("| map | share | " + " | ".join(f"in rank {rank}" for rank in args.ranks) + " |")
    print("|---|" + "---:|" * (1 + len(args.ranks)))
    for linear in linears(module.split, args.layer):
        gradient = gradients[linear.name]
        own = float(gradient.square().sum())
        parts = [float(kept[rank][linear.name].pull_back(gradient).square().sum()) / own for rank in args.ranks]
        print(f"| {linear.short_name} | {own / squares:.3f} | " + " | ".join(f"{part:.3f}" for part in parts) + " |")


if __name__ == "__main__":
    main()
