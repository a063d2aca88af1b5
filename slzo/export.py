"""Write the tuned model as a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from slzo.checkpoint import Checkpoint
from slzo.errors import SlzoError
from slzo.files import check_writable, replacing
from slzo.models.load import load_model, load_tokenizer
from slzo.models.parts import ModelParts
from slzo.models.quantization import method_of
from slzo.models.save import leave_unquantized
from slzo.zo.tuned_model import TunedModel


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Loadable with ``AutoModelForCausalLM.from_pretrained``.
        base: What it was merged into, in words.
    """

    folder: Path
    base: str


def export_checkpoint(checkpoint: Checkpoint, output: str, trust_remote_code: bool = False) -> Exported:
    """Merge a checkpoint's tuned tensors into its base model and save model and tokenizer.

    Args:
        checkpoint: Of a run.
        output: Folder to write; must not exist or be empty.
        trust_remote_code: Run the model's own code, if its checkpoint needs that.

    A run with ``model.quantization`` is merged into the model as it was before: its frozen layers need not be rounded. A model
    that was quantized already stays so, but for the layers that were tuned.

    Returns:
        The folder (loadable for prefix tuning where peft is installed) and what it was merged into.

    Raises:
        SlzoError: The checkpoint cannot be used or the folder is not empty.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SlzoError(f"output {output!r}: exists and is not an empty folder; choose another one or remove it")
    check_writable(target)
    note = checkpoint.note
    if note["trust_remote_code"] and not trust_remote_code:
        raise SlzoError(
            f"ckpt_path {checkpoint.path!r}: model {note['model']!r} runs code of its own; if you trust it, give "
            "--model.trust_remote_code true"
        )
    model = load_model(note["model"], note["dtype"], note["trust_remote_code"])
    try:
        # padded and without oneDNN: nothing is run, and the model keeps its own attention
        tuned_model = TunedModel.of_description(ModelParts(model, packed=False, onednn=False), note)
        tuned_model.tensors.load(checkpoint.content["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise SlzoError(f"ckpt_path {checkpoint.path!r}: does not fit model {note['model']!r} ({error})") from error
    with replacing(target) as partial:
        partial.mkdir()
        try:
            if tuned_model.exchanged is not None:
                leave_unquantized(model, tuple(tuned_model.exchanged.quantized))
            tuned_model.save_merged(str(partial))
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from error
        tokenizer = load_tokenizer(note["model"], note["trust_remote_code"])
        tokenizer.chat_template = note.get("chat_template") or tokenizer.chat_template  # the one it was trained with
        tokenizer.save_pretrained(partial)
    method, quantization = method_of(model), note.get("quantization")
    base = f"{note['model']}"
    if method is not None:
        base = f"{note['model']}, quantized ({method}) as it is but for what was tuned, which is in {note['dtype']}"
    elif quantization is not None:
        base = f"the unquantized base {note['model']}; it was tuned beside frozen layers in {quantization}"
    return Exported(target, base)
