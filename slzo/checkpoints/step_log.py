"""The log of a run's steps: a few bytes per step, enough to repeat the steps without the model's forward passes.

The file begins with a line of JSON. Each record holds kind, step, number of losses, learning rate and eps (float64), the losses
as the estimator got them (float32), and a CRC-32, all little-endian. Reading stops at a record that a crash cut off.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from slzo.utils.errors import SlzoError

NAME = "zo_log"
"""Name of the log file in a run's folder."""

START = "zo_start.ckpt"
"""Checkpoint with the initial state, in addition to the base model: bases, masks, and initial values of added matrices."""

_FORMAT = 2
_HEAD = struct.Struct("<BIHdd")
_SUM = struct.Struct("<I")
_STEP, _ROLLBACK = range(2)


class StepRecord(NamedTuple):
    """One step.

    Attributes:
        step: Number of the step, counted from 0.
        lr: Learning rate that the optimizer used.
        eps: Size of the perturbation.
        losses: Losses as the estimator got them, in its order.
    """

    step: int
    lr: float
    eps: float
    losses: tuple[float, ...]


class Rollback(NamedTuple):
    """After ``steps`` steps, the run returned to its weights after ``to`` steps; -1 if only the learning rate was halved."""

    steps: int
    to: int


@dataclass(frozen=True)
class StepLog:
    """Content of a log file.

    Attributes:
        settings: Settings that the steps depend on.
        records: Records in the order in which they were written.
    """

    settings: Mapping[str, Any]
    records: Sequence[StepRecord | Rollback] = field(default_factory=tuple)

    @property
    def steps(self) -> dict[int, StepRecord]:
        """The steps by number."""
        return {record.step: record for record in self.records if isinstance(record, StepRecord)}

    @property
    def rollbacks(self) -> dict[int, int]:
        """Targets of the rollbacks, by the number of steps taken; a resumed run may have written a rollback twice."""
        return {record.steps: record.to for record in self.records if isinstance(record, Rollback)}

    def before(self, step: int) -> list[StepRecord | Rollback]:
        """Return the records before a step."""
        return [r for r in self.records if (r.step < step if isinstance(r, StepRecord) else r.steps <= step)]


class StepLogWriter:
    """Writes a new file, which begins with the content of a log, and appends records to it without a buffer."""

    def __init__(self, path: Path, log: StepLog) -> None:
        header = json.dumps({"format": _FORMAT, "settings": log.settings}, sort_keys=True)
        # unbuffered, so that records survive a killed process
        self._file = path.open("wb", buffering=0)
        self._file.write(header.encode() + b"\n" + b"".join(map(_packed, log.records)))

    def append(self, record: StepRecord | Rollback) -> None:
        """Write one record."""
        self._file.write(_packed(record))

    def close(self) -> None:
        """Flush to the disk and close the file; may be called again."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()


def read_step_log(path: Path) -> StepLog:
    """Read a log up to its last complete record.

    Raises:
        SlzoError: The file is missing, is not a log of slzo, or has another format.
    """
    option = f"run {str(path.parent)!r}: its {NAME}"
    try:
        header, _, content = path.read_bytes().partition(b"\n")
        decoded = json.loads(header)
        found, settings = decoded["format"], decoded["settings"]
    except FileNotFoundError:
        raise SlzoError(f"{option} is missing; give the folder of a run") from None
    except (ValueError, KeyError, TypeError):
        raise SlzoError(f"{option} was not written by slzo; give the folder of another run") from None
    if found != _FORMAT:
        raise SlzoError(f"{option} has format {found!r}, and this slzo reads {_FORMAT}; use the version that wrote it")
    return StepLog(settings, tuple(_records(content)))


def _packed(record: StepRecord | Rollback) -> bytes:
    if isinstance(record, Rollback):
        body = _HEAD.pack(_ROLLBACK, record.steps, 0, float(record.to), 0.0)
    else:
        body = _HEAD.pack(_STEP, record.step, len(record.losses), record.lr, record.eps)
        body += struct.pack(f"<{len(record.losses)}f", *record.losses)
    return body + _SUM.pack(zlib.crc32(body))


def _records(content: bytes) -> Iterable[StepRecord | Rollback]:
    place = 0
    while place + _HEAD.size <= len(content):
        kind, step, count, lr, eps = _HEAD.unpack_from(content, place)
        end = place + _HEAD.size + 4 * count
        body = content[place:end]
        if end + _SUM.size > len(content) or _SUM.unpack_from(content, end) != (zlib.crc32(body),):
            return
        if kind == _ROLLBACK:
            yield Rollback(step, int(lr))
        else:
            yield StepRecord(step, lr, eps, struct.unpack_from(f"<{count}f", content, place + _HEAD.size))
        place = end + _SUM.size
