"""Sample tokens with random numbers that depend only on the answer and the position, not on batch or device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slzo.utils.seeding import derive_seed


@dataclass(frozen=True)
class Sampling:
    """Samples tokens with the Gumbel-max trick: the token with the largest logit / temperature + Gumbel noise.

    The noise comes from a counter-based generator (Philox; Salmon et al. 2011). Its key is the answer's key, its counter the
    position in the answer. So every process, device and batch samples the same answer. Two points of the weights use common
    random numbers: their answers differ only where the probabilities differ.

    Attributes:
        temperature: Divides the logits, > 0.
        keys: One key per answer, see :func:`sample_key`.
    """

    temperature: float
    keys: tuple[int, ...]

    def with_noise(self, logits: Tensor, rows: Sequence[int], position: int) -> Tensor:
        """Return logits / temperature + noise, shape (rows, vocabulary), float32, from logits of the same shape."""
        negated, first = np.empty((len(rows), logits.shape[-1]), np.float32), dict[int, int]()
        for place, row in enumerate(rows):
            key = self.keys[row]
            if (same := first.setdefault(key, place)) < place:  # answers at several points share a key
                negated[place] = negated[same]
            else:
                generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))
                generator.standard_exponential(dtype=np.float32, out=negated[place])
        np.maximum(negated, np.finfo(np.float32).tiny, out=negated)
        np.log(negated, out=negated)
        return (logits.float() / self.temperature).sub_(torch.from_numpy(negated).to(logits.device))

    def of(self, rows: Sequence[int]) -> "Sampling":
        """Return the sampling of some of the answers."""
        return Sampling(self.temperature, tuple(self.keys[row] for row in rows))


def sample_key(seed: int, step: int, row: str, sample: int) -> int:
    """Return the key of one answer, from the run's seed, the step, the row's id and the number of the row's sample."""
    return derive_seed("sample", seed, step, row, sample)
