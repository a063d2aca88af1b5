"""``slzo plan``."""

from slzo.cli.app import App
from slzo.memory_plan import format_plan, memory_inputs
from slzo.utils.console import say
from slzo.utils.runtime import free_bytes


def plan(app: App) -> None:
    """Estimate the memory that fit would take, from the model's config and the rows; the model is not loaded.

    Args:
        app: Trainer, model and rows.
    """
    rows, device = app.set_up_rows(), app.device
    say(
        format_plan(
            memory_inputs(app.model.options.for_rows(rows), rows, app.trainer.max_steps, device), free_bytes(device)
        )
    )
