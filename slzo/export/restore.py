"""Restore a tuned model from a checkpoint for use with transformers, without slzo's own engine."""

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.note import base_model
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError
from slzo.zo.tuned_model import TunedModel


def load_tuned(checkpoint: Checkpoint, trust_remote_code: bool = False) -> TunedModel:
    """Load the base model of a checkpoint and write the tuned values into its live weights; its attention is not replaced.

    Raises:
        SlzoError: The model needs code that is not trusted, or the checkpoint does not fit it.
    """
    tuned_model = untuned(checkpoint, trust_remote_code)
    tuned_model.tensors.load(checkpoint.content["state_dict"])
    return tuned_model


def untuned(checkpoint: Checkpoint, trust_remote_code: bool = False) -> TunedModel:
    """Load the base model like :func:`load_tuned`, but leave its live weights untuned."""
    note = checkpoint.note
    if note["trust_remote_code"] and not trust_remote_code:
        raise SlzoError(
            f"ckpt_path {checkpoint.path!r}: model {note['model']!r} runs its own code; if you trust it, give "
            "--trust_remote_code true"
        )
    model = load_model(base_model(note), note["dtype"], trust_remote_code)
    # padded and without oneDNN, so that the model stays as transformers made it
    return TunedModel.from_description(ModelParts(model, packed=False, onednn=False), note)
