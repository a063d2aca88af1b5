"""A job of the SLURM scheduler: its number, whether it was restarted, and how it goes back into the queue."""

import os
import signal
import subprocess

_PATIENCE_S = 30.0

PREEMPTION = signal.SIGUSR1
"""The signal that ``sbatch --signal=USR1@SECONDS`` sends before the time of a job is over."""


def job_id() -> str | None:
    """Return the number of this process's job, with the task's number in an array; ``None`` without a job."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def is_restarted() -> bool:
    """Whether the job ran before and went back into the queue."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def requeue(job: str, continues: bool = True, by_script: bool = False) -> str:
    """Put the job of this process back into the queue, and say so; if that fails, say how to do it by hand.

    The job ``continues`` if there is a checkpoint, which in a Python script (``by_script``) is passed by the script itself.
    """
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.SubprocessError) as error:
        said: bytes | None = getattr(error, "stderr", None)
        reason = said.decode(errors="replace") if said else str(error)
        return f"SLURM job {job} could not be requeued ({' '.join(reason.split())}); run: scontrol requeue {job}"
    if not continues:
        return f"SLURM job {job} is in the queue again, and will start anew"
    continued = "continues this run if the script passes ckpt_path" if by_script else "will continue this run"
    return f"SLURM job {job} is in the queue again, and {continued}"
