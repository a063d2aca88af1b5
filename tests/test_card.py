"""On a card: exactness of every family, runs, generation, the prefix cache in pinned memory, quantized and offloaded layers.

Run them with ``python -m pytest -m cuda``. Without a card, those that do not need CUDA itself run on the device of
``second_device.py``, see ``test_second_device.py``.
"""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CARD,
    FAMILIES,
    described,
    last_checkpoint,
    layer_forward,
    needs_card,
    needs_cuda,
    plain_two_passes,
    random_example,
    random_prompts,
    tiny_model,
    tune_layer,
    tuned,
    tuned_layer,
)

from slzo import fit
from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.datamodule import TaskDataModule
from slzo.evaluation.decoding import decode
from slzo.lightning.trainer import ZOTrainer
from slzo.models.device_map import DeviceMapOptions
from slzo.models.device_placement import load_with_device_map
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.models.placement import ON_MAIN_DEVICE
from slzo.models.prefix_cache import PrefixCache
from slzo.models.startup_check import split_and_verify
from slzo.module import ZOModule
from slzo.zo.estimators import Point
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.scopes import ActivationSubspace, OutlierChannels
from slzo.zo.selection import MaxRatioJump

pytestmark = [pytest.mark.cuda, needs_card]
EPS = 1e-3
LAYER = 2
OUTPUT = "LayerOutputPerturbation"
if CARD is None or CARD.type == "cuda":
    SLZO, ONE = ["-m", "slzo"], ["--trainer.accelerator=gpu"]
    # NCCL refuses two processes on one card
    TWO = [
        "--trainer.strategy=lightning.pytorch.strategies.DDPStrategy",
        "--trainer.strategy.process_group_backend=gloo",
    ]
else:
    SLZO = [str(Path(__file__).with_name("second_device.py"))]
    ONE, TWO = (
        [f"--trainer.accelerator={CARD.type}", f"--trainer.strategy={CARD.type}"],
        [f"--trainer.strategy={CARD.type}_ddp"],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_the_plain_computation(family, examples):
    direction = tune_layer(ModelParts(tiny_model(family, scale=1.5)), LAYER).draw(0, 0, 0)
    expected = plain_two_passes(family, examples, direction, EPS)
    there = {name: z.to(CARD) for name, z in direction.items()}
    points = [Point(there, EPS), Point(there, -EPS)]
    for packed in (True, False):
        parts = ModelParts(tiny_model(family, scale=1.5).to(CARD), packed)
        tuned = tune_layer(parts, LAYER)
        for paired in (True, False):
            forward = layer_forward(parts, LAYER, paired=paired)
            batch = pack(examples).to(CARD)
            forward.prefix(batch)
            hidden = forward.prefix(batch)  # from pinned memory
            for objective, losses in zip((CandidateCrossEntropy(), AnswerLikelihood()), expected, strict=True):
                sums = forward.losses(batch, hidden, tuned, points, objective)
                torch.testing.assert_close((sums[0] / sums[1]).double().cpu(), losses, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_states_come_back_from_pinned_memory():
    cache = PrefixCache(1, 1.0)
    states = torch.randn(12, 8, device=CARD)
    cache.put([3, 4], [5, 7], states)
    assert all(kept.is_pinned() and kept.device.type == "cpu" for kept in cache._states.values())
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = cache.gather([4, 3], {}, CARD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, torch.cat([states[5:], states[:5]]))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_processor(family):
    prompts = [example.sequences[0].ids[:-1] for example in random_prompts(6)]
    both = [ModelParts(tiny_model(family).to(device)) for device in ("cpu", CARD)]
    found = [decode(parts, prompts, {2}, max_new_tokens=8).answers for parts in both]
    same = sum(one == other for one, other in zip(*found, strict=True))
    assert same >= len(prompts) - 1  # a near tie may fall otherwise


def on_card(options, *more):
    """Options of a run on the card; with output perturbation, step sizes are measured."""
    left_out = ["accelerator", "batch_size"]
    if f"--model.estimator={OUTPUT}" in more:
        left_out += ["model.eps", "model.optimizer"]
    rest = [option for option in options if not any(name in option for name in left_out)]
    return [*rest, *ONE, "--trainer.devices=1", "--model.layer=2", *more]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--model.dtype=bfloat16"],
        ["--model.scope=LoRA"],
        [f"--model.estimator={OUTPUT}"],
        [f"--model.estimator={OUTPUT}", "--model.dtype=bfloat16", "--data.tokens_per_pass=60"],
        ["--model.estimator=Backprop"],
        pytest.param(["--model.quantization=nf4"], marks=needs_cuda),
        pytest.param(['--model.device_map={"model.layers.0": "disk", "model.layers.3": "cpu"}'], marks=needs_cuda),
        pytest.param(["--model.device_map=auto"], marks=needs_cuda),
    ],
)
def test_a_run_trains_scores_and_resumes(options, more):
    options = on_card(options, "--data.batch_size=8", *more)
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, "--trainer.max_steps=12", "--ckpt_path=last"]) == 0
    assert main(["test", *options, "--ckpt_path=last"]) == 0


def trainer_on_card(**options):
    device = {"accelerator": "gpu"} if CARD.type == "cuda" else {"accelerator": CARD.type, "strategy": CARD.type}
    return ZOTrainer(val_check_interval=1, devices=1, enable_progress_bar=False, **device, **options)


def few_rows(data_dir):
    return TaskDataModule("sst2", data_dir=str(data_dir), num_train=16, num_dev=8, num_test=8, batch_size=4)


@pytest.mark.parametrize("scope", [OutlierChannels(percent=10), ActivationSubspace(rank=2)], ids=described)
def test_a_module_is_scored_and_tuned_further_after_a_fit(scope, model_dir, data_dir):
    """Lightning moves the module to the CPU after a fit, and the constants of the scope with it."""
    trainer, data = trainer_on_card(max_steps=2), few_rows(data_dir)
    module = ZOModule(str(model_dir), 2, scope=scope, seed=0)
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, ckpt_path="last")
    module.load_state_dict(module.state_dict())
    assert found["test/loss"] > 0
    trainer_on_card(max_steps=4).fit(module, datamodule=data, ckpt_path="last")


def test_a_model_that_was_scored_before_is_profiled_on_the_card(model_dir, data_dir, monkeypatch):
    """Lightning moves the module to the CPU after a test, and back only after the setup of the next stage."""
    devices, original = [], fit.profile_model

    def profile_model(parts, *args):
        devices.append(parts.model.device.type)
        return original(parts, *args)

    monkeypatch.setattr(fit, "profile_model", profile_model)
    module, data = ZOModule(str(model_dir), eps=1e-3, seed=0), few_rows(data_dir)
    trainer_on_card().test(module, datamodule=data)
    trainer_on_card(max_steps=1, callbacks=[OutlierProfiler(MaxRatioJump())]).fit(module, datamodule=data)
    assert devices == [CARD.type]


@pytest.mark.parametrize("estimator", ["SPSA", OUTPUT])
@pytest.mark.parametrize("parallel", ["rows", "directions"])
def test_two_processes_on_one_card_take_the_steps_of_one(options, parallel, estimator):
    fit = ["fit", *on_card(options, f"--model.estimator={estimator}")]
    assert main([*fit, "--data.batch_size=8"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    # each is a node of its own, so that both get the same card
    own = [
        f"--data.batch_size={4 if parallel == 'rows' else 8}",
        f"--model.parallel={parallel}",
        "--trainer.num_nodes=2",
    ]
    both = [
        subprocess.Popen(
            [sys.executable, *SLZO, *fit, *TWO, *own],
            env={**os.environ, **address, "NODE_RANK": str(node), "LOCAL_RANK": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    for process in both:
        _, output = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]
    one, two = (tuned(last_checkpoint(number)) for number in (0, 1))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs (CUDA)")
@pytest.mark.parametrize("estimator", ["SPSA", OUTPUT])
@pytest.mark.parametrize("more", ["strategy=ddp", "strategy=sharded"])
def test_two_cards_take_the_steps_of_one(options, more, estimator):
    fit = ["fit", *on_card(options, f"--model.estimator={estimator}")]
    assert main([*fit, "--data.batch_size=8"]) == 0
    two = [f"--trainer.{more}", "--trainer.devices=2", "--data.batch_size=4"]
    run = subprocess.run([sys.executable, *SLZO, *fit, *two], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    alone, both = (tuned(last_checkpoint(number)) for number in (0, 1))
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_layers_away_from_the_card_compute_the_same(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    batch = pack([random_example(random.Random(0), i) for i in range(3)]).to(CARD)
    found = []
    for given in ({"model.layers.0": "disk", "model.layers.2": "cpu", "model.layers.3": "disk"}, None):
        if given is None:
            model, placement = load_model(str(tmp_path)).to(CARD), ON_MAIN_DEVICE
        else:
            model, placement = load_with_device_map(str(tmp_path), "float32", False, DeviceMapOptions(given), CARD)
        own = tuned_layer(split_and_verify(model, placement=placement), 2)
        assert all(tensor.live.device.type == CARD.type for _, tensor in own.tensors.items())
        found.append(own.parts.head(own.final_states(batch)))
    assert torch.equal(*found)
