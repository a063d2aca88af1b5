"""Hands a tuned model on: formats, one file each, and what lies beside the weights; this list registers the formats."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.export.adapter import write_adapter
from slzo.export.card import write_card, write_licences
from slzo.export.delta import write_delta
from slzo.export.facts import Exported, ExportOptions, Facts, facts_of
from slzo.export.merged import write_merged
from slzo.export.push import check_repository, push
from slzo.export.restore import restore
from slzo.models.origin import origin_of
from slzo.models.quantization import method_of
from slzo.utils.errors import SlzoError
from slzo.utils.files import check_writable, replacing, write_json
from slzo.zo.tuned_model import TunedModel

FORMATS: Mapping[str, Callable[[TunedModel, Facts, Path], None]] = MappingProxyType(
    {"adapter": write_adapter, "merged": write_merged, "delta": write_delta}
)
"""Writes what was tuned into a folder that exists."""

FACTS_FILE = "slzo.json"

_RELATIONS: Mapping[str, str] = MappingProxyType({"adapter": "for", "merged": "merged into", "delta": "on"})


def export_checkpoint(checkpoint: Checkpoint, options: ExportOptions) -> Exported:
    """Write what a checkpoint holds to a folder, with a model card and the licence of its base, and put it on the Hub if asked.

    Args:
        checkpoint: Of a run.
        options: Where to and how.

    Returns:
        The folder, and what it was merged into.

    Raises:
        SlzoError: The checkpoint cannot be used, the format does not fit, or the folder is not empty.
    """
    target = Path(options.output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SlzoError(
            f"output {options.output!r}: exists and is not an empty folder; choose another one or remove it"
        )
    check_writable(target)
    if options.push_to_hub is not None:
        check_repository(options.push_to_hub)
    origin = origin_of(checkpoint.note["model"], options.base_model)
    tuned_model = restore(checkpoint, options.trust_remote_code)
    name = options.format or ("merged" if tuned_model.peft_files() is None else "adapter")
    facts = facts_of(checkpoint, name, origin, tuned_model)
    with replacing(target) as partial:
        partial.mkdir()
        FORMATS[name](tuned_model, facts, partial)
        write_licences(origin, partial)
        write_json(partial / FACTS_FILE, facts.to_dict())
        write_card(facts, partial, target.resolve().name)
    if options.push_to_hub is not None:
        push(target, options.push_to_hub)
    return Exported(target, f"{_RELATIONS[name]} {_base(tuned_model, facts)}")


def _base(tuned_model: TunedModel, facts: Facts) -> str:
    """What the result was merged into, or goes on."""
    name, method, given = facts.note["model"], method_of(tuned_model.parts.model), facts.note.get("quantization")
    if method is not None:
        return f"{name}, quantized ({method}) as it is but for what was tuned, which is in {facts.note['dtype']}"
    return str(name) if given is None else f"the unquantized base {name}; it was tuned beside frozen layers in {given}"


__all__ = ["FACTS_FILE", "FORMATS", "ExportOptions", "Exported", "Facts", "export_checkpoint"]
