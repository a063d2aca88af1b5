"""Read, verify and write checkpoints, and find those of the newest run.

The file format is safetensors with checksums, without pickles, see :mod:`slzo.checkpoints.checkpoint_file`. In addition to the
state of Lightning, a checkpoint holds a note that says what its tensors are and to which model they belong.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from slzo.checkpoints import checkpoint_file
from slzo.utils.console import inform, say, warn
from slzo.utils.errors import SlzoError
from slzo.utils.files import replacing
from slzo.utils.hub import model_commit, split_revision
from slzo.utils.signals import signals_held

CHECKPOINT_FORMAT = 1
REPLAYED = "replay-"
"""Beginning of the names of checkpoints that were rebuilt from a log."""

NAMES = ("last", "best")
"""Names that stand for the last and the best checkpoint of the newest run."""

RUNS = "runs"
"""Folder above the runs."""

_OPTIONS = {"lr": "optimizer.lr"}  # options that have another name among the hyper-parameters
_MISSING = object()
_BEST_CHECKPOINT = "BestCheckpoint"  # its state is stored under its name and options
_ADVICE = "give another one of the run, or last for the newest intact one"
# entries that a resumable checkpoint has in addition to the tuned tensors
_TRAINING_STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers")
_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "scope": (dict,),
        "adapter": (dict, type(None)),
        "tensors": (dict,),
        "layer": (int, type(None)),
        "num_evaluations": (float, int),
        "model": (str,),
        "layer_reason": (str,),
        "dtype": (str,),
        "trust_remote_code": (bool,),
        "noise_seed": (int,),
        "num_nonfinite": (int,),
        "auto_step": (dict, type(None)),
        "nonfinite_in_row": (int,),
        "base": (dict,),
        "data": (dict,),
        "rows": (dict,),
        "environment": (dict,),
        "hub": (dict,),
        "optimizer": (dict,),
        "onednn": (bool, type(None)),
    }
)


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
    def note(self) -> dict[str, Any]:
        """The checkpoint's note, see :func:`checkpoint_note`."""
        return checkpoint_note(self.content, f"ckpt_path {self.path!r}")

    @property
    def run_folder(self) -> Path:
        """The folder of the run that wrote it, if it is still where it was written."""
        return run_folder_of(self.path)

    @property
    def is_resumable(self) -> bool:
        """Whether training can be resumed from it."""
        return all(name in self.content for name in _TRAINING_STATE)

    def check_resumable(self, optimizer: Mapping[str, Any]) -> None:
        """Check that training with this optimizer can be resumed from the checkpoint.

        Raises:
            SlzoError: It holds only weights, or its optimizer or scheduler is of another class.
        """
        if not self.is_resumable:
            raise SlzoError(
                f"ckpt_path {self.path!r}: holds weights only (checkpoint.save_weights_only), and training cannot resume from "
                "them; give the run's last.ckpt, or use it with test, predict or export"
            )
        saved = self.note["optimizer"]
        for option, name in (("model.optimizer", "class"), ("model.lr_scheduler", "scheduler")):
            old, new = (str(settings.get(name) or "").rpartition(".")[2] for settings in (saved, optimizer))
            if old and new and old != new:
                raise SlzoError(
                    f"{option} {new}: the checkpoint was trained with {old}, whose state it cannot load; resume with {old}, "
                    "or start again without --ckpt_path"
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
        raise SlzoError(f"{option}: no such file; give a .ckpt file from a run's checkpoints folder, last or best")
    with _one_line(option):
        # a plain Trainer of Lightning writes pickles in a zip file
        content = torch.load(path, "cpu", weights_only=True) if is_zipfile(path) else checkpoint_file.read(path)
    checkpoint_note(content, option)
    _check_state(content, option)
    return Checkpoint(str(path), content)


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        SlzoError: It cannot be written, or its weights are not finite.
    """
    _check_finite(content["state_dict"], f"training diverged: at step {content.get('global_step')} the checkpoint's")
    with replacing(path) as partial:
        checkpoint_file.write(content, partial)


def checkpoint_note(content: Any, option: str = "ckpt_path") -> dict[str, Any]:
    """Return the note of a checkpoint, which says what its tensors are and to which model they belong.

    Raises:
        SlzoError: It was not written by slzo, was written in another format, or is damaged.
    """
    note: Any = content.get("slzo") if isinstance(content, dict) else None
    if not isinstance(note, dict) or "format" not in note:
        raise SlzoError(f"{option}: not a checkpoint written by slzo; give one from a run's checkpoints folder")
    if note["format"] != CHECKPOINT_FORMAT:
        raise SlzoError(
            f"{option}: has format {note['format']!r}, and this slzo reads {CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    for name, types in _FIELDS.items():
        value = note.get(name, _MISSING)
        is_bool = isinstance(value, bool) and bool not in types
        if is_bool or not isinstance(value, types):
            found = "is missing" if value is _MISSING else f"is a {type(value).__name__}"
            raise SlzoError(f"{option}: its note is damaged: {name} {found}; give an unchanged checkpoint of slzo")
    for name, entry in note["tensors"].items():
        if not _is_description(entry):
            raise SlzoError(
                f"{option}: its note is damaged: tensor {name!r} has no usable description; give an unchanged checkpoint of slzo"
            )
    if not _is_data(note["data"]):
        raise SlzoError(f"{option}: its note is damaged: data is incomplete; give an unchanged checkpoint of slzo")
    return note


def base_model(note: Mapping[str, Any]) -> str:
    """Return the name that loads the base model of a checkpoint, of the commit that was tuned if it is from the Hub."""
    commit = note["hub"].get("model_commit")
    return str(note["model"]) if commit is None else f"{split_revision(note['model'])[0]}@{commit}"


def check_commit(note: Mapping[str, Any], model: str, folder: str | None) -> None:
    """Check that a model of the Hub is at the commit that a checkpoint was trained on.

    Args:
        note: Note of the checkpoint.
        model: Name of the model, as in ``model.model``.
        folder: Folder that it is loaded from.

    Raises:
        SlzoError: It is at another commit.
    """
    own, saved = model_commit(model, folder), note["hub"].get("model_commit")
    if None not in (own, saved) and own != saved:
        raise SlzoError(
            f"model.model {model!r}: is at commit {own}, and the checkpoint was trained on another one; give --model.model "
            f"{split_revision(model)[0]}@{saved}"
        )


def changed_options(content: dict[str, Any], own: Mapping[str, Any]) -> str:
    """Return the model options that differ from those of a checkpoint, as text; empty if there are none."""
    saved = content.get("hyper_parameters", {})
    different = [name for name in saved if name in own and saved[name] != own[name] and name[0] != "_"]
    return "; ".join(f"model.{_OPTIONS.get(name, name)}: {saved[name]} -> {own[name]}" for name in different)


def newest_checkpoint(root: str | Path, name: str = "last") -> Path:
    """Return the last checkpoint of the newest run below ``root``.

    If it is missing or damaged, report it and return the newest intact one, of the same run if that has any.

    Args:
        root: Folder of the runs, or of one run.
        name: What the user gave as ``ckpt_path``, for messages.

    Raises:
        SlzoError: There is no intact checkpoint.
    """
    times = {path: _modified(path) for path in Path(root).glob("**/checkpoints/*.ckpt")}
    known = {path: time for path, time in times.items() if time is not None and not path.name.startswith(REPLAYED)}
    found = sorted(known, key=known.__getitem__, reverse=True)
    if not found:
        raise SlzoError(
            f"ckpt_path {name!r}: no run below {str(root)!r} has a checkpoint; run slzo fit without --ckpt_path, or give "
            "a file"
        )
    newest = found[0].parent
    last = next((path for path in found if path.parent == newest and path.name.startswith("last")), None)
    if last is None:
        warn(f"ckpt_path {name!r}: {str(newest)!r} has no last.ckpt")
    else:
        try:
            with _one_line(f"ckpt_path {str(last)!r}"):
                checkpoint_file.verify(last)
            return last
        except SlzoError as error:
            warn(str(error))
    for path in sorted(found, key=lambda path: path.parent != newest):
        with suppress(SlzoError):
            if read_checkpoint(path).is_resumable:
                inform(f"{path} is the newest intact checkpoint")
                return path
    raise SlzoError(
        f"ckpt_path {name!r}: no checkpoint below {str(root)!r} is intact; run slzo fit without --ckpt_path, or give a file"
    )


def _modified(path: Path) -> float | None:
    """Return when a file was changed; ``None`` if it is gone or a broken link."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def named_checkpoint(name: str, root: str | Path) -> Path:
    """Return the checkpoint of the newest run below ``root`` that has the name, see :data:`NAMES`; print its path.

    Raises:
        SlzoError: There is none.
    """
    last = newest_checkpoint(root, name)
    found = last if name == "last" else _best_of(last)
    say(f"Using the {name} checkpoint of the newest run, {found}")
    return found


def find_checkpoint(ckpt_path: str | Path, root: str | Path, to_continue: bool = False) -> Checkpoint:
    """Read a checkpoint, given by its path, by the folder of its run, or by a name, see :func:`named_checkpoint`.

    Of a run's folder it is the best checkpoint, or the last one ``to_continue``.

    Raises:
        SlzoError: There is none, or it cannot be used.
    """
    if str(ckpt_path) in NAMES:
        ckpt_path = named_checkpoint(str(ckpt_path), root)
    elif (Path(ckpt_path) / "checkpoints").is_dir():
        ckpt_path = newest_checkpoint(ckpt_path, str(ckpt_path)) if to_continue else checkpoint_of_run(ckpt_path)
    return read_checkpoint(ckpt_path)


def checkpoint_of_run(folder: str | Path) -> Path:
    """Return the best checkpoint in the folder of a run, or the last one if the run was not validated.

    Raises:
        SlzoError: There is none.
    """
    last = newest_checkpoint(folder, str(folder))
    try:
        return _best_of(last)
    except SlzoError:
        return last


def _best_of(last: Path) -> Path:
    """Return the best checkpoint that the last one refers to; after a resume it may be in the folder of the earlier run."""
    callbacks = read_checkpoint(last).content.get("callbacks", {})
    own_first = sorted(callbacks, key=lambda name: not name.startswith(_BEST_CHECKPOINT))
    states = [callbacks[name] for name in own_first if isinstance(callbacks[name], dict)]
    for path in (best_file(state["best_model_path"], last) for state in states if state.get("best_model_path")):
        if path.is_file():
            return path
    raise SlzoError(f"ckpt_path 'best': the run of {str(last)!r} was not validated and has no best one; give last")


def best_file(saved: str, checkpoint: str | Path) -> Path:
    """Return the file of a best state.

    A relative path was saved by the checkpoint's own run. It counts from the folder in which that run was started, which may hold
    another project's runs now, so the file is looked for next to the checkpoint. A run that continues another one saves an
    absolute path; its folders may have been moved together. Only from a copy of a checkpoint outside a run the path counts from
    the current folder.

    Args:
        saved: Path of the best state in a checkpoint.
        checkpoint: Path of this checkpoint, of the same run or of one that continued it.

    Returns:
        The first place that has the file; ``saved`` if none has it.
    """
    path, folder = Path(saved), Path(checkpoint).parent
    places = [folder / path.name, run_folder_of(checkpoint).parent.joinpath(*path.parts[-3:])]
    if path.is_absolute():
        places.insert(0, path)
    elif folder.name != "checkpoints":
        places.append(path)
    return next((place for place in places if place.is_file()), path)


@contextmanager
def _one_line(option: str) -> Iterator[None]:
    """Convert errors of reading a file to SlzoErrors; hold signals, since readers would convert what their handlers raise."""
    try:
        with signals_held():
            yield
    except checkpoint_file.DamagedError as error:
        raise SlzoError(f"{option}: damaged: {error} does not match its checksum; {_ADVICE}") from error
    except OSError as error:
        raise SlzoError(f"{option}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged header can cause many errors
        raise SlzoError(f"{option}: not a readable checkpoint ({type(error).__name__}); {_ADVICE}") from error


def _check_state(content: Mapping[str, Any], option: str) -> None:
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise SlzoError(f"{option}: has no tensors under state_dict; give an unchanged checkpoint of slzo")
    if not isinstance(content.get("global_step"), int):
        raise SlzoError(f"{option}: has no step under global_step; give an unchanged checkpoint of slzo")
    _check_finite(state, f"{option}: its")


def _check_finite(state: Mapping[str, Tensor], whose: str) -> None:
    bad = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise SlzoError(
            f"{whose} tensor {bad!r} holds values that are infinite or not a number; use an earlier checkpoint, with a lower "
            "model.optimizer.lr"
        )


def _is_data(entry: Mapping[str, Any]) -> bool:
    """Whether the entries of :class:`slzo.data.fingerprint.DataFingerprint` have the right types."""
    rows = entry.get("rows")
    is_hashes = isinstance(rows, dict) and all(isinstance(h, Tensor) and h.dim() == 1 for h in rows.values())
    return isinstance(entry.get("tokenizer"), str) and is_hashes


def _is_description(entry: Any) -> bool:
    """Whether kind, shape and constants of a tuned tensor have the right types; see TunedTensors.description."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        return False
    shape = entry.get("shape")
    sizes = isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)
    constants = [value for name, value in entry.items() if name not in ("kind", "shape")]
    return sizes and all(isinstance(value, Tensor) for value in constants)
