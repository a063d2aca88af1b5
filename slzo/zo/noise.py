"""Directions that can be drawn again from three numbers and a name."""

from collections.abc import Callable

import torch
from torch import Tensor

from slzo.utils.seeding import derive_seed

Noise = Callable[[Tensor, int, int, int, str], Tensor]
"""Draws float32 noise of unit variance: like (gives shape and device), seed of the run, step, query in it, tensor's name."""


def _generator(like: Tensor, *key: int | str) -> torch.Generator:
    generator = torch.Generator(device=like.device)
    generator.manual_seed(derive_seed(*key))
    return generator


def gaussian(like: Tensor, seed: int, step: int, query: int, name: str) -> Tensor:
    """Standard normal noise, see :data:`Noise`.

    It does not depend on the global generator, on which other tensors are tuned, on the data order, or on resumes.
    """
    generator = _generator(like, seed, step, query, name)
    return torch.empty(like.shape, dtype=torch.float32, device=like.device).normal_(generator=generator)


def rademacher(like: Tensor, seed: int, step: int, query: int, name: str) -> Tensor:
    """Independent signs, -1 or 1 with equal chance, see :data:`Noise`."""
    generator = _generator(like, seed, step, query, name)
    bits = torch.empty(like.shape, dtype=torch.float32, device=like.device).random_(0, 2, generator=generator)
    return bits.mul_(2).sub_(1)


def low_rank(rank: int, interval: int | None) -> Noise:
    r"""Noise of matrices as :math:`U V^T / \sqrt{r}` with r the rank, >= 1; other tensors get :func:`gaussian` noise.

    U (rows, r) is drawn anew for each query, V (columns, r) stays for ``interval`` steps, >= 1, or is drawn with U where that is
    ``None``; both are standard normal, so that every entry has unit variance (LOZO, arXiv 2410.07698, whose lazily sampled V this
    takes, and EGGROLL, arXiv 2511.16652, for ``None``; the scale is EGGROLL's).
    """

    def draw(like: Tensor, seed: int, step: int, query: int, name: str) -> Tensor:
        if like.dim() != 2:
            return gaussian(like, seed, step, query, name)
        left = gaussian(like.new_empty(like.shape[0], rank), seed, step, query, f"{name}/left")
        lasting = (step, query) if interval is None else (step // interval, 0)
        right = gaussian(like.new_empty(like.shape[1], rank), seed, *lasting, f"{name}/right")
        return left.div_(rank**0.5) @ right.T

    return draw
