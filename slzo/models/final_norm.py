"""How the final norm of a model treats a state, measured from outside, so that it is the same for all model families."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from slzo.batches.encoded import prompt_alone
from slzo.batches.packing import pack
from slzo.models.parts import ModelParts

# A constant state that leaves less than this share of the gain has been removed as a mean.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class FinalNorm:
    """How the final norm treats a state, as measured from outside.

    Attributes:
        gain: Factor of each channel, shape (width,), float32.
        centers: Whether it subtracts the mean of the channels first, as LayerNorm does and RMSNorm does not.
    """

    gain: Tensor
    centers: bool

    @classmethod
    def of(cls, parts: ModelParts) -> Self:
        """Measure the norm of a model.

        A vector of alternating signs has mean 0 and size 1, so a norm leaves only its gain and its bias; the bias is the same
        for the opposite vector. A constant vector is lost by a norm that subtracts the mean.
        """
        ones = torch.ones(parts.model.get_output_embeddings().weight.shape[1], device=parts.model.device)
        signs = ones.clone()
        signs[1::2] = -1
        gain = _odd_part(parts, signs) * signs
        return cls(gain, bool(_odd_part(parts, ones).norm() < _LEAST_SHARE * gain.norm()))

    def tangent(self, differences: Tensor, states: Tensor) -> Tensor:
        """Return the parts of differences between rows of the head along which the norm lets a state move.

        The differences are of shape (U, M, width), the states of shape (U, width), float32.
        """
        found = differences * self.gain
        if self.centers:
            found, states = found - found.mean(dim=2, keepdim=True), states - states.mean(dim=1, keepdim=True)
        along = normalize(states, dim=1)[:, None]
        return found - (found * along).sum(dim=2, keepdim=True) * along


def _odd_part(parts: ModelParts, state: Tensor) -> Tensor:
    token = pack([prompt_alone(0, (0,))]).to(parts.model.device)
    states, last = state.to(parts.model.dtype)[None], parts.num_layers
    up, down = (parts.run(token, last, last, each)[0].float() for each in (states, -states))
    return (up - down) / 2
