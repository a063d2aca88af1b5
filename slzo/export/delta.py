"""Export only the tuned tensors, for scopes whose change does not have a low rank."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from slzo.export.base import ExportFormat, load_base_code
from slzo.export.facts import Facts
from slzo.utils.errors import SlzoError
from slzo.zo.tuned_model import TunedModel

DELTA_FILE = "delta.safetensors"


def write_delta(tuned_model: TunedModel, facts: Facts, folder: Path) -> None:
    """Write ``delta.safetensors``: the complete tuned tensors in the model's type, by their names in the model.

    Raises:
        SlzoError: An adapter was tuned, not tensors of the base model.
    """
    if tuned_model.adapter is not None:
        raise SlzoError(f"format delta: {facts.scope} tunes none of the base model's own tensors; use --format adapter")
    tensors = {name: tensor.live.detach().cpu().contiguous() for name, tensor in tuned_model.tensors.items()}
    (folder / DELTA_FILE).write_bytes(save(tensors, {"format": "pt"}))


def load_code(facts: Facts) -> str:
    """Return the Python code that loads the tensors into the base model."""
    base, tokenizer = load_base_code(facts, "model")
    imports = f"from safetensors.torch import load_file\nfrom transformers import {facts.auto_class}, AutoTokenizer"
    load = 'model.load_state_dict(load_file("PATH/delta.safetensors"), strict=False)'
    return f"{imports}\n\n{base}\n{load}\n{tokenizer}"


def read_delta(folder: Path) -> dict[str, Tensor]:
    """Read the tensors that :func:`write_delta` wrote.

    Raises:
        SlzoError: The file cannot be read.
    """
    try:
        return load_file(folder / DELTA_FILE)
    except (OSError, SafetensorError) as error:
        raise SlzoError(f"{str(folder / DELTA_FILE)!r}: cannot be read ({error}); export it again") from error


@torch.no_grad()
def swap(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write tensors into a model and return copies of the values that they replace.

    Raises:
        SlzoError: The model has no parameter of a tensor's name and shape; it is unchanged.
    """
    parameters = dict(model.named_parameters())
    wrong = [name for name, t in tensors.items() if name not in parameters or parameters[name].shape != t.shape]
    if wrong:
        raise SlzoError(f"tensor {wrong[0]!r} does not fit the base model; give the one that it was tuned on")
    before = {name: parameters[name].detach().clone() for name in tensors}
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    return before


DELTA = ExportFormat(write_delta, "the tuned tensors alone", load_code)
