"""Every optimization gives the losses of the plain two-pass computation for the same z, batch and dtype."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from helpers import (
    WholeVocabulary,
    each_family,
    layer_forward,
    plain_two_passes,
    random_example,
    tiny_model,
    tune_layer,
    tuned_layer,
)

from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.zo.estimators import SPSA, Point
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.stepper import StepOptions, Stepper

EPS = 1e-3
LAYER = 2


@pytest.mark.parametrize("all_options", [False, pytest.param(True, marks=pytest.mark.slow)])
@each_family
def test_losses_equal_the_plain_computation(family, all_options, examples, one_token_examples):
    """With all combinations of the five options, or with a quarter of them, which has every combination of any two."""
    for rows in (one_token_examples, examples):
        direction = tune_layer(ModelParts(tiny_model(family, scale=1.5)), LAYER).draw(0, 0, 0)
        points = [Point(direction, EPS), Point(direction, -EPS)]
        of_candidates, of_answers = plain_two_passes(family, rows, direction, EPS)
        expected = [
            (CandidateCrossEntropy(), of_candidates),
            (WholeVocabulary(), of_candidates),
            (AnswerLikelihood(), of_answers),
        ]
        for packed, onednn in itertools.product((True, False), (True, False)):
            onednn = onednn and torch.backends.mkldnn.is_available()
            parts = ModelParts(tiny_model(family, scale=1.5), packed, onednn=onednn)
            tuned = tune_layer(parts, LAYER)
            for warm in (True, False):
                filling = layer_forward(parts, LAYER)
                if warm:  # states from other batches, in another order
                    for example in reversed(rows):
                        filling.prefix(pack([example]))
                quarter = [(packed ^ onednn ^ warm, onednn ^ warm)]
                for grouped, paired in itertools.product((True, False), repeat=2) if all_options else quarter:
                    forward = layer_forward(parts, LAYER, paired=paired)
                    forward.cache = filling.cache
                    batch = pack(rows)
                    if not grouped:
                        batch = replace(batch, layout=batch.layout.in_one_group)
                    hidden = forward.prefix(batch, keep=warm)
                    for objective, losses in expected:
                        sums = forward.losses(batch, hidden, tuned, points, objective)
                        torch.testing.assert_close((sums[0] / sums[1]).double(), losses, rtol=1e-5, atol=1e-6)


def train(plain, steps=50):
    """Loss curve of some steps with every optimization off or on."""
    generator = random.Random(7)
    rows = [random_example(generator, i, 4 + i % 9, (1, 1), i % 2) for i in range(40)]
    parts = ModelParts(tiny_model("llama", scale=1.5), packed=not plain, onednn=False if plain else None)
    engine = Engine(paired=not plain, cache_gb=0 if plain else 1)
    model = tuned_layer(parts, LAYER, engine=engine)
    optimizer = torch.optim.SGD(model.tensors.masters, lr=3e-4)
    objective = WholeVocabulary() if plain else CandidateCrossEntropy()
    stepper = Stepper(model, objective, SPSA(), StepOptions(EPS))
    curve = []
    for step in range(steps):
        picked = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        packed = pack(picked)
        if plain:
            packed = replace(packed, layout=packed.layout.in_one_group)
        curve.append(stepper.step(TrainBatch(packed, ()), step, optimizer).estimate.loss)
    return torch.tensor(curve)


def test_fifty_steps_with_everything_on_equal_the_plain_run():
    plain, fast = train(plain=True), train(plain=False)
    assert (plain[0] - plain[-1]).abs() > 1e-3  # the weights do move
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
