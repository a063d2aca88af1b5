"""The options and the environment of a resumed run, compared with those of its checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch

from slzo.task_data import TaskData
from slzo.training.options import TrainingOptions
from slzo.utils.console import rank_zero_warn
from slzo.utils.environment import numerics
from slzo.utils.settings import differences, flat_settings

CONTINUED = ("model.optimizer", "model.lr_scheduler")
"""Groups of options that a resumed run takes from its checkpoint."""

_RATE = "model.optimizer.lr"


def agreed_settings(options: TrainingOptions, data: TaskData) -> dict[str, Any]:
    """Return the options of model and rows that a checkpoint holds and in which all processes agree, by name, as primitives."""
    return {
        **options.step_settings(options.layer, options.noise_seed),
        "model.parallel": options.parallel,
        "model.max_nonfinite": options.max_nonfinite,
        "model.trust_remote_code": options.trust_remote_code,
        **flat_settings("model.engine", asdict(options.engine)),
        **data.step_settings(),
    }


def continued_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a resumed run: ``own`` ones, but optimizer, scheduler and seed of the checkpoint, which continue.

    A rate that becomes automatic, or ceases to be, is the new one.
    """
    takes_rate = _takes_new_rate(saved, own)

    def continues(name: str) -> bool:
        if name == _RATE and takes_rate:
            return False
        return name.startswith(CONTINUED) or name == "model.seed"

    kept = {name: value for name, value in own.items() if not continues(name)}
    return kept | {name: value for name, value in saved.items() if continues(name)}


def _takes_new_rate(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the rate of a resumed run is its own one: it becomes automatic, or ceases to be."""
    return own[_RATE] != saved[_RATE] and "auto" in (own[_RATE], saved[_RATE])


# options of optimizer and scheduler that say how the same step is computed, or that change during a training
_NOT_COMPARED = ("fused", "foreach", "last_epoch")


def changed_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return the options of a resumed run that differ from those of its checkpoint, as text; see :func:`agreed_settings`.

    A layer that either of them leaves out is no change: it is that of the checkpoint, and another one is refused.
    """

    def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
        last = {name: name.rpartition(".")[2] for name in settings}
        return {name: settings[name] for name in settings if last[name] not in _NOT_COMPARED and last[name][0] != "_"}

    old, new = compared(saved), compared(own)
    if None in (old["model.layer"], new["model.layer"]):
        del old["model.layer"], new["model.layer"]
    return differences(old, new)


def apply_changed_settings(checkpoint: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Warn of options that differ from a checkpoint's; a rate that ceases to be automatic replaces those of its optimizers.

    Args:
        checkpoint: Content of the checkpoint; rates are changed in place.
        own: Options of the run that continues it, see :func:`agreed_settings`.
    """
    saved = checkpoint["slzo"]["settings"]
    new_rate = _takes_new_rate(saved, own)
    if new_rate and own[_RATE] != "auto":
        for group in chain.from_iterable(each["param_groups"] for each in checkpoint["optimizer_states"]):
            group["lr"] = own[_RATE]
    if changes := changed_settings(saved, own):
        rate = f"; {_RATE} is the new one" if new_rate else ""
        rank_zero_warn(
            f"these options differ from the checkpoint's: {changes}; the new values are used, except those of model.seed, "
            f"model.optimizer and model.lr_scheduler, which continue from the checkpoint{rate}"
        )


def check_environment(metadata: Mapping[str, Any], device: torch.device, processes: int) -> None:
    """Warn of versions and hardware that differ from those of a checkpoint."""
    old, new = metadata["environment"], numerics(device, processes)
    if changes := differences(old, new):
        is_same = old["device"] == new["device"]
        effect = "results are equal up to rounding" if is_same else "random directions differ between devices"
        rank_zero_warn(f"the environment differs from the checkpoint's: {changes}; {effect}")
