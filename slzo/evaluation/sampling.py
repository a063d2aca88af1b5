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
        # answers at several points share a key
        by_key = {key: self._noise(key, position, logits.shape[-1]) for key in {self.keys[row] for row in rows}}
        noise = np.stack([by_key[self.keys[row]] for row in rows])
        return logits.float() / self.temperature + torch.from_numpy(noise).to(logits.device)

    def of(self, rows: Sequence[int]) -> "Sampling":
        """Return the sampling of some of the answers."""
        return Sampling(self.temperature, tuple(self.keys[row] for row in rows))

    @staticmethod
    def _noise(key: int, position: int, size: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))
        exponential = generator.standard_exponential(size, dtype=np.float32)
        return -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))


def sample_key(seed: int, step: int, row: str, sample: int) -> int:
    """Return the key of one answer, from the run's seed, the step, the row's id and the number of the row's sample."""
    return derive_seed("sample", seed, step, row, sample)
