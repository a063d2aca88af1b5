"""A plain Hugging Face folder with what was tuned merged."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig

from slzo.errors import SlzoError
from slzo.export.facts import Facts
from slzo.models.load import load_tokenizer, resolve_model
from slzo.zo.tuned_model import TunedModel

_GENERATION = "generation_config.json"


def write_merged(tuned_model: TunedModel, facts: Facts, folder: Path) -> None:
    """Write model, tokenizer with its chat template, and generation config; any program that reads such folders loads it.

    Raises:
        SlzoError: No weight can hold what was tuned.
    """
    try:
        tuned_model.merge()
    except SlzoError as error:
        raise SlzoError(f"format merged: {error}") from error
    model, note = tuned_model.parts.model, facts.note
    original = Path(resolve_model(note["model"])) / _GENERATION
    if original.is_file():  # copied as it is: transformers refuses to write some that it reads
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error
    if original.is_file():
        (folder / _GENERATION).write_bytes(original.read_bytes())
    load_tokenizer(note["model"], note["trust_remote_code"]).save_pretrained(folder)
