"""Speed and memory options for computing the loss of a batch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slzo.utils.argument_checks import ArgumentTypes, check_at_least, check_types
from slzo.utils.errors import SlzoError

DType = Literal["float32", "bfloat16", "float16"]

_TYPES: ArgumentTypes = {
    **dict.fromkeys(("packed", "share_prefix"), (bool, "true or false")),
    **dict.fromkeys(("paired", "onednn"), (bool | None, "true or false, or leave it out")),
    "queries_at_once": (int, "a whole number"),
    "cache_gb": (int | float, "a number"),
    "cache_dir": (str | Path | None, "a folder"),
}


@dataclass(frozen=True)
class Engine:
    """Options for computing the loss. They change speed and memory, and the loss only by rounding.

    Args:
        packed: Run batches without padding.
        paired: Run both points of a query as one batch above the tuned layer; by default for small batches only.
        queries_at_once: Directions evaluated together; more than 1 fills the processor with small batches, and takes the memory
            of the tuned tensors for each.
        onednn: Run float32 linear layers on the CPU through oneDNN where no derivative is needed; by default a short
            timing decides.
        cache_gb: CPU memory in GiB for hidden states that enter the tuned layer, kept per example.
        cache_dir: Keep them in a memory-mapped file in this folder instead of in memory.
        share_prefix: With several processes, compute these states of a row in one process and send them to the others; false on
            slow networks.

    Raises:
        SlzoError: A value has another type, or a number is out of range.
    """

    packed: bool = True
    paired: bool | None = None
    queries_at_once: int = 1
    onednn: bool | None = None
    cache_gb: float = 2.0
    cache_dir: str | None = None
    share_prefix: bool = True

    def __post_init__(self) -> None:
        check_types("model.engine", _TYPES, vars(self))
        check_at_least("model.engine.queries_at_once", self.queries_at_once)
        if not 0 <= self.cache_gb < math.inf:
            raise SlzoError(
                f"model.engine.cache_gb {self.cache_gb}: must be finite and at least 0; 0 switches the cache off"
            )
        if self.cache_dir is not None:  # checkpoints hold texts
            object.__setattr__(self, "cache_dir", str(self.cache_dir))
