"""Every logger gets the loss and the held-out scores as ordinary metrics; a missing package is one line."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import error_line, run_dir, run_fit, summary
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from slzo.__main__ import main
from slzo.callbacks.outlier_profiler import log_plot


def test_tensorboard_has_one_score_before_and_one_after(options, once):
    """And it shows the options next to the score after, with the layer and the seed that were used."""
    once(run_fit, *options)
    events, scores = EventAccumulator(str(run_dir()), {"scalars": 0}).Reload(), summary()
    found = [(event.step, pytest.approx(event.value)) for event in events.Scalars("test/accuracy")]
    assert found == [(0, scores["score_before"]), (8, scores["score_after"])]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {"dominant_layer", "noise_seed"} <= set(shown)
    assert shown["data.task"].string_value == "sst2"


def test_scores_and_losses_are_ordinary_metrics_at_their_steps(options):
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name="]
    assert main(["fit", *options, *logger, "--trainer.max_steps=4"]) == 0
    with (run_dir() / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = summary()
    found = [(int(row["step"]), float(row["test/accuracy"])) for row in rows if row["test/accuracy"]]
    assert found == [(0, pytest.approx(scores["score_before"])), (4, pytest.approx(scores["score_after"]))]
    losses = [row for row in rows if row["train/loss"]]
    assert len(losses) == 4
    for row in losses:
        assert float(row["train/loss"]) == pytest.approx(
            (float(row["train/loss_plus"]) + float(row["train/loss_minus"])) / 2, rel=1e-4
        )


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_missing_package_is_one_line(options, capsys, logger, package):
    try:
        __import__(package)
    except ImportError:
        line = error_line(capsys, "fit", *options, f"--trainer.logger={logger}")
        assert line.startswith("slzo: error: trainer.logger: ")
        assert package in line
    else:
        pytest.skip(f"{package} is installed")


OWN_LOGGER = """
import json
from lightning.pytorch.loggers import Logger

RUNS = []

class Own(Logger):
    def __init__(self):
        super().__init__()
        self._version, self.options = f"run{len(RUNS)}", {}
        RUNS.append(self)

    name = property(lambda self: "own")
    version = property(lambda self: self._version)
    save_dir = property(lambda self: "kept")

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        self.options.update(params)
"""


def test_a_logger_without_folders_has_one_for_each_run(options, tmp_path, monkeypatch):
    """As W&B's and MLflow's; and it is given the main options."""
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_logger.py").write_text(OWN_LOGGER)
    for _ in range(2):
        assert main(["fit", *options, "--trainer.max_steps=2", "--trainer.logger=own_logger.Own"]) == 0
    import own_logger

    for run in own_logger.RUNS:
        folder = Path("kept/own") / run.version
        files = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "summary.json", "outlier_profile.png", "checkpoints"} <= files
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}
        expected = {"data.task": "sst2", "data.batch_size": 8, "trainer.max_steps": 2, "lr": 1e-3}
        expected["scope"] = "the dominant layer"
        assert {name: run.options[name] for name in expected} == expected
        assert run.options["dominant_layer"] == json.loads((folder / "summary.json").read_text())["dominant_layer"]
    assert not (Path("kept") / "summary.json").exists()


@pytest.mark.parametrize(
    "place",
    ["--trainer.logger.save_dir=~/$OWN", pytest.param("--trainer.default_root_dir=~/$OWN", marks=pytest.mark.slow)],
)
def test_a_home_folder_and_variables_are_expanded(options, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OWN", "my runs")
    assert main(["fit", *options, "--trainer.max_steps=2", "--model.layer=1", place]) == 0
    (folder,) = (tmp_path / "home" / "my runs").rglob("version_0")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}
    assert main(["test", place, "--ckpt_path=best", "--data.num_test=4"]) == 0
    assert main(["export", f"--ckpt_path=~/$OWN{str(folder).partition('my runs')[2]}", "--output=$HOME/out"]) == 0
    assert (tmp_path / "home" / "out" / "README.md").is_file()
    assert not [path for path in Path().iterdir() if path.name[0] in "~$"]


def test_a_folder_that_holds_a_run_is_one_line(options, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("same_logger.py").write_text(OWN_LOGGER.replace("lambda self: self._version", "lambda self: 'same'"))
    args = ["fit", *options, "--trainer.max_steps=2", "--trainer.logger=same_logger.Own"]
    assert main(args) == 0
    before = sorted(Path("kept").rglob("*"))
    assert "trainer.logger: its folder 'kept/own/same' holds another run; give it another version" in error_line(
        capsys, *args
    )
    assert sorted(Path("kept").rglob("*")) == before


@pytest.mark.slow
def test_a_given_version_is_taken_once_and_its_config_takes_the_next(options, capsys):
    both = [
        f"{{class_path: {kind}, init_args: {{save_dir: runs, name: '', version: 7}}}}"
        for kind in ("RunLogger", "CSVLogger")
    ]
    Path("both.yaml").write_text(f"trainer: {{logger: [{', '.join(both)}]}}")
    args = ["fit", *options, "--config=both.yaml", "--trainer.max_steps=2"]
    assert main(args) == 0
    assert {"metrics.csv", "hparams.yaml"} <= {path.name for path in run_dir(7).iterdir()}
    assert "trainer.logger.version 7: 'runs/version_7' exists; give another version" in error_line(capsys, *args)
    assert main(["test", f"--ckpt_path={run_dir(7) / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert main(["fit", f"--config={run_dir(7) / 'config.yaml'}"]) == 0
    assert len(list(Path("runs").glob("*/summary.json"))) == 2


def test_plots_go_to_loggers_that_take_them(tmp_path):
    given = []

    class Wandb(WandbLogger):
        def __init__(self):
            pass

        def log_image(self, key, images):
            given.append((key, images))

    class MLFlow(MLFlowLogger):
        experiment = SimpleNamespace(log_artifact=lambda *args: given.append(args))
        run_id = "r1"

        def __init__(self):
            pass

    path = tmp_path / "profile.png"
    log_plot(SimpleNamespace(loggers=[Wandb(), MLFlow(), object()]), "profile", path)
    assert given == [("profile", [str(path)]), ("r1", str(path))]


def test_wandb_offline(options):
    pytest.importorskip("wandb", reason="wandb is not installed")
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=wb", "--trainer.logger.offline=true"]
    assert main(["fit", *options, *logger]) == 0
    assert len(list(Path("wb/wandb").glob("offline-run-*/files/media/images/outlier_profile*.png"))) == 1
    assert len(list(Path("wb").glob("lightning_logs/*/summary.json"))) == 1


def test_mlflow_in_a_local_file(options):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    logger = ["--trainer.logger=MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///found.db"]
    assert main(["fit", *options, *logger]) == 0
    client = mlflow.tracking.MlflowClient("sqlite:///found.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    id = run.info.run_id
    assert [metric.step for metric in client.get_metric_history(id, "test/accuracy")] == [0, 8]
    assert len(client.get_metric_history(id, "train/loss")) == 8
    assert run.data.params["data.batch_size"] == "8"
    assert [each.path for each in client.list_artifacts(id)] == ["outlier_profile.png"]
