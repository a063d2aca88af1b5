"""What slzo adds to a checkpoint of Lightning."""

from importlib.metadata import version
from typing import Any

from slzo.checkpoints.metadata import CHECKPOINT_FORMAT
from slzo.data.classes import common_candidates
from slzo.task_data import TaskData
from slzo.tasks.base import Kind
from slzo.tasks.registry import task_to_predict
from slzo.training.run import Prepared
from slzo.utils.environment import numerics
from slzo.utils.hub import model_commit


def loaded_from_hub(prepared: Prepared, data: TaskData) -> dict[str, str | None]:
    """Return the Hub commit of the model, and name, configuration and commit of the data set.

    Entries are ``None`` for what is not from the Hub.
    """
    assert data.splits is not None
    source = data.splits.hub
    return {
        "model_commit": model_commit(prepared.options.model, prepared.untuned.model.name_or_path),
        "data_set": None if source is None else source.path,
        "data_config": None if source is None else source.config,
        "data_split": None if source is None else source.test,
        "data_commit": None if source is None else source.revision,
    }


def make_metadata(prepared: Prepared, data: TaskData) -> dict[str, Any]:
    """Return the metadata of a checkpoint, about its tensors and their model; only tensors and primitives."""
    options = prepared.options
    model = prepared.model
    assert data.splits is not None
    candidates = common_candidates(data.splits.train)
    return {
        "format": CHECKPOINT_FORMAT,
        **model.description(),
        **prepared.stepper.state_dict(),
        "model": options.model,
        "layer_reason": prepared.chosen.reason,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "trust_remote_code": options.trust_remote_code,
        "noise_seed": prepared.stepper.seed,
        "onednn": model.parts.onednn,
        "task": task_to_predict(data.task),
        "chat": data.task.chat is not None,
        "system_prompt": None if data.task.chat is None else data.task.chat.system,
        "chat_template": data.chat_template,
        "candidates": None if candidates is None else list(candidates),
        "max_new_tokens": data.task.max_new_tokens,
        "stop": list(data.decoding.stop) if data.task.kind is Kind.GENERATION else [],
        "num_appended_tokens": data.encoder.num_back,
        "max_length": data.max_length,
        "prompt_length": data.prompt_length,
        "num_demonstrations": data.num_demonstrations,
        "data": prepared.fingerprint.to_dict(),
        "settings": dict(prepared.settings),
        "environment": numerics(model.parts.model.device, data.processes.world_size),
        "hub": loaded_from_hub(prepared, data),
    }


def first_checkpoint(prepared: Prepared, data: TaskData) -> dict[str, Any]:
    """Return the content of a checkpoint before the first step. The masters are left out if they follow from the base model."""
    tensors = prepared.model.tensors
    is_needed = prepared.tuned_before or prepared.model.adapter is not None
    return {
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": tensors.clone_masters() if is_needed else {},
        "slzo": make_metadata(prepared, data),
    }
