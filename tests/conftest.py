"""Tiny random models of every family, a tiny tokenizer and tiny data."""

import io
import logging
import os
import random
import sys
from pathlib import Path

# one thread a worker, and in what it starts: several share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import tiny
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.models.prefix_cache import PrefixCache
from slzo.zo.estimators import Request
from slzo.zo.forward import SuffixForward
from slzo.zo.scopes import LayerScope, ScopeContext
from slzo.zo.forward import Span
from slzo.zo.tuned_model import TunedModel
from tiny import VOCABULARY, make_tokenizer  # noqa: F401  tests take it from here

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card that torch can use (CUDA)")
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2},
    "phi3": {"head_dim": None},
}


def tiny_model(family="llama", seed=0, scale=3.0, **changes):
    """A random model whose logits differ enough between tokens to show a mistake."""
    return tiny.tiny_model(family, seed, scale, **{**FAMILIES.get(family, {}), **changes})


def random_example(generator, index=0, prompt=8, answers=(1, 1), gold=0):
    """An example of random tokens: prompt length and the length of each candidate."""

    def tokens(count):
        return tuple(generator.choices(range(3, VOCABULARY), k=count))

    start = tokens(prompt)
    sequences = tuple(EncodedSequence(start + tokens(count), count) for count in answers)
    return EncodedExample(index, sequences, (gold,))


def tune_layer(parts, layer):
    """Masters of a whole decoder layer."""
    return LayerScope().tensors(ScopeContext(parts, layer, lambda _: ()))


def tuned_layer(parts, layer, **options):
    """A whole decoder layer is tuned."""
    return TunedModel.of_scope(parts, LayerScope(), layer, **options)


def layer_forward(parts, layer, cache_gb=1.0, **options):
    """The loss as a function of one decoder layer."""
    return SuffixForward(parts, Span(layer, layer + 1), PrefixCache(layer, cache_gb), **options)


class LossAt:
    """A loss for estimators made from a function of the points."""

    def __init__(self, function):
        self.at = function


def estimate(estimator, tuned, function, seed=0, step=0, **settings):
    """One estimate from a function of the points."""
    return estimator.estimate(Request(tuned, LossAt(function), seed, step, **settings))


def flat(gradient):
    """The gradient of an estimate as one vector."""
    return torch.cat([part.flatten() for part in gradient.values()])


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
    """Made-up SST-2 rows in the Hub's fields."""
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
    """Seeds that Lightning leaves in the environment must not reach the next test."""
    before = dict(os.environ)
    # log handlers keep the stream of the test that imported their library, which is closed by now
    for logger in [logging.getLogger(), *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.stream = _CurrentStderr()
    yield
    for name in set(os.environ) - set(before):
        if name.startswith(("PL_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")):
            os.environ.pop(name)


# ---- runs of the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def sst2_options(model_dir, data_dir, tmp_path, monkeypatch):
    """The tiny model on the made-up rows, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return [
        f"--model.model={model_dir}",
        "--data.task=sst2",
        f"--data.data_dir={data_dir}",
        "--trainer.accelerator=cpu",
    ]


@pytest.fixture
def options(sst2_options):
    """Options of a run of a few seconds, with steps of a given size: measuring them is tested in test_step_size.py."""
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
        "--report.write=false",  # pictures take as long as such a run
    ]


def run_dir(number=0):
    """The folder of a run, the first one is 0."""
    return Path("runs") / f"version_{number}"


def tuned(path):
    """The tuned tensors in a checkpoint."""
    return read_checkpoint(path).content["state_dict"]


@pytest.fixture(autouse=True)
def _blank_pictures(request, monkeypatch):
    """Rendering a picture takes longer than a tiny run: blank ones, but for tests marked ``pictures``, which look at them."""
    if request.node.get_closest_marker("pictures"):
        return
    blank = io.BytesIO()
    imsave(blank, np.zeros((1, 1, 3)), format="png")

    def savefig(figure, place, format="png", **options):
        if format == "svg":
            place.write("<svg></svg>\n")
        else:
            Path(place).write_bytes(blank.getvalue())

    monkeypatch.setattr(Figure, "savefig", savefig)
