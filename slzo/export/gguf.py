"""One GGUF file with what was tuned merged, for llama.cpp and programs built on it."""

from pathlib import Path

from slzo.errors import SlzoError
from slzo.export.facts import Facts
from slzo.models.load import load_tokenizer
from slzo.zo.tuned_model import TunedModel

GGUF_FILE = "model.gguf"


def write_gguf(tuned_model: TunedModel, facts: Facts, folder: Path) -> None:
    """Write ``model.gguf``, see :mod:`slzo.models.gguf_writer`.

    Raises:
        SlzoError: The model or its tokenizer is of a kind that is not written, or no weight can hold what was tuned.
    """
    from slzo.models.gguf_writer import why_not, write_file  # its imports take a second

    model, note = tuned_model.parts.model, facts.note
    tokenizer = load_tokenizer(note["model"], note["trust_remote_code"], note.get("chat_template"))
    if reason := why_not(model, tokenizer):
        raise SlzoError(
            f"format gguf: {reason}; use --format merged, and run llama.cpp's convert_hf_to_gguf.py on the folder it writes"
        )
    try:
        tuned_model.merge()
    except SlzoError as error:
        raise SlzoError(f"format gguf: {error}") from error
    write_file(model, tokenizer, folder / GGUF_FILE, facts.origin.name)
