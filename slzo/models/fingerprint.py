"""Fingerprint of a base model, which keeps tuned weights out of the wrong model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from slzo.models.placement import ON_MAIN_DEVICE, Placement
from slzo.models.quantization import method_of
from slzo.utils.errors import SlzoError
from slzo.utils.settings import differences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# number of values of each tensor in the sample, evenly spaced
_VALUES = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# config fields that do not change what the model computes
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
    """Fingerprint of a base model before tuning.

    Attributes:
        config: The config fields that determine what the model computes.
        sample: Hash of some values of every tensor, by each dtype that they can be rounded to, so that a model loaded in another
            dtype can be compared. For a quantized model: hash of the stored quantized values, by quantization and dtype.
        tuned: Hash of all values of the tuned tensors, by their dtype.
    """

    config: Mapping[str, Any]
    sample: Mapping[str, str]
    tuned: Mapping[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel, placement: Placement = ON_MAIN_DEVICE) -> Self:
        """Compute the fingerprint of a model, whose layers are as ``placement`` says; ``tuned`` is empty."""
        method = method_of(model)
        if method is None:
            some = {name: _sample(tensor).clone() for name, tensor in placement.values(model)}
            dtypes = [dtype for dtype in _DTYPES if all(part.dtype in (torch.float32, dtype) for part in some.values())]
            sample = {
                _name(dtype): hash_tensors((name, part.to(dtype)) for name, part in some.items()) for dtype in dtypes
            }
        else:  # never comparable to a plain model, whose values differ
            tensors: dict[str, Tensor] = dict(model.named_parameters())
            tensors |= {name: b for name, b in model.named_buffers() if not b.is_floating_point()}
            packed = (pair for name, tensor in tensors.items() for pair in _plain_tensors(name, tensor))
            sample = {f"{method}, {_name(model.dtype)}": hash_tensors((name, _sample(part)) for name, part in packed)}
        config = {name: value for name, value in model.config.to_dict().items() if name[0] != "_"}
        config = {name: value for name, value in config.items() if name not in _OTHER_FIELDS}
        return cls(json.loads(json.dumps(config, default=str)), sample, {})

    def short_hash(self) -> str:
        """Return one short hash of config and weights, to compare processes or results."""
        parts = [json.dumps(self.config, sort_keys=True), *self.sample.values(), *self.tuned.values()]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]

    def with_tuned(self, tensors: Mapping[str, Tensor]) -> Self:
        """Add the model's tensors that are tuned, before they change."""
        if not tensors:
            return self
        dtypes = "+".join(sorted({_name(tensor.dtype) for tensor in tensors.values()}))
        return replace(self, tuned={dtypes: hash_tensors(tensors.items())})

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only, for checkpoints."""
        return {name: dict(value) for name, value in vars(self).items()}

    def check(self, saved: Mapping[str, Any], option: str = "model.model", *, name: str | None = None) -> None:
        """Check that the fingerprint agrees with a saved one wherever both have a value.

        Raises:
            SlzoError: They differ; the message names the differences, the option that gives the model, and the name of the model
                of the saved fingerprint, if known.
        """
        both = saved.get("config", {}).keys() & self.config.keys()  # versions of transformers differ in their fields
        old, new = ({name: config[name] for name in both} for config in (saved.get("config", {}), self.config))
        changes = differences(old, new)
        if not changes and _differ(saved.get("sample", {}), self.sample):
            changes = "the same shape, different weights"
        if not changes and _differ(saved.get("tuned", {}), self.tuned):
            changes = "different weights in the tuned tensors"
        if changes:
            called = "" if name is None else f", called {name!r}"
            raise SlzoError(
                f"ckpt_path: was trained on another base model{called} ({changes}); give the model that it was trained on "
                f"({option}), or restore it"
            )


def _differ(saved: Mapping[str, str], own: Mapping[str, str]) -> bool:
    return any(saved[name] != own[name] for name in saved.keys() & own.keys())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors of a quantized tensor; nothing if their layout depends on the processor."""
    if type(tensor).__name__ == "Params4bit":  # bitsandbytes repacks it on first use
        return
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))


def _sample(tensor: Tensor) -> Tensor:
    flat, width = tensor.detach().reshape(-1), tensor.shape[-1] if tensor.dim() else 1
    stride = max(1, flat.numel() // _VALUES)
    while math.gcd(stride, width) > 1:  # a common divisor would leave out columns
        stride -= 1
    return flat[::stride]


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, types, shapes and all values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
