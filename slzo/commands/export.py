"""``slzo export``."""

from slzo.checkpoints.find import RUNS, find_checkpoint
from slzo.export.write import FORMATS, export_checkpoint
from slzo.utils.docs import with_lists


@with_lists(FORMATS=[f"{name} ({each.summary})" for name, each in FORMATS.items()])
def export(
    output: str,
    ckpt_path: str,
    format: str | None = None,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Export the tuned model to a folder that others can use, with a model card.

    Args:
        output: Folder to write.
        ckpt_path: Checkpoint to export: a file, the folder of a run (its best one), or ``last`` or ``best`` of the newest run in
            runs.
        format: {FORMATS}; by default adapter if the tuned change has a low rank, otherwise merged.
        base_model: Hub id of the base model for the adapter and the card, if slzo does not know it.
        push_to_hub: Also upload the folder to this repository of the Hugging Face Hub, such as me/my-model.
        private: Make the repository of push_to_hub a private one.
        trust_remote_code: Run model code that comes with a Hub repository.
    """
    checkpoint = find_checkpoint(ckpt_path, RUNS)
    export_checkpoint(
        checkpoint,
        output,
        format,
        base_model=base_model,
        push_to_hub=push_to_hub,
        private=private,
        trust_remote_code=trust_remote_code,
    )
