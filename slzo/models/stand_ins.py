"""Modules that replace others in the views of a model, see :mod:`slzo.models.views`."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput


class StandIn(nn.Module):
    """Replaces a module, but still gives access to the attributes of the original."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.replaced = (module,)  # in a tuple, so that it is not registered as a submodule a second time

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["replaced"][0], name)


class Pass(StandIn):
    """Replaces a layer that is not run; ``num_outputs`` is the length of the layer's output tuple, 0 if it returns no tuple."""

    def __init__(self, layer: nn.Module, num_outputs: int) -> None:
        super().__init__(layer)
        self.num_outputs = num_outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden_states


class Inject(Pass):
    """Returns given hidden states instead of its input."""

    value: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.value is not None
        return super().forward(self.value)


class Capture(Pass):
    """Stores the hidden states that it receives."""

    value: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.value = hidden_states
        return super().forward(hidden_states)


class CaptureOutput(StandIn):
    """Runs a layer and stores the hidden states that it returns."""

    value: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.replaced[0](hidden_states, *args, **kwargs)
        self.value = output[0] if isinstance(output, tuple | list) else output
        return output


class Precomputed(StandIn):
    """Replaces the whole decoder and returns final hidden states that are already computed.

    The output has the decoder's own class, because some heads read other fields, such as ``router_logits``.
    """

    value: Tensor | None = None

    def __init__(self, decoder: nn.Module, output_class: type[ModelOutput]) -> None:
        super().__init__(decoder)
        self.output_class = output_class

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.output_class(last_hidden_state=self.value)
