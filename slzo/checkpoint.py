"""Read checkpoints and find the newest one."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from slzo.errors import SlzoError

CHECKPOINT_FORMAT = 2


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU, tensors and primitives only.

    Raises:
        SlzoError: The file is missing, broken, or not written by slzo.
    """
    if not Path(path).is_file():
        raise SlzoError(
            f"ckpt_path {str(path)!r}: no such file; give a .ckpt file from a run's checkpoints folder, or last"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise SlzoError(f"ckpt_path {str(path)!r}: not a readable checkpoint ({type(error).__name__})") from error
    checkpoint_note(checkpoint, f"ckpt_path {str(path)!r}")
    return checkpoint


def checkpoint_note(checkpoint: Any, option: str = "ckpt_path") -> dict[str, Any]:
    """What the module noted in a checkpoint: what its tensors are and where they belong.

    Raises:
        SlzoError: It was not written by slzo, or by a version with another format.
    """
    if not isinstance(checkpoint, dict) or "slzo" not in checkpoint:
        raise SlzoError(f"{option}: not a checkpoint written by slzo; give one from a run's checkpoints folder")
    note = checkpoint["slzo"]
    if note["format"] != CHECKPOINT_FORMAT:
        raise SlzoError(
            f"{option}: has format {note['format']}, this slzo reads format {CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    return note


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


def resumed_from(trainer: Trainer) -> str | None:
    """The checkpoint that a run continues, known from the start of ``fit``.

    Lightning fills ``trainer.ckpt_path`` only after the set-up hooks; :class:`slzo.trainer.ZOTrainer` notes it before.
    """
    path = getattr(trainer, "resume_path", None) or trainer.ckpt_path
    return None if path is None else str(path)


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the run only tries the code and must write nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))
