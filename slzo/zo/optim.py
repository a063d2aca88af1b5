"""Which optimizers can take a zeroth-order gradient."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from slzo.errors import SlzoError

_REASONS = {
    "LBFGS": "it evaluates a closure several times per step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it updates matrices only, and a decoder layer has vectors too",
}


def check_optimizer(make: Callable[[Iterable[nn.Parameter]], Optimizer]) -> Optimizer:
    """Refuse optimizers that cannot work here, before anything expensive is done.

    Args:
        make: Builds the optimizer for given parameters.

    Returns:
        An optimizer of one made-up parameter, to read its settings from.

    Raises:
        SlzoError: With the reason.
    """
    try:
        trial = make([nn.Parameter(torch.zeros(1, 1))])
    except (ValueError, TypeError) as error:
        raise SlzoError(f"model.optimizer: {error}; correct its init_args") from error
    name = type(trial).__name__
    if name in _REASONS:
        raise SlzoError(
            f"model.optimizer {name}: cannot take a zeroth-order gradient ({_REASONS[name]}); use SGD, Adam, AdamW or "
            "another torch.optim class"
        )
    return trial
