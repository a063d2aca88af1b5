import copy
import math
from functools import partial

import pytest
import torch
from conftest import LossAt, estimate, flat, layer_forward, tiny_model, tune_layer
from torch import nn

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.utils.errors import SlzoError
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.zo.estimators import SPSA, Point, Request
from slzo.zo.noise import gaussian
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.optim import OptimizerChoice
from slzo.zo.stepper import StepOptions, take_step
from slzo.zo.tuned import TunedTensors


def mean_estimate(estimator, tuned, evaluate, steps, **settings):
    rows = [flat(estimate(estimator, tuned, evaluate, step=step, **settings).gradient) for step in range(steps)]
    return torch.stack(rows).mean(dim=0)


def test_spsa_mean_is_the_gradient_of_a_quadratic():
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    curvature = torch.tensor([1.0, 2.0, 0.5, 0.1])
    tuned = TunedTensors({"w": weight})

    def evaluate(points):
        losses = []
        for point in points:
            tuned.write(point.direction, point.scale)
            losses.append((curvature * weight.double().square()).sum() / 2)
        return torch.stack(losses)

    true = curvature * tuned.masters[0].detach()
    mean = mean_estimate(SPSA(), tuned, evaluate, 4000, eps=1e-3)
    # standard error of one coordinate: about |gradient| / sqrt(steps)
    assert (mean - true).norm() < 4 * true.norm() * math.sqrt(len(true) / 4000)


def test_more_queries_lower_the_variance():
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0))
    tuned = TunedTensors({"w": weight})
    true = tuned.masters[0].detach().clone()

    def evaluate(points):
        losses = []
        for point in points:
            tuned.write(point.direction, point.scale)
            losses.append(weight.double().square().sum() / 2)
        return torch.stack(losses)

    def error(queries):
        total = 0.0
        for step in range(40):
            result = estimate(SPSA(), tuned, evaluate, 1, step, num_queries=queries)
            total += float((flat(result.gradient) - true).square().sum())
        return total / 40

    assert error(8) < error(1) / 4


def test_spsa_follows_the_autograd_gradient_of_a_model(examples):
    model = tiny_model("llama", scale=1.0)
    parts = ModelParts(model)
    tuned = tune_layer(parts, 2)
    forward = layer_forward(parts, 2, cache_gb=0)
    batch = pack(examples)

    # the gradient by back-propagation through an untouched copy, one candidate at a time
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    parameters = dict(reference.named_parameters())
    for name in tuned.names:
        parameters[name].requires_grad_(True)
    losses = []
    for example in examples:
        scores = []
        for sequence in example.sequences:
            log_probs = reference(input_ids=torch.tensor([sequence.ids])).logits[0].float().log_softmax(-1)
            start = len(sequence.ids) - sequence.num_answer
            scores.append(
                torch.stack([log_probs[i - 1, sequence.ids[i]] for i in range(start, len(sequence.ids))]).mean()
            )
        losses.append(nn.functional.cross_entropy(torch.stack(scores)[None], torch.tensor([example.gold[0]])))
    torch.stack(losses).mean().backward()
    true = torch.cat([parameters[name].grad.flatten() for name in tuned.names])

    def evaluate(points):
        sums = forward.losses(batch, forward.prefix(batch), tuned, points, CandidateCrossEntropy())
        return sums[0] / sums[1]

    # each projected gradient is the slope along z, exactly what autograd gives
    slopes, expected = [], []
    for step in range(20):
        direction = tuned.draw(0, step, 0)
        expected.append(float(torch.dot(torch.cat([direction[n].flatten() for n in tuned.names]), true)))
        slopes.append(estimate(SPSA(), tuned, evaluate, step=step, eps=2e-3).projected_grad[0])
    torch.testing.assert_close(torch.tensor(slopes), torch.tensor(expected), rtol=0.05, atol=0.02 * float(true.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perturb_and_restore_is_exact(dtype):
    model = tiny_model("llama").to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = tune_layer(ModelParts(model), 1)
    for step in range(50):
        direction = tuned.draw(0, step, 0)
        tuned.write(direction, 1e-3)
        assert not torch.equal(
            model.model.layers[1].mlp.down_proj.weight, before["model.layers.1.mlp.down_proj.weight"]
        )
        tuned.write(direction, -1e-3)
        tuned.restore()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_applied_direction_is_what_rounding_left():
    live = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    tuned = TunedTensors({"w": live})
    direction = tuned.draw(0, 0, 0)
    gradient = {}
    tuned.accumulate(gradient, dict(direction), 1.0, (1e-3, -1e-3))
    applied = gradient["w"]
    tuned.write(direction, 1e-3)
    plus = live.float().clone()
    tuned.write(direction, -1e-3)
    torch.testing.assert_close(applied, (plus - live.float()) / 2e-3)
    # bfloat16 has steps of 1/128 above 1: most of so small a perturbation is lost
    assert (applied == 0).float().mean() > 0.5


def test_small_updates_survive_in_bfloat16():
    live = torch.full((4,), 1.0, dtype=torch.bfloat16)
    tuned = TunedTensors({"w": live})
    for _ in range(100):
        tuned.masters[0].data.sub_(1e-4)
    tuned.restore()
    torch.testing.assert_close(live.float(), torch.full((4,), 0.99), atol=4e-3, rtol=0)
    assert live[0] != 1.0


def test_noise_depends_on_seed_step_query_and_name_only():
    like = torch.zeros(64)
    base = gaussian(like, 1, 2, 3, "a")
    torch.manual_seed(999)
    torch.rand(5)
    assert torch.equal(base, gaussian(like, 1, 2, 3, "a"))
    others = [gaussian(like, *key) for key in ((0, 2, 3, "a"), (1, 3, 3, "a"), (1, 2, 4, "a"), (1, 2, 3, "b"))]
    assert all(abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 0.5 for other in others)
    large = gaussian(torch.zeros(100_000), 0, 0, 0, "w")
    assert abs(float(large.mean())) < 0.02
    assert abs(float(large.std()) - 1) < 0.02


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gaussian(torch.zeros(10), 0, 0, 0, "w")
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_not_finite_has_no_gradient():
    tuned = TunedTensors({"w": torch.ones(3)})
    result = estimate(SPSA(), tuned, lambda points: torch.tensor([float("nan"), 1.0]))
    assert not result.finite
    assert result.gradient == {}
    assert tuned.masters[0].grad is None


def test_a_step_that_is_not_finite_moves_nothing():
    """Not even by momentum, and what a step before it left behind does not come back."""
    live = torch.ones(3)
    tuned = TunedTensors({"w": live})
    optimizer = torch.optim.SGD(tuned.masters, lr=0.1, momentum=0.9)

    def function(points, factor):
        losses = []
        for point in points:
            tuned.write(point.direction, point.scale)
            losses.append(factor * live.sum())
        return torch.stack(losses)

    for factor, moves in ((1.0, True), (float("nan"), False), (float("inf"), False)):
        before = live.clone()
        loss = LossAt(partial(function, factor=factor))
        result = take_step(Request(tuned, loss, 0, 0), SPSA(), optimizer, measure_update=True)
        assert result.estimate.finite == moves
        assert (result.update_norm is not None) == moves
        assert torch.equal(live, before) != moves
        assert torch.equal(live, tuned.masters[0])
        assert tuned.masters[0].grad is None


@pytest.mark.parametrize(("eps", "queries"), [(0, 1), (-1e-3, 1), (float("inf"), 1), (float("nan"), 1), (1e-3, 0)])
def test_step_options_are_checked(eps, queries):
    with pytest.raises(SlzoError, match=r"model\.(eps|num_queries)"):
        StepOptions(eps, num_queries=queries)


def test_the_number_of_queries_at_once_is_checked():
    with pytest.raises(SlzoError, match=r"model\.engine\.queries_at_once 0"):
        Engine(queries_at_once=0)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Muon"])
def test_optimizers_that_cannot_take_the_gradient_are_refused(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    with pytest.raises(SlzoError, match=rf"model\.optimizer {name}"):
        OptimizerChoice.of(lambda params: getattr(torch.optim, name)(params, lr=0.1))


def test_other_optimizers_are_taken_and_wrong_arguments_named():
    OptimizerChoice.of(torch.optim.AdamW)
    with pytest.raises(SlzoError, match=r"model\.optimizer: Invalid learning rate: -1"):
        OptimizerChoice.of(lambda params: torch.optim.SGD(params, lr=-1))


def test_one_token_losses_need_only_the_candidates_logits(one_token_examples):
    parts = ModelParts(tiny_model("gemma2"))
    tuned = tune_layer(parts, 1)
    batch = pack(one_token_examples)
    direction = tuned.draw(0, 0, 0)
    results = []
    for selected in (True, False):
        forward = layer_forward(parts, 1, cache_gb=0, candidate_logits=selected)
        assert forward.selects(CandidateCrossEntropy(), batch) == selected
        points = [Point(direction, 1e-3), Point(direction, -1e-3)]
        results.append(forward.losses(batch, forward.prefix(batch), tuned, points, CandidateCrossEntropy()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_prefix_cache_gives_the_same_losses_in_any_batch(examples):
    parts = ModelParts(tiny_model("qwen3"))
    cold = layer_forward(parts, 2, cache_gb=0)
    warm = layer_forward(parts, 2)
    warm.prefix(pack(examples[:3]))
    warm.prefix(pack(examples[3:]))
    mixed = [examples[i] for i in (5, 0, 3, 6)]
    batch = pack(mixed)
    torch.testing.assert_close(warm.prefix(batch), cold.prefix(batch), rtol=1e-5, atol=1e-6)
    assert warm.cache.num_bytes == sum(pack([e]).num_tokens for e in examples) * 32 * 4


def test_only_missing_examples_are_run(examples, monkeypatch):
    parts = ModelParts(tiny_model("gemma2"))
    forward = layer_forward(parts, 2)
    batch = pack(examples)
    expected = layer_forward(parts, 2, cache_gb=0).prefix(batch)
    forward.prefix(pack([examples[1], examples[4]]))
    sizes = []
    original = ModelParts.run

    def run(self, part, *args):
        sizes.append(part.input_ids.numel())
        return original(self, part, *args)

    monkeypatch.setattr(ModelParts, "run", run)
    torch.testing.assert_close(forward.prefix(batch), expected, rtol=1e-5, atol=1e-6)
    known = batch.example_tokens[1] + batch.example_tokens[4]
    assert sizes == [batch.num_tokens - known]
    forward.prefix(batch)
    assert len(sizes) == 1


def test_scoring_may_read_the_cache_without_filling_it(examples):
    forward = layer_forward(ModelParts(tiny_model("llama")), 2)
    forward.prefix(pack(examples), keep=False)
    assert forward.cache.num_bytes == 0


def test_one_token_answers_after_different_tokens_keep_their_normalizers():
    """A tokenizer may join the end of the prompt with the answer; then the candidates follow different tokens."""
    rows = [EncodedExample(0, (EncodedSequence((3, 4, 5, 6), 1), EncodedSequence((3, 4, 7), 1)), (0,))]
    assert pack(rows).choice_ids is None


def test_prefix_cache_keeps_to_its_budget(examples):
    per_token = 32 * 4
    tokens = [pack([example]).num_tokens for example in examples]
    budget_gb = (tokens[0] + tokens[1]) * per_token / 2**30
    forward = layer_forward(ModelParts(tiny_model("llama")), 1, budget_gb)
    expected = forward.prefix(pack(examples))
    cache = forward.cache
    assert cache.num_bytes <= cache.budget
    assert [key in cache for key in (0, 1, 2)] == [True, True, False]
    torch.testing.assert_close(forward.prefix(pack(examples)), expected)
