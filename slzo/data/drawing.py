"""Read a task's rows from their source and draw its splits."""

from dataclasses import dataclass, replace

from slzo.data.files import format_left_out
from slzo.data.sources import load_examples
from slzo.data.splits import Splits, check_shared_ids, draw_splits, least_rows, part_test
from slzo.tasks.base import Example, HubSource, Split, Task
from slzo.utils.errors import RowError


@dataclass(frozen=True)
class RowSource:
    """Source of a task's rows; for the arguments see :func:`slzo.data.sources.load_examples`.

    Attributes:
        task: The task.
        data_dir: Folder with local files.
        hub_path: Hub repository that replaces the task's own, with ``@REVISION`` if it is not the newest commit.
        hub_config: Configuration of the Hub repository.
        columns: Keep the fields of each row.
        skip_bad_rows: Leave out rows that cannot be used.
    """

    task: Task
    data_dir: str | None
    hub_path: str | None
    hub_config: str | None
    columns: bool
    skip_bad_rows: bool

    def read(self, split: Split, notes: list[str], loaded: list[HubSource], file: str | None = None) -> list[Example]:
        """Read all usable rows of a split, or of a ``file`` with rows to predict, which need no labels.

        If rows are left out, a sentence about them is added to ``notes``. A data set of the Hub is added to ``loaded``.

        Raises:
            SlzoError: If the source or one of its rows cannot be used.
        """
        left_out: list[RowError] | None = [] if self.skip_bad_rows else None
        rows = load_examples(
            self.task,
            split,
            data_dir=self.data_dir,
            hub_path=self.hub_path,
            hub_config=self.hub_config,
            columns=self.columns,
            left_out=left_out,
            file=file,
            loaded=loaded,
        )
        if left_out:
            source = file or self.task.files.get(split, f"the {split} split")
            notes.append(format_left_out(left_out, len(rows), source))
        return rows

    def draw(self, *, num_train: int, num_dev: int, num_test: int | None, seed: int, needs_train: bool) -> Splits:
        """Draw the splits, see :func:`slzo.data.splits.draw_splits`. The only file of a custom task is divided among them.

        Args:
            num_train: Number of training examples.
            num_dev: Number of dev examples.
            num_test: Number of test examples; ``None`` for all.
            seed: Seed of the training and dev draw.
            needs_train: Whether training and dev examples are needed too.

        Raises:
            SlzoError: If a required split is missing or broken, or has too few rows.
        """
        files, origin = self.task.files, ""
        notes: list[str] = []
        loaded: list[HubSource] = []
        divided = "train" in files and "test" not in files
        test = [] if divided else self.read("test", notes, loaded)
        train = self.read("train", notes, loaded) if needs_train or divided else None
        dev = self.read("dev", notes, loaded) if needs_train and "dev" in files else None
        if self.task.id_field is not None:
            check_shared_ids(self.task.id_field, test, train or (), dev or ())
        if divided and train is not None:
            origin = (
                f"drawn from the {len(train)} of {files['train']} (seed {seed}; the same held-out rows for every seed)"
            )
            least = least_rows(num_train, 0 if dev else num_dev) if needs_train else 0
            train, test, repeats = part_test(train, num_test, least)
            notes += repeats
        drawn = draw_splits(
            train if needs_train else None,
            test,
            num_train=num_train,
            num_dev=num_dev,
            num_test=None if divided else num_test,
            seed=seed,
            dev_pool=dev,
        )
        return replace(drawn, notes=(*notes, *drawn.notes), origin=origin, hub=next(iter(loaded), None))
