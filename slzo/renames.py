"""Options that had another name once: typed they are an error with the new name, in saved files they are translated."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "model.packed": "model.engine.packed",
        "model.candidate_rows": "model.engine.candidate_logits",
        "model.paired": "model.engine.paired",
        "model.queries_at_once": "model.engine.queries_at_once",
        "model.onednn": "model.engine.onednn",
        "model.compile": "model.engine.compile",
        "model.prefix_cache_gb": "model.engine.cache_gb",
        "model.prefix_cache_dtype": "model.engine.cache_dtype",
        "model.prefix_cache_dir": "model.engine.cache_dir",
        "model.train_on": "data.objective",
        "model.estimator.split_rows": "model.estimator.divide_rows",
        "model.estimator.init_args.split_rows": "model.estimator.init_args.divide_rows",
    }
)
RENAMED_COMMANDS: Mapping[str, str] = MappingProxyType({"tune": "lr_search"})


def translate(config: dict[str, Any]) -> list[str]:
    """Give the options of a nested config their present names, in place; returns what was renamed, as ``old -> new``."""
    found = [name for name in _paths(config) if name in RENAMED]
    for name in found:
        *parents, last = name.split(".")
        value = _at(config, parents).pop(last)
        *parents, last = RENAMED[name].split(".")
        _at(config, parents).setdefault(last, value)
    return [f"{name} -> {RENAMED[name]}" for name in found]


def translate_flat(options: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The same for the options of one group by their names in it, as checkpoints hold them."""
    names = {name: RENAMED.get(f"{group}.{name}", f"{group}.{name}") for name in options}
    return {names[name].removeprefix(f"{group}."): value for name, value in options.items()}


def _paths(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        path = f"{prefix}{name}"
        yield path
        if isinstance(value, Mapping):
            yield from _paths(value, f"{path}.")


def _at(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    for name in names:
        if not isinstance(config.get(name), dict):
            config[name] = {}
        config = config[name]
    return config
