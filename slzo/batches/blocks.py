"""Examples that are computed together, so that what is kept of each does not depend on the batch that asks first."""

from collections.abc import Sequence
from dataclasses import dataclass

from slzo.batches.encoded import EncodedExample
from slzo.batches.packing import PackedBatch, pack, packed_length


@dataclass(frozen=True)
class Block:
    """Examples of one forward pass: matrix products of another height round otherwise.

    Attributes:
        examples: In the order in which they are packed.
        share_prompts: As in :func:`slzo.batches.packing.pack`.
    """

    examples: Sequence[EncodedExample]
    share_prompts: bool = True

    @property
    def keys(self) -> tuple[int, ...]:
        """Cache key of each example."""
        return tuple(example.index for example in self.examples)

    @property
    def num_tokens(self) -> int:
        """Packed tokens."""
        return sum(packed_length(example, self.share_prompts) for example in self.examples)

    def pack(self) -> PackedBatch:
        """The batch."""
        return pack(self.examples, share_prompts=self.share_prompts)
