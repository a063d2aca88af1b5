"""Ends a run of several processes when one of them is gone or does not answer."""

import atexit
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import DistError, TCPStore

from slzo.callbacks.checkpoints import LastCheckpoint
from slzo.lightning.trainer_state import callback_of
from slzo.private.lightning import keep_process_group_at_exit
from slzo.utils.console import rank_zero_warn
from slzo.utils.heartbeat import BEAT_S, MISSED_BEATS, Heartbeat, send_beat
from slzo.utils.peers import LAUNCHER, Peer, PeerWatch, end_process
from slzo.utils.process_group import gather_from_processes, leave_process_group

_STATUS = 2
_CONNECT_TIMEOUT = timedelta(seconds=20)

# a failed exchange between processes is blamed on one that ends within these seconds
_PATIENCE_S = 5.0


class RankWatch(Callback):
    """Ends this process with one line when another process of the run has ended or does not answer.

    A process that has ended is noticed at once on the same machine. One that hangs, on any machine, is noticed after 40
    seconds. The line names the rank and the checkpoint to continue from. The exit status is 2. Without it, a process would wait
    for the one that is gone, or end with a traceback of the library that connects them.

    Args:
        interval: Seconds between two signs of life of a process.
    """

    def __init__(self, interval: float = BEAT_S) -> None:
        self.interval = interval
        self._watch: PeerWatch | None = None
        self._heartbeat: Heartbeat | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the other processes. A collective call."""
        if trainer.world_size > 1:
            atexit.register(leave_process_group)
            peers = gather_from_processes([Peer.here(trainer.global_rank)])
            self._begin(trainer, peers)
            self._heartbeat = self._begin_heartbeat(trainer, peers)

    def watch_launcher(self, trainer: Trainer) -> None:
        """Watch the process that started this one, until all are connected: a connection to it may wait for half an hour.

        The first process leaves its number for those that Lightning will start.
        """
        if trainer.world_size > 1 and "LOCAL_RANK" not in os.environ:
            os.environ[LAUNCHER] = str(os.getpid())
        elif trainer.local_rank > 0 and LAUNCHER in os.environ:
            place = Peer.here(trainer.global_rank).place
            launcher = Peer(trainer.global_rank - trainer.local_rank, place, int(os.environ[LAUNCHER]))
            self._begin(trainer, [launcher], may_report=trainer.local_rank == 1)

    def _begin(self, trainer: Trainer, peers: Sequence[Peer], may_report: bool = True) -> None:
        def end(peer: Peer, reports: bool) -> None:
            _end(trainer, peer, "has ended", reports and may_report)

        if self._watch is not None:
            self._watch.stop()
        self._watch = PeerWatch(peers, Peer.here(trainer.global_rank), end)

    def _begin_heartbeat(self, trainer: Trainer, peers: Sequence[Peer]) -> Heartbeat | None:
        """Begin to send and to watch signs of life, if the first process can be reached. A collective call."""
        rank, number = trainer.global_rank, trainer.world_size
        environment = getattr(trainer.strategy, "cluster_environment", None)
        host = getattr(environment, "main_address", socket.gethostname())
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        port = trainer.strategy.broadcast(0 if store is None else store.port)
        if store is None:
            try:
                store = TCPStore(host, port, timeout=_CONNECT_TIMEOUT)
            except DistError:
                rank_zero_warn(
                    f"rank {rank} cannot reach port {port} of {host}; if this rank or its machine hangs, the others will "
                    "wait for it (open the ports between the machines)"
                )
        if store is not None:
            send_beat(store, rank)
        trainer.strategy.barrier()  # a process that hangs from now on has sent a beat
        if store is None:
            return None

        def end(other: int) -> None:
            peer, own = peers[other], peers[rank]
            if own.place and peer.place == own.place:
                with suppress(ProcessLookupError):
                    os.kill(peer.pid, signal.SIGKILL)  # it would keep its memory
            seconds = round(self.interval * MISSED_BEATS)
            _end(trainer, peer, f"has not answered for {seconds} seconds", rank == (1 if other == 0 else 0))

        return Heartbeat(store, rank, number, end, self.interval)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop. A collective call: no process ends before all have stopped."""
        if self._watch is not None:
            self._watch.stop()
            trainer.strategy.barrier()  # until then the others expect signs of life
            self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop, unless an exchange with another process has failed because that process is gone."""
        # they would wait for an exchange that may never end
        atexit.unregister(leave_process_group)
        keep_process_group_at_exit()
        self._stop(_PATIENCE_S if isinstance(exception, RuntimeError) else 0.0)

    def _stop(self, patience: float = 0.0) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._watch is not None:
            self._watch.stop(patience)
        self._watch = self._heartbeat = None


def _end(trainer: Trainer, peer: Peer, event: str, reports: bool) -> None:
    """End this process because another one is gone; print a line that says so if this process ``reports`` it."""
    if not reports:
        end_process(_STATUS, "")
    last = callback_of(trainer, LastCheckpoint)
    saved = (None if last is None else last.saved) or trainer.ckpt_path
    if trainer.state.fn != "fit" or saved is None:
        advice = "start the same command again"
    else:
        advice = f"continue with the same command and --ckpt_path {saved}"
    cause = f"rank {peer.rank} (process {peer.pid}) {event}, so the others stop at step {trainer.global_step}"
    end_process(_STATUS, f"\nslzo: error: {cause}; {advice}\n")
