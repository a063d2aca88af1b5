"""What slzo tells its user: plain lines on standard output, from the first process only."""

import sys

from lightning.pytorch.utilities.rank_zero import rank_zero_only


@rank_zero_only
def say(text: str = "") -> None:
    """Write one or more lines."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
