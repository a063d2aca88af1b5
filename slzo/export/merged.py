"""Export a plain Hugging Face model folder with the tuned weights merged."""

from pathlib import Path

from transformers import GenerationConfig

from slzo.checkpoints.metadata import base_model
from slzo.export.base import ExportFormat, trust_argument
from slzo.export.facts import Facts
from slzo.export.restore import tokenizer_of
from slzo.models.load import resolve_model
from slzo.models.save import leave_unquantized, save_model
from slzo.utils.errors import SlzoError
from slzo.zo.tuned_model import TunedModel

_GENERATION = "generation_config.json"
# of models with image input
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def write_merged(tuned_model: TunedModel, facts: Facts, folder: Path) -> None:
    """Write the model, the tokenizer with its chat template, and the generation config, so that transformers can load them.

    A run with ``model.quantization`` is merged into the unquantized model. A model that was quantized before the run stays
    quantized, except for the tuned layers.

    Raises:
        SlzoError: The tuned change cannot be merged into weights.
    """
    model, metadata, full_precision = tuned_model.parts.model, facts.metadata, tuned_model.full_precision
    if full_precision is not None:
        leave_unquantized(model, tuple(full_precision.quantized))
    try:
        tuned_model.merge()
    except SlzoError as error:
        raise SlzoError(f"format merged: {error}") from error
    base = base_model(metadata)
    original = Path(resolve_model(base)) / _GENERATION
    if original.is_file():  # copied below: transformers refuses to write some configs that it reads
        model.generation_config = GenerationConfig()
    tokenizer = tokenizer_of(metadata, metadata["trust_remote_code"])
    save_model(model, tokenizer, folder)
    for name in (_GENERATION, *_PROCESSORS):
        if (file := original.with_name(name)).is_file():
            (folder / name).write_bytes(file.read_bytes())


def load_code(facts: Facts) -> str:
    """Return the Python code that loads the folder."""
    trust = trust_argument(facts)
    return (
        f"from transformers import {facts.auto_class}, AutoTokenizer\n\n"
        f'model = {facts.auto_class}.from_pretrained("PATH_OR_REPOSITORY"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY"{trust})'
    )


MERGED = ExportFormat(write_merged, "a Hugging Face folder", load_code, base_words="merged into")
