"""What an adapter is: modules that a scope adds to a model."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar

from transformers import PreTrainedModel

from slzo.models.attention import VirtualTokens
from slzo.models.peft_files import PeftFiles
from slzo.utils.errors import SlzoError

ADAPTER_NAME = "slzo"


class Adapter(ABC):
    """Settings of extra modules: a dataclass of primitives and tuples of them, so that a checkpoint can hold them.

    Attributes:
        kind: Name in checkpoints.
    """

    kind: ClassVar[str]

    @abstractmethod
    def inject(self, model: PreTrainedModel) -> VirtualTokens | None:
        """Add the modules to a model, in place; returns virtual tokens that its attention has to see.

        Raises:
            SlzoError: peft is missing, or the model has no place for them.
        """

    @abstractmethod
    def remove(self, model: PreTrainedModel) -> None:
        """Take them out again; the model's own weights stay as they are."""

    @abstractmethod
    def merge(self, model: PreTrainedModel) -> None:
        """Have the model's own weights do what the modules do, in place, and take the modules out.

        Raises:
            SlzoError: No weight can hold it.
        """

    @abstractmethod
    def peft_files(self, model: PreTrainedModel) -> PeftFiles:
        """The modules, which are in the model, as peft keeps them on disk."""

    def to_dict(self) -> dict[str, Any]:
        """Kind and settings."""
        settings = asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}


def import_peft(scope: str) -> Any:
    """The peft package, or an SlzoError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        raise SlzoError(
            f"model.scope {scope}: needs peft, which is not installed; run: pip install 'slzo[peft]'"
        ) from error
    return peft
