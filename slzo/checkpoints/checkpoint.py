"""Read, verify and write checkpoints.

The file format is safetensors with checksums, without pickles, see :mod:`slzo.checkpoints.checkpoint_file`. In addition to the
state of Lightning, a checkpoint holds metadata, see :mod:`slzo.checkpoints.metadata`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slzo.checkpoints import checkpoint_file
from slzo.checkpoints.metadata import checkpoint_metadata
from slzo.utils.errors import SlzoError
from slzo.utils.files import replacing
from slzo.utils.signals import signals_held

_ADVICE = "give another one of the run, or last for the newest intact one"
_ZIP = b"PK\x03\x04"
# entries that a resumable checkpoint has in addition to the tuned tensors
_TRAINING_STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: Path of the file.
        content: Tensors, on the CPU, and primitives.
    """

    path: str
    content: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """The checkpoint's metadata, see :func:`slzo.training.checkpoint_content.make_metadata`."""
        metadata: dict[str, Any] = self.content["slzo"]
        return metadata

    @property
    def step(self) -> int:
        """Number of steps taken so far."""
        return int(self.content["global_step"])

    @property
    def run_folder(self) -> Path:
        """The folder of the run that wrote it, if it is still where it was written."""
        return run_folder_of(self.path)

    @property
    def is_resumable(self) -> bool:
        """Whether training can be resumed from it."""
        return all(name in self.content for name in _TRAINING_STATE)

    @property
    def scheduler_state(self) -> Mapping[str, Any] | None:
        """State of the learning-rate scheduler; ``None`` if there was none."""
        states = self.content.get("lr_schedulers")
        return states[0] if states else None

    def check_resumable(self, settings: Mapping[str, Any]) -> None:
        """Check that training with these options (:func:`slzo.training.resume.agreed_settings`) can be resumed from this.

        Raises:
            SlzoError: It holds only weights, or its optimizer or scheduler is of another class.
        """
        if not self.is_resumable:
            raise SlzoError(
                f"ckpt_path {self.path!r}: holds weights only (checkpoint.save_weights_only, or a replay), and training cannot "
                "resume from them; give the run's last.ckpt, or use it with test, predict or export"
            )
        for option in ("model.optimizer", "model.lr_scheduler"):
            old, new = (str(each.get(option, "")).rpartition(".")[2] for each in (self.metadata["settings"], settings))
            if (old or option == "model.lr_scheduler") and old != new:
                before, now = old or "none", new or "none"
                raise SlzoError(
                    f"{option} {now}: the checkpoint was trained with {before}, whose state it cannot load; resume with "
                    f"{before}, or start again without --ckpt_path"
                )


def run_folder_of(checkpoint: str | Path) -> Path:
    """Return the folder of the run that wrote a checkpoint, if the file is still where it was written."""
    path = Path(checkpoint)
    return (path if len(path.parts) > 2 else path.absolute()).parent.parent


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Load a checkpoint, tensors and primitives only, on the CPU and verify it.

    Raises:
        SlzoError: The file is missing, damaged, not written by slzo, or holds weights that are not finite.
    """
    option = f"ckpt_path {str(path)!r}"
    if Path(path).is_dir():
        raise SlzoError(f"{option}: is a folder; give a .ckpt file from a run's checkpoints folder, last or best")
    if not Path(path).is_file():
        raise SlzoError(
            f"{option}: no such file; give the folder of a run, a .ckpt file of its checkpoints, last or best"
        )
    with _as_slzo_error(option):
        content = _load_pickle(path) if _is_zip(path) else checkpoint_file.read(path)
    checkpoint_metadata(content, option)
    _check_tensors(content.get("state_dict"), option)
    if not isinstance(content.get("global_step"), int):
        raise SlzoError(f"{option}: has no step under global_step; give an unchanged checkpoint of slzo")
    return Checkpoint(str(path), content)


def read_tuned(path: str | Path) -> dict[str, Tensor]:
    """Read only the tuned tensors of a checkpoint that this run has written: less memory than :func:`read_checkpoint`.

    Raises:
        SlzoError: The file is damaged, has no tensors, or holds weights that are not finite.
    """
    option = f"ckpt_path {str(path)!r}"
    with _as_slzo_error(option):
        state: dict[str, Tensor] = (
            _load_pickle(path)["state_dict"] if _is_zip(path) else checkpoint_file.read(path, "state_dict")
        )
    _check_tensors(state, option)
    return state


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        SlzoError: It cannot be written, or its weights are not finite.
    """
    _check_finite(content["state_dict"], f"training diverged: at step {content.get('global_step')} the checkpoint's")
    with replacing(path) as partial:
        checkpoint_file.write(content, partial)


@contextmanager
def _as_slzo_error(option: str) -> Iterator[None]:
    """Convert errors of reading a file to SlzoErrors; hold signals, since readers would convert what their handlers raise."""
    try:
        with signals_held():
            yield
    except checkpoint_file.DamagedError as error:
        raise SlzoError(f"{option}: damaged: {error} does not match its checksum; {_ADVICE}") from error
    except OSError as error:
        raise SlzoError(f"{option}: cannot be read ({error.strerror or error}); {_ADVICE}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged header can cause many errors
        raise SlzoError(f"{option}: not a readable checkpoint ({type(error).__name__}); {_ADVICE}") from error


def _is_zip(path: str | Path) -> bool:
    """Return whether a file begins as a zip file. ``zipfile.is_zipfile`` also takes tensors that hold its end mark for one."""
    with Path(path).open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def _load_pickle(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint that a plain Trainer of Lightning wrote, a pickle in a zip file, without running its code."""
    content: dict[str, Any] = torch.load(path, "cpu", weights_only=True)
    return content


def _check_tensors(state: object, option: str) -> None:
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise SlzoError(f"{option}: has no tensors under state_dict; give an unchanged checkpoint of slzo")
    _check_finite(state, f"{option}: its")


def _check_finite(state: Mapping[str, Tensor], whose: str) -> None:
    bad = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise SlzoError(
            f"{whose} tensor {bad!r} holds values that are infinite or not a number; use an earlier checkpoint, with a lower "
            "model.optimizer.lr"
        )
