"""Conversion of GGUF files to plain Hugging Face folders in the cache.

transformers loads a GGUF file slowly and refuses to save the model, so each file is converted once.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slzo.utils.assets import build_once, cache_dir
from slzo.utils.console import print_status
from slzo.utils.errors import SlzoError, one_line

if TYPE_CHECKING:
    import torch


def gguf_to_folder(gguf: Path) -> Path:
    """Return a Hugging Face folder with the content of a user's GGUF file, converted on first use.

    The folder takes 2 or 4 bytes per weight. A file whose path, size or modification time changed is converted again.

    Raises:
        SlzoError: The file is missing or not GGUF, or transformers cannot read it.
    """
    _check_magic(gguf)
    status = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:12]

    def build(staging: Path) -> Path:
        print_status(f"converting {gguf.name} to safetensors, once")
        return convert(gguf, staging / "model", str(gguf))

    return build_once(cache_dir() / "gguf" / f"{gguf.stem}-{key}", build, is_model_folder)


def convert(gguf: Path, folder: Path, name: str) -> Path:
    """Write the model and tokenizer of a GGUF file to ``folder``, in the smallest dtype that is exact; return the folder.

    ``name`` is the user's name of the model, for messages.

    Raises:
        SlzoError: transformers cannot read the file.
        OSError: The folder cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slzo.models.loading_check import check_loading
    from slzo.models.save import save_model

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # transformers raises many kinds of errors
            reason = one_line(error)
            raise SlzoError(
                f"model.model {name!r}: transformers cannot read this GGUF file ({type(error).__name__}: {reason}); "
                "use another quantization of the model, or its Hugging Face folder"
            ) from error
        model, info = loaded
        check_loading(name, model, info)
        # the weights are dequantized already; without these marks the model is a plain one
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(_smallest_exact_dtype(model.state_dict()))
        save_model(model, tokenizer, folder)
    _remove_unknown_tokens(folder / "tokenizer.json", model.config.vocab_size)
    return folder


def _remove_unknown_tokens(file: Path, vocab_size: int) -> None:
    """Remove the tokens that transformers adds to every GGUF tokenizer and that the model does not know."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    kept = [entry for entry in saved["added_tokens"] if entry["id"] < vocab_size]
    if len(kept) < len(saved["added_tokens"]):
        file.write_text(json.dumps(saved | {"added_tokens": kept}, ensure_ascii=False), encoding="utf-8")


def _smallest_exact_dtype(weights: Mapping[str, "torch.Tensor"]) -> "torch.dtype":
    import torch

    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in weights.values()):
            return dtype
    return torch.float32


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a converted model."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _check_magic(gguf: Path) -> None:
    try:
        with gguf.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise SlzoError(
            f"model.model {str(gguf)!r}: cannot be read ({error.strerror}); give an existing file"
        ) from error
    if magic != b"GGUF":
        raise SlzoError(
            f"model.model {str(gguf)!r}: not a GGUF file (it starts with {magic!r}, not b'GGUF'); download it again, "
            "or give a Hugging Face folder"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and warnings of transformers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            yield
    finally:
        logging.set_verbosity(verbosity)
