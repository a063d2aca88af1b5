"""The plugin with which Lightning writes and reads checkpoints: atomically, with checksums, without pickles."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from slzo.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from slzo.utils.errors import SlzoError
from slzo.utils.files import check_local


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically in slzo's own format, to folders of this machine only.

    Lightning's plugin writes to ``$TMPDIR`` and moves the file. On another disk the move is a copy, which can be interrupted.

    Attributes:
        known: A checkpoint that was already read; its file is not read again when Lightning loads it.
    """

    known: Checkpoint | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SlzoError: It cannot be written, or ``path`` is not a path of this machine.
        """
        check_local("save_checkpoint", path)
        if storage_options is not None:
            raise SlzoError("save_checkpoint: storage_options cannot be used for files on this machine; leave them out")
        try:
            write_checkpoint(checkpoint, Path(path))
        except SlzoError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise SlzoError(f"{error}; then resume from the checkpoint before it with --ckpt_path last") from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        known, self.known = self.known, None
        if known is not None and known.path == str(path):
            return known.content
        return read_checkpoint(path).content
