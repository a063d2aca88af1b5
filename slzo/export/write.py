"""Export a tuned model: its weights in one of the registered formats, with a model card and the licences."""

from collections.abc import Mapping
from pathlib import Path

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.metadata import base_model as base_name
from slzo.export.adapter import ADAPTER
from slzo.export.base import ExportFormat, write_chat_template
from slzo.export.card import write_card, write_licences
from slzo.export.delta import DELTA
from slzo.export.facts import FACTS_FILE, Facts, facts_of
from slzo.export.merged import MERGED
from slzo.export.push import check_repository, push
from slzo.export.restore import base_of, load_tuned
from slzo.models.origin import origin_of
from slzo.models.quantization import method_of
from slzo.utils.console import rank_zero_print
from slzo.utils.errors import SlzoError
from slzo.utils.files import check_writable, expanded, replacing, write_json
from slzo.zo.tuned_model import TunedModel

FORMATS: Mapping[str, ExportFormat] = {"adapter": ADAPTER, "merged": MERGED, "delta": DELTA}
"""Export formats by name."""


def export_checkpoint(
    checkpoint: Checkpoint,
    output: str,
    format: str | None = None,
    *,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Export a checkpoint to a folder with a model card and the base model's licence, and optionally upload it to the Hub.

    Prints the folder, its base model, and the address of an upload.

    Args:
        checkpoint: Checkpoint of a run.
        output: Folder to write.
        format: Format to write; ``None`` for an adapter if the tuned change has a low rank, otherwise merged.
        base_model: Hub id of the base model; ``None`` for the one that the checkpoint names.
        push_to_hub: Hub repository to upload to; ``None`` for no upload.
        private: Whether the repository must be private.
        trust_remote_code: Whether to run code from the model's repository.

    Returns:
        The folder.

    Raises:
        SlzoError: The checkpoint cannot be used, the format does not fit it, or the folder is not empty.
    """
    if format is not None and format not in FORMATS:
        raise SlzoError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    target = expanded(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SlzoError(f"output {output!r}: exists and is not an empty folder; choose another one or remove it")
    if target.resolve() == Path.cwd():
        raise SlzoError(f"output {output!r}: is the current folder; give the name of a new one")
    check_writable(target)
    check_repository(push_to_hub, private)
    with base_of(checkpoint):
        origin = origin_of(base_name(checkpoint.metadata), base_model)
    tuned_model = load_tuned(checkpoint, trust_remote_code)
    adapter = tuned_model.peft_files() if format in (None, "adapter") else None
    name = format or ("merged" if adapter is None else "adapter")
    writer, facts = FORMATS[name], facts_of(checkpoint, name, origin, tuned_model, adapter)
    with replacing(target) as partial:
        partial.mkdir()
        writer.write(tuned_model, facts, partial)
        write_chat_template(facts, partial)
        write_licences(origin, partial)
        write_json(partial / FACTS_FILE, facts.to_dict())
        write_card(facts, writer, partial, target.resolve().name)
    rank_zero_print(f"Wrote {target}, {writer.base_words} {_base(tuned_model, facts)}")
    if push_to_hub is not None:
        rank_zero_print(f"Uploaded to {push(target, push_to_hub, private)}")
    return target


def _base(tuned_model: TunedModel, facts: Facts) -> str:
    """Describe the model that the result was merged into, or is to be used with."""
    name, method, quantization = (
        facts.metadata["model"],
        method_of(tuned_model.parts.model),
        facts.metadata.get("quantization"),
    )
    if method is not None:
        return f"{name}, still quantized ({method}) except for the tuned layers, which are in {facts.metadata['dtype']}"
    if quantization is not None:
        return f"the unquantized base {name}; its frozen layers were quantized ({quantization}) during tuning"
    return str(name)
