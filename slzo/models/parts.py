"""Run the prefix and the suffix of any Hugging Face decoder separately, without code for single model families.

A view is a shallow copy of the module that owns the decoder layers. It shares every weight, but stand-ins that pass, inject or
record hidden states replace some layers. The model's own forward still prepares masks, positions and rotary embeddings for
each layer. The original model is never modified.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from slzo.batches.packing import TokenBatch
from slzo.models.attention import LAYOUT_ARGUMENT, VIRTUAL_ARGUMENT, Attend, VirtualTokens, use_packed_attention
from slzo.models.decoder_layers import decoder_of, find_decoder_layers, refusal
from slzo.models.linear import OneDNNLinear, SelectedHead, is_plain_linear, onednn_is_faster, with_onednn
from slzo.models.quantization import is_plain
from slzo.models.stand_ins import Capture, CaptureOutput, Inject, Pass, Precomputed
from slzo.private.modules import with_submodule
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_View = tuple[nn.Module, Inject | None, "Capture | CaptureOutput | None"]


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

    Attributes:
        virtual_tokens: Keys and values that every sequence sees before its tokens, see :meth:`rebuilt`; at first ``None``.
        limits: What the model can do; at first everything.

    Hidden states are exchanged in packed form, shape (T, hidden), in the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, packed: bool = True, onednn: bool | None = None) -> None:
        self.model = model
        self.virtual_tokens: VirtualTokens | None = None
        self.limits = Limits()
        self.layers_path, self.layers = find_decoder_layers(model)
        self.num_layers = len(self.layers)
        self.packed = packed and use_packed_attention(model)
        self._stack_path, self._layers_name = decoder_of(model, self.layers_path)
        self._stack = model.get_submodule(self._stack_path)
        self.use_onednn((model.device.type == "cpu" and onednn_is_faster(self.layers[0])) if onednn is None else onednn)

    def rebuilt(self, virtual_tokens: VirtualTokens | None, onednn: bool | None = None) -> ModelParts:
        """Return new parts of the same model with the same settings; needed after its modules were replaced or extended.

        Args:
            virtual_tokens: Those of the new parts.
            onednn: See :class:`ModelParts`; ``None`` for the same.
        """
        parts = copy.copy(self)
        parts.virtual_tokens = virtual_tokens
        parts.use_onednn(self.onednn if onednn is None else onednn)
        return parts

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    def use_onednn(self, onednn: bool) -> None:
        """Run float32 linear layers on the CPU through oneDNN, or not."""
        self.onednn = onednn
        self._runnable = [with_onednn(layer) for layer in self.layers] if onednn else list(self.layers)
        self._views: dict[tuple[int, int, bool], _View] = {}
        self._head_views: dict[bool, tuple[nn.Module, Precomputed, SelectedHead | None]] = {}

    @cached_property
    def _outputs(self) -> tuple[int, type[ModelOutput]]:
        """Outputs of a layer and of the decoder, see :func:`_inspect_outputs`. Lazy: loading and saving need no forward pass."""
        return _inspect_outputs(self.model, self.layers[0], self._stack)

    def prepare(self) -> None:
        """Inspect the model's outputs now, before hooks are registered or another attention replaces the model's own."""
        _ = self._outputs

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
            SlzoError: If a sequence is longer than the longest of ``limits``.
        """
        before = 0 if self.virtual_tokens is None else self.virtual_tokens.num_tokens
        longest = self.limits.longest
        if longest is not None and int(batch.position_ids.max()) + before >= longest:
            raise SlzoError(
                f"data.max_length: with a sequence of more than {longest} tokens {type(self.model).__name__} computes the "
                f"others of its batch differently; set it to {longest} or less"
            )
        view, inject, capture = self._view(start, stop, norm)
        if inject is not None:
            if hidden is None:
                raise ValueError(f"running from layer {start} needs the hidden states that enter it")
            inject.value = hidden[None] if self.packed else hidden[batch.layout.in_one_group.groups[0]]
        try:
            output = view(**self._inputs(batch, attend), use_cache=False)
            final = output.last_hidden_state if capture is None else capture.value
            assert final is not None
            return self.to_packed(final, batch)
        finally:
            if inject is not None:
                inject.value = None
            if capture is not None:
                capture.value = None

    def head(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Compute the logits of final hidden states.

        Args:
            hidden: Final hidden states, shape (U, hidden).
            token_ids: Tokens to compute logits for, shape (K,); ``None`` for the whole vocabulary.

        Returns:
            Logits, shape (U, K or vocabulary), float32, after the model's own scaling or soft-capping.
        """
        if token_ids is not None and not (
            self.limits.selects_tokens and is_plain(self.model.get_output_embeddings().weight)
        ):
            return self.head(hidden).index_select(1, token_ids)  # rows of a quantized head cannot be selected
        view, precomputed, selected = self._head_view(token_ids is not None)
        precomputed.value = hidden.unsqueeze(0)
        if selected is not None and token_ids is not None:
            selected.token_ids = token_ids
        try:
            # the stand-in ignores the ids, but some models read their shape
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            return view(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            precomputed.value = None

    def _view(self, start: int, stop: int, norm: bool) -> _View:
        if not 0 <= start <= stop <= self.num_layers:
            raise ValueError(f"layers {start} to {stop} are not within 0 and {self.num_layers}")
        norm = norm or stop < self.num_layers
        if (start, stop, norm) not in self._views:
            inject = Inject(self.layers[start - 1], self._outputs[0]) if start > 0 else None
            capture: Capture | CaptureOutput | None = None
            layers: list[nn.Module] = [Pass(layer, self._outputs[0]) for layer in self.layers]
            layers[start:stop] = self._runnable[start:stop]
            if inject is not None:
                layers[start - 1] = inject
            if stop < self.num_layers:
                layers[stop] = capture = Capture(self.layers[stop], self._outputs[0])
            elif not norm:
                layers[-1] = capture = CaptureOutput(layers[-1])
            view = with_submodule(self._stack, self._layers_name, nn.ModuleList(layers).eval())
            self._views[start, stop, norm] = (view, inject, capture)
        return self._views[start, stop, norm]

    def _head_view(self, selected: bool) -> tuple[nn.Module, Precomputed, SelectedHead | None]:
        if selected not in self._head_views:
            precomputed = Precomputed(self._stack, self._outputs[1])
            view = with_submodule(self.model, self._stack_path, precomputed)
            original = self.model.get_output_embeddings()
            head: nn.Module | None = SelectedHead(original, self.onednn) if selected else None
            if not selected and self.onednn and is_plain_linear(original):
                head = OneDNNLinear(original)
            if head is not None:
                path = next(name for name, module in self.model.named_modules() if module is original)
                view = with_submodule(view, path, head)
            self._head_views[selected] = (view, precomputed, head if isinstance(head, SelectedHead) else None)
        return self._head_views[selected]

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
        if attend is not None:
            raise ValueError("a model that runs padded uses its own attention")
        layout = batch.layout.in_one_group
        return {
            "input_ids": batch.input_ids[layout.groups[0]],
            "position_ids": batch.position_ids[layout.groups[0]],
            "attention_mask": layout.valid[0].long(),
        }

    def to_packed(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """Convert hidden states from the model's shape to packed form, shape (T, hidden)."""
        return hidden[0] if self.packed else hidden.flatten(0, 1).index_select(0, batch.layout.in_one_group.inverse)


@torch.no_grad()
def _inspect_outputs(model: PreTrainedModel, layer: nn.Module, stack: nn.Module) -> tuple[int, type[ModelOutput]]:
    """Return the length of a decoder layer's output tuple, 0 if it returns no tuple, and the class of the decoder's output."""
    seen: dict[nn.Module, Any] = {}
    with ExitStack() as hooks:
        for module in (layer, stack):
            hooks.enter_context(module.register_forward_hook(lambda module, _, output: seen.update({module: output})))
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    returned, output = seen[layer], seen[stack]
    hidden = returned[0] if isinstance(returned, tuple | list) else returned
    if hidden.shape[:2] != (1, 2):
        raise refusal(
            model, f"its layers pass on more than one state per token, of shape {tuple(hidden.shape)} for two tokens"
        )
    return len(returned) if isinstance(returned, tuple | list) else 0, type(output)
