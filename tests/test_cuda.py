"""On a card: exactness of every family, runs, generation, the prefix cache in pinned memory, quantized and offloaded layers.

Skipped where torch finds none. Run them with ``python -m pytest -m cuda``.
"""

import random

import pytest
import torch
from helpers import (
    FAMILIES,
    layer_forward,
    needs_cuda,
    plain_two_passes,
    random_example,
    random_prompts,
    tiny_model,
    tune_layer,
    tuned_layer,
)

from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.evaluation.decoding import generate
from slzo.models.device_map import DeviceMapChoice
from slzo.models.device_placement import load_with_device_map
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.models.startup_check import split_and_verify
from slzo.zo.estimators import Point
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy

pytestmark = [pytest.mark.cuda, needs_cuda]
CARD = torch.device("cuda", 0)
EPS = 1e-3
LAYER = 2


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
            forward = layer_forward(parts, LAYER, candidate_logits=paired, paired=paired)
            batch = pack(examples).to(CARD)
            forward.prefix(batch)
            hidden = forward.prefix(batch)  # from pinned memory
            for objective, losses in zip((CandidateCrossEntropy(), AnswerLikelihood()), expected, strict=True):
                sums = forward.losses(batch, hidden, tuned, points, objective)
                torch.testing.assert_close((sums[0] / sums[1]).double().cpu(), losses, rtol=1e-4, atol=1e-5)


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
    found = [generate(parts, prompts, {2}, max_new_tokens=8).answers for parts in both]
    same = sum(one == other for one, other in zip(*found, strict=True))
    assert same >= len(prompts) - 1  # a near tie may fall otherwise


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--model.dtype=bfloat16"],
        ["--model.scope=LoRA"],
        ["--model.quantization=nf4"],
        ['--model.device_map={"model.layers.0": "disk", "model.layers.3": "cpu"}'],
        ["--model.device_map=auto"],
    ],
)
def test_a_run_trains_scores_and_resumes(options, more):
    rest = [option for option in options if "accelerator" not in option]
    options = [*rest, "--trainer.accelerator=gpu", "--trainer.devices=1", *more, "--model.layer=2"]
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, "--trainer.max_steps=12", "--ckpt_path=last"]) == 0
    assert main(["test", *options, "--ckpt_path=last"]) == 0


def test_layers_away_from_the_card_compute_the_same(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    batch = pack([random_example(random.Random(0), i) for i in range(3)]).to(CARD)
    found = []
    for given in ({"model.layers.0": "disk", "model.layers.2": "cpu", "model.layers.3": "disk"}, None):
        plain = load_model(str(tmp_path)).to(CARD) if given is None else None
        model = plain or load_with_device_map(str(tmp_path), "float32", False, DeviceMapChoice(given), CARD)
        own = tuned_layer(split_and_verify(model), 2)
        assert all(tensor.live.device == CARD for _, tensor in own.tensors.items())
        found.append(own.logits(batch))
    assert torch.equal(*found)
