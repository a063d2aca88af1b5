"""Lightning's hooks around :class:`slzo.task_data.TaskData`."""

from contextlib import nullcontext, suppress
from functools import cached_property, partial
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor, distributed

from slzo.data.batch import EvalBatch, TrainBatch
from slzo.data.loader import BatchLoader
from slzo.models.shard_group import ShardGroup
from slzo.task_data import TaskData
from slzo.training.options import TrainingOptions
from slzo.utils.errors import SlzoError
from slzo.zo.processes import SINGLE_PROCESS, Parallel, Processes, num_directions


class TaskDataModule(TaskData, LightningDataModule):
    """The training, dev and held-out rows of one task; see :class:`slzo.task_data.TaskData` for the arguments.

    :mod:`slzo` has a complete example.
    """

    @cached_property
    def _groups(self) -> dict[int, tuple[Any, Any]]:
        """Process groups that have the same points, and the same rows, by number of directions."""
        return {}

    @property
    def processes(self) -> Processes:
        """The processes of the trainer, which divide rows and directions. The first use in a fit is a collective call."""
        if self.trainer is None:
            return SINGLE_PROCESS
        trainer = self.trainer
        options = getattr(trainer.lightning_module, "options", None)
        parallel: Parallel = options.parallel if isinstance(options, TrainingOptions) else "rows"
        world_size, rank = trainer.world_size, trainer.global_rank
        directions = num_directions(parallel, world_size)
        rows = points = None
        if directions not in (1, world_size):
            if directions not in self._groups:
                self._groups[directions] = _groups_of(world_size, rank, directions)
            rows, points = self._groups[directions]
        add_up = partial(trainer.strategy.reduce, reduce_op="sum")
        return Processes(
            world_size,
            rank,
            directions,
            sum_rows=partial(add_up, group=rows),
            sum_points=partial(add_up, group=points),
            broadcast=trainer.strategy.broadcast,
            gather_rows=partial(self._gather, group=rows),
        )

    def _gather(self, tensor: Tensor, group: Any) -> Tensor:
        """Return the tensors of all processes of a group, stacked; ``None`` for the group of all."""
        assert self.trainer is not None
        shards: ShardGroup | None = getattr(self.trainer.strategy, "shard_group", None)
        if shards is not None:  # a process that waits must keep answering gathers of layers
            shards.barrier()
        gathered = tensor.new_empty(distributed.get_world_size(group), *tensor.shape)
        distributed.all_gather(list(gathered), tensor.contiguous(), group)
        return gathered

    @property
    def on_accelerator(self) -> bool:
        """Whether the trainer's device is not a CPU."""
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def __str__(self) -> str:  # Lightning's lists the data sets of data loaders, which these do not have
        return f"{type(self).__name__} of task {self.task.name}"

    def prepare_data(self) -> None:
        """Download the tokenizer once per machine."""
        self._follow_module()
        # one process does this while the others wait; setup raises an error in all of them
        with suppress(SlzoError) if self.trainer is not None and self.trainer.world_size > 1 else nullcontext():
            _ = self.encoder

    def setup(self, stage: str) -> None:
        """Read and split the rows, see :meth:`slzo.task_data.TaskData.setup`."""
        self._follow_module()
        _ = self.encoder
        super().setup(stage)

    def _follow_module(self) -> None:
        """Take the tokenizer of the trainer's ZOModule, unless another one was given."""
        options = getattr(getattr(self.trainer, "lightning_module", None), "options", None)
        if isinstance(options, TrainingOptions):
            self.follow_model(options.model, options.trust_remote_code)

    def train_dataloader(self) -> BatchLoader[TrainBatch]:
        """Return training batches from the current step on."""
        steps_done = partial(getattr, self.trainer, "global_step", 0)  # not a lambda, which could not be pickled
        return BatchLoader(self.sampler(steps_done=steps_done), self.pack_training_rows)

    def val_dataloader(self) -> BatchLoader[EvalBatch]:
        """Return dev rows in an order that is fast to score."""
        return self._eval_loader("dev")

    def test_dataloader(self) -> BatchLoader[EvalBatch]:
        """Return held-out rows in an order that is fast to score; :attr:`slzo.data.batch.Row.position` has the split's order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader[EvalBatch]:
        """Return held-out rows as in :meth:`test_dataloader`; generation tasks always generate answers."""
        return self._eval_loader("predict")

    def _eval_loader(self, split: str) -> BatchLoader[EvalBatch]:
        plan = self.eval_plan(split)
        return BatchLoader(plan.batches, plan.pack)


def _groups_of(number: int, rank: int, directions: int) -> tuple[Any, Any]:
    """Return the processes with the same points as this one, and those with the same rows. A collective call.

    A device mesh would split the trainer's group, which gloo cannot do if the group is bound to a GPU.
    """
    same_points = [range(first, number, directions) for first in range(directions)]
    same_rows = [range(first, first + directions) for first in range(0, number, directions)]
    # every process makes all groups, in the same order
    made = [(ranks, distributed.new_group(list(ranks))) for ranks in (*same_points, *same_rows)]
    points, rows = (group for ranks, group in made if rank in ranks)
    return points, rows
