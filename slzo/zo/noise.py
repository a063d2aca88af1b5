"""Random directions that can be reproduced from seed, step, query and tensor name."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slzo.utils.seeding import derive_seed

Noise = Callable[[Tensor, int, int, int, str], Tensor]
"""Draws float32 noise of unit variance. Arguments: a tensor of the wanted shape and device, seed, step, query, tensor name."""


def _generator(like: Tensor, *key: int | str) -> torch.Generator:
    generator = torch.Generator(device=like.device)
    generator.manual_seed(derive_seed(*key))
    return generator


def gaussian(like: Tensor, seed: int, step: int, query: int, name: str) -> Tensor:
    """Draw standard normal noise; for the arguments see :data:`Noise`.

    The noise does not depend on the global generator, on which other tensors are tuned, on the order of the data, or on
    whether the run was resumed.
    """
    generator = _generator(like, seed, step, query, name)
    return torch.empty(like.shape, dtype=torch.float32, device=like.device).normal_(generator=generator)


def rademacher(like: Tensor, seed: int, step: int, query: int, name: str) -> Tensor:
    """Draw independent random signs, -1 or 1 with equal probability; for the arguments see :data:`Noise`."""
    generator = _generator(like, seed, step, query, name)
    bits = torch.empty(like.shape, dtype=torch.float32, device=like.device).random_(0, 2, generator=generator)
    return bits.mul_(2).sub_(1)


def row_noise(rows: Sequence[int], counts: Sequence[int], like: Tensor, seed: int, step: int, query: int) -> Tensor:
    """Draw standard normal noise for some rows, given by their numbers in the training set; shape (P, width), float32.

    The noise of a row does not depend on the other rows, nor on the process or the pass that holds it. ``counts`` has the number
    of positions of each row; they sum to P. ``like`` is a tensor of shape (P, width) on the wanted device.
    """
    noise = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    generator = torch.Generator(device=like.device)
    for row, own in zip(rows, noise.split(tuple(counts)), strict=True):
        own.normal_(generator=generator.manual_seed(derive_seed(seed, step, query, row)))
    return noise


def low_rank(rank: int, interval: int | None) -> Noise:
    r"""Return noise of the form :math:`U V^T / \sqrt{r}` for matrices; other tensors get :func:`gaussian` noise.

    U (rows, r) and V (columns, r) are standard normal, so every entry has unit variance. U is new for each query. Keeping V for
    some steps is LOZO's lazy sampling (arXiv 2410.07698). A new V for each query, and the scale, are EGGROLL's (arXiv
    2511.16652).

    Args:
        rank: r, >= 1.
        interval: Steps between two draws of V, >= 1; ``None`` draws V for each query.
    """

    def draw(like: Tensor, seed: int, step: int, query: int, name: str) -> Tensor:
        if like.dim() != 2:
            return gaussian(like, seed, step, query, name)
        left = gaussian(like.new_empty(like.shape[0], rank), seed, step, query, f"{name}/left")
        key = (step, query) if interval is None else (step // interval, 0)
        right = gaussian(like.new_empty(like.shape[1], rank), seed, *key, f"{name}/right")
        return left.div_(rank**0.5) @ right.T

    return draw
