"""The callbacks of every training, in the order in which they run."""

from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from slzo.callbacks.answer_log import AnswerLog
from slzo.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from slzo.callbacks.loss_guard import LossGuard
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.progress_bar import StepProgressBar
from slzo.callbacks.rank_watch import RankWatch
from slzo.callbacks.run_record import RunRecord
from slzo.callbacks.step_watch import StepWatch
from slzo.callbacks.time_limit import TimeLimit

DEFAULTS: Mapping[str, type[Callback]] = {
    "profiler": OutlierProfiler,  # writes the profile before the others print
    "guard": LossGuard,  # its dev loss decides whether a state is saved
    "watch": StepWatch,
    "answers": AnswerLog,
    "record": RunRecord,  # reads the counts of the callbacks above
    "checkpoint": BestCheckpoint,  # Lightning runs checkpoints last
    "last_checkpoint": LastCheckpoint,  # saves the state of all others
}
"""Classes by the name of their option group. The user's own callbacks run before ``record``, or after ``checkpoint`` if they
save."""


def with_defaults(given: Sequence[Callback], *, checkpoints: bool = True, progress: bool = True) -> list[Callback]:
    """Return the given callbacks and the missing default ones, in the order in which they run.

    Without ``checkpoints`` none of them saves checkpoints, and without ``progress`` none shows progress.
    """
    kept = [each for each in given if checkpoints or not isinstance(each, Checkpoint)]
    kinds = [*DEFAULTS.values()]
    missing = [kind for kind in (*kinds, RankWatch) if not any(isinstance(each, kind) for each in kept)]
    kept += [kind() for kind in missing if checkpoints or not issubclass(kind, Checkpoint)]
    if progress and not any(isinstance(each, ProgressBar) for each in kept):
        kept.append(StepProgressBar())
    # the progress bar ends its line before the others print; a run is stopped before its last state is saved
    order: list[type] = [ProgressBar, *kinds, RankWatch]
    record = order.index(RunRecord)
    order.insert(record + 1, TimeLimit)

    def place(callback: Callback) -> float:
        # Lightning's own "best" is that of the first callback that saves
        other = order.index(BestCheckpoint) + 0.5 if isinstance(callback, Checkpoint) else record - 0.5
        return next((number for number, kind in enumerate(order) if isinstance(callback, kind)), other)

    return sorted(kept, key=place)
