"""Views of a model: shallow copies that run some of its decoder layers, or its head alone.

A view shares every weight, but stand-ins that pass, inject or record hidden states replace some layers. The model's own forward
still prepares masks, positions and rotary embeddings for each layer. The original model is never modified.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from slzo.models.decoder_layers import decoder_of, refusal
from slzo.models.linear import OneDNNLinear, SelectedHead, is_plain_linear, with_onednn
from slzo.models.shared_key_values import ARGUMENT, KeyValueSharing, SharedKeyValues, join_states, split_states
from slzo.models.stand_ins import Capture, CaptureOutput, Inject, Pass, Precomputed
from slzo.private.modules import with_submodule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Outputs(NamedTuple):
    """What the modules of a model return.

    Attributes:
        of_layer: Length of a decoder layer's output tuple, 0 if it returns no tuple.
        of_decoder: Class of the decoder's output.
        after_layers: Names of the decoder's modules that run after the layers, such as the final norm.
    """

    of_layer: int
    of_decoder: type[ModelOutput]
    after_layers: tuple[str, ...]


class Decoder:
    """The module of a model that owns the decoder layers and takes token ids."""

    def __init__(self, model: PreTrainedModel, layers_path: str, layers: nn.ModuleList) -> None:
        self.model = model
        self.layers = layers
        self.path, self.layers_name = decoder_of(model, layers_path)
        self.module = model.get_submodule(self.path)

    @cached_property
    @torch.no_grad()
    def outputs(self) -> Outputs:
        """What a layer and the decoder return, from a forward pass. Lazy: loading and saving need none."""
        layer, last, seen = self.layers[0], self.layers[-1], dict[nn.Module, Any]()
        inner = dict(self.module.named_children())
        with ExitStack() as hooks:
            for module in (layer, last, self.module, *inner.values()):
                hooks.enter_context(
                    module.register_forward_hook(lambda module, _, output: seen.update({module: output}))
                )
            self.model(input_ids=self._two_tokens, use_cache=False)
        returned, output = seen[layer], seen[self.module]
        is_tuple = isinstance(returned, tuple | list)
        hidden = returned[0] if is_tuple else returned
        if hidden.dim() != 3 or hidden.shape[:2] != (1, 2):
            raise refusal(
                self.model,
                f"its layers pass on more than one state per token, of shape {tuple(hidden.shape)} for two tokens",
            )
        called = list(seen)
        after = called[called.index(last) + 1 :]
        names = tuple(name for name, module in inner.items() if module in after)
        return Outputs(len(returned) if is_tuple else 0, type(output), names)

    @cached_property
    @torch.no_grad()
    def sharing(self) -> KeyValueSharing:
        """Keys and values that later layers take from earlier ones; found by forward passes if the config has some."""
        if not getattr(self.model.config.get_text_config(decoder=True), "num_kv_shared_layers", None):
            return KeyValueSharing()
        return KeyValueSharing.of(self.module, self.layers, self._two_tokens)

    @property
    def _two_tokens(self) -> Tensor:
        return torch.zeros(1, 2, dtype=torch.int64, device=self.model.device)

    @property
    def head_follows(self) -> bool:
        """Whether the head comes directly after the decoder, without other weights in between."""
        own, head = self.path.partition(".")[0], self.model.get_output_embeddings()
        others = [child for name, child in self.model.named_children() if name != own and child is not head]
        return all(next(child.parameters(), None) is None for child in others)

    def with_float32(self, start: int) -> Self:
        """Copy the decoder with layers ``start`` and above, and what runs after the layers, in float32; the rest is shared."""
        upper = [copy.deepcopy(layer).float() for layer in self.layers[start:]]
        layers = nn.ModuleList([*self.layers[:start], *upper])
        model = with_submodule(self.model, f"{self.path}.{self.layers_name}", layers)
        for name in self.outputs.after_layers:
            path = f"{self.path}.{name}"
            model = with_submodule(model, path, copy.deepcopy(model.get_submodule(path)).float())
        decoder = copy.copy(self)
        decoder.model, decoder.layers, decoder.module = model, layers, model.get_submodule(self.path)
        return decoder


@dataclass(frozen=True)
class LayersView:
    """Some of the decoder layers.

    Attributes:
        module: The view.
        inject: Stands before the first layer; ``None`` if this is the first layer of the model.
        capture: Stands after the last layer; ``None`` if the final norm follows.
        sharing: Keys and values that later layers take from earlier ones.
        entering: Those that come with the states that enter the first layer.
        leaving: Those that go with the states after the last layer.
    """

    module: nn.Module
    inject: Inject | None
    capture: Capture | CaptureOutput | None
    sharing: KeyValueSharing
    entering: tuple[SharedKeyValues, ...]
    leaving: tuple[SharedKeyValues, ...]

    def run(self, hidden: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """Return the states after the layers, in the model's shape.

        Args:
            hidden: States that enter the first layer, in the model's shape; not read by a view without ``inject``.
            inputs: Arguments of the model's own forward.
        """
        try:
            known: dict[str, tuple[Tensor, Tensor]] = {}
            if self.inject is not None:
                assert hidden is not None
                self.inject.value, known = split_states(hidden, self.entering)
            states = self.sharing.mapping(known)
            output = self.module(**inputs, **({ARGUMENT: states} if self.sharing.shared else {}), use_cache=False)
            final = output.last_hidden_state if self.capture is None else self.capture.value
            assert final is not None
            return join_states(final, states, self.leaving)
        finally:
            for stand_in in (self.inject, self.capture):
                if stand_in is not None:
                    stand_in.value = None


@dataclass(frozen=True)
class HeadView:
    """The head.

    Attributes:
        module: The view.
        decoder: Stands in place of the decoder.
        selected: Computes the logits of some tokens; ``None`` if those of the whole vocabulary are computed.
    """

    module: nn.Module
    decoder: Precomputed
    selected: SelectedHead | None

    def run(self, hidden: Tensor, token_ids: Tensor | None) -> Tensor:
        """Return logits, shape (U, K or vocabulary), from final states (U, hidden) and, with ``selected``, token ids (K,)."""
        self.decoder.value = hidden.unsqueeze(0)
        if self.selected is not None and token_ids is not None:
            self.selected.token_ids = token_ids
        try:
            # the stand-in ignores the ids, but some models read their shape
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            return self.module(input_ids=ids, use_cache=False).logits[0]
        finally:
            self.decoder.value = None


class Views:
    """Makes the views of a model, each once; with ``onednn``, linear layers run through oneDNN."""

    def __init__(self, decoder: Decoder, onednn: bool) -> None:
        self._decoder = decoder
        self._onednn = onednn
        self._runnable = [with_onednn(layer) if onednn else layer for layer in decoder.layers]
        self._of_layers: dict[tuple[int, int, bool], LayersView] = {}
        self._of_head: dict[bool, HeadView] = {}

    def of_layers(self, start: int, stop: int, norm: bool) -> LayersView:
        """Return the view of layers ``start`` to ``stop - 1``; after the model's last layer, ``norm`` adds the final norm."""
        key = (start, stop, norm or stop < len(self._runnable))
        if key not in self._of_layers:
            self._of_layers[key] = self._make_layers(*key)
        return self._of_layers[key]

    def of_head(self, selects: bool) -> HeadView:
        """Return the view of the head, for some tokens if ``selects``, else for the whole vocabulary."""
        if selects not in self._of_head:
            self._of_head[selects] = self._make_head(selects)
        return self._of_head[selects]

    def _make_layers(self, start: int, stop: int, norm: bool) -> LayersView:
        own, length = self._decoder.layers, self._decoder.outputs.of_layer
        layers: list[nn.Module] = [Pass(layer, length) for layer in own]
        layers[start:stop] = self._runnable[start:stop]
        inject: Inject | None = None
        if start > 0:
            layers[start - 1] = inject = Inject(own[start - 1], length)
        capture: Capture | CaptureOutput | None = None
        if stop < len(own):
            layers[stop] = capture = Capture(own[stop], length)
        elif not norm:
            layers[-1] = capture = CaptureOutput(layers[-1])
        replaced = nn.ModuleList(layers).eval()
        module = with_submodule(self._decoder.module, self._decoder.layers_name, replaced)
        sharing = self._decoder.sharing
        entering, leaving = (sharing.below(layer, len(own)) for layer in (start, stop))
        return LayersView(module, inject, capture, sharing, entering, leaving)

    def _make_head(self, selects: bool) -> HeadView:
        model = self._decoder.model
        precomputed = Precomputed(self._decoder.module, self._decoder.outputs.of_decoder)
        view = with_submodule(model, self._decoder.path, precomputed)
        original = model.get_output_embeddings()
        selected = SelectedHead(original, self._onednn) if selects else None
        head: nn.Module | None = selected
        if head is None and self._onednn and is_plain_linear(original):
            head = OneDNNLinear(original)
        if head is not None:
            path = next(name for name, module in model.named_modules() if module is original)
            view = with_submodule(view, path, head)
        return HeadView(view, precomputed, selected)
