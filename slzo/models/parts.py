"""Run the prefix and the suffix of any Hugging Face decoder separately, without code for single model families."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slzo.batches.packing import TokenBatch
from slzo.models.attention import LAYOUT_ARGUMENT, VIRTUAL_ARGUMENT, Attend, VirtualTokens, use_packed_attention
from slzo.models.decoder_layers import find_decoder_layers
from slzo.models.linear import onednn_is_faster
from slzo.models.placement import ON_MAIN_DEVICE, Placement
from slzo.models.quantization import is_plain
from slzo.models.views import Decoder, Views
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Limits:
    """What a model run in parts can do; :func:`slzo.models.startup_check.split_and_verify` finds out.

    Attributes:
        longest: Longest sequence in tokens whose result does not depend on the rest of its batch; ``None`` for no limit.
        selects_tokens: Whether the head can be run for some tokens of the vocabulary; otherwise it is run for all of them.
        left_padding: Whether left padding leaves results unchanged when sequences are padded for generation.
    """

    longest: int | None = None
    selects_tokens: bool = True
    left_padding: bool = True


class ModelParts:
    """Runs parts of a decoder-only model on packed batches.

    Args:
        model: The model, in evaluation mode. Its weights are shared, not copied.
        packed: Run without padding. ``False`` pads on the right and uses the model's own attention. Models without
            transformers' attention interface are always padded.
        onednn: Run linear layers through oneDNN while autograd is off (see :mod:`slzo.models.linear`); ``None`` decides by timing
            both.
        placement: Where the layers are, as returned with the model by what loaded it.

    Attributes:
        virtual_tokens: Keys and values that every sequence sees before its tokens, see :meth:`rebuilt`; at first ``None``.
        limits: What the model can do; at first everything.

    Hidden states are exchanged in packed form, shape (T, hidden), in the model's dtype. If later layers take keys and values from
    earlier ones, these are further columns of the states, see :meth:`extra_columns`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        packed: bool = True,
        onednn: bool | None = None,
        placement: Placement = ON_MAIN_DEVICE,
    ) -> None:
        self.model = model
        self.placement = placement
        self.virtual_tokens: VirtualTokens | None = None
        self.limits = Limits()
        self.layers_path, self.layers = find_decoder_layers(model)
        self.num_layers = len(self.layers)
        self.packed = packed and use_packed_attention(model)
        self._decoder = Decoder(model, self.layers_path, self.layers)
        if onednn is None:
            onednn = model.device.type == "cpu" and onednn_is_faster(self.layers[0])
        self.onednn = onednn
        self._views = Views(self._decoder, onednn)

    def rebuilt(self, virtual_tokens: VirtualTokens | None = None, onednn: bool | None = None) -> ModelParts:
        """Return new parts of the same model; needed after its modules were replaced or extended.

        What is left out stays the same; for ``onednn`` see :class:`ModelParts`.
        """
        parts = copy.copy(self)
        parts.virtual_tokens = self.virtual_tokens if virtual_tokens is None else virtual_tokens
        parts.onednn = self.onednn if onednn is None else onednn
        parts._views = Views(self._decoder, parts.onednn)
        return parts

    def in_float32(self, start: int) -> ModelParts:
        """Return parts that run layers ``start`` and above, the final norm and selected rows of the head in float32.

        These layers and the norm have float32 copies of their weights. Everything else is shared. If the model has other weights
        between the decoder and the head, nothing is copied and these parts are returned.
        """
        if not self._decoder.head_follows:
            return self
        parts = copy.copy(self)
        parts._decoder = self._decoder.with_float32(start)
        parts.model, parts.layers = parts._decoder.model, parts._decoder.layers
        parts._views = Views(parts._decoder, parts.onednn)
        return parts

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    def extra_columns(self, layer: int) -> int:
        """Return how many columns of the states before a layer, after the hidden state, are keys and values of earlier layers."""
        return sum(each.columns for each in self._decoder.sharing.below(layer, self.num_layers))

    def num_columns(self, layer: int) -> int:
        """Return how many columns the states before a layer have."""
        return self.width + self.extra_columns(layer)

    def prepare(self) -> None:
        """Inspect the model's outputs now, before hooks are registered."""
        _ = self._decoder.outputs, self._decoder.sharing

    def run(
        self,
        batch: TokenBatch,
        start: int,
        stop: int,
        hidden: Tensor | None = None,
        *,
        norm: bool = True,
        attend: Attend | None = None,
    ) -> Tensor:
        """Run decoder layers ``start`` to ``stop - 1``.

        Args:
            batch: Tokens and layout.
            start: First layer to run.
            stop: One past the last layer to run. After the last layer of the model, the final norm is applied too.
            hidden: Input of layer ``start``, shape (T, hidden); not needed for ``start == 0``. For ``start == num_layers`` it is
                the output of the last layer, and only the final norm is applied.
            norm: Apply the final norm after the last layer.
            attend: Computes the attention in place of the layout; needs ``packed``.

        Returns:
            Input of layer ``stop``, or the final hidden states; shape (T, hidden).

        Raises:
            SlzoError: A sequence is longer than the longest of ``limits``, or there are virtual tokens and the model is padded.
        """
        before = 0 if self.virtual_tokens is None else self.virtual_tokens.num_tokens
        longest = self.limits.longest
        if longest is not None and int(batch.position_ids.max()) + before >= longest:
            raise SlzoError(
                f"data.max_length: with a sequence of more than {longest} tokens {type(self.model).__name__} computes the "
                f"others of its batch differently; set it to {longest} or less"
            )
        entering: Tensor | None = None
        if start > 0:
            assert hidden is not None
            entering = hidden[None] if self.packed else hidden[batch.layout.in_one_group.groups[0]]
        final = self._views.of_layers(start, stop, norm).run(entering, self._inputs(batch, attend))
        return self.to_packed(final, batch)

    def head(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Compute the logits of final hidden states.

        Args:
            hidden: Final hidden states, shape (U, hidden), in the model's dtype or in float32.
            token_ids: Tokens to compute logits for, shape (K,); ``None`` for the whole vocabulary.

        Returns:
            Logits, shape (U, K or vocabulary), float32, after the model's own scaling or soft-capping.
        """
        if token_ids is not None and not (
            self.limits.selects_tokens and is_plain(self.model.get_output_embeddings().weight)
        ):
            return self.head(hidden).index_select(1, token_ids)  # rows of a quantized head cannot be selected
        if token_ids is None:
            hidden = hidden.to(self.model.dtype)
        return self._views.of_head(token_ids is not None).run(hidden, token_ids).float()

    def _inputs(self, batch: TokenBatch, attend: Attend | None) -> dict[str, Any]:
        if self.packed:
            virtual = self.virtual_tokens
            before, shift = ({}, 0) if virtual is None else ({VIRTUAL_ARGUMENT: virtual}, virtual.num_tokens)
            return {
                **before,
                "input_ids": batch.input_ids.unsqueeze(0),
                "position_ids": batch.position_ids.unsqueeze(0) + shift,
                # transformers passes on a four-dimensional mask and builds no (T, T) mask
                "attention_mask": batch.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool),
                LAYOUT_ARGUMENT: batch.layout if attend is None else attend,
            }
        assert attend is None  # a padded model uses its own attention
        self.check_padded()
        layout = batch.layout.in_one_group
        return {
            "input_ids": batch.input_ids[layout.groups[0]],
            "position_ids": batch.position_ids[layout.groups[0]],
            "attention_mask": layout.valid[0].long(),
        }

    def check_padded(self) -> None:
        """Check that the model's own attention, with padding, computes the same.

        Raises:
            SlzoError: It does not see the virtual tokens.
        """
        if self.virtual_tokens is not None:
            raise SlzoError(
                "model.scope PrefixTuning: needs packed batches, which this model or model.engine.packed false does not "
                "allow; leave that option out"
            )

    def to_packed(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """Convert hidden states from the model's shape to packed form, shape (T, hidden)."""
        return hidden[0] if self.packed else hidden.flatten(0, 1).index_select(0, batch.layout.in_one_group.inverse)
