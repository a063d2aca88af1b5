"""Directions of likely tokens: against the model's own norm and head, and against autograd in the last layer."""

import math
import random

import pytest
import torch
from helpers import (
    autograd_gradient,
    batch_loss,
    estimate_at,
    flat,
    layer_forward,
    on_grid,
    random_example,
    same_tensors,
    short_examples,
    tiny_model,
    tuned_model,
)
from torch.nn import functional as F

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.models.final_norm import FinalNorm
from slzo.models.parts import ModelParts
from slzo.zo.estimators import LayerOutputPerturbation, layer_output
from slzo.zo.estimators.layer_output import limit_noise
from slzo.zo.head_directions import head_directions, tokens_of_positions
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.packed_layer_output import PackedLayerOutput
from tiny import VOCABULARY

pytestmark = pytest.mark.fast

LAST = 3  # the last layer of a tiny model
NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gemma3_text": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
}


def assert_close(found, expected):
    """Up to rounding of the losses, which is divided by short distances."""
    one, other = flat(found.gradient), flat(expected.gradient)
    assert (one - other).norm() < 1e-3 * other.norm()


def varied(family):
    """A tiny model whose final norm has a gain and a bias of its own in each channel."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.get_submodule(NORMS[family]).parameters():
            parameter.copy_(1 + torch.rand(len(parameter), generator=torch.Generator().manual_seed(len(NORMS[family]))))
    return model


@pytest.mark.parametrize("family", NORMS)
def test_the_gain_is_the_weight_of_the_norm(family, examples):
    model = varied(family)
    weight = model.get_submodule(NORMS[family]).weight
    expected = 1 + weight if family == "gemma3_text" else weight
    norm = FinalNorm.of(ModelParts(model))
    torch.testing.assert_close(norm.gain, expected.detach(), rtol=1e-4, atol=1e-4)
    assert norm.centers == (family in ("gpt2", "gpt_neox"))


def test_tokens_are_those_of_the_answers_and_the_likeliest():
    """In a row of candidates of one token those of its answers alone."""
    rows = [random_example(random.Random(0), number, 5, (1, 2), 0) for number in range(3)]
    batch = pack([*rows, random_example(random.Random(1), 3, 4, (1, 1), 0)])
    own = [set() for _ in batch.logit_positions]
    for position, token in zip(batch.token_logit.tolist(), batch.token_id.tolist(), strict=True):
        own[position].add(token)
    assert {len(tokens) for tokens in own} == {1, 2}
    assert [set(tokens) for tokens in tokens_of_positions(batch, None, 5).tolist()] == own
    # a token that several answers begin with counts once
    alike = EncodedExample(0, (EncodedSequence((3, 4, 5, 6), 2), EncodedSequence((3, 4, 5, 7), 2)), (0,))
    assert tokens_of_positions(pack([alike]), None, 5).tolist() == [[5], [6], [7]]
    logits = torch.randn(len(own), VOCABULARY, generator=torch.Generator().manual_seed(0))
    likely = logits.topk(5, dim=1).indices.tolist()
    found = tokens_of_positions(batch, logits, 5).tolist()
    expected = [one | set(other) for one, other in zip(own[:-1], likely, strict=False)]
    assert [set(tokens) for tokens in found] == [*expected, own[-1]]


def test_directions_are_orthonormal_and_orthogonal_to_the_state(examples):
    model, batch = varied("llama"), pack(examples)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(batch.logit_positions), 32, generator=generator)
    tokens = torch.randint(VOCABULARY, (len(states), 4), generator=generator)
    tokens[0] = tokens[0, 0]  # a position without a difference
    tokens[1, 2:] = tokens[1, 1]  # and one with a single one
    norm = FinalNorm.of(ModelParts(model))
    directions, sensitivity = head_directions(model.lm_head.weight, norm, states, tokens)
    found = directions.permute(1, 0, 2)
    inner = found @ found.transpose(1, 2)
    numbers = [len(set(own)) - 1 for own in tokens.tolist()]
    assert numbers[:2] == [0, 1]
    for own, number in zip(inner, numbers, strict=True):
        torch.testing.assert_close(own, torch.diag((torch.arange(3) < number).float()), rtol=1e-4, atol=1e-4)
    assert (found @ states[..., None]).abs().max() < 1e-4
    assert torch.equal(sensitivity[..., 0] > 0, directions.norm(dim=2) > 0.5)
    # a shift of the state along the only direction changes the logit difference as much as it says
    norm, head = model.model.norm, model.lm_head
    size = states[1].square().mean().sqrt()
    near, far = (head(norm(states[1] + sign * 1e-2 * size * directions[0, 1])) for sign in (-1, 1))
    first, second = tokens[1, :2]
    change = ((far - near)[second] - (far - near)[first]) / 2e-2
    assert float(change.abs()) == pytest.approx(float(sensitivity[0, 1]), rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("answers", [(1, 1), (1, 1, 1)])
def test_in_the_last_layer_the_directions_of_candidates_hold_the_whole_gradient(family, answers):
    """One query of noise adds nothing: outside of the directions the loss is constant."""
    rows, model = short_examples(answers), tuned_model(family, LAST)
    expected = autograd_gradient(model.parts.model, rows, model.tensors.names)
    found = estimate_at(model, batch_loss(model, rows), queries=1, tokens=8)
    assert float(F.cosine_similarity(flat(found.gradient), flat(expected), dim=0)) > 0.999
    assert float(flat(found.gradient).norm() / flat(expected).norm()) == pytest.approx(1, abs=0.02)


def test_more_tokens_of_the_vocabulary_leave_less_to_noise():
    rows, model = short_examples((2, 3)), tuned_model(layer=LAST)
    loss = batch_loss(
        model, [EncodedExample(row.index, (row.sequences[row.gold[0]],), (0,)) for row in rows], AnswerLikelihood()
    )
    expected = flat(loss.gradient()[1])
    errors = []
    for tokens in (0, 4, 16, 31):
        found = [flat(estimate_at(model, loss, step, queries=2, tokens=tokens).gradient) for step in range(8)]
        errors.append(float(torch.stack([(one - expected).norm() for one in found]).mean() / expected.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4
    assert errors[-1] < 2


@pytest.mark.slow
def test_with_unlimited_noise_the_mean_is_the_gradient(examples, monkeypatch):
    """With directions in a middle layer, from which two layers follow; the bias of 0.3 per logit is small."""
    monkeypatch.setattr(layer_output, "limit_noise", lambda rest, *_: rest)
    model = tuned_model(layer=1)
    loss = batch_loss(model, examples)
    noise, both = (
        torch.stack(
            [flat(estimate_at(model, loss, step, queries=40, tokens=tokens).gradient) for step in range(40)]
        ).mean(0)
        for tokens in (0, 8)
    )
    assert float((both - noise).norm() / noise.norm()) < 0.35
    assert float(F.cosine_similarity(both, noise, dim=0)) > 0.95


def test_noise_counts_as_far_as_its_channels_and_the_rest_of_the_gradient_matter():
    """Against a plain loop over positions and channels."""
    generator = torch.Generator().manual_seed(0)
    rest, along = torch.randn(2, 4, 8, generator=generator)
    along[0], along[1, :4], along[2] = 0, 10, 1e-3 * along[2]
    found = limit_noise(rest, along, num_queries=2)
    for position in range(4):
        noise, measured = (sum(float(value) ** 2 for value in own[position]) / 8 for own in (rest, along))
        outside = noise * 2 / (8 + 2 + 1)
        for channel in range(8):
            channel_size = abs(float(along[position, channel]))
            weight = min(0.3, outside / (2 * measured) * channel_size / math.sqrt(noise)) if measured else 0.3
            assert float(found[position, channel]) == pytest.approx(weight * float(rest[position, channel]), rel=1e-5)
    torch.testing.assert_close(found[0], 0.3 * rest[0])
    assert not limit_noise(torch.zeros(4, 8), along, 2).any()


def test_the_limit_knows_the_gradient_outside_of_the_directions():
    """The mean over much noise of the limit is that of the true gradient g: |g|^2 |a_j| / (2 |a|^2)."""
    gradient, along = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4000, 4, 64, generator=torch.Generator().manual_seed(1))
    measured = ((noise @ gradient)[..., None] * noise).mean(dim=1)
    along = 100 * along  # so that no weight is at its bound
    limited = limit_noise(measured, along.expand(4000, -1), num_queries=4)
    size = measured.square().mean(dim=1, keepdim=True).sqrt()
    found = (limited / measured * size).mean(dim=0)
    expected = gradient.square().sum() / (2 * along.square().sum()) * along.abs()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_the_estimate_has_the_limited_noise(examples, monkeypatch):
    model = tuned_model(layer=1)
    loss = batch_loss(model, examples)
    plain, limited = [], []
    for step in range(4):
        limited.append(flat(estimate_at(model, loss, step, queries=2, tokens=8).gradient))
        with monkeypatch.context() as patch:
            patch.setattr(layer_output, "limit_noise", lambda rest, *_: torch.zeros_like(rest))
            plain.append(flat(estimate_at(model, loss, step, queries=2, tokens=8).gradient))
    for one, other in zip(plain, limited, strict=True):
        assert 0.01 < float((other - one).norm() / one.norm()) < 0.6


@pytest.mark.parametrize("layer", [1, LAST])
@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()], ids=["candidates", "likelihood"])
def test_parts_order_and_processes_change_nothing(objective, layer, examples):
    model = tuned_model(layer=layer)
    options = {"queries": 3, "tokens": 4}
    whole = estimate_at(model, batch_loss(model, examples, objective), **options)
    for rows, max_tokens in ((examples, 40), (examples, 60), (examples[::-1], None)):
        found = estimate_at(model, batch_loss(model, pack(rows), objective, max_tokens=max_tokens), **options)
        assert_close(found, whole)

    def run(processes):
        return estimate_at(model, batch_loss(model, examples, objective, processes), **options)

    found = on_grid(1, 2, run)
    assert same_tensors(found[0].gradient, found[1].gradient)
    assert_close(found[0], whole)


def test_without_readable_rows_there_is_noise_alone(examples, monkeypatch):
    model = tuned_model()
    loss = batch_loss(model, examples)
    monkeypatch.setattr("slzo.zo.packed_layer_output.is_plain", lambda _: False)
    plain, tokens = (estimate_at(model, loss, queries=2, tokens=number) for number in (0, 8))
    assert same_tensors(plain.gradient, tokens.gradient)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_shifts_are_not_lost_in_rounding(family, monkeypatch):
    monkeypatch.setattr("slzo.zo.forward.MOST_FLOAT32", -1)  # what is above runs in bfloat16 too
    rows = short_examples((1, 1))
    model = tuned_model(tiny_model(family).to(torch.bfloat16), LAST)
    forward, batch = layer_forward(model.parts, LAST), pack(rows)
    entering = forward.prefix(batch)
    leaving = model.parts.run(batch, LAST, LAST + 1, entering, norm=False)
    output = PackedLayerOutput(forward, batch, entering, leaving, CandidateCrossEntropy())
    for change in (0.3, 1e-6):  # also where a much smaller shift would change the logits as much
        shifts = output.token_shifts(8, change)
        applied = output.applied(shifts)
        assert (applied.flatten(0, 1).norm(dim=1) > 0).all()
        assert float(F.cosine_similarity(applied, shifts, dim=2).min()) > 0.5


def test_tokens_must_not_be_negative():
    with pytest.raises(Exception, match=r"model.estimator.tokens -1: must be at least 0; 0 for noise alone"):
        LayerOutputPerturbation(tokens=-1)
