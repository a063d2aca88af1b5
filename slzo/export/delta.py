"""The tuned tensors alone, for scopes that are of no low rank."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from slzo.export.facts import Facts
from slzo.utils.errors import SlzoError
from slzo.zo.tuned_model import TunedModel

DELTA_FILE = "delta.safetensors"


def write_delta(tuned_model: TunedModel, facts: Facts, folder: Path) -> None:
    """Write ``delta.safetensors``: by the model's names, the tensors that were tuned, whole and in the model's type.

    Raises:
        SlzoError: What was tuned is no tensor of the base model.
    """
    if tuned_model.adapter is not None:
        raise SlzoError(f"format delta: {facts.scope} tunes none of the base model's own tensors; use --format adapter")
    tensors = {name: tensor.live.detach().cpu().contiguous() for name, tensor in tuned_model.tensors.items()}
    (folder / DELTA_FILE).write_bytes(save(tensors, {"format": "pt"}))


def read_delta(folder: Path) -> dict[str, Tensor]:
    """The tensors of such a folder.

    Raises:
        SlzoError: They cannot be read.
    """
    try:
        return load_file(folder / DELTA_FILE)
    except (OSError, SafetensorError) as error:
        raise SlzoError(f"{str(folder / DELTA_FILE)!r}: cannot be read ({error}); export it again") from error


@torch.no_grad()
def swap(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write tensors into a model; what was there is returned, to be written back.

    Raises:
        SlzoError: The model has none of that name and shape; it is as it was.
    """
    own = dict(model.named_parameters())
    wrong = [name for name, t in tensors.items() if name not in own or own[name].shape != t.shape]
    if wrong:
        raise SlzoError(f"tensor {wrong[0]!r} does not fit the base model; give the one that it was tuned on")
    before = {name: own[name].detach().clone() for name in tensors}
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return before
