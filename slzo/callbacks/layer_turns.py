"""Where layers are tuned one after the other: turns to the next one when the dev loss has stopped falling."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.callbacks.exact_resume import is_of_interval
from slzo.callbacks.loss_guard import LossGuard
from slzo.console import say
from slzo.module import ZOModule
from slzo.zo.tuned_model import TunedModel


class LayerTurns(Callback):
    """Turns a run whose scope has ``turns``, as :class:`slzo.zo.scopes.LayersInTurn`, to the next layer.

    It goes on from the weights that had the lowest dev loss, where :class:`LossGuard`, which runs before it, holds them. In the
    last layer training goes on to its end.
    """

    def __init__(self) -> None:
        self._lowest = math.inf
        self._waited = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which layer is the first."""
        if not isinstance(pl_module, ZOModule) or pl_module.tuned_model is None or pl_module.tuned_model.turn is None:
            return
        if not pl_module.resumed:
            self._lowest, self._waited = math.inf, 0
        order = ", ".join(map(str, pl_module.scope.turns(pl_module.parts)))
        say(f"Layers     {order} in turn, now {pl_module.tuned_model.turn}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count validations without a gain."""
        if not is_of_interval(trainer) or not isinstance(pl_module, ZOModule):
            return
        tuned_model = pl_module.tuned_model
        if tuned_model is None or tuned_model.turn is None:
            return
        loss = pl_module.datamodule.judge.distance(trainer.callback_metrics, "val/")
        if loss < self._lowest:
            self._lowest, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited >= pl_module.scope.patience:
            turns = pl_module.scope.turns(pl_module.parts)
            later = turns[turns.index(tuned_model.turn) + 1 :]
            if later:
                self._turn(trainer, pl_module, tuned_model, later[0])

    def _turn(self, trainer: Trainer, module: ZOModule, tuned_model: TunedModel, layer: int) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        good = next((callback.good for callback in callbacks if isinstance(callback, LossGuard)), None)
        if good is not None:
            tuned_model.tensors.load(good)
        self._waited = 0
        module.turn_to(layer)
        say(f"\nStep {trainer.global_step}: the {module.datamodule.judge.words} falls no more, on to layer {layer}.")

    def state_dict(self) -> dict[str, Any]:
        """The lowest dev loss and how long ago it was."""
        return {"lowest": self._lowest, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._lowest, self._waited = state_dict["lowest"], state_dict["waited"]
