"""A model that the user has loaded with transformers, in place of the name of one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from slzo.models.quantization import method_of
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def name_of_loaded(model: PreTrainedModel) -> str:
    """Return the folder or Hub id that a loaded model comes from.

    Raises:
        SlzoError: It is no model of transformers, has no values, comes from no folder or Hub id, has an adapter, or its layers
            are quantized or divided over devices, which slzo does itself.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SlzoError(
            f"from_model: {kind} is not a model of transformers; give one that from_pretrained returned (of a PeftModel, that of "
            "merge_and_unload)"
        )
    if not model.name_or_path:
        raise SlzoError(
            f"from_model: this {kind} has no name_or_path, so checkpoints could not name their base model; call save_pretrained, "
            "and load it from that folder"
        )
    places = getattr(model, "hf_device_map", {})
    if len(set(places.values())) > 1:
        raise SlzoError(
            f"from_model: this {kind} is divided over {', '.join(sorted({str(place) for place in places.values()}))}; give "
            "ZOModule its name and device_map instead"
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise SlzoError(
            f"from_model: this {kind} has no values (device meta); load it with from_pretrained on another device"
        )
    check_no_adapter(model)
    if (method := method_of(model)) is not None:
        raise SlzoError(
            f"from_model: this {kind} is quantized ({method}); give ZOModule its name instead, and quantization if its files are "
            "not quantized"
        )
    return model.name_or_path


def check_no_adapter(model: PreTrainedModel) -> None:
    """Check that a loaded model has no modules of peft, which would be tuned, or removed with slzo's own.

    Raises:
        SlzoError: It has some.
    """
    from slzo.models.adapters.lora import has_adapter

    if "peft" in sys.modules and has_adapter(model):
        raise SlzoError(
            f"from_model: this {type(model).__name__} has modules of peft, maybe of an earlier fit; load it again with "
            "from_pretrained (of a PeftModel, save what merge_and_unload returns, and load that)"
        )
