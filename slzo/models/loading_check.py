"""Check a model's config.json and that its files hold all of its weights; explain in one line why it cannot be loaded.

transformers only warns about missing weights, and initializes them at random.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from slzo.models.decoder_layers import find_decoder_layers
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.pluralize import pluralize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED = 3
_SIZES = (
    *("hidden_size", "n_embd", "d_model"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "vocab_size"),
)


def check_config_file(name: str, file: Path) -> None:
    """Check that a config.json is an object, and that the sizes in it are above 0; code of transformers relies on both.

    Raises:
        SlzoError: The file is not an object, or a size is below 1.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SlzoError(
            f"model.model {name!r}: its config.json cannot be read ({one_line(error, None)}); give a complete model"
        ) from error
    if not isinstance(content, dict):
        raise SlzoError(
            f"model.model {name!r}: its config.json holds a JSON {type(content).__name__}; it must be an object with the "
            "model's settings, as save_pretrained writes it"
        )
    text = content.get("text_config")
    for entry, value in [*content.items(), *(text.items() if isinstance(text, dict) else ())]:
        if entry in _SIZES and isinstance(value, int) and value < 1:
            raise SlzoError(f"model.model {name!r}: {entry} {value} in its config.json: must be at least 1; correct it")


def reason_of(error: Exception, config: PretrainedConfig | None = None) -> str:
    """Return in one line why a model cannot be made or loaded, from the error of transformers.

    With the model's config, an error that is only one of its values names the entry.
    """
    if isinstance(error, KeyError) and config is not None:
        entries = config.get_text_config(decoder=True).to_dict().items()
        unknown = next((entry for entry, value in entries if value == error.args[0]), None)
        if unknown is not None:
            return f"config.json: {unknown} {error.args[0]!r} is not known to transformers"
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return "its .bin files are damaged"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Couldn't instantiate the backend tokenizer"):
        return "it has no tokenizer files, or needs sentencepiece or tiktoken"
    file = Path(lines[0].partition(": ")[2])
    if isinstance(error, FileNotFoundError) and file.is_file():  # safetensors says so if it may not read it
        return f"{file} cannot be opened; check its permissions"
    if isinstance(error, StrictDataclassError):  # the first line names the check, the last the reason
        return f"config.json: {lines[-1].partition(': ')[2]}"
    return lines[0] if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {lines[0]}"


def check_loading(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that all weights of a model come from its files, and warn about weights in the files that it does not use.

    Weights that are tied to others, and those that a model's class declares optional, are not reported by transformers. ``name``
    is the user's name of the model, for messages, and ``info`` what ``from_pretrained`` returns with ``output_loading_info``.

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
    rank_zero_warn(f"model.model {name!r}: its files hold weights that the model does not use: {_list(unexpected)}")


def _list(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMED])
    return f"{shown} and {pluralize(len(names) - _NAMED, 'more tensor')}" if len(names) > _NAMED else shown


def _beyond_the_last_layer(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Return the tensors of decoder layers that the model does not have; files may leave out the first parts of names."""
    path, layers = find_decoder_layers(model)
    parts = path.split(".")
    prefixes = "|".join(re.escape(".".join(parts[start:])) for start in range(len(parts)))
    numbered = ((name, re.match(rf"(?:{prefixes})\.(\d+)\.", name)) for name in names)
    # extra layers that predict further tokens, as in DeepSeek-V3; transformers has none
    known = len(layers) + (getattr(model.config, "num_nextn_predict_layers", None) or 0)
    return [name for name, match in numbered if match and int(match[1]) >= known]
