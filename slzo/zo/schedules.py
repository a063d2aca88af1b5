"""Learning-rate schedulers: trials of the user's choice, steps, and halving of their rates."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from slzo.private.modules import nested_schedulers
from slzo.utils.errors import SlzoError, one_line

MakeScheduler = Callable[[Optimizer], LRScheduler]
CORRECT = "correct its init_args"
USER_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, AssertionError)
"""What optimizers and schedulers raise, which may be the user's own."""


def step_scheduler(scheduler: Any, step: int) -> None:
    """Set the rate of the step after ``step``, which is counted from 0.

    Only the end of a long schedule is not found by :meth:`OptimizerOptions.check_schedule`.

    Raises:
        SlzoError: The schedule ends here.
    """
    try:
        scheduler.step()
    except USER_ERRORS as error:
        raise schedule_error(error, f"at step {step + 1} of the training") from error


def schedule_error(error: Exception, where: str, way: str = CORRECT) -> SlzoError:
    """Return the error for what a scheduler raised; ``where`` says when, and ``way`` what to do."""
    return SlzoError(f"model.lr_scheduler: {one_line(error)} ({where}); {way}")


def take_schedule_steps(scheduler: Any, num_steps: int) -> None:
    """Step a scheduler whose optimizer takes no steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers warn if the optimizer takes no steps
        for _ in range(num_steps):
            scheduler.step()


def try_scheduler(make: MakeScheduler, probe: Optimizer) -> dict[str, Any]:
    """Create a scheduler of an optimizer, step it, and return its class and first state. The optimizer's rate may change.

    Raises:
        SlzoError: It cannot be created, takes no step, or needs a metric.
    """
    try:
        scheduler = make(probe)
        if not isinstance(scheduler, LRScheduler):
            raise SlzoError(
                f"model.lr_scheduler: returned {type(scheduler).__name__}; let it return a scheduler of "
                "torch.optim.lr_scheduler"
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            raise SlzoError(
                "model.lr_scheduler ReduceLROnPlateau: needs a metric at every step, and there is one only after validations; "
                "use another scheduler"
            )
        state = {name: value for name, value in scheduler.state_dict().items() if isinstance(value, int | float | str)}
        take_schedule_steps(scheduler, 2)
    except ArithmeticError as error:
        raise SlzoError(f"model.lr_scheduler: cannot take a step ({error}); change the argument that is 0") from error
    except USER_ERRORS as error:
        raise SlzoError(f"model.lr_scheduler: {one_line(error)}; {CORRECT}") from error
    return {"class": type(scheduler).__qualname__, **state}


def halve_rate(optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
    """Halve the learning rate and the bounds between which schedulers, nested ones included, move it."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr"):
            if name in group:
                group[name] /= 2
    for scheduler in [nested for outer in schedulers for nested in nested_schedulers(outer)]:
        for name in ("base_lrs", "max_lrs"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate / 2 for rate in getattr(scheduler, name)])
        if hasattr(scheduler, "eta_min"):
            scheduler.eta_min /= 2
