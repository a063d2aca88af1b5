"""Which options of several runs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

_OF_THE_RUN = ("ckpt_path", "trainer.logger.version", "weights_only")


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Name and values, one a run, of each option that is not the same in all; an option that a run lacks is ``None``."""
    names = sorted({name for config in configs for name in config} - set(_OF_THE_RUN))
    rows = [(name, [config.get(name) for config in configs]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]
