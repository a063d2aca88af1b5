"""Optimizers: checks of the user's choice, and the memory that they take. :mod:`slzo.zo.schedules` is about schedulers."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from slzo.private.modules import nested_schedulers
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.pluralize import pluralize
from slzo.zo.schedules import CORRECT, USER_ERRORS, MakeScheduler, schedule_error, take_schedule_steps, try_scheduler

MakeOptimizer = Callable[[Iterable], Optimizer]

_REASONS = {
    "LBFGS": "it evaluates a closure several times per step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it updates matrices only, and a decoder layer has vectors too",
}
_FIXED_RATES = ("Rprop",)
_PROBE_SIZE = 64
AUTO_LR = math.inf
"""The learning rate that stands for ``auto``; every torch optimizer accepts it. :mod:`slzo.zo.auto_step` sets one each step."""

# Optimizers whose step is proportional to the gradient, and optimizers that divide the gradient by its size. RAdam changes from
# the first kind to the second, and the first steps of RMSprop are ten times as long as later ones, so neither is listed.
_PLAIN = (torch.optim.SGD, torch.optim.ASGD)
_NORMALIZED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam)
_TRIED_STEPS = 20_000


def default_optimizer(perturbs_weights: bool) -> type[torch.optim.SGD | torch.optim.AdamW]:
    """Return the default optimizer: SGD for sums of random directions of the weights, AdamW for what is close to the gradient."""
    return torch.optim.SGD if perturbs_weights else torch.optim.AdamW


def _fused(make: MakeOptimizer, params: Iterable) -> Optimizer:
    """Create an optimizer; Adam and AdamW with torch's fused step, which takes a sixth of the time on a CPU."""
    optimizer = make(params)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for group in optimizer.param_groups:
            chosen = any(group.get(name) is not None for name in ("foreach", "fused")) or group.get("differentiable")
            if not chosen and all(param.device.type in ("cpu", "cuda") for param in group["params"]):
                group["fused"] = True
    return optimizer


def _with_rate(make: Callable[..., Optimizer]) -> MakeOptimizer:
    """Set the automatic rate if ``lr`` is "auto", or if a class of torch.optim that supports it has no ``lr``."""
    kind, keywords = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    usual = "auto" if kind in (*_PLAIN, *_NORMALIZED) else None
    return partial(make, lr=AUTO_LR) if keywords.get("lr", usual) == "auto" else make


def rate_rule(optimizer: Optimizer) -> tuple[bool, float]:
    """Return how the length of an optimizer's step depends on the gradient.

    Returns:
        Whether it does not depend on the gradient's size, otherwise it is proportional to it; and the factor of the learning
        rate that makes up for momentum.

    Raises:
        SlzoError: This is not known for the optimizer's class, or its momentum is 1 or more.
    """
    if isinstance(optimizer, _PLAIN):
        momentum, dampening = (float(optimizer.param_groups[0].get(name, 0.0)) for name in ("momentum", "dampening"))
        if momentum >= 1:
            raise SlzoError(
                f"model.optimizer.momentum {momentum:g}: must be below 1 with model.optimizer.lr auto; lower it"
            )
        return False, (1.0 - momentum) / (1.0 - dampening) if momentum > 0 and dampening < 1 else 1.0
    if isinstance(optimizer, _NORMALIZED):
        return True, 1.0
    names = ", ".join(kind.__name__ for kind in (*_PLAIN, *_NORMALIZED))
    raise SlzoError(
        f"model.optimizer.lr auto: no rate is known for {type(optimizer).__name__}; give a number, or use one of {names}"
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """An optimizer and its scheduler, described before the parameters exist.

    Attributes:
        make: Creates the optimizer for given parameters.
        make_scheduler: Creates its scheduler; ``None`` for a constant rate.
        name: Name of the optimizer's class.
        lr: Learning rate; ``AUTO_LR`` if it is automatic.
        settings: Class and options of optimizer and scheduler, primitives only.
        state_copies: Elements of optimizer state per parameter element (2 for Adam).
        normalizes: Whether the optimizer divides the gradient by its size; ``None`` if unknown.
    """

    make: MakeOptimizer
    make_scheduler: MakeScheduler | None
    name: str
    lr: float
    settings: dict[str, Any]
    state_copies: float
    normalizes: bool | None

    @property
    def automatic(self) -> bool:
        """Whether the learning rate is automatic."""
        return self.lr == AUTO_LR

    @classmethod
    def of(cls, make: MakeOptimizer, make_scheduler: MakeScheduler | None = None) -> Self:
        """Try optimizer and scheduler on a small matrix, so that errors appear before anything expensive is done.

        Args:
            make: A class of torch.optim, ``functools.partial`` of one, or another callable that creates an optimizer of
                parameters. The rate is automatic if ``lr`` is "auto", or left out for a class that can take such a rate.
            make_scheduler: Creates a scheduler of an optimizer.

        Raises:
            SlzoError: One of them cannot be created, cannot take a step, or does not fit the other.
        """
        make = _with_rate(make)
        try:
            probe = make([nn.Parameter(torch.zeros(_PROBE_SIZE, _PROBE_SIZE))])
        except USER_ERRORS as error:
            raise SlzoError(f"model.optimizer: {one_line(error)}; {CORRECT}") from error
        name = type(probe).__name__
        if not isinstance(probe, Optimizer):
            raise SlzoError(
                f"model.optimizer: returned {name}; let it return a torch.optim.Optimizer of its parameters"
            )
        if name in _REASONS and f"{type(probe).__module__}.".startswith("torch.optim."):
            raise SlzoError(
                f"model.optimizer {name}: cannot take a zeroth-order gradient ({_REASONS[name]}); use SGD, Adam, AdamW or "
                "another torch.optim class"
            )
        if probe.defaults.get("maximize"):
            raise SlzoError(
                "model.optimizer.maximize true: maximizes the loss, and that of a reward is its negative; leave it out"
            )
        rate = probe.param_groups[0].get("lr")
        if not isinstance(rate, int | float) or math.isnan(rate):
            raise SlzoError(f"model.optimizer {name}: its learning rate is {rate!r}; give a number for lr, or auto")
        options = {k: v for k, v in probe.defaults.items() if isinstance(v, int | float | str | tuple | None)}
        lr = float(rate)
        settings: dict[str, Any] = {"class": f"{type(probe).__module__}.{type(probe).__qualname__}", **options}
        settings["lr"] = lr  # that of a group may differ from the default
        normalizes = None
        if lr == AUTO_LR:
            normalizes, _ = rate_rule(probe)
            settings["lr"] = "auto"
            if make_scheduler is not None:
                raise SlzoError(
                    "model.lr_scheduler: needs a number for model.optimizer.lr, which is auto; give a number, or leave "
                    "the scheduler out"
                )
        if name in _FIXED_RATES and make_scheduler is not None:
            raise SlzoError(
                f"model.lr_scheduler: has no effect with {name}, which reads its rate only at the first step; leave it out"
            )
        settings["scheduler"] = None if make_scheduler is None else try_scheduler(make_scheduler, probe)
        return cls(partial(_fused, make), make_scheduler, name, lr, settings, _state_copies(probe), normalizes)

    def build(self, masters: Iterable[nn.Parameter], lr: float | None = None) -> tuple[Optimizer, Any | None]:
        """Return the optimizer of parameters and its scheduler, ``None`` without one. ``lr`` replaces the rate of the options."""
        optimizer = self.make(masters)
        if lr is not None:
            set_rate(optimizer, lr)
        return optimizer, None if self.make_scheduler is None else self.make_scheduler(optimizer)

    @property
    def follows_rate(self) -> bool:
        """Whether the optimizer's learning rate has an effect; OneCycleLR and CyclicLR set their own."""
        return self._first_rate(1.0) != self._first_rate(2.0)

    def _first_rate(self, lr: float) -> float:
        """Return the rate of the first step at which it is not 0, as it may be in a warm-up."""
        optimizer, scheduler = self.build([nn.Parameter(torch.zeros(1, 1))], lr)
        with suppress(*USER_ERRORS):  # the end of the schedule
            for _ in range(_TRIED_STEPS):
                if scheduler is None or optimizer.param_groups[0]["lr"] != 0:
                    break
                take_schedule_steps(scheduler, 1)
        return float(optimizer.param_groups[0]["lr"])

    def check_schedule(self, num_steps: int, state: Mapping[str, Any] | None) -> None:
        """Step the scheduler as often as the run does, at most 20 000 times.

        ``state`` is that of the scheduler in the checkpoint that the run continues; ``None`` for a new run.

        Raises:
            SlzoError: The scheduler ends earlier.
        """
        if self.make_scheduler is None:
            return
        try:
            scheduler = self.make_scheduler(self.make([nn.Parameter(torch.zeros(1, 1))]))
            done = 0
            if state is not None:
                scheduler.load_state_dict(copy.deepcopy(dict(state)))
                done = max(getattr(inner, "last_epoch", 0) for inner in nested_schedulers(scheduler))
            take_schedule_steps(scheduler, min(num_steps - done, _TRIED_STEPS))
        except USER_ERRORS as error:
            way = CORRECT
            if state is not None:
                way = "a resumed run keeps the schedule of its checkpoint; take fewer steps, or start without a checkpoint"
            raise schedule_error(error, f"the run takes {pluralize(num_steps, 'step')}", way) from error


def _state_copies(probe: Optimizer) -> float:
    """Take a step and return the elements of optimizer state per parameter element."""
    (parameter,) = probe.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    try:
        probe.step()
    except USER_ERRORS as error:
        reason = one_line(error)
        raise SlzoError(
            f"model.optimizer {type(probe).__name__}: cannot take a step ({reason}); use another one"
        ) from error
    state: dict[str, Any] = probe.state[parameter]
    held = sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1)
    return held / parameter.numel()


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
