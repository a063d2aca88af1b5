"""Read checkpoints and find the newest one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slzo.errors import SlzoError
from slzo.renames import translate_flat

CHECKPOINT_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: Of the file.
        content: Tensors and primitives, on the CPU.
    """

    path: str
    content: dict[str, Any]

    @property
    def note(self) -> dict[str, Any]:
        """What its tensors are and where they belong."""
        return checkpoint_note(self.content, f"ckpt_path {self.path!r}")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Load a checkpoint on the CPU, tensors and primitives only.

    Raises:
        SlzoError: The file is missing, broken, or not written by slzo.
    """
    if Path(path).is_dir():
        raise SlzoError(
            f"ckpt_path {str(path)!r}: is a folder; give a .ckpt file from a run's checkpoints folder, or last"
        )
    if not Path(path).is_file():
        raise SlzoError(
            f"ckpt_path {str(path)!r}: no such file; give a .ckpt file from a run's checkpoints folder, or last"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise a dozen unrelated classes
        raise SlzoError(f"ckpt_path {str(path)!r}: not a readable checkpoint ({type(error).__name__})") from error
    checkpoint_note(content, f"ckpt_path {str(path)!r}")
    return Checkpoint(str(path), content)


def checkpoint_note(content: Any, option: str = "ckpt_path") -> dict[str, Any]:
    """What the module noted in a checkpoint: what its tensors are and where they belong.

    Raises:
        SlzoError: It was not written by slzo, or by a version with another format.
    """
    note: Any = content.get("slzo") if isinstance(content, dict) else None
    if not isinstance(note, dict) or "format" not in note:
        raise SlzoError(f"{option}: not a checkpoint written by slzo; give one from a run's checkpoints folder")
    if note["format"] != CHECKPOINT_FORMAT:
        raise SlzoError(
            f"{option}: has format {note['format']!r}, this slzo reads format {CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    return note


def model_options(content: dict[str, Any]) -> dict[str, Any]:
    """The model options that a checkpoint was trained with, by their present names."""
    return translate_flat(content.get("hyper_parameters", {}), "model")


def newest_checkpoint(root: str | Path) -> Path:
    """The last checkpoint of the newest run below ``root``.

    Raises:
        SlzoError: There is none.
    """
    found = sorted(Path(root).glob("**/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SlzoError(
            f"ckpt_path 'last': no run below {str(root)!r} has a last.ckpt; start without --ckpt_path, or name a file"
        )
    return found[-1]
