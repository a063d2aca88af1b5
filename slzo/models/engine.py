"""Speed and memory options for computing the loss of a batch."""

from dataclasses import dataclass
from typing import Literal

from slzo.utils.errors import check_at_least

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Engine:
    """Options for computing the loss. They change speed and memory, and the loss only by rounding.

    Args:
        packed: Run batches without padding.
        paired: Run both points of a query as one batch above the tuned layer; left out, for small batches only.
        queries_at_once: Directions evaluated together; more than 1 fills the processor with small batches, and takes the memory
            of the tuned tensors for each.
        onednn: Run float32 linear layers on the CPU through oneDNN where no derivative is needed; left out, a short timing
            decides.
        cache_gb: CPU memory in GiB for hidden states that enter the tuned layer, kept per example.
        cache_dir: Keep them in a memory-mapped file in this folder instead of in memory.
        share_prefix: With several processes, compute these states of a row in one process and send them to the others; false on
            slow networks.

    Raises:
        SlzoError: A number is out of range.
    """

    packed: bool = True
    paired: bool | None = None
    queries_at_once: int = 1
    onednn: bool | None = None
    cache_gb: float = 2.0
    cache_dir: str | None = None
    share_prefix: bool = True

    def __post_init__(self) -> None:
        check_at_least("model.engine.queries_at_once", self.queries_at_once)
        check_at_least("model.engine.cache_gb", self.cache_gb, 0, "0 switches the cache off")
