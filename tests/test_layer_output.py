"""Perturbing the output of the tuned layer: against plain forward passes, against autograd, and who may use it."""

import copy
import math
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import (
    assert_mean_is,
    assert_same_estimate,
    autograd_gradient,
    batch_loss,
    described,
    each_family,
    estimate_at,
    flat,
    layer_forward,
    on_grid,
    plain_losses,
    plain_scores,
    random_example,
    same_tensors,
    short_examples,
    tiny_loss,
    tiny_model,
    tune_layer,
    tuned_layer,
    tuned_model,
)
from torch.nn import functional as F

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.models.parts import ModelParts
from slzo.zo.derivatives import vjp
from slzo.zo.estimators import EstimatorContext, LayerOutputPerturbation
from slzo.zo.layer_output import LayerOutput
from slzo.zo.layers_above import layers_vjp
from slzo.zo.loss import OutputGradient
from slzo.zo.noise import row_noise
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.packed_layer_output import _FEWEST_TOKENS, PackedLayerOutput
from slzo.zo.processes import gathered_alone, identity
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA, OutlierChannels
from slzo.zo.tuned_tensor import Masked, Subspace
from tiny import VOCABULARY

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("objective", [CandidateCrossEntropy([1.0, 10000.0])])
def test_positions_with_fewer_directions_than_others_take_no_part_in_these(objective):
    """Their shift is 0 there, and the loss of the row changes: 0 times infinity."""
    generator = random.Random(0)
    examples = [random_example(generator, number, 8, (3, 2), number % 2) for number in range(4)]
    model = tuned_model("llama", 2, scale=2.0)
    for step in range(3):
        assert (
            LayerOutputPerturbation()
            .estimate(EstimatorContext(model.tensors, batch_loss(model, examples, objective), 0, step))
            .finite
        )


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16, torch.float16])
def test_rounding_does_not_hide_the_noise_of_a_layer_that_adds_little(dtype, monkeypatch):
    monkeypatch.setattr("slzo.zo.forward.MOST_FLOAT32", -1)  # the head runs in this type too
    generator = random.Random(0)
    examples = [random_example(generator, number, 6 + 2 * number, (1, 1), number % 2) for number in range(6)]
    plain = tiny_model("llama", 0, 3.0)
    plain.model.embed_tokens.weight.mul_(300)
    model = tuned_layer(ModelParts(copy.deepcopy(plain).to(dtype), onednn=False), 3)
    want = flat(autograd_gradient(plain, examples, model.tensors.names)).double()
    loss, estimator = (
        batch_loss(model, examples, CandidateCrossEntropy()),
        LayerOutputPerturbation(tokens=0, queries=64),
    )
    mean = sum(
        flat(estimator.estimate(EstimatorContext(model.tensors, loss, 0, step)).gradient).double() for step in range(20)
    )
    assert float(F.cosine_similarity(mean, want, dim=0)) > 0.9


LAST = 3  # the last layer of a tiny model


def noted_runs(monkeypatch):
    """Notes first layer, last layer + 1 and number of tokens of every forward pass from now on."""
    seen, run = [], ModelParts.run

    def noted(self, batch, start, stop, *args, **options):
        seen.append((start, stop, batch.input_ids.numel()))
        return run(self, batch, start, stop, *args, **options)

    monkeypatch.setattr(ModelParts, "run", noted)
    return seen


# ---- losses at a shifted output --------------------------------------------------------------------------------------------


def layer_output(parts, layer, batch, objective):
    """What a layer computes for a batch, with shifts at answer positions, and its output."""
    forward = layer_forward(parts, layer)
    entering = parts.run(batch, 0, layer)
    leaving = parts.run(batch, layer, layer + 1, entering, norm=False)
    return PackedLayerOutput(forward, batch, entering, leaving, objective), leaving


def first_shifted(sequence):
    """The first position of a sequence that predicts an answer token."""
    return len(sequence.ids) - sequence.num_answer - 1


def shifted_scores(model, layer, example, shifts):
    """Log-probabilities of each candidate's tokens, with the layer's output shifted at the positions that predict them.

    ``shifts`` has a shift for each candidate, shape (answer, width).
    """
    scores = []
    for sequence, shift in zip(example.sequences, shifts, strict=True):

        def add(module, inputs, output, sequence=sequence, shift=shift):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden, start = hidden.clone(), first_shifted(sequence)
            hidden[0, start : start + len(shift)] += shift
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.get_submodule(layer).register_forward_hook(add)
        scores += plain_scores(model, type(example)(0, (sequence,), (0,)))
        handle.remove()
    return scores


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()], ids=described)
@pytest.mark.parametrize("layer", [1, 3])
@each_family
def test_losses_at_a_shifted_output(family, layer, objective, examples):
    """Those of the tokens after each position; a loss of the candidates' scores is taken to first order in these."""
    model = tiny_model(family, scale=1.5, attn_implementation="eager")
    parts, batch = ModelParts(tiny_model(family, scale=1.5), onednn=False), pack(examples)
    output, _ = layer_output(parts, layer, batch, objective)
    torch.manual_seed(1)
    shifts = 0.3 * torch.randn(3, len(batch.logit_positions), output.width)
    losses = output.losses(shifts)
    assert torch.equal(output.applied(shifts), shifts)
    ends = torch.tensor(batch.example_tokens).cumsum(0)
    rows = torch.searchsorted(ends, batch.logit_positions, right=True)
    assert output.counts == tuple(torch.bincount(rows).tolist())
    assert torch.equal(output.term, torch.arange(len(rows)))
    assert losses.shape == (3, output.num_terms) == (3, len(rows))
    where = {int(position): number for number, position in enumerate(batch.logit_positions)}
    for number in range(3):
        expected, sequences = torch.zeros(output.num_terms), iter(sequences_of(batch))
        for example in examples:
            own = [[where[p] for p in next(sequences)[-sequence.num_answer :]] for sequence in example.sequences]
            shift = [shifts[number][numbers] for numbers in own]
            scores, gold = shifted_scores(model, f"{parts.layers_path}.{layer}", example, shift), example.gold[0]
            slopes = -F.one_hot(torch.tensor(gold), len(own)).float()
            if isinstance(objective, CandidateCrossEntropy):
                unshifted = plain_scores(model, example)
                slopes += torch.stack([tokens.mean() for tokens in unshifted]).softmax(0)
                slopes /= torch.tensor([len(numbers) for numbers in own])
                if not any(numbers[1:] for numbers in own):  # the loss of the row, as if all rows were such
                    means = torch.stack([tokens.mean() for tokens in scores])
                    expected[own[0]] = F.cross_entropy(means[None], torch.tensor([gold])).float()
                    continue
            for numbers, slope, tokens in zip(own, slopes, scores, strict=True):
                expected.index_add_(0, torch.tensor(numbers), slope * tokens.float())
        torch.testing.assert_close(losses[number], expected, rtol=2e-4, atol=2e-4)


def sequences_of(batch):
    """Packed positions of the candidates' sequences, in the order of the candidates."""
    last = batch.logit_positions[batch.token_logit[batch.candidate_length.cumsum(0) - 1]]
    return [positions.tolist() for positions in batch.layout.sequences_up_to(last)]


def conversations():
    """Answers with a message between them that is not scored, and candidates of which only the end is."""
    generator = random.Random(3)

    def tokens(count):
        return tuple(generator.choices(range(3, VOCABULARY), k=count))

    talks = [
        EncodedExample(
            i, (EncodedSequence(tokens(16 + i), 9, (True, True, *[False] * (4 + i), *[True] * (3 - i))),), (0,)
        )
        for i in range(2)
    ]
    start = tokens(7)
    ends = (EncodedSequence(start + tokens(6), 2), EncodedSequence(start + tokens(1), 1))
    return [*talks, EncodedExample(2, ends, (1,)), random_example(generator, 3, 5, (3, 2), 1)]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_running_the_last_tokens_is_enough(family, layer):
    """Without packing the layers above run over all tokens at every point."""
    batch, losses, scored = pack(conversations()), [], 5 + 4 + 1 + 2
    for packed in (True, False):
        parts = ModelParts(tiny_model(family, scale=1.5), packed, onednn=False)
        output, _ = layer_output(parts, layer, batch, AnswerLikelihood())
        torch.manual_seed(1)
        losses.append(output.losses(0.3 * torch.randn(3, len(output.size), output.width)))
    torch.testing.assert_close(*losses, rtol=2e-4, atol=2e-4)
    assert int((losses[0].std(dim=0) > 1e-3).sum()) == scored  # the shifts reach every token of a gold answer


@pytest.mark.parametrize("layer", [0, 2])
def test_the_size_is_that_of_what_the_layer_adds(layer, examples):
    model = tiny_model(output_hidden_states=True)
    output, _ = layer_output(ModelParts(model, onednn=False), layer, pack(examples), CandidateCrossEntropy())
    of_row = output.size.split(output.counts)
    for example, sizes in zip(examples[:4], of_row, strict=False):  # answers of one token share their position
        states = model(input_ids=torch.tensor([example.sequences[0].ids[:-1]])).hidden_states
        added = states[layer + 1][0, -1] - states[layer][0, -1]
        assert float(sizes) == pytest.approx(float(added.square().mean().sqrt()), rel=1e-4)


# ---- against autograd ------------------------------------------------------------------------------------------------------


@contextmanager
def constant_except(layer, positions):
    """Derivatives in which a layer's output is constant at all other positions."""

    def detach(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        constant = hidden.detach().clone()
        constant[:, positions] = hidden[:, positions]
        return (constant, *output[1:]) if isinstance(output, tuple) else constant

    handle = layer.register_forward_hook(detach)
    yield
    handle.remove()


def reference_of(model, names):
    """A copy of a model in which some parameters have derivatives, and these parameters."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    parameters = dict(reference.named_parameters())
    return reference, {name: parameters[name].requires_grad_(True) for name in names}


def gradient_from_answers(model, layer, examples, names):
    """The gradient of the cross-entropy with the layer's output constant at all positions that predict no answer token."""
    reference, parameters = reference_of(model, names)
    losses = []
    for example in examples:
        scores = []
        for sequence in example.sequences:
            with constant_except(reference.get_submodule(layer), slice(first_shifted(sequence), None)):
                (tokens,) = plain_scores(reference, type(example)(0, (sequence,), (0,)))
            scores.append(tokens.mean())
        losses.append(F.cross_entropy(torch.stack(scores)[None], torch.tensor([example.gold[0]])))
    torch.stack(losses).mean().backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def gradient_of_tokens(model, layer, examples, names):
    """The gradient of the gold answers' likelihood if the layer's output at a position affects only the token after it."""
    reference, parameters = reference_of(model, names)
    losses = []
    for example in examples:
        gold = example.sequences[example.gold[0]]
        for number in range(gold.num_answer):
            with constant_except(reference.get_submodule(layer), first_shifted(gold) + number):
                (tokens,) = plain_scores(reference, type(example)(0, (gold,), (0,)))
            losses.append(-tokens[number])
    torch.stack(losses).mean().backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def estimates_of(model, loss, number, queries=50):
    """Some estimates that hardly have a bias."""
    return [estimate_at(model, loss, step, queries=queries, scale=0.02) for step in range(number)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layer", [0, 2, 3])
@each_family
def test_the_derivative_through_the_last_tokens_is_that_of_the_layer(family, layer, packed, examples):
    parts, batch = ModelParts(tiny_model(family, scale=1.5), packed, onednn=False), pack(examples)
    tuned, entering = tune_layer(parts, layer), parts.run(batch, 0, layer, None).detach()
    run = partial(parts.run, batch, layer, layer + 1, entering, norm=False)
    expected_output, expected = vjp(tuned, run)
    output, found = layers_vjp(parts, tuned, layer, layer + 1, batch, entering)
    # only the head reads the last layer's output
    read = batch.logit_positions if packed and layer == LAST else slice(None)
    torch.testing.assert_close(output[read], expected_output[read])
    at_needed = torch.randn(len(batch.logit_positions), parts.width, generator=torch.Generator().manual_seed(0))
    everywhere = torch.zeros_like(output)
    everywhere[batch.logit_positions, : parts.width] = at_needed
    _, total = found(at_needed).total(torch.zeros(2), identity, gathered_alone)
    for name, own in tuned.with_zeros(expected(everywhere)).items():
        torch.testing.assert_close(total[name], own, rtol=1e-4, atol=1e-5 * max(1.0, float(own.abs().max())))


@pytest.mark.parametrize(
    "family", [*(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gpt2", "gemma4_text")), "gemma3_text"]
)
def test_the_mean_is_the_gradient(family, examples):
    """In a middle layer: the gradient with the output constant at all positions that predict no answer token."""
    model, loss = tiny_loss(examples, family)
    expected = gradient_from_answers(model.parts.model, f"{model.parts.layers_path}.2", examples, model.tensors.names)
    estimates = estimates_of(model, loss, 25)
    assert estimates[0].loss == pytest.approx(float(plain_losses(model.parts.model, examples)[0]), rel=1e-5)
    assert_mean_is(expected, estimates)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"])
def test_in_the_last_layer_the_answers_have_the_whole_gradient(family, examples):
    model = tuned_model(family, LAST)
    expected = autograd_gradient(model.parts.model, examples, model.tensors.names)
    assert_mean_is(expected, estimates_of(model, batch_loss(model, examples), 20))


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("llama", 0),
        pytest.param("gemma3_text", 1, marks=pytest.mark.slow),
        pytest.param("llama", LAST, marks=pytest.mark.slow),
        ("gemma2", LAST),
    ],
)
def test_the_mean_with_a_loss_of_each_token_is_the_gradient_of_its_position(family, layer):
    """In the last layer this is the whole gradient."""
    examples, model = short_examples((6, 5)), tuned_model(family, layer, scale=1.5)
    loss = batch_loss(model, examples, AnswerLikelihood())
    value, whole = loss.gradient()
    names = model.tensors.names
    expected = gradient_of_tokens(model.parts.model, f"{model.parts.layers_path}.{layer}", examples, names)
    missing = flat({name: whole[name] - expected[name] for name in names}).norm() / flat(whole).norm()
    assert missing < 1e-4 if layer == LAST else missing > 0.1
    estimates = estimates_of(model, loss, 20, queries=20)
    assert estimates[0].loss == pytest.approx(value, rel=1e-5)
    assert_mean_is(expected, estimates)


SCOPES = [
    pytest.param(LayerScope("attention"), marks=pytest.mark.slow),
    LayerScope("mlp"),
    OutlierChannels(percent=10),
    pytest.param(OutlierChannels(percent=10, complement=True), marks=pytest.mark.slow),
    ActivationSubspace(rank=4),
    LoRA(rank=2),
]


@pytest.mark.parametrize("scope", SCOPES, ids=described)
def test_the_mean_is_the_gradient_of_every_scope_of_one_layer(scope, examples):
    model = tuned_model(layer=LAST, scope=scope)
    of_weights = autograd_gradient(model.parts.model, examples, model.tensors.names)
    expected = {name: of_master(tensor, of_weights[name]) for name, tensor in model.tensors.items()}
    assert_mean_is(expected, estimates_of(model, batch_loss(model, examples), 20))


def of_master(tensor, gradient):
    """The gradient of a master, from that of the weight."""
    if isinstance(tensor, Masked):
        return gradient.flatten()[tensor.index]
    return gradient @ tensor.basis if isinstance(tensor, Subspace) else gradient


@pytest.mark.parametrize(
    ("objective", "answers"),
    [
        (CandidateCrossEntropy(), (1, 1)),  # only the candidates' logits
        (CandidateCrossEntropy([1.0, 5.0]), (1, 1)),
        (CandidateCrossEntropy([1.0, 5.0]), (2, 3)),
        (AnswerLikelihood(), (2, 3)),
    ],
)
def test_the_mean_is_the_gradient_of_every_objective(objective, answers):
    model = tuned_model(layer=LAST)
    loss = batch_loss(model, short_examples(answers), objective)
    value, expected = loss.gradient()
    estimates = estimates_of(model, loss, 20)
    assert estimates[0].loss == pytest.approx(value, rel=1e-5)
    assert_mean_is(expected, estimates)


def test_the_bias_falls_with_the_square_of_the_scale(examples):
    """The noise is the same at every scale, so the estimates differ by their bias alone."""
    model = tuned_model(scale=1.5)
    loss = batch_loss(model, examples)
    far, near, nearest = (flat(estimate_at(model, loss, scale=scale).gradient) for scale in (0.4, 0.2, 0.1))
    first, second = far - near, near - nearest
    assert float(first @ second / second.square().sum()) == pytest.approx(4, abs=0.25)
    assert first.norm() > 0.005 * nearest.norm()  # far more than rounding


# ---- the estimate as a formula ---------------------------------------------------------------------------------------------


class Linear(LayerOutput):
    """Three rows whose losses are linear in their states; states are rounded to multiples of ``step``.

    The terms of the loss are those of the rows or, ``per_token``, those of the positions.
    """

    keys, counts, width, num_layers_above, whole_vocabulary = (7, 3, 11), (2, 1, 3), 4, 3, False
    compares_candidates = False
    row = torch.tensor([0, 0, 1, 2, 2, 2])

    def __init__(self, step=0.0, points_at_once=100, per_token=False):
        generator = torch.Generator().manual_seed(0)
        self.slope = torch.randn(6, 4, generator=generator)
        self.size = torch.tensor([0.5, 2.0, 1.0])[self.row, None]
        self.step, self.points_at_once, self.calls = step, points_at_once, []
        self.per_token, self.term = per_token, torch.arange(6) if per_token else self.row

    def losses(self, shifts):
        self.calls.append(len(shifts))
        products = (self.slope * self.applied(shifts)).sum(dim=-1)
        return torch.zeros(len(shifts), self.num_terms).index_add_(1, self.term, products)

    def applied(self, shifts):
        return (shifts / self.step).round() * self.step if self.step else shifts

    def gradient_from_output(self, estimate):
        return OutputGradient(1.0, {"output": estimate(self)[0]}, 2.0)


def estimate_of_output(output, step=0, **options):
    return LayerOutputPerturbation(**options).estimate(EstimatorContext(None, output, 5, step)).gradient["output"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("rounding", [0.0, 0.05])
@pytest.mark.parametrize(("at_once", "calls"), [(1, [1] * 14), (5, [4, 4, 4, 2]), (100, [14])])
def test_the_estimate_is_the_formula(rounding, at_once, calls, per_token):
    """With the shifts that rounding left, and the same however many points run together."""
    output, counts = Linear(rounding, at_once, per_token), (2, 1, 3)
    expected = torch.zeros(6, 4)
    for query in range(7):
        shift = 0.1 * output.size * row_noise(output.keys, counts, expected, 5, 3, query)
        ends = output.applied(shift) - output.applied(-shift)
        for term in range(output.num_terms):
            own = output.term == term
            slope = (output.slope[own] * ends[own]).sum()
            expected[own] += slope * ends[own] / (0.2 * output.size[own]) ** 2 / 7
    found = estimate_of_output(output, step=3, queries=7, scale=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert output.calls == calls


@pytest.mark.parametrize(("above", "queries"), [(0, 4), (1, 4), (2, 8), (4, 16), (20, 16)])
def test_candidates_near_the_end_of_the_model_take_fewer_queries(above, queries):
    class WithDirection(Linear):
        num_layers_above, compares_candidates = above, True

        def token_shifts(self, number, change):
            return torch.ones(1, 6, 4)

    output = WithDirection()
    estimate_of_output(output)
    assert sum(output.calls) == 2 * (1 + queries)
    output.compares_candidates, output.calls = False, []
    estimate_of_output(output)
    assert sum(output.calls) == 2 * (1 + 16)
    noise_alone = Linear()
    noise_alone.num_layers_above, noise_alone.compares_candidates = above, True
    estimate_of_output(noise_alone)
    assert sum(noise_alone.calls) == 2 * 16


def test_the_noise_of_a_row_is_its_own():
    """Independent of the other rows, and another one for each row, query and step."""
    like = torch.empty(6, 4)
    whole = row_noise((7, 3, 11), (2, 1, 3), like, 0, 0, 0)
    alone = row_noise((11,), (3,), like[:3], 0, 0, 0)
    assert torch.equal(whole[3:], alone)
    others = [row_noise((11,), (3,), like[:3], *key) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    others += [row_noise((key,), (3,), like[:3], 0, 0, 0) for key in (7, -1, -12)]
    assert len({tuple(noise.flatten().tolist()) for noise in [alone, *others]}) == 7


@pytest.mark.parametrize(("per_token", "entries"), [(False, (8, 4, 12)), (True, (4,) * 6)])
def test_the_mean_of_a_linear_loss_is_its_slope(per_token, entries):
    """The relative variance is that of theory: (d + 1) / q for a term of the loss that d entries are measured by."""
    output = Linear(per_token=per_token)
    found = torch.stack([estimate_of_output(output, step, queries=25) for step in range(200)])
    error = found.std(dim=0) / 200**0.5
    assert ((found.mean(dim=0) - output.slope) / error).square().mean().sqrt() < 1.3
    for term, number in enumerate(entries):
        own, slope = found[:, output.term == term], output.slope[output.term == term]
        variance = (own - slope).square().sum(dim=(1, 2)).mean() / slope.square().sum()
        assert float(variance) == pytest.approx((number + 1) / 25, rel=0.15)


# ---- bfloat16 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_the_estimate_is_about_that_of_float32(family, examples):
    half = tiny_model(family, scale=1.0).to(torch.bfloat16)
    gradients = []
    for model in (copy.deepcopy(half), copy.deepcopy(half).float()):
        tuned = tuned_model(model)
        found = estimate_at(tuned, batch_loss(tuned, examples), scale=0.2)
        assert all(part.dtype == torch.float32 for part in found.gradient.values())
        gradients.append(flat(found.gradient))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98
    assert float(gradients[0].norm() / gradients[1].norm()) == pytest.approx(1, abs=0.05)


@each_family
@pytest.mark.parametrize("layer", [2, 3])
def test_in_half_precision_few_layers_above_run_in_float32(family, layer, one_token_examples, monkeypatch):
    half = tiny_model(family, scale=1.0).to(torch.bfloat16)

    def gradient(model):
        tuned = tuned_model(copy.deepcopy(model), layer)
        return flat(estimate_at(tuned, batch_loss(tuned, one_token_examples), tokens=None).gradient)

    found, expected = gradient(half), gradient(half.float())
    assert F.cosine_similarity(found, expected, dim=0) > 0.99
    half.to(torch.bfloat16)
    monkeypatch.setattr("slzo.zo.forward.MOST_FLOAT32", -1)
    assert not torch.equal(found, gradient(half))


def test_shifts_of_layers_that_run_in_float32_are_not_rounded(one_token_examples):
    parts = ModelParts(tiny_model(scale=1.0).to(torch.bfloat16), onednn=False)
    weights = {name: tensor.clone() for name, tensor in parts.model.named_parameters()}
    output, _ = layer_output(parts, 2, pack(one_token_examples), CandidateCrossEntropy())
    shifts = 1e-4 * output.size * torch.ones(1, len(output.size), output.width)
    assert torch.equal(output.applied(shifts), shifts)
    assert not torch.equal(output.losses(shifts), output.losses(-shifts))
    # the model itself stays in half precision
    assert all(torch.equal(tensor, weights[name]) for name, tensor in parts.model.named_parameters())
    assert {tensor.dtype for tensor in parts.model.parameters()} == {torch.bfloat16}


def test_weights_between_decoder_and_head_keep_the_model_in_half_precision():
    model = tiny_model(scale=1.0).to(torch.bfloat16)
    model.transform = torch.nn.Linear(2, 2)
    parts = ModelParts(model, onednn=False)
    assert parts.in_float32(2) is parts


def test_in_bfloat16_what_rounding_left_counts(examples):
    parts = ModelParts(tiny_model(scale=1.0).to(torch.bfloat16), onednn=False)
    batch = pack(examples)
    output, leaving = layer_output(parts, 2, batch, CandidateCrossEntropy())
    torch.manual_seed(0)
    shifts = 0.02 * output.size * torch.randn(2, len(output.size), output.width)
    applied = output.applied(shifts)
    here = leaving[batch.logit_positions]
    assert torch.equal(applied, (here.float() + shifts).bfloat16().float() - here.float())
    assert 0.01 < (applied - shifts).norm() / shifts.norm() < 1
    # a shift that is rounded already runs the same
    assert torch.equal(output.losses(applied), output.losses(shifts))


# ---- parts, order and processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()], ids=described)
def test_a_batch_in_parts_has_the_same_estimate(objective, layer, examples, monkeypatch):
    """Also one in another order: the noise belongs to the rows."""
    model, packed = tuned_model(layer=layer), pack(examples)
    options = {"queries": 3, "scale": 0.2}
    whole = estimate_at(model, batch_loss(model, packed, objective), **options)
    seen = noted_runs(monkeypatch)
    found = estimate_at(model, batch_loss(model, packed, objective, max_tokens=40), **options)
    assert_same_estimate(found, whole)
    parts = [part.num_tokens for part in packed.cut(40)]
    assert len(parts) > 2
    # forward over all tokens, then for the derivative their keys and values, and the last tokens
    of_layer = [tokens for start, stop, tokens in seen if (start, stop) == (layer, layer + 1)]
    assert of_layer[::3] == of_layer[1::3] == parts
    assert all(few < part for few, part in zip(of_layer[2::3], parts, strict=True))
    for rows, max_tokens in ((packed, 1), (pack(examples[::-1]), None)):
        found = estimate_at(model, batch_loss(model, rows, objective, max_tokens=max_tokens), **options)
        assert_same_estimate(found, whole)
    other = estimate_at(model, batch_loss(model, packed, objective), step=1, **options)
    assert (flat(other.gradient) - flat(whole.gradient)).norm() > 0.1 * flat(whole.gradient).norm()


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()], ids=described)
@pytest.mark.parametrize("queries", [1, 6, 40])
@pytest.mark.parametrize("number", [2, 3])
def test_processes_divide_the_points(number, queries, objective, examples):
    model = tuned_model()
    if objective.only_gold:  # as in training
        examples = [EncodedExample(row.index, (row.sequences[row.gold[0]],), (0,)) for row in examples]
    num_terms = len(pack(examples).logit_positions)
    whole = estimate_at(model, batch_loss(model, examples, objective), queries=queries)

    def run(processes):
        added = []

        def sum_points(losses):
            added.append(losses.clone())
            return processes.sum_points(losses)

        noted = replace(processes, sum_points=sum_points)
        return added, estimate_at(model, batch_loss(model, examples, objective, noted), queries=queries)

    added, found = zip(*on_grid(1, number, run), strict=True)
    evaluated = [torch.cat(own) for own in added]
    assert ((torch.stack(evaluated) != 0).sum(dim=0) == 1).all()  # each loss is computed by one process
    assert evaluated[0].shape == (2 * queries, num_terms)
    for estimate in found:
        assert_same_estimate(estimate, whole)
        assert same_tensors(estimate.gradient, found[0].gradient)


def test_processes_divide_the_rows(examples):
    """Halves of other sizes and weights."""
    model, objective = tuned_model(), AnswerLikelihood()
    whole = estimate_at(model, batch_loss(model, examples, objective), queries=4)
    halves = (examples[:5], examples[5:])

    def run(processes):
        return estimate_at(model, batch_loss(model, halves[processes.rank], objective, processes), queries=4)

    found = on_grid(2, 1, run)
    for estimate in found:
        assert_same_estimate(estimate, whole)
    assert same_tensors(found[0].gradient, found[1].gradient)


# ---- cost ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 60])
def test_only_the_layers_above_run_for_a_query(queries, examples, monkeypatch):
    """Over tokens of answers alone; the other tokens run once a step, however many queries there are."""
    model, packed = tuned_model(layer=1), pack(examples)
    loss = batch_loss(model, packed)
    seen = noted_runs(monkeypatch)
    found = estimate_at(model, loss, queries=queries)
    # all candidates of an example share the token before them; the last token of each predicts nothing
    shifted = sum(1 + sum(sequence.num_answer - 1 for sequence in example.sequences) for example in examples)
    assert shifted < packed.num_tokens
    # the tuned layer runs forward; for its derivative, keys and values of all tokens, and the tokens of answers
    assert [tokens for start, stop, tokens in seen if (start, stop) == (1, 2)] == 2 * [packed.num_tokens] + [shifted]
    # the last layer needs only keys and values of most tokens
    assert [tokens for start, stop, tokens in seen if (start, stop) in ((2, 3), (3, 4))] == 2 * [packed.num_tokens]
    first, *of_queries = [tokens for start, stop, tokens in seen if (start, stop) == (2, 4)]
    assert first == shifted
    assert sum(of_queries) == 2 * queries * shifted
    assert max(of_queries) <= max(_FEWEST_TOKENS, 2 * shifted)
    assert Counter(start for start, _, _ in seen) == {1: 3, 2: 2 + len(of_queries), 3: 1}
    # in passes of three layers: the tuned one, then the layer above over all tokens, and three and two over those of answers
    share = shifted / packed.num_tokens
    cost = 1 + 3 * share + 1 + 2 * share + 2 * queries * share * 2
    assert found.num_evaluations == pytest.approx(cost / (2 + (share if share < 0.7 else 1)))


class OfRows(AnswerLikelihood):
    """The same loss, which does not say that it is a sum over positions."""

    def row_losses(self, logits, batch, selected):
        return super().row_losses(logits, batch, selected)._replace(by_position=None)


@pytest.mark.parametrize(
    ("rows", "objective", "given", "queries"),
    [
        ("one_token_examples", CandidateCrossEntropy(), {}, 16),
        ("examples", CandidateCrossEntropy(), {}, 1),
        ("one_token_examples", AnswerLikelihood(), {}, 1),
        ("examples", AnswerLikelihood(), {}, 1),
        ("examples", OfRows(), {}, 4),
        ("examples", CandidateCrossEntropy(), {"queries": 5}, 5),
        ("examples", AnswerLikelihood(), {"queries": 5}, 5),
    ],
)
def test_logits_of_the_whole_vocabulary_take_fewer_queries(rows, objective, given, queries, request, monkeypatch):
    """And a loss of each token takes the fewest."""
    model, evaluated, losses = tuned_model(), [], PackedLayerOutput.losses
    loss = batch_loss(model, request.getfixturevalue(rows), objective)
    expected = estimate_at(model, loss, **{**given, "queries": queries})

    def noted(self, shifts):
        evaluated.append(len(shifts))
        return losses(self, shifts)

    monkeypatch.setattr(PackedLayerOutput, "losses", noted)
    assert same_tensors(estimate_at(model, loss, **{"queries": None, **given}).gradient, expected.gradient)
    assert sum(evaluated) == 2 * queries


def test_all_parts_of_a_batch_take_as_many_queries(examples, monkeypatch):
    """Also rows of one token alone, whose positions are as many as the rows."""
    model, evaluated, losses = tuned_model(), {}, PackedLayerOutput.losses
    loss = batch_loss(model, examples, max_tokens=1)
    expected = estimate_at(model, loss, queries=1)

    def noted(self, shifts):
        assert self.per_token
        evaluated[self.keys] = evaluated.get(self.keys, 0) + len(shifts)
        return losses(self, shifts)

    monkeypatch.setattr(PackedLayerOutput, "losses", noted)
    assert same_tensors(estimate_at(model, loss).gradient, expected.gradient)
    assert evaluated == {(example.index,): 2 for example in examples}


def test_an_estimate_leaves_nothing_behind(examples):
    model = tuned_model()
    loss = batch_loss(model, examples)
    weights = {name: tensor.clone() for name, tensor in model.parts.model.named_parameters()}
    first, other, again = (estimate_at(model, loss, step, queries=2) for step in (0, 1, 0))
    assert same_tensors(first.gradient, again.gradient)
    assert not same_tensors(first.gradient, other.gradient)
    assert same_tensors(dict(model.parts.model.named_parameters()), weights)
    assert not any(tensor.requires_grad for tensor in model.parts.model.parameters())
    assert all(master.grad is None for master in model.tensors.masters)


@pytest.mark.parametrize("where", ["everywhere", "at a point"])
def test_a_loss_that_is_not_finite_has_no_gradient(where, examples, monkeypatch):
    model = tuned_model()
    loss = batch_loss(model, examples)
    if where == "everywhere":
        model.parts.model.lm_head.weight[5, 5] = math.nan
    else:
        losses = PackedLayerOutput.losses
        monkeypatch.setattr(
            PackedLayerOutput, "losses", lambda *args: losses(*args).index_fill(0, torch.tensor(1), math.inf)
        )
    found = estimate_at(model, loss, queries=2)
    assert not found.finite


def test_a_layer_that_adds_nothing_has_an_estimate(examples):
    model = tiny_model(scale=1.0)
    layer = model.model.layers[2]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    tuned = tuned_layer(ModelParts(model, onednn=False), 2)
    estimate = LayerOutputPerturbation(queries=4).estimate(
        EstimatorContext(tuned.tensors, batch_loss(tuned, examples), 0, 0)
    )
    assert estimate.finite
    assert flat(estimate.gradient).abs().max() > 0
