"""Which optimizers can take a zeroth-order gradient."""

from torch.optim import Optimizer

from slzo.errors import SlzoError

_REASONS = {
    "LBFGS": "it evaluates a closure several times per step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it updates matrices only, and a decoder layer has vectors too",
}


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers that cannot work here.

    Raises:
        SlzoError: With the reason.
    """
    name = type(optimizer).__name__
    reason = _REASONS.get(name)
    if reason is not None:
        raise SlzoError(
            f"model.optimizer {name}: cannot take a zeroth-order gradient ({reason}); use SGD, Adam, AdamW or another "
            "torch.optim class"
        )
