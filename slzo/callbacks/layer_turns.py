"""Where layers are tuned one after the other: turns to the next one when the dev loss has stopped falling."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.callbacks.loss_guard import LossGuard
from slzo.console import say
from slzo.module import ZOModule
from slzo.zo.scopes import LayersInTurn


class LayerTurns(Callback):
    """Turns a run with the scope :class:`slzo.zo.scopes.LayersInTurn` to the next lower layer.

    It goes on from the weights that had the lowest dev loss, where :class:`LossGuard`, which runs before it, holds them. In the
    last layer training goes on to its end.
    """

    def __init__(self) -> None:
        self._lowest = math.inf
        self._waited = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which layer is the first."""
        if isinstance(pl_module, ZOModule) and isinstance(pl_module.scope, LayersInTurn):
            assert pl_module.tuned_model is not None
            if not pl_module.resumed:
                self._lowest, self._waited = math.inf, 0
            order = ", ".join(map(str, pl_module.scope.turns(pl_module.parts)))
            say(f"Layers     {order} in turn, now {pl_module.tuned_model.turn}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count validations without a gain."""
        if (
            trainer.state.fn != "fit"
            or trainer.sanity_checking
            or getattr(trainer.fit_loop, "at_end", False)  # a run that is continued must not differ from a longer one
            or not isinstance(pl_module, ZOModule)
            or not isinstance(pl_module.scope, LayersInTurn)
        ):
            return
        loss = pl_module.datamodule.judge.distance(trainer.callback_metrics, "val/")
        if loss < self._lowest:
            self._lowest, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited >= pl_module.scope.patience:
            self._turn(trainer, pl_module)

    def _turn(self, trainer: Trainer, module: ZOModule) -> None:
        tuned_model = module.tuned_model
        assert tuned_model is not None
        assert tuned_model.turn is not None
        lower = [layer for layer in module.scope.turns(module.parts) if layer < tuned_model.turn]
        if not lower:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        good = next((callback.good for callback in callbacks if isinstance(callback, LossGuard)), None)
        if good is not None:
            tuned_model.tensors.load(good)
        self._waited = 0
        module.turn_to(lower[0])
        say(f"\nStep {trainer.global_step}: the {module.datamodule.judge.words} falls no more, on to layer {lower[0]}.")

    def state_dict(self) -> dict[str, Any]:
        """The lowest dev loss and how long ago it was."""
        return {"lowest": self._lowest, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._lowest, self._waited = state_dict["lowest"], state_dict["waited"]
