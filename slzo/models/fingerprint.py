"""Tells one base model from another, so that tuned weights never go into the wrong one."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slzo.models.placement import values_of
from slzo.models.quantization import method_of
from slzo.utils.errors import SlzoError
from slzo.utils.settings import differences

# values of each tensor in the sample, evenly spread
_VALUES = 1024
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# what a config says besides the function that the model computes
_OTHER_FIELDS = frozenset(
    {
        "architectures",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True)
class Fingerprint:
    """Of a base model before anything of it is tuned.

    Attributes:
        config: What its config says of the function that it computes.
        sample: Hash of some values of every tensor, for each type that they can be rounded to, so that a model that is loaded in
            another type can be compared; of a quantized model by its quantization, as the quantized values are stored.
        tuned: Hash of all values of the tensors that are tuned, by the type that they have.
    """

    config: Mapping[str, Any]
    sample: Mapping[str, str]
    tuned: Mapping[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """That of a model, without anything tuned."""
        method = method_of(model)
        if method is None:
            some = {name: _some(tensor).clone() for name, tensor in values_of(model)}
            types = [kind for kind in _TYPES if all(own.dtype in (torch.float32, kind) for own in some.values())]
            sample = {_name(kind): _hash((name, own.to(kind)) for name, own in some.items()) for kind in types}
        else:  # not to be compared with a plain model, whose values differ, nor rounded
            tensors: dict[str, Tensor] = dict(model.named_parameters())
            tensors |= {name: b for name, b in model.named_buffers() if not b.is_floating_point()}
            packed = (pair for name, tensor in tensors.items() for pair in _packed(name, tensor))
            sample = {f"{method}, {_name(model.dtype)}": _hash((name, _some(part)) for name, part in packed)}
        config = {name: value for name, value in model.config.to_dict().items() if name[0] != "_"}
        config = {name: value for name, value in config.items() if name not in _OTHER_FIELDS}
        return cls(json.loads(json.dumps(config, default=str)), sample, {})

    def with_tuned(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same with those of the model's own tensors that are tuned, before they change."""
        if not tensors:
            return self
        kinds = "+".join(sorted({_name(tensor.dtype) for tensor in tensors.values()}))
        return replace(self, tuned={kinds: _hash(tensors.items())})

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for checkpoints."""
        return {name: dict(value) for name, value in vars(self).items()}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Refuse a model whose fingerprint differs from a saved one, where both say something.

        Raises:
            SlzoError: With what differs.
        """
        both = saved.get("config", {}).keys() & self.config.keys()  # other versions of transformers know other fields
        old, new = ({name: config[name] for name in both} for config in (saved.get("config", {}), self.config))
        changes = differences(old, new)
        if not changes and _differ(saved.get("sample", {}), self.sample):
            changes = "the same shape, other weights"
        if not changes and _differ(saved.get("tuned", {}), self.tuned):
            changes = "other weights in what is tuned"
        if changes:
            raise SlzoError(
                f"ckpt_path: does not fit model.model as it is now: not the one that it was trained on ({changes}); give that one"
            )


def _differ(saved: Mapping[str, str], own: Mapping[str, str]) -> bool:
    return any(saved[name] != own[name] for name in saved.keys() & own.keys())


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _packed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a quantized one consists of; none where their order depends on the processor."""
    if type(tensor).__name__ == "Params4bit":  # bitsandbytes packs it anew when it is first used
        return
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _packed(f"{name}.{inner}", getattr(tensor, inner))


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _VALUES)]


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
