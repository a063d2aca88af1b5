"""Fine-tune one decoder layer of a language model without back-propagation through the layers above it.

The three classes of a run are imported when they are first used::

    from slzo import TaskDataModule, ZOModule, ZOTrainer

    data = TaskDataModule("movie_reviews", num_train=1000, num_dev=200, num_test=500)
    model = ZOModule("smollm2-135m", seed=0)
    trainer = ZOTrainer(max_steps=160, val_check_interval=20)
    trainer.fit(model, datamodule=data)

    tuned = ZOModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    (scores,) = trainer.test(tuned, datamodule=data)
    print(scores["test/accuracy"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slzo.version import __version__

if TYPE_CHECKING:
    from slzo.datamodule import TaskDataModule
    from slzo.lightning.trainer import ZOTrainer
    from slzo.module import ZOModule

__all__ = ["TaskDataModule", "ZOModule", "ZOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a class when it is first used, because it needs torch."""
    places = {"TaskDataModule": "slzo.datamodule", "ZOModule": "slzo.module", "ZOTrainer": "slzo.lightning.trainer"}
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(places[name]), name)
