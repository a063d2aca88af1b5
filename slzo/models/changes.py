"""What tuning changes in a model before it starts, and how this is undone."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

from slzo.models.adapters import Adapter
from slzo.models.full_precision import FullPrecision
from slzo.models.parts import ModelParts
from slzo.models.quantization import method_of


class ModelChanges:
    """The changes of a model. An error in a ``with`` block of this object undoes them.

    Attributes:
        parts: The model with the changes made so far.
        adapter: The modules that were added; ``None`` if there are none.
        full_precision: The quantized linear maps that full-precision ones replace; ``None`` if the model is not quantized.
    """

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        self.adapter: Adapter | None = None
        self.full_precision: FullPrecision | None = None
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self.undo()

    def make_tunable(self, layers_to_change: Callable[[], Sequence[int]]) -> None:
        """Move the layers that will change to the model's main device, and put them in full precision.

        ``layers_to_change`` is called only if layers are elsewhere or quantized.
        """
        model, placement = self.parts.model, self.parts.placement
        if not placement.is_on_main_device:
            layers = layers_to_change()
            placement.load_layers(layers)
            self._undo.callback(placement.return_layers, layers)
        if method_of(model) is None:
            return
        paths = [f"{self.parts.layers_path}.{layer}" for layer in layers_to_change()]
        self.full_precision = FullPrecision.make(model, paths)
        self._undo.callback(self.full_precision.undo, model)
        self.parts = self.parts.rebuilt()

    def add_adapter(self, adapter: Adapter | None) -> None:
        """Add an adapter's modules, if there is one."""
        if adapter is None:
            return
        model = self.parts.model
        virtual_tokens = adapter.inject(model)
        self._undo.callback(adapter.remove, model)
        self.adapter = adapter
        self.parts = self.parts.rebuilt(virtual_tokens)

    def undo(self) -> None:
        """Remove the adapter's modules and restore quantized ones. Other weights stay as they are."""
        self._undo.close()
