"""Full-precision tensors from a model's own files, read one at a time: their values before quantization."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class OriginalWeights:
    """The full-precision tensors in the files that a model was loaded from.

    Args:
        source: The folder; empty if there is none.
        prefix: Optional prefix of parameter names in the files, such as ``model``.
    """

    def __init__(self, source: str, prefix: str) -> None:
        self.source = source
        self._prefix = f"{prefix}." if prefix else ""

    def read(self, name: str, shape: torch.Size) -> Tensor | None:
        """Read a parameter by its name in the model; ``None`` if the files do not have it in this shape and in full precision."""
        for known in self._names(name):
            path = self._files.get(known)
            if path is None:
                continue
            with _opened(path) as file:
                tensor = None if file is None else file.get_tensor(known)
            if tensor is not None and tensor.shape == shape and tensor.dtype in _DTYPES.values():
                return tensor
        return None

    @property
    def num_bytes(self) -> int:
        """Size of the files; 0 if there are none."""
        return sum(Path(path).stat().st_size for path in set(self._files.values()))

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the largest tensor, read from the file headers; ``None`` if there are no files."""
        largest, dtype = 0, None
        for path in set(self._files.values()):
            with _opened(path) as file:
                for name in () if file is None else file.keys():
                    part = file.get_slice(name)
                    size = math.prod(part.get_shape())
                    if size > largest:
                        largest, dtype = size, _DTYPES.get(part.get_dtype())
        return dtype

    def _names(self, name: str) -> Iterator[str]:
        yield name
        if self._prefix:
            yield name.removeprefix(self._prefix)
            yield self._prefix + name

    @cached_property
    def _files(self) -> dict[str, str]:
        """File of each tensor; empty if there are no safetensors files."""
        try:
            index = self._path(_INDEX)
            if index is not None:
                names: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                paths = {file: self._path(file) for file in set(names.values())}
                return {name: path for name, file in names.items() if (path := paths[file]) is not None}
            single = self._path(_SINGLE)
            if single is None:
                return {}
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):  # loading will report it
            return {}

    def _path(self, name: str) -> str | None:
        """Return the path of a file in the folder; ``None`` if it is not there."""
        path = Path(self.source, name)
        return str(path) if self.source and path.is_file() else None


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a safetensors file; ``None`` if it is damaged, which loading the model will report."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError):
        yield None
        return
    with file as opened:
        yield opened
