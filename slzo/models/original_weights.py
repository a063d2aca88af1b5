"""Tensors of a model's own files, read one by one: what they were before the model was quantized."""

import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_BY_NAME = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FULL = (torch.float32, torch.bfloat16, torch.float16)


class OriginalWeights:
    """The full-precision tensors in the files that a model came from.

    Args:
        source: Folder or Hub id; what is in the Hub's cache is read, nothing is fetched.
        prefix: That the files may have before a parameter's name or leave out, like ``model``.
    """

    def __init__(self, source: str, prefix: str) -> None:
        self.source = source
        self._prefix = f"{prefix}." if prefix else ""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OriginalWeights":
        """Those of a model that ``from_pretrained`` made."""
        return cls(model.name_or_path or "", model.base_model_prefix)

    def read(self, name: str, shape: torch.Size) -> Tensor | None:
        """A parameter by the model's name; ``None`` if the files hold none of this shape in full precision."""
        for known in self._names(name):
            path = self._files.get(known)
            if path is None:
                continue
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(known)
            if tensor.shape == shape and tensor.dtype in _FULL:
                return tensor
        return None

    @property
    def num_bytes(self) -> int:
        """Size of the files; 0 where there are none."""
        return sum(Path(path).stat().st_size for path in set(self._files.values()))

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the largest tensor, from its file's header; ``None`` where there are no files."""
        largest, kind = 0, None
        for name, path in self._files.items():
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(name)
                size = math.prod(part.get_shape())
                if size > largest:
                    largest, kind = size, _BY_NAME.get(part.get_dtype())
        return kind

    def _names(self, name: str) -> Iterator[str]:
        yield name
        if self._prefix:
            yield name.removeprefix(self._prefix)
            yield self._prefix + name

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file of each tensor; empty where there are no safetensors."""
        try:
            index = self._find(_INDEX)
            if index is not None:
                names: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                found = {file: self._find(file) for file in set(names.values())}
                return {name: path for name, file in names.items() if (path := found[file]) is not None}
            single = self._find(_SINGLE)
            if single is None:
                return {}
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        except (OSError, ValueError, KeyError, SafetensorError):
            return {}

    def _find(self, name: str) -> str | None:
        return cached_file(
            self.source,
            name,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
