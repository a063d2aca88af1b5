"""Callbacks for runs in other processes: one sends its own process a signal, one writes the weights of each process."""

import os
import signal

import torch
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


class WeightWriter(Callback):
    """Writes the tuned weights of each process after the last step."""

    def on_train_end(self, trainer, pl_module):
        weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        torch.save(weights, f"weights-{trainer.global_rank}.pt")
