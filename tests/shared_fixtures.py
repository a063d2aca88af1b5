"""Fixtures: a tiny model and made-up rows on disk, options of a short run, a clean environment."""

import copy
import gc
import importlib.metadata
import io
import logging
import os
import random
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

# one thread per worker and its child processes, because several share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import docstring_parser
import numpy as np
import pytest
from helpers import random_example
from hub_stand_in import HubStandIn
from matplotlib.figure import Figure
from matplotlib.image import imsave

import tiny
from slzo.cli.app import SlzoCLI
from slzo.cli.parser import command_function
from slzo.models import startup_check
from slzo.private.models import attention_of
from slzo.utils import pip_download
from slzo.utils.hub import model_folder

# what each parser of options and each run asks for again does not change
docstring_parser.parse = cache(docstring_parser.parse)
importlib.metadata.version = cache(importlib.metadata.version)

_PARSERS = {}
_setup_parser = SlzoCLI.setup_parser


def _setup_parser_once(cli, *args):
    """Give each run its own copy of the parser of its command, which takes longer to build than a short run."""
    key = (cli._command, command_function(cli._command))
    if key not in _PARSERS:
        _setup_parser(cli, *args)
        _PARSERS[key] = cli.parser
    cli.parser = copy.deepcopy(_PARSERS[key])


SlzoCLI.setup_parser = _setup_parser_once


def pytest_collection_finish():
    """Leave what was imported out of each search for garbage."""
    gc.freeze()


@pytest.fixture
def examples():
    """Prompts of several lengths; candidates of one token and of several."""
    generator = random.Random(0)
    one = [random_example(generator, i, 5 + 3 * i, (1, 1), i % 2) for i in range(4)]
    many = [random_example(generator, 4 + i, 6 + 5 * i, (3, 2, 1), i % 3) for i in range(3)]
    return one + many


@pytest.fixture
def one_token_examples(examples):
    return examples[:4]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny Llama with its tokenizer, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny.write_model(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Made-up SST-2 rows with the Hub's fields."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_rows(folder)
    return folder


class _CurrentStderr:
    def write(self, text):
        return sys.stderr.write(text)

    def flush(self):
        sys.stderr.flush()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Remove seeds that Lightning leaves in the environment, so that they do not reach the next test."""
    before = dict(os.environ)
    # log handlers keep the closed stream of the test that imported their library
    for logger in [logging.getLogger(), *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.stream = _CurrentStderr()
    yield
    for name in set(os.environ) - set(before):
        if name.startswith(("PL_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")):
            os.environ.pop(name)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A new working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub, and empty caches."""
    import datasets
    from huggingface_hub import HfFileSystem, constants

    model_folder.cache_clear()
    with HubStandIn() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        HfFileSystem.clear_instance_cache()
        yield hub


@pytest.fixture
def listening():
    """Ctrl-C counts, also where the tests run in the background of a shell, whose jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_pip(monkeypatch):
    """Fail the test if it runs pip."""
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: pytest.fail("pip was run"))


@pytest.fixture
def sst2_options(model_dir, data_dir, tmp_path, monkeypatch):
    """Options for the tiny model and the made-up rows, in a new working folder."""
    monkeypatch.chdir(tmp_path)
    return [
        f"--model.model={model_dir}",
        "--data.task=sst2",
        f"--data.data_dir={data_dir}",
        "--trainer.accelerator=cpu",
    ]


@pytest.fixture
def options(sst2_options):
    """Options of a run of a few seconds with given step sizes; test_auto_step.py tests measured ones."""
    return [
        *sst2_options,
        "--data.num_train=40",
        "--data.num_dev=16",
        "--data.batch_size=8",
        "--profiler.rule=MaxRatioJump",
        "--trainer.max_steps=8",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--model.eps=1e-3",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=1e-3",
    ]


_MADE = {}


@pytest.fixture
def once(tmp_path_factory, monkeypatch):
    """Copy what ``make(*args)`` writes into the working folder; tests with the same arguments share one call."""

    def copy_of(make, *args):
        if (make, *args) not in _MADE:
            folder = tmp_path_factory.mktemp("made")
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                make(*args)
            _MADE[make, *args] = folder
        shutil.copytree(_MADE[make, *args], ".", dirs_exist_ok=True)

    return copy_of


@pytest.fixture(autouse=True)
def _blank_plots(request, monkeypatch):
    """Skip plots and reports, which take longer than a tiny run, except in tests marked ``plots``."""
    if request.node.get_closest_marker("plots"):
        return
    monkeypatch.setattr("slzo.fit.write_run_report", lambda folder: folder / "report.html")
    blank = io.BytesIO()
    imsave(blank, np.zeros((1, 1, 3)), format="png")

    def savefig(figure, place, format="png", **options):
        if format == "svg":
            place.write("<svg></svg>\n")
        else:
            Path(place).write_bytes(blank.getvalue())

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr("slzo.report.profile_files.profile_plot", lambda *_: Figure())


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch):
    """Do not wait for the disk: only a loss of power would show it. Tests of failing disks replace this."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


_TWINS = {}


@pytest.fixture(autouse=True)
def _one_check_of_a_twin(monkeypatch):
    """Check the twin of a config once, not in each run: its result depends on the config alone. A direct check is not shared."""
    twin = startup_check._Twin

    def shared(model):
        key = (type(model), attention_of(model), model.device, model.config.to_json_string())
        if key not in _TWINS:
            _TWINS[key] = twin(model)
            _TWINS[key].longest = cache(_TWINS[key].longest)
        return _TWINS[key]

    def split_and_verify(*args):
        with monkeypatch.context() as patch:
            patch.setattr(startup_check, "_Twin", shared)
            return startup_check.split_and_verify(*args)

    monkeypatch.setattr("slzo.training.build.split_and_verify", split_and_verify)
