"""How Lightning writes and reads checkpoints: beside their place, whole or not at all."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from slzo.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from slzo.checkpoint_file import is_ours


class CheckpointFiles(_WrappingCheckpointIO):
    """Writes local files whole; hands out a checkpoint that was read already, once, in the place of reading its file again.

    Lightning's own writes in ``$TMPDIR`` and moves, which on another disk is a copy that can end half-way.
    """

    known: Checkpoint | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one; what another plugin or another file system does is left to it."""
        if type(self.checkpoint_io) is TorchCheckpointIO and storage_options is None and _is_local_file_protocol(path):
            write_checkpoint(checkpoint, Path(path))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read one."""
        known, self.known = self.known, None
        if known is not None and known.path == str(path):
            return known.content
        if _is_local_file_protocol(path) and Path(path).is_file() and is_ours(path):
            return read_checkpoint(path).content
        return super().load_checkpoint(path, *args, **kwargs)

    def teardown(self) -> None:
        """Pass it on."""
        assert self.checkpoint_io is not None
        self.checkpoint_io.teardown()
