"""Read a task's rows from their source and draw its splits."""

from dataclasses import replace

from slzo.data.sources import RowSource
from slzo.data.splits import Splits, check_shared_ids, draw_splits, least_rows, split_off_test


def draw_from(
    source: RowSource, *, num_train: int, num_dev: int, num_test: int | None, seed: int, needs_train: bool
) -> Splits:
    """Draw the splits, see :func:`slzo.data.splits.draw_splits`. The only file of a custom task is divided among them.

    Args:
        source: Source of the rows.
        num_train: Number of training examples.
        num_dev: Number of dev examples.
        num_test: Number of test examples; ``None`` for all.
        seed: Seed of the training and dev draw.
        needs_train: Whether training and dev examples are needed too.

    Raises:
        SlzoError: If a required split is missing or broken, or has too few rows.
    """
    files, origin = source.task.files, ""
    divided = "train" in files and "test" not in files
    read = {}
    if not divided:
        read["test"] = source.read("test")
    if needs_train or divided:
        read["train"] = source.read("train")
    if needs_train and "dev" in files:
        read["dev"] = source.read("dev")
    notes = [rows.note for rows in read.values() if rows.note]
    test, train, dev = (read[split].examples if split in read else None for split in ("test", "train", "dev"))
    if files:
        check_shared_ids(source.task.id_field, test or (), train or (), dev or ())
    if divided and train is not None:
        origin = f"drawn from the {len(train)} of {files['train']} (seed {seed}; the same held-out rows for every seed)"
        least = least_rows(num_train, 0 if dev else num_dev) if needs_train else 0
        train, test, repeats = split_off_test(train, num_test, least)
        notes += repeats
    drawn = draw_splits(
        train if needs_train else None,
        test or [],
        num_train=num_train,
        num_dev=num_dev,
        num_test=None if divided else num_test,
        seed=seed,
        dev_pool=dev,
    )
    hub = next((rows.hub for rows in read.values() if rows.hub is not None), None)
    return replace(drawn, notes=(*notes, *drawn.notes), origin=origin, hub=hub)
