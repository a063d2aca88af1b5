"""Options of a sweep, and the names of its cells."""

import math
from dataclasses import dataclass, replace
from itertools import product

import torch

from slzo.utils.argument_checks import check_at_least
from slzo.utils.errors import SlzoError
from slzo.zo.scopes.base import check_layer

MIN_DIRECTIONS = 20


@dataclass(frozen=True)
class SweepPlan:
    """Options of a sweep of layers; see :func:`slzo.commands.sweep.sweep` for their meaning.

    Raises:
        SlzoError: An option is out of range.
    """

    layers: tuple[int, ...] | None
    steps: int
    seeds: tuple[int, ...]
    directions: int
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.directions != 0 and self.directions < MIN_DIRECTIONS:
            raise SlzoError(
                f"directions {self.directions}: too few for a reliable mean; give at least {MIN_DIRECTIONS} directions, or "
                "0 to measure no sensitivity"
            )
        check_at_least("steps", self.steps, 0)
        if self.steps == 0 and self.directions == 0:
            raise SlzoError("steps 0, directions 0: leave nothing to do; give one of them")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise SlzoError(
                f"seconds {self.seconds}: give a number above 0, or leave it out to end each training after its steps"
            )
        if not self.seeds:
            raise SlzoError("seeds []: give at least one seed")
        if self.layers is not None and not self.layers:
            raise SlzoError("layers []: give at least one layer, or leave it out for all")

    def of_model(self, num_layers: int) -> "SweepPlan":
        """Return the plan for a model, with its layers in rising order and each seed once.

        Raises:
            SlzoError: The model does not have a layer.
        """
        chosen = range(num_layers) if self.layers is None else sorted(set(self.layers))
        for layer in chosen:
            check_layer(layer, num_layers, "layers", left_out="all be trained")
        return replace(self, layers=tuple(chosen), seeds=tuple(dict.fromkeys(self.seeds)))

    @property
    def trainings(self) -> list[tuple[int, int]]:
        """Layer and seed of each training."""
        return list(product(self.layers or (), self.seeds)) if self.steps else []

    def training_cell(self, layer: int, seed: int) -> str:
        """Return the name of the cell that trains a layer with a seed, for the steps and seconds of this plan.

        What fits into a time depends on the number of threads, so cells for a time name it.
        """
        seconds = "" if self.seconds is None else f"-seconds-{self.seconds}-threads-{torch.get_num_threads()}"
        return f"train-{layer}-seed-{seed}-steps-{self.steps}{seconds}"

    def sensitivity_cell(self, layer: int) -> str:
        """Return the name of the cell that measures a layer's sensitivity, for the directions and the first seed of this plan."""
        return f"sensitivity-{layer}-seed-{self.seeds[0]}-directions-{self.directions}"
