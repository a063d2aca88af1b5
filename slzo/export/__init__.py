"""Export tuned models. Each format is one file, registered here; the model card and licences are written next to the weights."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.note import base_model
from slzo.export.adapter import ADAPTER
from slzo.export.base import ExportFormat
from slzo.export.card import write_card, write_licences
from slzo.export.delta import DELTA
from slzo.export.facts import Exported, ExportOptions, Facts, facts_of
from slzo.export.merged import MERGED
from slzo.export.push import check_repository, push
from slzo.export.restore import load_tuned
from slzo.models.origin import origin_of
from slzo.models.quantization import method_of
from slzo.utils.errors import SlzoError
from slzo.utils.files import check_writable, replacing, write_json
from slzo.zo.tuned_model import TunedModel

FORMATS: Mapping[str, ExportFormat] = MappingProxyType({"adapter": ADAPTER, "merged": MERGED, "delta": DELTA})
"""Export formats by name."""

FACTS_FILE = "slzo.json"


def export_checkpoint(checkpoint: Checkpoint, options: ExportOptions) -> Exported:
    """Export a checkpoint to a folder with a model card and the base model's licence, and optionally upload it to the Hub.

    Args:
        checkpoint: Checkpoint of a run.
        options: Options of the export.

    Returns:
        The folder, the base in words, and the address of an upload.

    Raises:
        SlzoError: The checkpoint cannot be used, the format does not fit it, or the folder is not empty.
    """
    if options.format is not None and options.format not in FORMATS:
        raise SlzoError(f"format {options.format!r}: choose one of {', '.join(FORMATS)}")
    target = Path(options.output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SlzoError(
            f"output {options.output!r}: exists and is not an empty folder; choose another one or remove it"
        )
    if target.resolve() == Path.cwd():
        raise SlzoError(f"output {options.output!r}: is the current folder; give the name of a new one")
    check_writable(target)
    check_repository(options.push_to_hub, options.private)
    origin = origin_of(base_model(checkpoint.note), options.base_model)
    tuned_model = load_tuned(checkpoint, options.trust_remote_code)
    adapter = tuned_model.peft_files() if options.format in (None, "adapter") else None
    name = options.format or ("merged" if adapter is None else "adapter")
    format, facts = FORMATS[name], facts_of(checkpoint, name, origin, tuned_model, adapter)
    with replacing(target) as partial:
        partial.mkdir()
        format.write(tuned_model, facts, partial)
        write_licences(origin, partial)
        write_json(partial / FACTS_FILE, facts.to_dict())
        write_card(facts, format, partial, target.resolve().name)
    address = None if options.push_to_hub is None else push(target, options.push_to_hub, options.private)
    return Exported(target, f"{format.base_words} {_base(tuned_model, facts)}", address)


def _base(tuned_model: TunedModel, facts: Facts) -> str:
    """Describe the model that the result was merged into, or is to be used with."""
    name, method, quantization = facts.note["model"], method_of(tuned_model.parts.model), facts.note.get("quantization")
    if method is not None:
        return f"{name}, still quantized ({method}) except for the tuned layers, which are in {facts.note['dtype']}"
    if quantization is not None:
        return f"the unquantized base {name}; its frozen layers were quantized ({quantization}) during tuning"
    return str(name)


__all__ = ["FACTS_FILE", "FORMATS", "ExportOptions", "Exported", "Facts", "export_checkpoint"]
