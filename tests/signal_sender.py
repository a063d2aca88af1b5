"""A callback that sends its own process a signal at a step and a place."""

import os
import signal

from lightning.pytorch import Callback


class SignalSender(Callback):
    """Sends ``number`` once, when the hook ``place`` is called with ``step`` steps done, ``times`` times, on all ranks or one."""

    def __init__(self, place: str, step: int, number: str = "SIGINT", times: int = 1, rank: int | None = None) -> None:
        self.left = times

        def send(trainer, *args, **kwargs):
            if rank not in (None, trainer.global_rank):
                return
            if self.left and trainer.global_step == step and not trainer.sanity_checking and trainer.state.fn == "fit":
                while self.left:
                    self.left -= 1
                    os.kill(os.getpid(), getattr(signal, number))

        setattr(self, place, send)
