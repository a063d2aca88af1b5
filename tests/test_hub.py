"""Models and rows of a stand-in for the Hub: revisions, commits that are recorded, and errors in one line."""

import json
import os
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from helpers import error_line, last_checkpoint, run_dir, slzo_error
from hub_stand_in import TOKEN
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.checkpoints.metadata import base_model
from slzo.cli.process import prepare_process
from slzo.data.sources import RowSource
from slzo.export.adapter import ADAPTER
from slzo.export.facts import Facts
from slzo.models.device_map import DeviceMapOptions
from slzo.models.device_placement import load_with_device_map
from slzo.models.load import load_config, load_model, load_tokenizer, resolve_model
from slzo.models.origin import origin_of
from slzo.models.peft_files import PeftFiles
from slzo.models.shape import model_shape
from slzo.prompting.pair import load_pair
from slzo.tasks.base import HubSource
from slzo.tasks.registry import get_task
from slzo.tasks.sst2 import Sst2
from slzo.utils.hub import hub_bars, model_folder

QUIET = [
    "--trainer.enable_progress_bar=false",
    "--record.test_before=false",
    "--trainer.max_steps=1",
    "--model.layer=1",
]


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def load_rows(name):
    return RowSource(get_task("sst2"), hub_path=name).read("test")


@pytest.fixture
def model(hub, model_dir, tmp_path):
    """The commits of a model of the Hub, the older one first; the newer one has other weights."""
    first, folder = hub.commit_folder("me/tiny", model_dir, LICENSE="text"), tmp_path / "newer"
    shutil.copytree(model_dir, folder)
    doubled = {name: 2 * tensor for name, tensor in weights_of(folder).items()}
    save_file(doubled, folder / "model.safetensors", {"format": "pt"})
    return first, hub.commit_folder("me/tiny", folder)


@pytest.fixture
def rows(hub, data_dir):
    """The commits of a data set of the Hub, the older one first."""
    files = {path.name: path.read_bytes() for path in (data_dir / "sst2").iterdir()}
    newer = {name: content.replace(b"film", b"movie") for name, content in files.items()}
    return hub.commit("datasets/me/rows", files), hub.commit("datasets/me/rows", newer)


def test_every_way_to_load_takes_the_revision(model, model_dir):
    head = weights_of(model_dir)["lm_head.weight"]
    for commit, expected in zip(model, (head, 2 * head), strict=True):
        name = f"me/tiny@{commit}"
        folder = resolve_model(name)
        assert Path(folder).name == commit
        assert not (Path(folder) / "model.safetensors").exists()
        assert model_shape(name)[0].stored_bytes is None  # only the weights are missing
        on_disk = DeviceMapOptions({"model.layers.0": "disk"}, None)
        placed, _ = load_with_device_map(name, "float32", False, on_disk, torch.device("cpu"))
        assert torch.equal(placed.lm_head.weight, expected)
        assert torch.equal(load_model(name).lm_head.weight, expected)
        assert model_shape(name)[0].stored_bytes == (Path(folder) / "model.safetensors").stat().st_size
        found = [load_config(name), load_model(name, quantization="int8"), load_tokenizer(name)]
        assert {each.name_or_path for each in found} == {folder}
    assert resolve_model("me/tiny") == folder
    assert [document.name for document in origin_of(f"me/tiny@{model[0]}").documents] == ["LICENSE"]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_every_form(hub, model_dir, tmp_path, monkeypatch, kind, sharded):
    weights, folder = weights_of(model_dir), tmp_path / "base"
    shutil.copytree(model_dir, folder, ignore=lambda *_: ["model.safetensors"])
    shards = {"a": dict(list(weights.items())[:5]), "b": dict(list(weights.items())[5:])} if sharded else {"": weights}
    for name, part in shards.items():
        path = folder / f"{name}{kind}"
        torch.save(part, path) if kind.endswith("bin") else save_file(part, path, {"format": "pt"})
    if sharded:
        index = {tensor: f"{name}{kind}" for name, part in shards.items() for tensor in part}
        (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    hub.commit_folder("me/tiny", folder, **{"other.safetensors": "not needed"})
    assert torch.equal(load_model("me/tiny").lm_head.weight, weights["lm_head.weight"])
    assert not any("other.safetensors" in path for method, path in hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model_folder.cache_clear()
    hub.requests.clear()
    assert torch.equal(load_model("me/tiny").lm_head.weight, weights["lm_head.weight"])
    assert hub.requests == []


def test_a_folder_with_an_at_sign_is_a_folder(hub, model_dir, own_folder):
    shutil.copytree(model_dir, "me/tiny@v1")
    assert resolve_model("me/tiny@v1") == "me/tiny@v1"
    assert origin_of("me/tiny@v1").commit is None
    assert hub.requests == []


def test_what_was_loaded_is_recorded_and_kept(model, rows, hub, options, capsys):
    older, newer = model
    given = [
        *options,
        *QUIET,
        f"--data.hub_path=me/rows@{rows[0]}",
        "--data.data_dir=null",
        "--data.num_train=1000",
        "--data.num_dev=1",
        "--trainer.val_check_interval=1",
    ]
    assert main(["fit", *given, f"--model.model=me/tiny@{older}"]) == 0
    expected = {
        "model_commit": older,
        "data_set": "me/rows",
        "data_config": None,
        "data_split": "validation",
        "data_commit": rows[0],
    }
    assert json.loads((run_dir() / "environment.json").read_text())["hub"] == expected
    metadata = read_checkpoint(last_checkpoint()).metadata
    assert metadata["hub"] == expected
    assert base_model(metadata) == f"me/tiny@{older}"
    resumed = [*given, f"--ckpt_path={last_checkpoint()}", "--trainer.max_steps=2"]
    line = error_line(capsys, "fit", *resumed, "--model.model=me/tiny")
    assert f"is at commit {newer}, and the checkpoint was trained on another one" in line
    assert line.endswith(f"give --model.model me/tiny@{older}")
    assert main(["fit", *resumed, f"--model.model=me/tiny@{older}"]) == 0
    assert main(["export", "--ckpt_path=best", "--output=out", "--format=delta"]) == 0
    assert f'from_pretrained("me/tiny", dtype="float32", revision="{older}")' in Path("out/README.md").read_text()
    assert Path("out/LICENSE").read_text() == "text"
    card = Path("out/README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["datasets"] == ["me/rows"]
    place = {"name": "sst2", "type": "me/rows", "split": "validation", "revision": rows[0]}
    assert metadata["model-index"][0]["results"][0]["dataset"] == place
    assert "task sst2, 79 training rows, 1 dev row, 24 held-out rows, batches of 8; from [me/rows](https://" in card
    for commit in (older, rows[0]):
        assert f"at commit `{commit}`" in card
    hub.requests.clear()
    for path in ("out", str(last_checkpoint())):
        _ = load_pair(path)
    assert not any(newer in path or "revision/main" in path for _, path in hub.requests)


def test_an_adapter_names_the_commit_of_its_base(model, tmp_path):
    facts = Facts("adapter", origin_of("me/tiny"), {}, 1, "LoRA", 2, 4, "AutoModelForCausalLM", PeftFiles({"r": 2}, {}))
    ADAPTER.write(None, facts, tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found == {"base_model_name_or_path": "me/tiny", "revision": model[1], "r": 2}


def test_rows_of_a_revision(rows, hub, monkeypatch):
    loaded = []
    for revision in ("main", rows[0], None):
        name = "me/rows" if revision is None else f"me/rows@{revision}"
        loaded.append(load_rows(name))
        assert ("film" in loaded[-1].examples[0].prompt) == (revision == rows[0])
    assert [found.hub.revision for found in loaded] == [rows[1], rows[0], rows[1]]
    own = type("Own", (Sst2,), {"hub": HubSource("me/rows", revision=rows[0])})()
    assert RowSource(own).read("test").hub.revision == rows[0]
    assert RowSource(own, hub_path=f"me/rows@{rows[1]}").read("test").hub.revision == rows[1]
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, revision, **options: real(*args, **options))
    line = slzo_error(load_rows, f"me/rows@{rows[0]}")
    assert f"only commit {rows[1]} is in the cache" in line


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("me/none", "the Hub has no such model, or it is private; check the name, or log in with `hf auth login`"),
        (
            "me/tiny@v9",
            "the Hub has no such revision; give a branch, a tag or a commit of https://huggingface.co/me/tiny/",
        ),
        ("me/tiny@", "no such folder; give a local Hugging Face folder"),
        ("smollm2-135m@v1", "a built-in model has no revisions; give 'smollm2-135m'"),
    ],
)
def test_wrong_names_of_models(model, name, problem):
    line = slzo_error(resolve_model, name)
    assert line.startswith(f"model.model {name!r}: {problem}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("me/none", "'me/none': the Hub has no such data set, or it is private"),
        ("me/rows@v9", "'me/rows@v9': the Hub has no such revision; give a branch, a tag or a commit of https://hugg"),
    ],
)
def test_wrong_names_of_data_sets(rows, name, problem):
    line = slzo_error(load_rows, name)
    assert line.startswith(f"data.hub_path {problem}")


def test_a_download_is_announced_once_by_the_first_process(model, capsys, monkeypatch):
    for rank, lines in (("0", ["slzo: Downloading me/tiny: 0.2 MB"]), ("0", []), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        load_model("me/tiny" if rank == "0" else f"me/tiny@{model[0]}")
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("slzo")] == lines


@pytest.mark.parametrize(
    ("terminal", "rank", "wanted", "shown"),
    [(True, "0", True, True), (False, "0", True, False), (True, "1", True, False), (True, "0", False, False)],
)
def test_bars_are_shown_on_a_terminal_by_the_first_process(monkeypatch, terminal, rank, wanted, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", rank)
    before = are_progress_bars_disabled()
    with hub_bars(wanted):
        assert are_progress_bars_disabled() != shown
    assert are_progress_bars_disabled() == before


@pytest.mark.parametrize(("terminal", "hidden"), [(True, None), (False, "1")])
def test_bars_of_data_sets_are_shown_on_a_terminal(monkeypatch, terminal, hidden):
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "")
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    prepare_process()
    assert os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS") == hidden


def test_what_needs_a_licence_names_its_page(model, rows, hub, monkeypatch):
    hub.gated |= {"me/tiny", "datasets/me/rows"}
    needs = (
        "its licence must be accepted first; accept it on https://huggingface.co/{} and log in with `hf auth login`; or"
    )
    assert slzo_error(resolve_model, "me/tiny").startswith(f"model.model 'me/tiny': {needs.format('me/tiny')}")
    assert slzo_error(load_rows, "me/rows").startswith(f"data.hub_path 'me/rows': {needs.format('datasets/me/rows')}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Path(resolve_model("me/tiny")).name == model[1]
    assert len(load_rows("me/rows").examples) == 24


def test_a_download_that_breaks_names_the_cause(model, rows, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.broken |= {"model.safetensors", "validation.jsonl"}
    reason = "peer closed connection without sending complete message body"
    line = slzo_error(load_model, "me/tiny")
    assert line.startswith(f"model.model 'me/tiny': cannot be downloaded ({reason}")
    assert "check the connection and the disk, and run again" in line
    line = slzo_error(load_rows, "me/rows")
    assert f"cannot load me/rows split 'validation' from the Hub (RemoteProtocolError: {reason}" in line
    hub.broken.clear()
    load_model("me/tiny")
