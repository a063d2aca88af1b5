"""The built-in rewards by name. Each reward is one file; it is imported and listed here."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence

from slzo.rewards.builtin.accuracy import accuracy
from slzo.rewards.builtin.exact_match import exact_match
from slzo.rewards.builtin.json_valid import json_valid
from slzo.rewards.builtin.number_match import number_match
from slzo.rewards.builtin.regex import regex
from slzo.rewards.builtin.rouge import rouge
from slzo.rewards.builtin.token_f1 import token_f1
from slzo.utils.errors import SlzoError, did_you_mean

RewardFunction = Callable[..., Sequence[float]]
"""``f(prompts, completions, **columns)`` returns one number per completion. It gets only the arguments that it declares."""

_ALL: tuple[RewardFunction, ...] = (accuracy, exact_match, json_valid, number_match, regex, rouge, token_f1)
REWARDS: Mapping[str, RewardFunction] = {function.__name__: function for function in _ALL}

PERPLEXITY = "perplexity"
"""The only metric that needs no generated answers."""


def _is_metric(function: RewardFunction) -> bool:
    """Whether a reward needs only the answer and its references, so that it can be a metric."""
    given = ("completions", "references")
    parameters = inspect.signature(function).parameters.values()
    return all(each.name in given or each.default is not each.empty for each in parameters)


METRICS: Mapping[str, RewardFunction] = {
    "f1" if name == "token_f1" else name: function for name, function in REWARDS.items() if _is_metric(function)
}
"""The metrics of generated answers by name."""


def check_package(name: str) -> None:
    """Raise an error if a built-in reward needs a package that is not installed; other names pass."""
    package = getattr(REWARDS.get(name), "package", None)
    if package is not None and importlib.util.find_spec(package) is None:
        raise SlzoError(f"{name}: needs {package}, which is not installed; run: pip install 'slzo[rewards]'")


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of a generation task's metrics and return them without duplicates.

    Raises:
        SlzoError: There are none, a name is unknown, or a package is not installed.
    """
    known = [PERPLEXITY, *sorted(METRICS)]
    if not names:
        raise SlzoError(f"data.task.metrics []: name at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            near = did_you_mean(str(name), known)
            advice = f"choose from {', '.join(known)}, or use data.reward"
            raise SlzoError(f"data.task.metrics {name!r}: no such metric; {near}{' ' if near else ''}{advice}")
        check_package(name)
    return tuple(dict.fromkeys(names))


def answer_metric(name: str, answer: str, references: Sequence[str]) -> float:
    """Return the score of one generated answer, 0 to 1, in the metric of that name."""
    function = METRICS[name]
    more = {"references": [references]} if "references" in inspect.signature(function).parameters else {}
    return float(function(completions=[answer], **more)[0])
