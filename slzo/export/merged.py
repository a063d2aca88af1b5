"""A plain Hugging Face folder with what was tuned merged."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig

from slzo.export.facts import Facts
from slzo.models.load import load_tokenizer, resolve_model
from slzo.models.save import leave_unquantized, save_model
from slzo.utils.errors import SlzoError
from slzo.zo.tuned_model import TunedModel

_GENERATION = "generation_config.json"


def write_merged(tuned_model: TunedModel, facts: Facts, folder: Path) -> None:
    """Write model, tokenizer with its chat template, and generation config; any program that reads such folders loads it.

    A run with ``model.quantization`` is merged into the model as it was before: its frozen layers need not be rounded. A model
    that was quantized already stays so, but for the layers that were tuned.

    Raises:
        SlzoError: No weight can hold what was tuned.
    """
    model, note, exchanged = tuned_model.parts.model, facts.note, tuned_model.exchanged
    if exchanged is not None:
        leave_unquantized(model, tuple(exchanged.quantized))
    try:
        tuned_model.merge()
    except SlzoError as error:
        raise SlzoError(f"format merged: {error}") from error
    original = Path(resolve_model(note["model"])) / _GENERATION
    if original.is_file():  # copied as it is: transformers refuses to write some that it reads
        model.generation_config = GenerationConfig()
    try:
        save_model(model, str(folder))
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error
    if original.is_file():
        (folder / _GENERATION).write_bytes(original.read_bytes())
    load_tokenizer(note["model"], note["trust_remote_code"], note.get("chat_template")).save_pretrained(folder)
