"""The built-in rewards by name; each is one file, with its import and its name in this list."""

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from slzo.rewards.builtin.accuracy import accuracy
from slzo.rewards.builtin.exact_match import exact_match
from slzo.rewards.builtin.json_valid import json_valid
from slzo.rewards.builtin.number_match import number_match
from slzo.rewards.builtin.regex import regex
from slzo.rewards.builtin.rouge import rouge
from slzo.rewards.builtin.token_f1 import token_f1
from slzo.utils.errors import SlzoError

RewardFunction = Callable[..., Sequence[float]]
"""``f(prompts, completions, **columns)``: one number a completion. It is given those of these that it has parameters for."""

_ALL: tuple[Callable[..., list[float]], ...] = (
    accuracy,
    exact_match,
    json_valid,
    number_match,
    regex,
    rouge,
    token_f1,
)
REWARDS: Mapping[str, RewardFunction] = MappingProxyType({function.__name__: function for function in _ALL})

PERPLEXITY = "perplexity"
"""The one metric that needs no answers."""


def _scores_alone(function: RewardFunction) -> bool:
    """Whether a reward needs nothing but the answer and its references, so that it can be a metric."""
    given = ("completions", "references")
    parameters = inspect.signature(function).parameters.values()
    return all(each.name in given or each.default is not each.empty for each in parameters)


_METRICS: Mapping[str, RewardFunction] = MappingProxyType(
    {"f1" if name == "token_f1" else name: function for name, function in REWARDS.items() if _scores_alone(function)}
)


def check_package(name: str) -> None:
    """Refuse a built-in reward whose package is not installed; other names pass."""
    package = getattr(REWARDS.get(name), "package", None)
    if package is not None and importlib.util.find_spec(package) is None:
        raise SlzoError(f"{name}: needs {package}, which is not installed; pip install 'slzo[rewards]'")


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Names of metrics of a generation task, at least one and each known.

    Raises:
        SlzoError: One is not.
    """
    known = [PERPLEXITY, *sorted(_METRICS)]
    if not names:
        raise SlzoError(f"data.task.metrics []: name at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise SlzoError(
                f"data.task.metrics {name!r}: no such metric; {hint}choose of {', '.join(known)}; others can be a data.reward"
            )
        check_package(name)
    return tuple(dict.fromkeys(names))


def answer_metric(name: str, answer: str, references: Sequence[str]) -> float:
    """What one generated answer scores, 0 to 1, in a metric of that name."""
    function = _METRICS[name]
    arguments: dict[str, Any] = {"completions": [answer]}
    if "references" in inspect.signature(function).parameters:
        arguments["references"] = [references]
    return float(function(**arguments)[0])
