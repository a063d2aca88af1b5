"""The language model of a module: where it comes from, and what of it is tuned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.models.parts import ModelParts
from slzo.models.shard_group import ShardGroup
from slzo.training.build import load_parts, restore
from slzo.training.options import TrainingOptions
from slzo.zo.tuned_model import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Place(NamedTuple):
    """Where a model is loaded.

    Attributes:
        device: Device of this process.
        shard_group: Processes that share the frozen layers; ``None`` if this one has all.
        broadcast: Returns the value of the first process.
    """

    device: torch.device
    shard_group: ShardGroup | None
    broadcast: Callable[[Any], Any]


@dataclass
class HeldModel:
    """A language model that is loaded when it is first used.

    It is untuned, or has the tensors of a checkpoint that is scored, until a training tunes it. The tuned tensors stay for later
    trainings and scores. :meth:`release` removes them.

    Attributes:
        options: Options of the model, and of what is tuned.
        given: Model that the user has loaded, or that of an exported folder; ``None`` to load that of the options.
        given_is_tuned: Whether ``given`` is a tuned model.
        start: Checkpoint whose tensors are scored, until they are tuned further; ``None`` without one.
        untuned: The untuned model; ``None`` before it is loaded.
        tuned: The model with its tuned tensors; ``None`` before there are any.
    """

    options: TrainingOptions
    given: "PreTrainedModel | None" = None
    given_is_tuned: bool = False
    start: Checkpoint | None = None
    untuned: ModelParts | None = None
    tuned: TunedModel | None = None

    @property
    def is_tuned(self) -> bool:
        """Whether a tuned model is scored."""
        return self.tuned is not None or self.start is not None or self.given_is_tuned

    def parts(self, place: Place) -> ModelParts:
        """Return the parts of the model, with the modules that the scope added."""
        if self.tuned is None and self.start is not None:
            self.restore(self.start, place)
        return self.load(place) if self.tuned is None else self.tuned.parts

    def load(self, place: Place) -> ModelParts:
        """Return the untuned model, and load it if that has not been done."""
        if self.untuned is None:
            self.untuned = load_parts(self.options, place.device, place.shard_group, place.broadcast, self.given)
        return self.untuned

    def restore(self, start: Checkpoint, place: Place, for_training: bool = False) -> None:
        """Tune the tensors of a checkpoint, with its values."""
        self.tuned = restore(self.load(place), start, self.options, for_training)

    def restart(self, place: Place, resumes: bool) -> None:
        """Rebuild the tensors of ``start``, which were scored so far, with the options of a training.

        Nothing is restored if the training continues another checkpoint (``resumes``), which brings its own tensors.
        """
        start = self.start
        assert start is not None
        if self.tuned is not None:  # their values may have changed
            start = Checkpoint(start.path, {**start.content, "state_dict": self.tuned.tensors.clone_masters()})
            self.release()
        if not resumes:
            self.restore(start, place, for_training=True)
        self.start = None

    def release(self) -> None:
        """Remove the tuned tensors, and drop the model, whose weights they have changed."""
        if self.tuned is not None:
            self.tuned.release()
            self.tuned = None
            self.drop()

    def drop(self) -> None:
        """Drop the untuned model, so that it is loaded again when it is needed. A given model stays."""
        if self.given is None:
            self.untuned = None
