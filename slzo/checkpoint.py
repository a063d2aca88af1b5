"""Read and write checkpoints and find the newest one.

Formats 2 and 3 are zip archives that ``torch.load(weights_only=True)`` reads, with CRC-32s that torch writes and does not look
at; here they are verified. Format 4 is that of :mod:`slzo.checkpoint_file`, without pickles.
"""

import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slzo import checkpoint_file
from slzo.checkpoint_note import FORMATS, check_note
from slzo.errors import SlzoError
from slzo.files import replacing
from slzo.renames import translate_flat
from slzo.signals import signals_held

CHECKPOINT_FORMAT = max(FORMATS)
_ADVICE = "give another one of the run, or last for the newest that is whole"
# what a state to go on from has besides the tuned tensors
_TRAINING_STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers")


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

    @property
    def is_resumable(self) -> bool:
        """Whether training can go on from it."""
        return all(name in self.content for name in _TRAINING_STATE)

    def check_resumable(self, optimizer: Mapping[str, Any]) -> None:
        """Refuse to go on from weights alone, or with an optimizer or scheduler of another class.

        Raises:
            SlzoError: With the reason.
        """
        if not self.is_resumable:
            raise SlzoError(
                f"ckpt_path {self.path!r}: holds weights only (checkpoint.save_weights_only), and training cannot go on from "
                "them; give the run's last.ckpt, or use it with test, predict or export"
            )
        saved = self.note.get("optimizer")
        if saved is None:  # format 2
            saved = {"class": self.content.get("hyper_parameters", {}).get("optimizer")}
        for option, name in (("model.optimizer", "class"), ("model.lr_scheduler", "scheduler")):
            old, new = (str(each.get(name) or "").rpartition(".")[2] for each in (saved, optimizer))
            if old and new and old != new:
                raise SlzoError(
                    f"{option} {new}: the checkpoint was trained with {old}, whose state it cannot take over; resume with {old}, "
                    "or begin anew without --ckpt_path"
                )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Load a checkpoint on the CPU, tensors and primitives only, and verify it.

    Raises:
        SlzoError: The file is missing, broken, not written by slzo, or holds weights that are not finite.
    """
    option = f"ckpt_path {str(path)!r}"
    if Path(path).is_dir():
        raise SlzoError(f"{option}: is a folder; give a .ckpt file from a run's checkpoints folder, last or best")
    if not Path(path).is_file():
        raise SlzoError(f"{option}: no such file; give a .ckpt file from a run's checkpoints folder, last or best")
    content = _content(path, option)
    checkpoint_note(content, option)
    _check_state(content, option)
    return Checkpoint(str(path), content)


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        SlzoError: It cannot be written, or its weights are not finite.
    """
    _check_finite(content["state_dict"], f"training diverged: at step {content.get('global_step')} the checkpoint's")
    try:
        with replacing(path) as partial:
            checkpoint_file.write(content, partial)
    except SlzoError as error:
        raise SlzoError(f"{error}; then go on from the checkpoint before it with --ckpt_path last") from error


def checkpoint_note(content: Any, option: str = "ckpt_path") -> dict[str, Any]:
    """What the module noted in a checkpoint: what its tensors are and where they belong.

    Raises:
        SlzoError: It was not written by slzo, by a version with another format, or was changed by hand.
    """
    note: Any = content.get("slzo") if isinstance(content, dict) else None
    if not isinstance(note, dict) or "format" not in note:
        raise SlzoError(f"{option}: not a checkpoint written by slzo; give one from a run's checkpoints folder")
    check_note(note, option)
    return note


def model_options(content: dict[str, Any]) -> dict[str, Any]:
    """The model options that a checkpoint was trained with, by their present names."""
    return translate_flat(content.get("hyper_parameters", {}), "model")


def changed_options(content: dict[str, Any], own: Mapping[str, Any]) -> str:
    """The model options of a run that are others than a checkpoint was trained with, in words; empty if there are none."""
    saved = model_options(content)
    different = [name for name in saved if name in own and saved[name] != own[name] and name[0] != "_"]
    return "; ".join(f"model.{name}: {saved[name]} -> {own[name]}" for name in different)


def newest_checkpoint(root: str | Path) -> Path:
    """The last checkpoint of the newest run below ``root``; where it is damaged, the newest one of all that is whole, and why.

    Raises:
        SlzoError: There is none.
    """
    found = _by_age(root, "last*.ckpt")
    if not found:
        raise SlzoError(
            f"ckpt_path 'last': no run below {str(root)!r} has a last.ckpt; start without --ckpt_path, or name a file"
        )
    option = f"ckpt_path {str(found[0])!r}"
    try:
        with _one_line(option):
            _verify(found[0])
        return found[0]
    except SlzoError as error:
        sys.stderr.write(f"slzo: {error}\n")
    for path in _by_age(root, "*.ckpt"):
        with suppress(SlzoError):
            if read_checkpoint(path).is_resumable:
                sys.stderr.write(f"slzo: {path} is the newest checkpoint that is whole\n")
                return path
    raise SlzoError(f"ckpt_path 'last': no checkpoint below {str(root)!r} is whole; start without --ckpt_path")


def _content(path: str | Path, option: str) -> dict[str, Any]:
    """What is in a file of any format, compared with its checksums."""
    with _one_line(option):
        if checkpoint_file.is_ours(path):
            return checkpoint_file.read(path)
        _verify(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content


def _verify(path: str | Path) -> None:
    """Compare everything in a file of any format with its checksums."""
    if checkpoint_file.is_ours(path):
        checkpoint_file.verify(path)
        return
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise checkpoint_file.DamagedError(part)


@contextmanager
def _one_line(option: str) -> Iterator[None]:
    """Errors of reading a file as SlzoErrors; a signal waits, since the readers make what its handler raises such an error."""
    try:
        with signals_held():
            yield
    except checkpoint_file.DamagedError as error:
        raise SlzoError(f"{option}: damaged, {error} in it is not what was written; {_ADVICE}") from error
    except OSError as error:
        raise SlzoError(f"{option}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # archives, pickles and headers fail in many ways
        raise SlzoError(f"{option}: not a readable checkpoint ({type(error).__name__}); {_ADVICE}") from error


def _by_age(root: str | Path, name: str) -> list[Path]:
    found = Path(root).glob(f"**/checkpoints/{name}")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _check_state(content: Mapping[str, Any], option: str) -> None:
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise SlzoError(f"{option}: has no tensors under state_dict; it was not written by slzo like this")
    if not isinstance(content.get("global_step"), int):
        raise SlzoError(f"{option}: has no step under global_step; it was not written by slzo like this")
    _check_finite(state, f"{option}: its")


def _check_finite(state: Mapping[str, Tensor], whose: str) -> None:
    bad = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise SlzoError(
            f"{whose} tensor {bad!r} holds values that are infinite or not a number; use an earlier checkpoint, with a lower "
            "model.optimizer.init_args.lr"
        )
