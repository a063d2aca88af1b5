"""Every logger gets the loss and the held-out scores as ordinary metrics; a missing package is one line."""

import csv
import json

import pytest
from conftest import run_dir

from slzo.__main__ import main


def test_scores_and_losses_are_ordinary_metrics_at_their_steps(options):
    assert (
        main(
            ["fit", *options, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name="]
        )
        == 0
    )
    with (run_dir() / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((run_dir() / "summary.json").read_text())
    found = [(int(row["step"]), float(row["test/accuracy"])) for row in rows if row["test/accuracy"]]
    assert found == [(0, pytest.approx(summary["score_before"])), (8, pytest.approx(summary["score_after"]))]
    losses = [row for row in rows if row["train/loss"]]
    assert len(losses) == 8
    for row in losses:
        assert float(row["train/loss"]) == pytest.approx(
            (float(row["train/loss_plus"]) + float(row["train/loss_minus"])) / 2, rel=1e-4
        )


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_missing_package_is_one_line(options, capsys, logger, package):
    try:
        __import__(package)
    except ImportError:
        assert main(["fit", *options, f"--trainer.logger={logger}"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"slzo: error: trainer.logger: {logger}: ")
        assert package in line
    else:
        pytest.skip(f"{package} is installed")
