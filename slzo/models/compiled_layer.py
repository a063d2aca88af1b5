"""``torch.compile`` of single decoder layers, with a way back."""

import warnings
from typing import Any

import torch
from torch import nn


class CompiledLayer(nn.Module):
    """A decoder layer that runs compiled; if compiling fails it runs as it is, with one warning.

    All layers of one class share the compiled code. Shapes are dynamic, so a new batch shape does not compile again. The
    layer's weights are shared and may change between calls.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is not registered as a submodule a second time
        self._compiled: Any = torch.compile(layer, dynamic=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        if self._compiled is not None:
            try:
                return self._compiled(*args, **kwargs)
            except (torch.OutOfMemoryError, MemoryError):  # not the compiler's: running again would take more
                raise
            except Exception as error:  # compilers fail in many ways, the layer itself has none to fear
                if "alloc" in str(error) and "memory" in str(error):  # what torch raises on a CPU
                    raise
                self._compiled = None
                reason = " ".join(str(error).split())[:200]
                warnings.warn(
                    f"model.engine.compile: {type(error).__name__}: {reason}; running uncompiled", stacklevel=2
                )
        return self._layer[0](*args, **kwargs)
