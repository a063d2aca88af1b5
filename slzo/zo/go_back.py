"""Back to weights that were good, with half the learning rate and an optimizer that has forgotten."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from slzo.zo.step_size import StepSize
from slzo.zo.tuned import TunedTensors


def go_back(
    tuned: TunedTensors,
    masters: Mapping[str, Tensor] | None,
    optimizer: Optimizer,
    schedulers: Sequence[Any] = (),
    step_size: StepSize | None = None,
) -> None:
    """Take the weights back and halve the learning rate.

    Args:
        tuned: What is tuned.
        masters: Its good values, as :meth:`TunedTensors.copy_of_masters` gives them; ``None`` only halves the rate.
        optimizer: Forgets its state, which came from what went wrong, where the weights go back.
        schedulers: Of the learning rate.
        step_size: What sets the learning rate instead.
    """
    if masters is not None:
        tuned.load(masters)
        optimizer.state = defaultdict(dict)
    if step_size is not None:
        step_size.factor /= 2
    else:
        halve_rate(optimizer, schedulers)


def halve_rate(optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
    """Halve a constant learning rate, and those between which schedulers (or schedulers of schedulers) move it."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if name in group:
                group[name] /= 2
    for scheduler in [inner for one in schedulers for inner in _with_inner(one)]:
        for name in ("base_lrs", "max_lrs"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate / 2 for rate in getattr(scheduler, name)])


def _with_inner(scheduler: Any) -> list[Any]:
    return [scheduler, *(one for inner in getattr(scheduler, "_schedulers", ()) for one in _with_inner(inner))]
