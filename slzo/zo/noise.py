"""Directions that can be drawn again from three numbers and a name."""

import torch
from torch import Tensor

from slzo.seeding import derive_seed


def gaussian(like: Tensor, seed: int, step: int, query: int, name: str) -> Tensor:
    """Standard normal noise of one tensor in one query of one step.

    It does not depend on the global generator, on which other tensors are tuned, on the data order, or on resumes.

    Args:
        like: Gives shape and device.
        seed: The run's seed.
        step: Training step.
        query: Direction within the step.
        name: The tensor's name.

    Returns:
        Float32 tensor.
    """
    generator = torch.Generator(device=like.device)
    generator.manual_seed(derive_seed(seed, step, query, name))
    return torch.empty(like.shape, dtype=torch.float32, device=like.device).normal_(generator=generator)
