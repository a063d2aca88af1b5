"""A tuned model from a checkpoint, to be read and written, not run."""

from slzo.checkpoint import Checkpoint
from slzo.errors import SlzoError
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.zo.tuned_model import TunedModel


def restore(checkpoint: Checkpoint, trust_remote_code: bool = False) -> TunedModel:
    """The base model of a checkpoint with what was tuned in its live weights; it keeps its own attention.

    Raises:
        SlzoError: It runs code of its own that is not trusted, or the checkpoint does not fit it.
    """
    note = checkpoint.note
    if note["trust_remote_code"] and not trust_remote_code:
        raise SlzoError(
            f"ckpt_path {checkpoint.path!r}: model {note['model']!r} runs code of its own; if you trust it, give "
            "--model.trust_remote_code true"
        )
    model = load_model(note["model"], note["dtype"], note["trust_remote_code"])
    try:
        # padded and without oneDNN: nothing is run
        tuned_model = TunedModel.of_description(ModelParts(model, packed=False, onednn=False), note)
        tuned_model.tensors.load(checkpoint.content["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise SlzoError(f"ckpt_path {checkpoint.path!r}: does not fit model {note['model']!r} ({error})") from error
    return tuned_model
