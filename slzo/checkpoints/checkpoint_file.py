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
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slzo.utils.errors import SlzoError

_TYPES: Mapping[torch.dtype, str] = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamagedError(ValueError):
    """A part of a file differs from its checksum; the message names the part."""


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, text, ``True``, ``False`` and ``None``.

    Tensors are written one by one, since the writer of safetensors before 0.8 would first copy all of them.

    Raises:
        SlzoError: The content holds a value of another type.
        OSError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encoded(dict(content), (), tensors)
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"tree": tree, "tensors": sums}, allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {"content": text, "crc32": str(zlib.crc32(text.encode()))}}
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that each is aligned to its item size
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    with path.open("wb") as file:
        file.write(len(start).to_bytes(8, "little"))
        file.write(start)
        for name in order:
            file.write(_bytes(tensors[name]))


def read(path: str | Path, entry: str = "") -> Any:
    """Read what :func:`write` wrote, with tensors on the CPU, and verify the checksums.

    With ``entry`` only this entry is read.

    Raises:
        DamagedError: A part does not match its checksum.
        Exception: Other errors, if the file does not have this format.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        text = header["content"]
        if str(zlib.crc32(text.encode())) != header["crc32"]:
            raise DamagedError("the header")
        content = json.loads(text)
        prefix = f"{entry}." if entry else ""
        tensors = {
            name: _tensor(file, name, expected)
            for name, expected in content["tensors"].items()
            if name.startswith(prefix)
        }
    tree = content["tree"]
    return _decoded(tree[entry] if entry else tree, tensors)


def _tensor(file: Any, name: str, expected: int) -> Tensor:
    tensor: Tensor = file.get_tensor(name).clone()  # not a view of a file that may be replaced
    if _checksum(tensor) != expected:
        raise DamagedError(f"tensor {name!r}")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """Return the values of a contiguous tensor on the CPU without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of dtype, shape and values."""
    return zlib.crc32(_bytes(tensor), zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode()))


def _encoded(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Encode a value for JSON; add its tensors to ``tensors``, named by their paths."""
    if isinstance(value, Tensor):
        name = ".".join(path)
        while name in tensors:  # keys with dots
            name += "'"
        if value.layout is not torch.strided or value.dtype not in _TYPES:
            raise SlzoError(
                f"checkpoint: {name} is a tensor of {value.layout}, {value.dtype}, which the file format does not support"
            )
        tensors[name] = value.detach().cpu().contiguous()
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
        if isinstance(value, kind):  # str of a member of an enum is its name
            return _encoded(value.value if isinstance(value, Enum) else kind(value), path, tensors)
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
