"""Base class of adapters, the modules that a scope adds to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slzo.models.attention import VirtualTokens
from slzo.models.peft_files import PeftFiles
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_NAME = "slzo"


@dataclass(frozen=True)
class Adapter(ABC):
    """Settings of extra modules: a dataclass of primitives and tuples of primitives, so that a checkpoint can store it.

    Attributes:
        kind: Name of the adapter in checkpoints.
        multiplies: Whether it moves weights by a product of two matrices, one of which begins at 0.
    """

    kind: ClassVar[str]
    multiplies: ClassVar[bool] = False

    @abstractmethod
    def inject(self, model: PreTrainedModel) -> VirtualTokens | None:
        """Add the modules to a model in place; return virtual tokens if its attention needs them.

        Raises:
            SlzoError: peft is missing, or the model does not support the modules.
        """

    @abstractmethod
    def remove(self, model: PreTrainedModel) -> None:
        """Remove the modules; the model's own weights do not change."""

    @abstractmethod
    def merge(self, model: PreTrainedModel) -> None:
        """Merge the modules into the model's own weights in place, and remove them.

        Raises:
            SlzoError: They cannot be merged.
        """

    @abstractmethod
    def peft_files(self, model: PreTrainedModel) -> PeftFiles:
        """Return the modules of the model in peft's file format."""

    def to_dict(self) -> dict[str, Any]:
        """Return kind and settings."""
        settings = asdict(self)
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}


def import_peft(option: str) -> Any:
    """Import peft; raise an SlzoError that names the option and says how to install it if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise SlzoError(f"{option}: needs peft, which is not installed; run: pip install 'slzo[peft]'") from error
    return peft
