"""The classes of estimator and optimizer if only their options are given."""

from collections.abc import Iterable, Sequence
from typing import Any

from slzo.cli.given import Given
from slzo.cli.option_types import imported_class
from slzo.zo.estimators import ESTIMATORS, SPSA, LayerOutputPerturbation
from slzo.zo.optim import AUTO_LR
from slzo.zo.scopes import SCOPES


def class_defaults(given: Sequence[Given]) -> dict[str, dict[str, Any]]:
    """Return estimator and optimizer with a class, for those of which an option is given.

    A choice of which no option is given stays open: the model makes it when it knows the objective.
    """
    names = [each.name for each in given if each.value is not None]
    found: dict[str, dict[str, Any]] = {}
    scope = _last_class("model.scope", given, SCOPES)
    of_weights = {"model.eps", "model.eps_end", "model.num_queries", "model.clip_projected_grad"}.intersection(names)
    default = SPSA if of_weights or getattr(scope, "layers", None) == "all" else LayerOutputPerturbation
    if any(name.startswith("model.estimator.") for name in names):
        found["model.estimator"] = {"class_path": f"{default.__module__}.{default.__name__}"}
    if any(name == "model.optimizer" or name.startswith("model.optimizer.") for name in names):
        estimator = _last_class("model.estimator", given, ESTIMATORS) or default
        optimizer = "SGD" if getattr(estimator, "along_directions", True) else "AdamW"
        found["model.optimizer"] = {"class_path": f"torch.optim.{optimizer}", "init_args": {"lr": AUTO_LR}}
    return found


def _last_class(name: str, given: Sequence[Given], known: Iterable[type]) -> Any:
    """Return the class that an option names last; ``None`` if there is none."""
    paths = [each.value for each in given if each.name == name and isinstance(each.value, str)]
    if not paths:
        return None
    return next((kind for kind in known if kind.__name__ == paths[-1]), None) or imported_class(paths[-1])
