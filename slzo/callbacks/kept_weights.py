"""The weights of a run's best checkpoint, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slzo.checkpoint import read_checkpoint
from slzo.module import ZOModule


@contextmanager
def kept_weights(module: ZOModule, best: str) -> Iterator[bool]:
    """Around work with the weights of a checkpoint; the module has its last ones again afterwards.

    Args:
        module: Whose weights they are.
        best: The checkpoint.

    Yields:
        Whether there is such a checkpoint; else the last weights are left as they are.
    """
    if not best or not Path(best).is_file():
        yield False
        return
    last = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        module.load_state_dict(read_checkpoint(best).content["state_dict"])
        yield True
    finally:
        module.load_state_dict(last)
