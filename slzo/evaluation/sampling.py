"""Tokens drawn with random numbers that depend on what they are for, and on nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slzo.utils.seeding import derive_seed


@dataclass(frozen=True)
class Sampling:
    """Samples by the Gumbel-max trick: the largest of logit / temperature + Gumbel noise.

    The noise of a token comes from a counter-based generator (Philox; Salmon et al. 2011), keyed by its answer and counted by its
    position in it. So the same answer is drawn on any process and device and in any batch, and at two points of the weights the
    random numbers are common: answers differ only where the probabilities do.

    Attributes:
        temperature: Divides the logits, > 0.
        keys: One per answer, see :func:`sample_key`.
    """

    temperature: float
    keys: tuple[int, ...]

    def disturbed(self, logits: Tensor, rows: Sequence[int], position: int) -> Tensor:
        """Logits over temperature, plus noise; shape as ``logits``, (rows, vocabulary), float32."""
        # answers at several points of the weights have one key
        drawn = {key: self._noise(key, position, logits.shape[-1]) for key in {self.keys[row] for row in rows}}
        noise = np.stack([drawn[self.keys[row]] for row in rows])
        return logits.float() / self.temperature + torch.from_numpy(noise).to(logits.device)

    def of(self, rows: Sequence[int]) -> "Sampling":
        """That of some of the prompts."""
        return Sampling(self.temperature, tuple(self.keys[row] for row in rows))

    @staticmethod
    def _noise(key: int, position: int, size: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))
        exponential = generator.standard_exponential(size, dtype=np.float32)
        return -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))


def sample_key(seed: int, step: int, row: str, sample: int) -> int:
    """Key of one answer: the run's seed, the step, the row's id, and which of its samples it is."""
    return derive_seed("sample", seed, step, row, sample)
