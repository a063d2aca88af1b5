"""The file format of checkpoints: safetensors, with all other values as JSON in the header, and CRC-32 checksums.

The file contains no code, and any safetensors reader can read its tensors. The header's metadata has two entries: ``content``,
which is JSON, and ``crc32``, the checksum of ``content``. In ``content``, ``tree`` is the nested content in which
``{"$tensor": name}`` stands for a tensor, and ``tensors`` has the checksum of each tensor. ``$dict``, ``$tuple`` and ``$float``
encode what JSON lacks: dicts with keys that are not all text, tuples, and floats that are not finite.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.utils.files import library_disk_errors


class DamagedError(ValueError):
    """A part of a file differs from its checksum; the message names the part."""


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, text, ``True``, ``False`` and ``None``.

    Raises:
        SlzoError: The content holds a value of another type.
        OSError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encoded(dict(content), (), tensors)
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"tree": tree, "tensors": sums}, allow_nan=False)
    with library_disk_errors():
        specs = {name: _spec(tensor) for name, tensor in tensors.items()}
        serialize_file(specs, path, {"content": text, "crc32": str(zlib.crc32(text.encode()))})


def read(path: str | Path, entry: str = "") -> Any:
    """Read what :func:`write` wrote, with tensors on the CPU, and verify the checksums.

    With ``entry`` only this entry is read.

    Raises:
        DamagedError: A part does not match its checksum.
        Exception: Other errors, if the file does not have this format.
    """
    with safe_open(path, framework="pt") as file:
        content = _metadata(file)
        prefix = f"{entry}." if entry else ""
        tensors = {
            name: _tensor(file, name, expected)
            for name, expected in content["tensors"].items()
            if name.startswith(prefix)
        }
    tree = content["tree"]
    return _decoded(tree[entry] if entry else tree, tensors)


def _metadata(file: Any) -> dict[str, Any]:
    """Return the tree and the checksums of the tensors."""
    header = file.metadata()
    text = header["content"]
    if str(zlib.crc32(text.encode())) != header["crc32"]:
        raise DamagedError("the header")
    content: dict[str, Any] = json.loads(text)
    return content


def _tensor(file: Any, name: str, expected: int) -> Tensor:
    tensor: Tensor = file.get_tensor(name).clone()  # not a view of a file that may be replaced
    if _checksum(tensor) != expected:
        raise DamagedError(f"tensor {name!r}")
    return tensor


def _spec(tensor: Tensor) -> TensorSpec:
    """Describe a contiguous tensor on the CPU, which must outlive the description."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(dtype=dtype, shape=tensor.shape, data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)


def _checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of dtype, shape and values of a contiguous tensor on the CPU."""
    values = tensor.reshape(-1).view(torch.uint8).numpy().data
    return zlib.crc32(values, zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode()))


def _encoded(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Encode a value for JSON; add its tensors to ``tensors``, named by their paths."""
    if isinstance(value, Tensor):
        name = ".".join(path)
        while name in tensors:  # keys with dots
            name += "'"
        try:
            tensors[name] = value.detach().cpu().contiguous()
            _spec(tensors[name])
        except (RuntimeError, SafetensorError) as error:
            raise SlzoError(
                f"checkpoint: {name} is a tensor of {value.layout}, {value.dtype}, which the file format does not support"
            ) from error
        return {"$tensor": name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encoded(each, (*path, key), tensors) for key, each in value.items()}
        pairs = [
            [_encoded(key, path, tensors), _encoded(each, (*path, str(key)), tensors)] for key, each in value.items()
        ]
        return {"$dict": pairs}
    if isinstance(value, list | tuple):
        items = [_encoded(each, (*path, str(number)), tensors) for number, each in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    for kind in (bool, int, float, str):  # subclasses, such as NumPy numbers and text enums
        if isinstance(value, kind):
            return _encoded(kind(value), path, tensors)
    raise SlzoError(
        f"checkpoint: {'.'.join(path)} is a {type(value).__name__}, and a checkpoint holds tensors, numbers, text, lists and "
        "dicts; let its owner's state_dict return only these"
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key == "$tensor":
            return tensors[inner]
        if key == "$float":
            return float(inner)
        if key == "$tuple":
            return tuple(_decoded(each, tensors) for each in inner)
        if key == "$dict":
            return {_decoded(name, tensors): _decoded(each, tensors) for name, each in inner}
    return {key: _decoded(each, tensors) for key, each in value.items()}
