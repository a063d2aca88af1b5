"""``slzo export``."""

from slzo.checkpoints.checkpoint import find_checkpoint
from slzo.cli.app import App
from slzo.export import FORMATS, ExportOptions, export_checkpoint
from slzo.utils.console import say
from slzo.utils.docs import with_lists
from slzo.utils.errors import SlzoError
from slzo.utils.files import disk_errors


@with_lists(FORMATS=[f"{name} ({each.summary})" for name, each in FORMATS.items()])
def export(
    app: App,
    output: str,
    ckpt_path: str | None = None,
    format: str | None = None,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Export the tuned model to a folder that others can use, with a model card.

    Args:
        app: Only the model's trust_remote_code is used; the checkpoint names its base model.
        output: Folder to write.
        ckpt_path: Checkpoint to export, folder of a run (its best one), or ``last`` or ``best`` of the newest run.
        format: {FORMATS}; by default adapter if the tuned change has a low rank, otherwise merged.
        base_model: Hub id of the base model for the adapter and the card, if slzo does not know it.
        push_to_hub: Also upload the folder to this repository of the Hugging Face Hub, such as me/my-model.
        private: Make the repository of push_to_hub a private one.
    """
    if ckpt_path is None:
        raise SlzoError("ckpt_path: export needs a checkpoint; give --ckpt_path FILE, or --ckpt_path best")
    checkpoint = find_checkpoint(ckpt_path, app.trainer.runs_folder)
    options = ExportOptions(output, format, base_model, push_to_hub, private, app.model.options.trust_remote_code)
    with disk_errors():
        done = export_checkpoint(checkpoint, options)
    say(f"Wrote {done.folder}, {done.base}")
    if done.address is not None:
        say(f"Uploaded to {done.address}")
