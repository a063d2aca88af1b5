"""The first process of a run on a machine, which starts the others there."""

import os
import time

LAUNCHER = "SLZO_LAUNCHER"
"""Environment variable with the process ID of the launcher."""

_TICK_S = 0.05


def launcher_ends(seconds: float) -> bool:
    """Whether another process of the run started this one and ends within ``seconds``.

    If it does so after an error of this process, it had an error of its own, and has printed it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or LAUNCHER not in os.environ:
        return False
    launcher, end = int(os.environ[LAUNCHER]), time.monotonic() + seconds
    while os.getppid() == launcher:
        if time.monotonic() > end:
            return False
        time.sleep(_TICK_S)
    return True
