"""Restore a tuned model from a checkpoint for use with transformers, without slzo's own engine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.metadata import base_model
from slzo.data.fingerprint import hash_tokenizer
from slzo.models.load import load_model, load_tokenizer
from slzo.models.parts import ModelParts
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import SlzoError
from slzo.zo.tuned_model import TunedModel


def load_tuned(checkpoint: Checkpoint, trust_remote_code: bool) -> TunedModel:
    """Load the base model of a checkpoint and write the tuned values into its live weights; its attention is not replaced.

    Raises:
        SlzoError: The model needs code that is not trusted, or the checkpoint does not fit it.
    """
    tuned_model = load_base(checkpoint, trust_remote_code)
    tuned_model.tensors.load(checkpoint.content["state_dict"])
    return tuned_model


def load_base(checkpoint: Checkpoint, trust_remote_code: bool) -> TunedModel:
    """Load the base model like :func:`load_tuned`, but leave its live weights untuned."""
    metadata = checkpoint.metadata
    if metadata["trust_remote_code"] and not trust_remote_code:
        raise SlzoError(
            f"ckpt_path {checkpoint.path!r}: model {metadata['model']!r} runs its own code; if you trust it, give "
            "--trust_remote_code true"
        )
    with base_of(checkpoint):
        model = load_model(base_model(metadata), metadata["dtype"], trust_remote_code)
        # padded and without oneDNN, so that the model stays as transformers made it
        return TunedModel.from_description(ModelParts(model, packed=False, onednn=False), metadata)


@contextmanager
def base_of(checkpoint: Checkpoint) -> Iterator[None]:
    """Name the checkpoint in errors about its base model, for commands without ``model.model``."""
    try:
        yield
    except SlzoError as error:
        raise SlzoError(
            f"ckpt_path {checkpoint.path!r}: needs its base model {checkpoint.metadata['model']!r} where the run found it, and "
            f"unchanged ({error})"
        ) from error


def tokenizer_of(metadata: Mapping[str, Any], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint's base model, with the chat template of the run; warn if the run had another one."""
    tokenizer = load_tokenizer(base_model(metadata), trust_remote_code, metadata.get("chat_template"))
    if hash_tokenizer(tokenizer) != metadata["data"]["tokenizer"]:
        rank_zero_warn(
            "the run used another tokenizer than that of its model (data.tokenizer); use that one with the tuned model"
        )
    return tokenizer
