"""Check that all processes of a run have the same options and versions."""

from collections.abc import Mapping
from typing import Any

from slzo.utils.errors import SlzoError
from slzo.utils.runtime import gather_from_processes
from slzo.utils.settings import differences


def check_agreement(values: Mapping[str, Any], advice: str) -> None:
    """Check that some values are the same on all processes. A collective call.

    Args:
        values: Primitives by the name that the message uses; only equality counts.
        advice: What to do if they differ, for the message.

    Raises:
        SlzoError: On all processes, if a value of one process differs from that of the first process.
    """
    first, *others = gather_from_processes([dict(values)])
    for rank, other in enumerate(others, start=1):
        if changes := differences(first, other):
            raise SlzoError(f"the processes of this run differ, rank 0 -> rank {rank}: {changes}; {advice}")
