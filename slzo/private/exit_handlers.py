"""With NCCL, Lightning destroys the process group when the interpreter ends, by a function that has no public name."""

import atexit

from lightning.fabric.utilities.distributed import _destroy_dist_connection


def keep_process_group_at_exit() -> None:
    """Let this process end without destroying the process group, which waits for the other processes."""
    atexit.unregister(_destroy_dist_connection)
