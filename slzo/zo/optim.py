"""Optimizers: which can take a zeroth-order gradient, what they cost, and one that torch lacks."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from slzo.errors import SlzoError

_REASONS = {
    "LBFGS": "it evaluates a closure several times per step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it updates matrices only, and a decoder layer has vectors too",
}
_TRIAL_SIZE = 64


class SignSGD(Optimizer):
    r"""Steps of one size for every element: ZO-signSGD (Liu et al. 2019), with momentum Signum (arXiv 1802.04434).

    .. math:: w \leftarrow w - \eta \, \mathrm{sign}(m)

    with m the gradient or its running mean.

    Args:
        params: Parameters or groups.
        lr: Step size, absolute, > 0.
        momentum: Share of the old mean that is kept, in [0, 1); 0 keeps no state.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, params: Iterable, lr: float = 1e-5, momentum: float = 0.0) -> None:
        if not lr > 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"Invalid momentum value: {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = parameter.grad
                if group["momentum"] > 0:
                    state = self.state[parameter]
                    if not state:
                        state["mean"] = torch.zeros_like(parameter)
                    mean = state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.sub_(mean.sign(), alpha=group["lr"])
        return loss


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
        trial = make([nn.Parameter(torch.zeros(_TRIAL_SIZE, _TRIAL_SIZE))])
    except (ValueError, TypeError) as error:
        raise SlzoError(f"model.optimizer: {error}; correct its init_args") from error
    name = type(trial).__name__
    if name in _REASONS:
        raise SlzoError(
            f"model.optimizer {name}: cannot take a zeroth-order gradient ({_REASONS[name]}); use SGD, Adam, AdamW or "
            "another torch.optim class"
        )
    return trial


def check_scheduler(make: Callable[[Optimizer], object], trial: Optimizer) -> None:
    """Refuse a scheduler with unusable arguments, before anything expensive is done.

    Args:
        make: Builds the scheduler for an optimizer.
        trial: From :func:`check_optimizer`; its rate may be changed.

    Raises:
        SlzoError: With the reason.
    """
    try:
        make(trial)
    except (ValueError, TypeError, KeyError) as error:
        raise SlzoError(f"model.lr_scheduler: {error}; correct its init_args") from error


def state_copies(trial: Optimizer) -> float:
    """Elements of state that an optimizer keeps per parameter element (2 for Adam), seen on a made-up matrix.

    Args:
        trial: From :func:`check_optimizer`; it is stepped.
    """
    (parameter,) = trial.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    trial.step()
    state: dict[str, Any] = trial.state[parameter]
    held = sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1)
    return held / parameter.numel()
