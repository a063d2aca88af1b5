"""Run any Hugging Face decoder in parts, prefix and suffix, without code for single families.

A view is a shallow copy of the module that owns the decoder layers: it shares every weight, but some layers are replaced by
stand-ins that pass, inject or record hidden states. The model's own forward then prepares masks, positions and rotary
embeddings for each layer as its authors meant, and the original model is never modified.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, ModelOutput

from slzo.batches.packing import PackedBatch, TokenBatch
from slzo.models.attention import (
    LAYOUT_ARGUMENT,
    VIRTUAL_ARGUMENT,
    VirtualTokens,
    packed_attention_forward,
    use_attention,
)
from slzo.models.compiled_layer import CompiledLayer
from slzo.models.linear import onednn_is_faster, with_onednn
from slzo.models.quantization import is_plain
from slzo.utils.errors import SlzoError

_PACKED = "slzo_packed"


class _StandIn(nn.Module):
    """In place of a module, whose other attributes the code around it may read."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is not registered as a submodule a second time

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"][0], name)


class _Pass(_StandIn):
    """Stands for a layer that is not run; ``num_outputs`` are those of the layer, 0 if it does not return a tuple."""

    def __init__(self, layer: nn.Module, num_outputs: int) -> None:
        super().__init__(layer)
        self.num_outputs = num_outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden_states


class _Inject(_Pass):
    """Hands on given hidden states in place of its input."""

    value: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.value is not None
        return super().forward(self.value)


class _Capture(_Pass):
    """Keeps the hidden states that arrive."""

    value: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.value = hidden_states
        return super().forward(hidden_states)


class _Precomputed(_StandIn):
    """Stands for the whole decoder and returns final hidden states that are already known.

    Its output is of the decoder's own class, as heads read other fields of it (a mixture of experts' ``router_logits``).
    """

    value: Tensor | None = None

    def __init__(self, decoder: nn.Module, output_class: type[ModelOutput]) -> None:
        super().__init__(decoder)
        self.output_class = output_class

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.output_class(last_hidden_state=self.value)


class _SelectedHead(nn.Module):
    """The language-model head for a few tokens of the vocabulary."""

    token_ids: Tensor | None = None

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._head = (head,)

    @property
    def weight(self) -> Tensor:
        """Rows of the head's weight; some models ask for their type."""
        assert self.token_ids is not None
        return self._head[0].weight.index_select(0, self.token_ids)

    @property
    def bias(self) -> Tensor | None:
        """The same of its bias."""
        bias = self._head[0].bias
        assert self.token_ids is not None
        return None if bias is None else bias.index_select(0, self.token_ids)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.weight, self.bias)


def _replace(root: nn.Module, path: str, stand_in: nn.Module) -> nn.Module:
    """Copy of ``root`` in which the module at ``path`` is another one; all else is shared."""
    twin = copy.copy(root)
    head, _, rest = path.partition(".")
    twin._modules = {**root._modules, head: _replace(getattr(root, head), rest, stand_in) if rest else stand_in}
    return twin


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers.

    Raises:
        SlzoError: The model has no unique list of ``num_hidden_layers`` layers.
    """
    config = model.config.get_text_config(decoder=True)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", None)
    ]
    # an inner list (experts, adapters) can have the same length by chance; the outermost one holds the layers
    found = [(name, module) for name, module in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(found) > 1:  # beside the text decoder one for images, as deep
        decoder = model.get_decoder()
        inside = next((f"{name}." for name, module in model.named_modules() if module is decoder), "")
        found = [(name, module) for name, module in found if name.startswith(inside)]
    if getattr(config, "is_encoder_decoder", False) or len(found) != 1:
        raise refusal(
            model,
            f"expected a decoder-only language model with one list of decoder layers, found {len(found)} such lists",
        )
    if model.get_output_embeddings() is None:
        raise refusal(model, "it has no language-model head")
    return found[0]


def _decoder_of(model: PreTrainedModel, layers_path: str) -> tuple[str, str]:
    """Path of the innermost module around the decoder layers that takes token ids, and the layers' path in it."""
    steps = layers_path.split(".")
    for depth in range(len(steps) - 1, 0, -1):
        path = ".".join(steps[:depth])
        if "input_ids" in inspect.signature(model.get_submodule(path).forward).parameters:
            return path, ".".join(steps[depth:])
    raise refusal(model, "no module around the decoder layers, other than the whole model, takes token ids")


class ModelParts:
    """Runs parts of a decoder-only model on packed batches.

    Args:
        model: In evaluation mode; its weights are shared, not copied.
        packed: Run without padding. ``False`` pads on the right and uses the model's own attention; models that do not use
            transformers' attention interface always run this way.
        onednn: Run linear layers through oneDNN (see :mod:`slzo.models.linear`); ``None`` decides by timing both.
        compile: Compile the decoder layers (see :mod:`slzo.models.compiled_layer`); they do not use oneDNN then.
        virtual_tokens: Keys and values that every sequence sees before its tokens; needs ``packed``.

    Attributes:
        longest: Longest sequence in tokens that is computed alike whatever it is batched with; ``None`` for no limit.
        selects: Whether the head can be run for some tokens of the vocabulary only; else it is run for all of them.
        pads_left: Whether padding before a sequence is as good as none, where sequences are padded for generation.

    Hidden states are exchanged in packed form, shape (T, hidden), in the model's dtype.
    """

    longest: int | None = None
    selects: bool = True
    pads_left: bool = True

    def __init__(
        self,
        model: PreTrainedModel,
        packed: bool = True,
        onednn: bool | None = None,
        compile: bool = False,
        virtual_tokens: VirtualTokens | None = None,
    ) -> None:
        self.model = model
        self.virtual_tokens = virtual_tokens
        self.layers_path, self.layers = find_decoder_layers(model)
        self.num_layers = len(self.layers)
        self.packed = packed and _use_packed_attention(model)
        self.compile = compile
        self.onednn = not compile and (onednn_is_faster(self.layers[0]) if onednn is None else onednn)
        stand_in = CompiledLayer if compile else with_onednn
        self._runnable = [stand_in(layer) for layer in self.layers] if compile or self.onednn else list(self.layers)
        self._stack_path, self._layers_name = _decoder_of(model, self.layers_path)
        self._stack = model.get_submodule(self._stack_path)
        self._seen: tuple[int, type[ModelOutput]] | None = None
        self._views: dict[tuple[int, int], tuple[nn.Module, _Inject | None, _Capture | None]] = {}
        self._head_views: dict[bool, tuple[nn.Module, _Precomputed, _SelectedHead | None]] = {}

    def with_virtual_tokens(self, virtual_tokens: VirtualTokens | None) -> "ModelParts":
        """Parts of the same model with the same switches, made again: its modules were exchanged, or others added."""
        twin = ModelParts(self.model, self.packed, self.onednn, self.compile, virtual_tokens)
        twin.longest, twin.selects, twin.pads_left = self.longest, self.selects, self.pads_left
        twin._seen = self._seen
        return twin

    @property
    def _outputs(self) -> tuple[int, type[ModelOutput]]:
        """Of a layer and the decoder, found when one is first run: loading and saving need no forward pass."""
        if self._seen is None:
            self._seen = _seen_outputs(self.model, self.layers[0], self._stack)
        return self._seen

    def prepare(self) -> None:
        """Look at the model's outputs now: before hooks are set, or another attention takes the place of the model's own."""
        _ = self._outputs

    def run(self, batch: TokenBatch, start: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        """Run decoder layers ``start`` to ``stop - 1``.

        Args:
            batch: Tokens and layout.
            start: First layer to run.
            stop: One past the last layer. With all layers run, the final norm is applied too.
            hidden: Input of layer ``start``, shape (T, hidden); not needed for ``start == 0``.

        Returns:
            Input of layer ``stop``, or the final hidden states; shape (T, hidden).

        Raises:
            SlzoError: A sequence is longer than :attr:`longest`.
        """
        before = 0 if self.virtual_tokens is None else self.virtual_tokens.num_tokens
        if self.longest is not None and int(batch.position_ids.max()) + before >= self.longest:
            raise SlzoError(
                f"data.max_length: with a sequence of more than {self.longest} tokens {type(self.model).__name__} computes the "
                f"others of its batch differently; set it to {self.longest} or less"
            )
        view, inject, capture = self._view(start, stop)
        if inject is not None:
            if hidden is None:
                raise ValueError(f"running from layer {start} needs the hidden states that enter it")
            inject.value = hidden[None] if self.packed else hidden[batch.layout.in_one_group().groups[0]]
        try:
            output = view(**self._inputs(batch), use_cache=False)
            final = output.last_hidden_state if capture is None else capture.value
            assert final is not None
            return self.to_packed(final, batch)
        finally:
            if inject is not None:
                inject.value = None
            if capture is not None:
                capture.value = None

    def runs_as(self, path: str) -> nn.Module | None:
        """The module that runs for the model's one at a path, inside of a decoder layer; ``None`` where there is none."""
        if not path.startswith(f"{self.layers_path}."):
            return None
        number, _, rest = path.removeprefix(f"{self.layers_path}.").partition(".")
        return self._runnable[int(number)].get_submodule(rest)

    def head(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Logits of final hidden states.

        Args:
            hidden: Shape (U, hidden).
            token_ids: Compute only these tokens' logits, shape (K,); ``None`` for the whole vocabulary.

        Returns:
            Shape (U, K or vocabulary), float32, after the model's own scaling or soft-capping.
        """
        if token_ids is not None and not (self.selects and is_plain(self.model.get_output_embeddings().weight)):
            return self.head(hidden).index_select(1, token_ids)  # rows of a quantized head cannot be taken out
        view, precomputed, selected = self._head_view(token_ids is not None)
        precomputed.value = hidden.unsqueeze(0)
        if selected is not None:
            selected.token_ids = token_ids
        try:
            # the stand-in ignores the ids, some forwards only read their shape
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            return view(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            precomputed.value = None

    def logits(
        self, batch: PackedBatch, start: int = 0, hidden: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """Logits at ``batch.needed`` from layer ``start`` up, (U, K or vocabulary), float32; see :meth:`run` and :meth:`head`."""
        final = self.run(batch, start, self.num_layers, hidden)
        return self.head(final.index_select(0, batch.needed), token_ids)

    def _view(self, start: int, stop: int) -> tuple[nn.Module, _Inject | None, _Capture | None]:
        if not 0 <= start <= stop <= self.num_layers:
            raise ValueError(f"layers {start} to {stop} are not within 0 and {self.num_layers}")
        if (start, stop) not in self._views:
            inject = _Inject(self.layers[start - 1], self._outputs[0]) if start > 0 else None
            capture = _Capture(self.layers[stop], self._outputs[0]) if stop < self.num_layers else None
            layers: list[nn.Module] = [_Pass(layer, self._outputs[0]) for layer in self.layers]
            layers[start:stop] = self._runnable[start:stop]
            if inject is not None:
                layers[start - 1] = inject
            if capture is not None:
                layers[stop] = capture
            view = _replace(self._stack, self._layers_name, nn.ModuleList(layers).eval())
            self._views[start, stop] = (view, inject, capture)
        return self._views[start, stop]

    def _head_view(self, selected: bool) -> tuple[nn.Module, _Precomputed, _SelectedHead | None]:
        if selected not in self._head_views:
            precomputed = _Precomputed(self._stack, self._outputs[1])
            view = _replace(self.model, self._stack_path, precomputed)
            head = None
            if selected:
                original = self.model.get_output_embeddings()
                path = next(name for name, module in self.model.named_modules() if module is original)
                head = _SelectedHead(original)
                view = _replace(view, path, head)
            self._head_views[selected] = (view, precomputed, head)
        return self._head_views[selected]

    def _inputs(self, batch: TokenBatch) -> dict[str, Any]:
        if self.packed:
            virtual = self.virtual_tokens
            before, shift = ({}, 0) if virtual is None else ({VIRTUAL_ARGUMENT: virtual}, virtual.num_tokens)
            return {
                **before,
                "input_ids": batch.input_ids.unsqueeze(0),
                "position_ids": batch.position_ids.unsqueeze(0) + shift,
                # a four-dimensional mask is passed on untouched: no (T, T) mask is built
                "attention_mask": batch.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool),
                # compiled code is made for one number of groups
                LAYOUT_ARGUMENT: batch.layout.in_one_group() if self.compile else batch.layout,
            }
        layout = batch.layout.in_one_group()
        return {
            "input_ids": batch.input_ids[layout.groups[0]],
            "position_ids": batch.position_ids[layout.groups[0]],
            "attention_mask": layout.valid[0].long(),
        }

    def to_packed(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """Hidden states as the model shapes them, in packed form (T, hidden)."""
        return hidden[0] if self.packed else hidden.flatten(0, 1).index_select(0, batch.layout.in_one_group().inverse)


def _use_packed_attention(model: PreTrainedModel) -> bool:
    """Switch the model to packed attention; ``False`` where its attention is not exchangeable."""
    if not model._can_set_attn_implementation():
        return False
    use_attention(model, _PACKED, packed_attention_forward)
    return attention_of(model) == _PACKED


@torch.no_grad()
def _seen_outputs(model: PreTrainedModel, layer: nn.Module, stack: nn.Module) -> tuple[int, type[ModelOutput]]:
    """Length of the tuple that decoder layers return, 0 if it is none, and the class of what the decoder returns."""
    seen: dict[nn.Module, Any] = {}
    handles = [
        module.register_forward_hook(lambda module, _inputs, output: seen.update({module: output}))
        for module in (layer, stack)
    ]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    returned, output = seen[layer], seen[stack]
    hidden = returned[0] if isinstance(returned, tuple | list) else returned
    if hidden.shape[:2] != (1, 2):
        raise refusal(
            model, f"its layers pass on more than one state for each token, of shape {tuple(hidden.shape)} for two"
        )
    kind = type(output) if isinstance(output, ModelOutput) else BaseModelOutputWithPastAndCrossAttentions
    return len(returned) if isinstance(returned, tuple | list) else 0, kind


def refusal(model: PreTrainedModel, reason: str) -> SlzoError:
    """The error for a model that cannot be run in parts."""
    return SlzoError(
        f"model.model: architecture {type(model).__name__} is not supported: {reason}; use a causal language model such as "
        "Llama, Qwen, Mistral, OPT, GPT-2, GPT-NeoX, Gemma or Phi-3 (docs/families.md lists those that work)"
    )


def attention_of(model: PreTrainedModel) -> str:
    """Name of the attention that the decoder uses."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)
