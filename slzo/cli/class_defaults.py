"""Default classes of estimator and optimizer, for options that are given without a class."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from slzo.cli.given import loaded
from slzo.cli.option_types import argument_types, classes_of, imported_class
from slzo.module import ZOModule
from slzo.utils.settings import Given
from slzo.zo.estimators import Estimator, default_estimator
from slzo.zo.optim import AUTO_LR, default_optimizer
from slzo.zo.scopes import Scope
from slzo.zo.scopes.base import is_one_layer

# Options of weight perturbations with their defaults; see StepOptions.has_weight_options.
_WEIGHT_DEFAULTS = {
    f"model.{name}": inspect.signature(ZOModule).parameters[name].default for name in ("eps", "num_queries")
}


def class_defaults(given: Sequence[Given]) -> dict[str, dict[str, Any]]:
    """Return the classes of estimator and optimizer, each only if one of its options is given.

    The class that is named last counts: the parser passes options on from the default class to the named one, such as the weight
    decay of AdamW to SGD.
    """
    latest = {each.name: loaded(each.value) for each in given}  # the last one counts, also if it is null
    options = {name: value for name, value in latest.items() if value is not None}
    found: dict[str, dict[str, Any]] = {}
    of_weights = any(options.get(name, usual) != usual for name, usual in _WEIGHT_DEFAULTS.items())
    default = default_estimator(_one_layer(given, options), of_weights)
    estimator = _last_class("model.estimator", given, Estimator) or default
    if any(name.startswith("model.estimator.") for name in options):
        found["model.estimator"] = {"class_path": _path(estimator)}
    if any(name == "model.optimizer" or name.startswith("model.optimizer.") for name in options):
        optimizer = _last_class("model.optimizer", given, Optimizer) or default_optimizer(
            estimator.perturbs == "weights"
        )
        rate = {"lr": AUTO_LR} if "lr" in argument_types(optimizer) else {}
        found["model.optimizer"] = {"class_path": _path(optimizer), "init_args": rate}
    return found


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _one_layer(given: Sequence[Given], options: Mapping[str, Any]) -> bool:
    """Return whether the given scope is within one layer, as far as its options tell."""
    kind = _last_class("model.scope", given, Scope)
    if kind is None:
        return True
    parameter = inspect.signature(kind).parameters.get("layers")
    if parameter is None:  # layers in the options are of an earlier scope
        return is_one_layer(getattr(kind, "layers", None))
    return is_one_layer(options.get("model.scope.layers", parameter.default))


def _last_class(name: str, given: Sequence[Given], base: type) -> Any:
    """Return the class that an option names last; ``None`` if it names none that it takes."""
    paths = [each.value for each in given if each.name == name]
    if not paths or not isinstance(loaded(paths[-1]), str):  # null takes a class back
        return None
    kind = classes_of(base).get(paths[-1]) or imported_class(paths[-1])
    return kind if isinstance(kind, type) and issubclass(kind, base) else None
