"""Check that a model's files held all of its weights; transformers only warns, and initializes missing weights at random."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

from slzo.models.parts import find_decoder_layers
from slzo.utils.console import warn
from slzo.utils.errors import SlzoError

_NAMED = 3


def check_loading(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that all weights of a model come from its files, and warn about weights in the files that it does not use.

    Weights that are tied to others, and those that a model's class declares optional, are not reported by transformers.

    Args:
        name: The user's name of the model, for messages.
        model: The loaded model.
        info: What ``from_pretrained`` returns with ``output_loading_info``.

    Raises:
        SlzoError: Tensors are missing or have other shapes, or the files hold decoder layers that the config does not have.
    """
    if missing := info["missing_keys"]:
        raise SlzoError(
            f"model.model {name!r}: its files lack {_list(missing)}; give a complete model whose config.json fits its files"
        )
    if mismatched := info["mismatched_keys"]:
        tensor, stored, expected = sorted(mismatched)[0]
        raise SlzoError(
            f"model.model {name!r}: tensor {tensor!r} has shape {tuple(stored)} in its files and {tuple(expected)} by its "
            f"config.json ({len(mismatched)} such tensors); give a model whose config.json fits its files"
        )
    unexpected = info["unexpected_keys"]
    if not unexpected:
        return
    if beyond := _beyond_the_last_layer(model, unexpected):
        raise SlzoError(
            f"model.model {name!r}: its files hold decoder layers that its config.json does not have: {_list(beyond)}; correct "
            "the number of layers there"
        )
    warn(f"model.model {name!r}: its files hold weights that the model does not use: {_list(unexpected)}")


def _list(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more tensors" if len(names) > _NAMED else shown


def _beyond_the_last_layer(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Return the tensors of decoder layers that the model does not have; files may leave out the first parts of names."""
    path, layers = find_decoder_layers(model)
    parts = path.split(".")
    prefixes = "|".join(re.escape(".".join(parts[start:])) for start in range(len(parts)))
    numbered = ((name, re.match(rf"(?:{prefixes})\.(\d+)\.", name)) for name in names)
    return [name for name, match in numbered if match and int(match[1]) >= len(layers)]
