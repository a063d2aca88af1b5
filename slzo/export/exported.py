"""Read an exported folder: a whole model, an adapter or a delta."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel

from slzo.export.adapter import ADAPTER_CONFIG_FILE
from slzo.export.base import CHAT_TEMPLATE
from slzo.export.delta import DELTA_FILE, read_delta, swap
from slzo.export.facts import FACTS_FILE
from slzo.models.adapters.base import import_peft
from slzo.models.engine import DType
from slzo.models.fingerprint import Fingerprint
from slzo.models.load import load_model
from slzo.models.origin import loadable
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.files import expanded, read_json

_EXPORT_AGAIN = "export it again"


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Attributes:
        folder: The folder.
        facts: What slzo noted of the run; empty in the folder of an adapter that slzo did not write.
    """

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def at(cls, path: str | Path) -> Self | None:
        """Return the export in a folder; ``None`` if there is none."""
        folder = expanded(path)
        if not any((folder / name).is_file() for name in (FACTS_FILE, ADAPTER_CONFIG_FILE)):
            return None
        return cls(folder, read_json(folder / FACTS_FILE, _EXPORT_AGAIN))

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole model."""
        return (self.folder / "config.json").is_file()

    @property
    def is_delta(self) -> bool:
        """Whether it has the tuned tensors."""
        return (self.folder / DELTA_FILE).is_file()

    @property
    def dtype(self) -> DType:
        """Type of the weights."""
        dtype: DType = self.facts.get("dtype", "float32")
        return dtype

    def options(self, model: str | None) -> dict[str, Any]:
        """Return the options that score it: model, dtype, and the task with its options, unless it is a class of the user.

        ``model`` is the base model that the user gave; ``None`` for the one that the folder names.

        Raises:
            SlzoError: The base model is a local folder, and none is given.
        """
        if model is None:
            model = str(self.folder) if self.is_whole else self.base_name("model.model")
        task, demonstrations = self.facts.get("task"), self.facts.get("num_demonstrations")
        if isinstance(task, dict) and self.facts.get("chat_template"):
            task = {**task, "init_args": {**task["init_args"], "template": str(self.folder / CHAT_TEMPLATE)}}
        options = {
            "model.model": model,
            "model.dtype": self.facts.get("dtype"),
            "data.task": task,
            "data.num_demonstrations": demonstrations,
            "data.max_length": self.facts.get("max_length"),
        }
        return {name: value for name, value in options.items() if value is not None}

    def base_name(self, option: str) -> str:
        """Return the name of the base model, with its commit; the user can give another one with ``option``.

        Raises:
            SlzoError: It was a local folder.
        """
        base, config = self.facts.get("base_model", {}), self.folder / ADAPTER_CONFIG_FILE
        name = base.get("name") or read_json(config, _EXPORT_AGAIN).get("base_model_name_or_path")
        if not name or base.get("public") is False:  # a local folder on the machine where it was tuned
            which = f" (a local folder called {name!r} when it was tuned)" if name else ""
            raise SlzoError(
                f"ckpt_path {str(self.folder)!r}: its base model is not public{which}; give a copy with --{option}"
            )
        return loadable(str(name)) if base.get("commit") is None else f"{name}@{base['commit']}"

    def check_base(self, model: PreTrainedModel, option: str) -> None:
        """Check that a model is the base model. The user can give another one with ``option``.

        Raises:
            SlzoError: It is another one.
        """
        name = self.facts.get("base_model", {}).get("name")
        Fingerprint.of(model).check(self.facts.get("fingerprint", {}), option, name=name)

    def load_model(self, base: str, dtype: DType, trust_remote_code: bool) -> PreTrainedModel:
        """Load the tuned model; an adapter is merged into it. A whole model needs no ``base``.

        Raises:
            SlzoError: The folder or its base model cannot be used, or it is another base model.
        """
        if self.is_whole:
            return load_model(str(self.folder), dtype, trust_remote_code)
        model = load_model(base, dtype, trust_remote_code)
        self.check_base(model, "model.model")
        if self.is_delta:
            swap(model, read_delta(self.folder))
            return model
        merged: PreTrainedModel = self.adapted(model, "model.model").merge_and_unload()
        return merged

    def adapted(self, model: PreTrainedModel, option: str) -> Any:
        """Return a base model with the adapter, a ``PeftModel``. The user can give another base model with ``option``.

        Raises:
            SlzoError: peft is not installed, the adapter does not fit, or transformers cannot use it.
        """
        peft = import_peft(f"ckpt_path {str(self.folder)!r}")
        try:
            adapted = peft.PeftModel.from_pretrained(model, str(self.folder)).eval()
        except Exception as error:  # peft raises whatever its code meets in edited files
            raise SlzoError(
                f"ckpt_path {str(self.folder)!r}: the adapter does not fit its base model ({one_line(error)}); give the right "
                f"one with --{option}"
            ) from error
        if adapted.active_peft_config.is_prompt_learning:
            raise virtual_tokens_error(self.folder)
        return adapted


def virtual_tokens_error(path: str | Path) -> SlzoError:
    """Return the error for a prefix-tuned model: transformers 5.24 ignores the virtual tokens of peft 0.21."""
    return SlzoError(
        f"ckpt_path {str(path)!r}: transformers cannot use the virtual tokens of prefix tuning; use slzo predict with the "
        "checkpoint of the run"
    )
