"""What the processes of a run exchange besides tensors."""

import gc
from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed

from slzo.utils.errors import SlzoError
from slzo.utils.settings import differences

_Item = TypeVar("_Item")


def gather_from_processes(items: list[_Item]) -> list[_Item]:
    """Gather the items of all processes, in the order of the processes; a collective operation."""
    if not torch.distributed.is_initialized():
        return items
    gathered: list[list[_Item]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def check_agreement(values: Mapping[str, Any], advice: str) -> None:
    """Check that some values are the same on all processes; otherwise ``advice`` ends the message. A collective call.

    Raises:
        SlzoError: On all processes, if a value of one process differs from that of the first process.
    """
    first, *others = gather_from_processes([dict(values)])
    for rank, other in enumerate(others, start=1):
        if changes := differences(first, other):
            raise SlzoError(f"the processes of this run differ, rank 0 -> rank {rank}: {changes}; {advice}")


def leave_process_group() -> None:
    """Disconnect from the other processes of a run, when no exchange with them is under way.

    It waits for the threads that exchange tensors. If such a thread released a tensor while the interpreter ends, it would abort
    the process (pytorch/pytorch#190489).
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # the threads end with the last reference to the group
