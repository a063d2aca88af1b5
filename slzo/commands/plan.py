"""``slzo plan``."""

from slzo.cli.app import App
from slzo.lightning.strategy import ShardedStrategy
from slzo.training.memory_plan import format_first_order, format_plan, memory_inputs
from slzo.utils.console import rank_zero_print
from slzo.utils.runtime import free_bytes


def plan(app: App) -> None:
    """Estimate the memory that fit would take, from the model's config and the rows; the model is not loaded.

    It also estimates what first-order training of the same tensors would take.

    Args:
        app: Trainer, model and rows.
    """
    data, device = app.set_up_data(), app.device
    options, steps, free = app.model.options, app.trainer.max_steps, free_bytes(device)
    options.check_objective(data.objective)
    shards = app.trainer.world_size if isinstance(app.trainer.strategy, ShardedStrategy) else 1
    rank_zero_print(format_plan(memory_inputs(options, data, steps, device, shards), free))
    if shards == 1 and (compared := format_first_order(options, data, steps, device, free)):
        rank_zero_print(compared)
