"""Ends a run of several processes when one of them is gone."""

import os
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.callbacks.checkpoints import LastCheckpoint
from slzo.utils.peers import Peer, PeerWatch, end_process
from slzo.utils.runtime import gather_from_processes

_STATUS = 2
_LAUNCHER = "SLZO_LAUNCHER"
"""Environment variable with the process ID of the launcher."""

# seconds in which a failed exchange between processes is explained by one that has ended
_PATIENCE_S = 5.0


class RankWatch(Callback):
    """Ends this process with one line when another process of the run on the same machine has ended.

    The line names the rank and the checkpoint to continue from. The exit status is 2. Without it, a process would wait for the
    one that is gone, or end with a traceback of the library that connects them.
    """

    def __init__(self) -> None:
        self._watch: PeerWatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the other processes. A collective call."""
        if trainer.world_size > 1:
            self._begin(trainer, gather_from_processes([Peer.here(trainer.global_rank)]))

    def watch_launcher(self, trainer: Trainer) -> None:
        """Watch the process that started this one, until all are connected: a connection to it may wait for half an hour.

        The first process leaves its number for those that Lightning will start.
        """
        if trainer.world_size > 1 and "LOCAL_RANK" not in os.environ:
            os.environ[_LAUNCHER] = str(os.getpid())
        elif trainer.local_rank > 0 and _LAUNCHER in os.environ:
            place = Peer.here(trainer.global_rank).place
            launcher = Peer(trainer.global_rank - trainer.local_rank, place, int(os.environ[_LAUNCHER]))
            self._begin(trainer, [launcher], may_report=trainer.local_rank == 1)

    def _begin(self, trainer: Trainer, peers: Sequence[Peer], may_report: bool = True) -> None:
        def end(peer: Peer, reports: bool) -> None:
            end_process(_STATUS, f"\nslzo: error: {_message(trainer, peer)}\n" if reports and may_report else "")

        if self._watch is not None:
            self._watch.stop()
        self._watch = PeerWatch(peers, Peer.here(trainer.global_rank), end)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop. A collective call: no process ends before all have stopped."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
            trainer.strategy.barrier()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop, unless an exchange with another process has failed because that process is gone."""
        if self._watch is not None:
            self._watch.stop(_PATIENCE_S if isinstance(exception, RuntimeError) else 0.0)


def _message(trainer: Trainer, peer: Peer) -> str:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    saved = next((each.saved for each in callbacks if isinstance(each, LastCheckpoint)), None) or trainer.ckpt_path
    if trainer.state.fn != "fit" or saved is None:
        advice = "start the same command again"
    else:
        advice = f"continue with the same command and --ckpt_path {saved}"
    return (
        f"rank {peer.rank} (process {peer.pid}) has ended, so the others stop at step {trainer.global_step}; {advice}"
    )
