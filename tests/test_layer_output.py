"""Perturbing the output of the tuned layer: against plain forward passes, against autograd, and who may use it."""

import copy
import json
import math
import random
import re
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import (
    FAMILIES,
    autograd_gradient,
    batch_loss,
    cnn,
    described,
    error_line,
    flat,
    image_loss,
    images,
    layer_forward,
    packed_prompts,
    plain_losses,
    plain_scores,
    random_example,
    same_tensors,
    slzo_error,
    tiny_loss,
    tiny_model,
    tuned_layer,
)
from torch.nn import functional as F

from slzo.__main__ import main
from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.losses import LossSum
from slzo.batches.packing import pack
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA, LayerOutputPerturbation, Request
from slzo.zo.estimators.base import LayerOutput, OutputGradient
from slzo.zo.layer_output import PackedLayerOutput
from slzo.zo.noise import row_noise
from slzo.zo.objectives import (
    AnswerF1,
    AnswerLikelihood,
    CandidateCrossEntropy,
    CandidateErrors,
    CandidateObjective,
    LogitObjective,
    Reward,
)
from slzo.zo.processes import Processes
from slzo.zo.scopes import (
    ActivationSubspace,
    AllParameters,
    LayerScope,
    LoRA,
    OutlierChannels,
    PrefixTuning,
    SmallestWeights,
)
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tensors import Masked, Subspace
from slzo.zo.tuned_model import TunedModel
from tiny import VOCABULARY

pytestmark = pytest.mark.fast

LAST = 3  # the last layer of a tiny model


def tuned_model(family="llama", layer=2, scope=None, scale=1.0, packed=True):
    """A tiny model with one layer, or a scope of it, tuned; LoRA's second matrices are not 0."""
    model = tiny_model(family, scale=scale) if isinstance(family, str) else family
    parts, scope = ModelParts(model, packed, onednn=False), LayerScope() if scope is None else scope
    tuned = TunedModel.from_scope(parts, scope, layer, prompts=packed_prompts, engine=Engine(cache_gb=0))
    if isinstance(scope, LoRA):
        torch.manual_seed(0)
        tuned.tensors.load(
            {name: 0.3 * torch.randn_like(master) for name, master in tuned.tensors.named_masters().items()}
        )
    return tuned


def estimate_at(model, loss, step=0, seed=0, **options):
    """One estimate."""
    return LayerOutputPerturbation(**options).estimate(Request(model.tensors, loss, seed, step))


def noted_runs(monkeypatch):
    """Notes first layer, last layer + 1 and number of tokens of every forward pass from now on."""
    seen, run = [], ModelParts.run

    def noted(self, batch, start, stop, *args, **options):
        seen.append((start, stop, batch.input_ids.numel()))
        return run(self, batch, start, stop, *args, **options)

    monkeypatch.setattr(ModelParts, "run", noted)
    return seen


def short_examples(answers=(2, 1)):
    """Few tokens: with noise at all positions an estimate has as many directions as states have entries."""
    generator = random.Random(1)
    return [random_example(generator, i, 4 + i, answers, i % 2) for i in range(4)]


# ---- losses at a shifted output --------------------------------------------------------------------------------------------


def layer_output(parts, layer, batch, objective):
    """What a layer computes for a batch, with shifts at answer positions, and its output."""
    forward = layer_forward(parts, layer)
    entering = forward.prefix(batch)
    leaving = parts.run(batch, layer, layer + 1, entering, norm=False)
    return PackedLayerOutput(forward, batch, entering, leaving, objective, "answer"), leaving


def first_shifted(sequence):
    """The first position of a sequence that predicts an answer token."""
    return len(sequence.ids) - sequence.num_answer - 1


def plain_row_losses(model, layer, examples, shifts, objective):
    """What each example adds to the loss, with the layer's output shifted at each sequence's answer positions.

    ``shifts`` has, for each example and candidate, the shift of the positions that predict the answer, shape (answer, width).
    """
    found = []
    for example, own in zip(examples, shifts, strict=True):
        scores = []
        for sequence, shift in zip(example.sequences, own, strict=True):

            def add(module, inputs, output, sequence=sequence, shift=shift):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden, start = hidden.clone(), first_shifted(sequence)
                hidden[0, start : start + len(shift)] += shift
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = model.get_submodule(layer).register_forward_hook(add)
            (tokens,) = plain_scores(model, type(example)(0, (sequence,), (0,)))
            handle.remove()
            scores.append(tokens)
        gold = example.gold[0]
        if isinstance(objective, AnswerLikelihood):
            found.append(-scores[gold].sum())
        else:
            means = torch.stack([tokens.mean() for tokens in scores])
            found.append(F.cross_entropy(means[None], torch.tensor([gold])))
    return torch.stack(found)


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()], ids=described)
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_at_a_shifted_output(family, layer, objective, examples):
    model = tiny_model(family, scale=1.5, attn_implementation="eager")
    parts, batch = ModelParts(tiny_model(family, scale=1.5), onednn=False), pack(examples)
    output, _ = layer_output(parts, layer, batch, objective)
    torch.manual_seed(1)
    shifts = 0.3 * torch.randn(3, len(output.row), output.width)
    losses = output.losses(shifts)
    assert torch.equal(output.applied(shifts), shifts)
    where = {int(position): number for number, position in enumerate(output.positions)}
    for number in range(3):
        of_examples, sequences = [], iter(sequences_of(batch))
        for example in examples:
            own = []
            for sequence in example.sequences:
                positions = next(sequences)[-sequence.num_answer :]
                own.append(shifts[number][[where[position] for position in positions]])
            of_examples.append(own)
        expected = plain_row_losses(model, f"{parts.layers_path}.{layer}", examples, of_examples, objective)
        torch.testing.assert_close(losses[number], expected.float(), rtol=2e-4, atol=2e-4)


def sequences_of(batch):
    """Packed positions of the candidates' sequences, in the order of the candidates."""
    last = batch.needed[batch.token_needed[batch.candidate_length.cumsum(0) - 1]]
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
    batch, losses = pack(conversations()), []
    for packed in (True, False):
        parts = ModelParts(tiny_model(family, scale=1.5), packed, onednn=False)
        output, _ = layer_output(parts, layer, batch, AnswerLikelihood())
        torch.manual_seed(1)
        losses.append(output.losses(0.3 * torch.randn(3, len(output.row), output.width)))
    torch.testing.assert_close(*losses, rtol=2e-4, atol=2e-4)
    assert losses[0].std(dim=0).min() > 1e-3  # the shifts reach every row


@pytest.mark.parametrize("layer", [0, 2])
def test_the_size_is_that_of_what_the_layer_adds(layer, examples):
    model = tiny_model(output_hidden_states=True)
    output, _ = layer_output(ModelParts(model, onednn=False), layer, pack(examples), CandidateCrossEntropy())
    of_row = output.size.split(torch.bincount(output.row).tolist())
    for example, sizes in zip(examples[:4], of_row, strict=False):  # answers of one token share their position
        states = model(input_ids=torch.tensor([example.sequences[0].ids[:-1]])).hidden_states
        added = states[layer + 1][0, -1] - states[layer][0, -1]
        assert float(sizes) == pytest.approx(float(added.square().mean().sqrt()), rel=1e-4)


# ---- against autograd ------------------------------------------------------------------------------------------------------


def gradient_from_answers(model, layer, examples, names):
    """The gradient of the cross-entropy with the layer's output detached at all positions that predict no answer token."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    parameters = dict(reference.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    losses = []
    for example in examples:
        scores = []
        for sequence in example.sequences:

            def detach(module, inputs, output, sequence=sequence):
                hidden = output[0] if isinstance(output, tuple) else output
                start = first_shifted(sequence)
                hidden = torch.cat([hidden[:, :start].detach(), hidden[:, start:]], dim=1)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = reference.get_submodule(layer).register_forward_hook(detach)
            (tokens,) = plain_scores(reference, type(example)(0, (sequence,), (0,)))
            handle.remove()
            scores.append(tokens.mean())
        losses.append(F.cross_entropy(torch.stack(scores)[None], torch.tensor([example.gold[0]])))
    torch.stack(losses).mean().backward()
    return {name: parameters[name].grad for name in names}


def estimates_of(model, loss, number, queries=50, positions="answer"):
    """Some estimates that hardly have a bias."""
    return [estimate_at(model, loss, step, queries=queries, scale=0.02, positions=positions) for step in range(number)]


def assert_mean_is(expected, estimates):
    """The mean differs from a gradient by noise alone, and the noise is small."""
    assert all(one.gradient.keys() == expected.keys() for one in estimates)
    means = {}
    for name, wanted in expected.items():
        found = torch.stack([one.gradient[name] for one in estimates]).double()
        means[name], error = found.mean(dim=0), found.std(dim=0) / len(found) ** 0.5
        distance = ((means[name] - wanted) / error.clamp(min=1e-7 * float(wanted.abs().max()))).square().mean().sqrt()
        assert distance < 2, name  # about 1 if the differences are noise
    mean, wanted = flat(means), flat(expected).double()
    assert F.cosine_similarity(mean, wanted, dim=0) > 0.9
    assert float(mean @ wanted / wanted.square().sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_mean_is_the_gradient(family, examples):
    """With answer positions in a middle layer: the gradient with the output constant at all other positions."""
    model, loss = tiny_loss(examples, family)
    expected = gradient_from_answers(model.parts.model, f"{model.parts.layers_path}.2", examples, model.tensors.names)
    estimates = estimates_of(model, loss, 40)
    assert estimates[0].loss == pytest.approx(float(plain_losses(model.parts.model, examples)[0]), rel=1e-5)
    assert_mean_is(expected, estimates)


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("gpt2", 2)])
def test_the_mean_with_noise_at_all_positions_is_the_whole_gradient(family, layer):
    examples, model = short_examples(), tuned_model(family, layer)
    expected = autograd_gradient(model.parts.model, examples, model.tensors.names)
    assert_mean_is(expected, estimates_of(model, batch_loss(model, examples), 20, queries=100, positions="all"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_in_the_last_layer_the_answers_have_the_whole_gradient(family, examples):
    model = tuned_model(family, LAST)
    expected = autograd_gradient(model.parts.model, examples, model.tensors.names)
    assert_mean_is(expected, estimates_of(model, batch_loss(model, examples), 30))


SCOPES = [
    LayerScope("attention"),
    LayerScope("mlp", norms=False),
    OutlierChannels(percent=10),
    OutlierChannels(percent=10, complement=True),
    ActivationSubspace(rank=4, num_sequences=8),
    LoRA(rank=2),
]


@pytest.mark.parametrize("scope", SCOPES, ids=described)
def test_the_mean_is_the_gradient_of_every_scope_of_one_layer(scope, examples):
    model = tuned_model(layer=LAST, scope=scope)
    of_weights = autograd_gradient(model.parts.model, examples, model.tensors.names)
    expected = {name: of_master(tensor, of_weights[name]) for name, tensor in model.tensors.items()}
    assert_mean_is(expected, estimates_of(model, batch_loss(model, examples), 30))


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
    estimates = estimates_of(model, loss, 30)
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
    """Three rows whose losses are linear in their states; states are rounded to multiples of ``step``."""

    keys, width = (7, 3, 11), 4
    row = torch.tensor([0, 0, 1, 2, 2, 2])

    def __init__(self, step=0.0, points_at_once=100):
        generator = torch.Generator().manual_seed(0)
        self.slope = torch.randn(6, 4, generator=generator)
        self.size = torch.tensor([0.5, 2.0, 1.0])[self.row, None]
        self.step, self.points_at_once, self.calls = step, points_at_once, []

    def losses(self, shifts):
        self.calls.append(len(shifts))
        products = (self.slope * self.applied(shifts)).sum(dim=-1)
        return torch.zeros(len(shifts), 3).index_add_(1, self.row, products)

    def applied(self, shifts):
        return (shifts / self.step).round() * self.step if self.step else shifts

    def gradient_from_output(self, estimate, positions):
        return OutputGradient(1.0, {"output": estimate(self)}, 2.0)


def estimate_of_output(output, step=0, **options):
    return LayerOutputPerturbation(**options).estimate(Request(None, output, 5, step)).gradient["output"]


@pytest.mark.parametrize("rounding", [0.0, 0.05])
@pytest.mark.parametrize(("at_once", "calls"), [(1, [1] * 14), (5, [4, 4, 4, 2]), (100, [14])])
def test_the_estimate_is_the_formula(rounding, at_once, calls):
    """With the shifts that rounding left, and the same however many points run together."""
    output, counts = Linear(rounding, at_once), (2, 1, 3)
    expected = torch.zeros(6, 4)
    for query in range(7):
        shift = 0.1 * output.size * row_noise(output.keys, counts, expected, 5, 3, query)
        ends = output.applied(shift) - output.applied(-shift)
        for row in range(3):
            own = output.row == row
            slope = (output.slope[own] * ends[own]).sum()
            expected[own] += slope * ends[own] / (0.2 * output.size[own]) ** 2 / 7
    found = estimate_of_output(output, step=3, queries=7, scale=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert output.calls == calls


def test_the_noise_of_a_row_is_its_own():
    """Independent of the other rows, and another one for each row, query and step."""
    like = torch.empty(6, 4)
    whole = row_noise((7, 3, 11), (2, 1, 3), like, 0, 0, 0)
    alone = row_noise((11,), (3,), like[:3], 0, 0, 0)
    assert torch.equal(whole[3:], alone)
    others = [row_noise((11,), (3,), like[:3], *key) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    others += [row_noise((key,), (3,), like[:3], 0, 0, 0) for key in (7, -1, -12)]
    assert len({tuple(noise.flatten().tolist()) for noise in [alone, *others]}) == 7


def test_the_mean_of_a_linear_loss_is_its_slope():
    """The relative variance is that of theory: (d + 1) / q for a row of d entries."""
    output = Linear()
    found = torch.stack([estimate_of_output(output, step, queries=25) for step in range(200)])
    error = found.std(dim=0) / 200**0.5
    assert ((found.mean(dim=0) - output.slope) / error).square().mean().sqrt() < 1.3
    for row, entries in enumerate((8, 4, 12)):
        own, slope = found[:, output.row == row], output.slope[output.row == row]
        variance = (own - slope).square().sum(dim=(1, 2)).mean() / slope.square().sum()
        assert float(variance) == pytest.approx((entries + 1) / 25, rel=0.15)


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


def test_in_bfloat16_what_rounding_left_counts(examples):
    parts = ModelParts(tiny_model(scale=1.0).to(torch.bfloat16), onednn=False)
    output, leaving = layer_output(parts, 2, pack(examples), CandidateCrossEntropy())
    torch.manual_seed(0)
    shifts = 0.02 * output.size * torch.randn(2, len(output.row), output.width)
    applied = output.applied(shifts)
    here = leaving[output.positions]
    assert torch.equal(applied, (here.float() + shifts).bfloat16().float() - here.float())
    assert 0.01 < (applied - shifts).norm() / shifts.norm() < 1
    # a shift that is rounded already runs the same
    assert torch.equal(output.losses(applied), output.losses(shifts))


# ---- parts, order and processes --------------------------------------------------------------------------------------------


def assert_same_estimate(found, expected):
    """Up to rounding of the losses, which is divided by the scale."""
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    one, other = flat(found.gradient), flat(expected.gradient)
    assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()], ids=described)
def test_a_batch_in_parts_has_the_same_estimate(objective, layer, positions, examples, monkeypatch):
    """Also one in another order: the noise belongs to the rows."""
    model, packed = tuned_model(layer=layer), pack(examples)
    options = {"queries": 3, "scale": 0.2, "positions": positions}
    whole = estimate_at(model, batch_loss(model, packed, objective), **options)
    seen = noted_runs(monkeypatch)
    found = estimate_at(model, batch_loss(model, packed, objective, max_tokens=40), **options)
    assert_same_estimate(found, whole)
    parts = [part.num_tokens for part in packed.cut(40)]
    assert len(parts) > 2
    assert [tokens for start, stop, tokens in seen if (start, stop) == (layer, layer + 1)] == parts
    for rows, max_tokens in ((packed, 1), (pack(examples[::-1]), None)):
        found = estimate_at(model, batch_loss(model, rows, objective, max_tokens=max_tokens), **options)
        assert_same_estimate(found, whole)
    other = estimate_at(model, batch_loss(model, packed, objective), step=1, **options)
    assert (flat(other.gradient) - flat(whole.gradient)).norm() > 0.1 * flat(whole.gradient).norm()


def on_processes(number, run):
    """What each process adds to every sum, and what ``run(rank, all_reduce_sum)`` returns for each, one after the other.

    In a first round nobody knows the sums, so nothing that is added to a sum may depend on an earlier one.
    """
    added = []
    for rank in range(number):
        own = []

        def note(tensor, own=own):
            own.append(tensor.clone())
            return tensor

        run(rank, note)
        added.append(own)
    sums = [torch.stack(parts).sum(dim=0) for parts in zip(*added, strict=True)]

    def with_sums(rank):
        known = iter(sums)
        found = run(rank, lambda tensor: next(known).clone())
        assert next(known, None) is None
        return found

    return added, [with_sums(rank) for rank in range(number)]


@pytest.mark.parametrize("queries", [1, 6, 40])
@pytest.mark.parametrize("number", [2, 3])
def test_processes_divide_the_points(number, queries, examples):
    model = tuned_model()
    whole = estimate_at(model, batch_loss(model, examples), queries=queries)

    def run(rank, all_reduce_sum):
        processes = Processes(number, rank, "directions", all_reduce_sum)
        return estimate_at(model, batch_loss(model, examples, processes=processes), queries=queries)

    added, found = on_processes(number, run)
    evaluated = [torch.cat(own) for own in added]
    assert ((torch.stack(evaluated) != 0).sum(dim=0) == 1).all()  # each loss is computed by one process
    assert len(evaluated[0]) == 2 * queries
    for estimate in found:
        assert_same_estimate(estimate, whole)
        assert same_tensors(estimate.gradient, found[0].gradient)


def test_processes_divide_the_rows(examples):
    """Halves of other sizes and weights."""
    model, objective = tuned_model(), AnswerLikelihood()
    whole = estimate_at(model, batch_loss(model, examples, objective), queries=4)
    halves = (examples[:5], examples[5:])

    def run(rank, all_reduce_sum):
        processes = Processes(2, rank, "rows", all_reduce_sum)
        return estimate_at(model, batch_loss(model, halves[rank], objective, processes), queries=4)

    _, found = on_processes(2, run)
    for estimate in found:
        assert_same_estimate(estimate, whole)
    assert same_tensors(found[0].gradient, found[1].gradient)


# ---- cost ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 60])
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_only_the_layers_above_run_for_a_query(queries, positions, examples, monkeypatch):
    """With answer positions over their tokens alone; the tuned layer runs once a step, however many queries there are."""
    model, packed = tuned_model(layer=1), pack(examples)
    loss = batch_loss(model, packed)
    seen = noted_runs(monkeypatch)
    found = estimate_at(model, loss, queries=queries, positions=positions)
    # all candidates of an example share the token before them; the last token of each predicts nothing
    answer = sum(1 + sum(sequence.num_answer - 1 for sequence in example.sequences) for example in examples)
    shifted = answer if positions == "answer" else packed.num_tokens
    assert answer < packed.num_tokens
    assert [tokens for start, _, tokens in seen if start == 1] == [packed.num_tokens]
    first, *of_queries = [tokens for start, stop, tokens in seen if (start, stop) == (2, 4)]
    assert first == packed.num_tokens
    assert sum(of_queries) == 2 * queries * shifted
    assert max(of_queries) <= max(512, 2 * shifted)
    assert Counter(start for start, _, _ in seen) == {1: 1, 2: 1 + len(of_queries)}
    # in passes of three layers: three of the tuned one, whose derivative costs two, and those of the two above
    cost = (3 + 2 + 2 * queries * shifted / packed.num_tokens * 2) / 3
    assert found.num_evaluations == round(cost)


@pytest.mark.parametrize(
    ("rows", "objective", "given", "queries"),
    [
        ("one_token_examples", CandidateCrossEntropy(), None, 16),
        ("examples", CandidateCrossEntropy(), None, 4),
        ("one_token_examples", AnswerLikelihood(), None, 4),
        ("examples", CandidateCrossEntropy(), 5, 5),
    ],
)
def test_logits_of_the_whole_vocabulary_take_fewer_queries(rows, objective, given, queries, request, monkeypatch):
    model, evaluated, losses = tuned_model(), [], PackedLayerOutput.losses
    loss = batch_loss(model, request.getfixturevalue(rows), objective)
    expected = estimate_at(model, loss, queries=queries)

    def noted(self, shifts):
        evaluated.append(len(shifts))
        return losses(self, shifts)

    monkeypatch.setattr(PackedLayerOutput, "losses", noted)
    assert same_tensors(estimate_at(model, loss, queries=given).gradient, expected.gradient)
    assert sum(evaluated) == 2 * queries


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
    assert found.gradient == {}


# ---- objectives ------------------------------------------------------------------------------------------------------------


class Margins(CandidateObjective):
    """A user's objective of scores: by how much each wrong candidate is closer than 1 to the right one."""

    def of_scores(self, scores, batch):
        right = scores[batch.right][batch.candidate_example]  # one in each example
        wrong = (1 + scores - right).relu()[~batch.right]
        return LossSum(wrong.sum(), torch.tensor(float(batch.num_examples)))


class Certainty(LogitObjective):
    """A user's objective of logits, with another weight for each example."""

    def of_logits(self, logits, batch, selected):
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        return LossSum(entropy.sum(), torch.tensor(float(batch.needed.numel())))


WEIGHTED = CandidateCrossEntropy([1.0, 5.0])
BUILT_IN = [CandidateCrossEntropy(), WEIGHTED, AnswerLikelihood(), CandidateErrors()]


def plain_loss(objective, logits, example):
    """Total and weight of an example alone, from the logits before its answer tokens."""
    batch = pack([example])
    if objective not in BUILT_IN:
        return objective.of_logits(logits, batch, False)
    tokens = logits.log_softmax(-1)[batch.token_needed, batch.token_id].split(batch.candidate_length.tolist())
    means = torch.stack([own.mean() for own in tokens])
    if not example.gold:
        return torch.zeros(2)
    if isinstance(objective, AnswerLikelihood):
        return -tokens[example.gold[0]].sum(), torch.tensor(float(len(tokens[example.gold[0]])))
    if isinstance(objective, CandidateErrors):
        return torch.tensor([float(int(means.argmax()) not in example.gold), 1.0])
    weight = torch.tensor(objective.class_weights[example.gold[0]] if objective is WEIGHTED else 1.0)
    return -weight * means.log_softmax(0)[example.gold[0]], weight


ANSWERS = {
    "one token": [(1, 1), (1, 1), (1, 1)],
    "several tokens": [(3, 2), (1, 4), (2, 2)],
    "other candidates": [(3, 2), (1,), (2, 1, 4)],
}
CASES = [*product([*BUILT_IN, Margins(), Certainty()], ANSWERS)]
CASES.remove((WEIGHTED, "other candidates"))  # they need the same candidates in all rows


@pytest.mark.parametrize(
    ("objective", "answers"), CASES, ids=lambda value: value if isinstance(value, str) else value.describe()
)
def test_the_losses_of_rows_are_those_of_each_row_alone(objective, answers):
    generator = random.Random(1)
    examples = [random_example(generator, i, 5, own, i % len(own)) for i, own in enumerate(ANSWERS[answers])]
    if objective in BUILT_IN:  # without a label it has no weight; two right candidates are fine
        examples += [EncodedExample(7 + i, examples[0].sequences, gold) for i, gold in enumerate(((), (0, 1)))]
    batch = pack(examples)
    logits = 2 * torch.randn(3, len(batch.needed), VOCABULARY, generator=torch.Generator().manual_seed(0))
    sizes = [len(pack([example]).needed) for example in examples]
    expected = torch.stack(
        [
            torch.stack(
                [torch.stack([*plain_loss(objective, *one)]) for one in zip(point.split(sizes), examples, strict=True)]
            )
            for point in logits
        ]
    )
    inputs = [(logits, False)]
    if not objective.needs_vocabulary(batch):  # scores without the normalizer, which cancels
        inputs.append((logits[..., batch.choice_ids], True))
    assert len(inputs) == (2 if answers == "one token" and isinstance(objective, CandidateObjective) else 1)
    for given, selected in inputs:
        totals, weights = objective.of_rows(given, batch, selected)
        torch.testing.assert_close(torch.stack([totals, weights.expand_as(totals)], dim=-1), expected)
        for point, own in zip(given, expected, strict=True):
            torch.testing.assert_close(torch.stack([*objective.of_logits(point, batch, selected)]), own.sum(dim=0))


@pytest.mark.parametrize("objective", [CandidateErrors(), Margins(), Certainty()], ids=described)
@pytest.mark.parametrize("answers", [(1, 1), (2, 3)])
def test_an_objective_without_derivative_or_of_the_user_has_an_estimate(objective, answers):
    examples, model = short_examples(answers), tuned_model()
    found = estimate_at(model, batch_loss(model, examples, objective), scale=0.5)
    assert found.finite
    assert all(part.isfinite().all() for part in found.gradient.values())
    logits = model.parts.logits(pack(examples), 0, None)
    total, weight = objective.of_logits(logits, pack(examples), False)
    assert found.loss == pytest.approx(float(total / weight), rel=1e-4)
    if not isinstance(objective, CandidateErrors):  # the errors may be the same at all points
        assert flat(found.gradient).norm() > 0


# ---- who may use it --------------------------------------------------------------------------------------------------------


def stepper(model):
    return Stepper(model, CandidateCrossEntropy(), LayerOutputPerturbation(), StepOptions(None))


@pytest.mark.parametrize(
    ("scope", "tuned"),
    [
        (AllParameters(), "tensors outside the decoder layers are tuned"),
        (LayerScope(layers=[1, 2]), "layers 1 to 2 are tuned"),
        (LayerScope(layers="all"), "layers 0 to 3 are tuned"),
        (SmallestWeights(), "layers 0 to 3 are tuned"),
        (LoRA(rank=2, layers=[0, 3]), "layers 0 to 3 are tuned"),
        (PrefixTuning(num_tokens=2), "are tuned"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_a_scope_of_several_layers_is_refused(scope, tuned):
    error = slzo_error(stepper, tuned_model(scope=scope))
    assert error.startswith("model.estimator LayerOutputPerturbation: perturbs the output of one layer, and ")
    assert tuned in error
    assert error.endswith("use a scope of one layer (LayerScope, OutlierChannels, ActivationSubspace, LoRA), or SPSA")


def test_one_layer_by_its_number_is_one_layer():
    assert stepper(tuned_model(scope=LayerScope(layers=[1]))).model.span[:2] == (1, 2)


def test_a_model_whose_rows_depend_on_each_other_is_refused():
    model = tuned_model()
    model.parts.model.config.quantization_config = SimpleNamespace(load_in_8bit=True)
    assert "with LLM.int8 (load_in_8bit) the loss of a row depends on the other rows" in slzo_error(stepper, model)


def test_a_loss_of_any_module_has_no_layer():
    tuned, loss = image_loss(cnn(), images())
    error = slzo_error(LayerOutputPerturbation().estimate, Request(tuned, loss, 0, 0))
    assert error.startswith("model.estimator: ClosureLoss is no sum over rows of a loss of logits")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("queries", 0, r"queries 0: must be at least 1"),
        ("scale", 0.0, r"scale 0\.0: must be a number above 0"),
        ("scale", math.inf, r"scale inf: must be a number above 0"),
        ("scale", math.nan, r"scale nan: must be a number above 0"),
        ("positions", "last", r"positions 'last': choose one of answer, all"),
    ],
)
def test_wrong_arguments(option, value, expected):
    assert re.match(rf"model\.estimator\.{expected}", slzo_error(lambda: LayerOutputPerturbation(**{option: value})))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_queries": 2}, r"model\.num_queries 2: counts directions of weights, .* set model\.estimator\.queries"),
        (
            {"eps": 1e-3},
            r"model\.eps 0\.001: is a distance between weights, and LayerOutputPerturbation perturbs no weights",
        ),
        ({"eps_end": 1e-3}, r"model\.eps_end 0\.001: is a distance between weights, .* use model\.estimator SPSA"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_of_perturbed_weights_are_refused(given, expected):
    assert re.match(expected, slzo_error(lambda: ZOModule(estimator=LayerOutputPerturbation(), **given)))


@pytest.fixture
def plain(sst2_options):
    """Options of a run with nothing said of estimator and optimizer."""
    return [*sst2_options, "--data.num_train=40", "--data.num_dev=16", "--model.layer=2"]


GIVEN = "--model.estimator=LayerOutputPerturbation"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([GIVEN, "--model.eps=1e-3"], r"model\.eps 0\.001: is a distance between weights"),
        ([GIVEN, "--model.num_queries=2"], r"model\.num_queries 2: counts directions of weights"),
        (["--model.estimator.queries=0"], r"model\.estimator\.queries 0: must be at least 1"),
        (["--model.estimator.positions=last"], r"model\.estimator.*positions.*last"),
        ([GIVEN, "--model.scope=AllParameters"], r"LayerOutputPerturbation: perturbs the output of one layer"),
        (
            ["--model.optimizer=SGD"],
            r"model\.optimizer SGD: with LayerOutputPerturbation.* use AdamW, give a number, or",
        ),
    ],
)
def test_the_command_line_refuses_in_one_line(plain, capsys, args, expected):
    assert re.search(expected, error_line(capsys, "fit", *plain, *args))
    assert not list(Path("runs").glob("*"))


def test_a_run_cannot_be_replayed(plain, capsys):
    error = error_line(capsys, "replay", *plain, "--run=.")
    assert re.search(
        r"model\.estimator LayerOutputPerturbation.*: uses a derivative, so there is no log of losses", error
    )


def generating_rows():
    """Options of rows whose answers are generated."""
    rows = [{"messages": [{"role": "user", "content": f"Film {i}?"}], "word": "good"} for i in range(24)]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"class_path": "ChatTask", "init_args": {"train_file": "talks.jsonl", "max_new_tokens": 4}}
    return [f"--data.task={json.dumps(task)}", "--data.objective=Reward", "--data.objective.functions=json_valid"]


def test_generated_answers_are_refused(model_dir, own_folder, capsys):
    options = [f"--model.model={model_dir}", "--model.layer=1", "--trainer.accelerator=cpu", *generating_rows()]
    error = error_line(capsys, "fit", *options, GIVEN)
    assert re.search(
        r"data\.objective .*: generates answers, and LayerOutputPerturbation.* needs a loss of logits", error
    )


# ---- defaults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "estimator", "optimizer"),
    [
        ({}, "LayerOutputPerturbation", "AdamW"),
        ({"scope": LoRA()}, "LayerOutputPerturbation", "AdamW"),
        ({"estimator": LayerOutputPerturbation(4)}, "LayerOutputPerturbation", "AdamW"),
        ({"optimizer": torch.optim.Adam}, "LayerOutputPerturbation", "Adam"),
        ({"estimator": SPSA()}, "SPSA", "SGD"),
        ({"eps": 1e-3}, "SPSA", "SGD"),
        ({"eps_end": 1e-3}, "SPSA", "SGD"),
        ({"num_queries": 2}, "SPSA", "SGD"),
        ({"clip_projected_grad": 10}, "SPSA", "SGD"),
        ({"scope": AllParameters()}, "SPSA", "SGD"),
        ({"scope": LayerScope(layers=[1, 2])}, "SPSA", "SGD"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_defaults_follow_from_what_is_given(given, estimator, optimizer):
    options = ZOModule(**given).options
    assert (type(options.estimator).__name__, options.optimizer.name) == (estimator, optimizer)
    assert options.optimizer.automatic == ("optimizer" not in given)


@pytest.mark.parametrize(
    ("args", "estimator", "optimizer"),
    [
        (["--model.estimator.queries=4"], "LayerOutputPerturbation", None),
        (["--model.estimator.divide_rows=true", "--model.num_queries=2"], "SPSA", None),
        (["--model.optimizer.lr=1e-3"], None, "AdamW"),
        (["--model.optimizer.lr=1e-3", "--model.eps=1e-3"], None, "SGD"),
        (["--model.optimizer.lr=1e-3", "--model.estimator=SPSA"], "SPSA", "SGD"),
        (["--model.optimizer.lr=1e-3", GIVEN], "LayerOutputPerturbation", "AdamW"),
        (["--model.optimizer.lr=1e-3", "--model.scope=AllParameters"], None, "SGD"),
        (["--model.optimizer.lr=1e-3", "--model.scope=LoRA"], None, "AdamW"),
    ],
)  # fmt: skip
def test_options_alone_choose_the_class(plain, capsys, args, estimator, optimizer):
    """None is left open, for the module to choose."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *plain, *args, "--print_config"])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.err
    printed = yaml.safe_load(output.out)["model"]
    chosen = [printed[name] and printed[name]["class_path"].rpartition(".")[2] for name in ("estimator", "optimizer")]
    assert chosen == [estimator, optimizer]
    if optimizer is not None:
        assert printed["optimizer"]["init_args"]["lr"] == 1e-3
    if args == ["--model.estimator.queries=4"]:
        assert printed["estimator"]["init_args"] == {"queries": 4, "scale": 0.05, "positions": "answer"}


@pytest.mark.parametrize("objective", [AnswerF1(), Reward("json_valid", in_process=True)], ids=["F1", "reward"])
def test_with_generated_answers_the_default_perturbs_weights(objective):
    rows = SimpleNamespace(objective=objective, batch_size=8)
    for given, optimizer in (({}, "SGD"), ({"optimizer": torch.optim.Adam}, "Adam")):
        options = ZOModule(**given).options.for_rows(rows)
        assert (type(options.estimator), options.optimizer.name) == (SPSA, optimizer)
    rows.objective = CandidateErrors()
    assert isinstance(ZOModule().options.for_rows(rows).estimator, LayerOutputPerturbation)


# ---- what once went wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returned", ["sums", "number"])
def test_what_a_users_objective_returns_is_checked(returned, examples):
    class Own(CandidateObjective):
        def of_scores(self, scores, batch):
            total, weight = -scores.sum(), torch.tensor(float(batch.num_examples))
            return (total, weight) if returned == "sums" else total

    model, loss = tiny_loss(examples, objective=Own())
    request = Request(model.tensors, loss, 0, 0)
    if returned == "sums":
        assert LayerOutputPerturbation(queries=2).estimate(request).finite
        return
    with pytest.raises(SlzoError, match=r"of_scores\(\) returned .*must return a LossSum"):
        LayerOutputPerturbation(queries=2).estimate(request)


def test_a_layer_that_adds_nothing_has_an_estimate(examples):
    model = tiny_model(scale=1.0)
    layer = model.model.layers[2]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    tuned = tuned_layer(ModelParts(model, onednn=False), 2)
    estimate = LayerOutputPerturbation(queries=4).estimate(Request(tuned.tensors, batch_loss(tuned, examples), 0, 0))
    assert estimate.finite
    assert flat(estimate.gradient).abs().max() > 0
