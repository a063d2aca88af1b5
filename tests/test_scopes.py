"""What each scope tunes, that the rest stays, and that checkpoints bring it back."""

import inspect
import json
import random
import re
import sys

import pytest
import torch
from helpers import (
    FAMILIES,
    PEFT_HEADS,
    WholeVocabulary,
    batch_loss,
    described,
    layer_forward,
    packed_prompts,
    peft_prefix,
    plain_losses,
    random_example,
    tiny_model,
    tune_layer,
    tune_scope,
)
from torch import nn
from transformers import AutoModelForCausalLM

from slzo.batches.packing import pack
from slzo.models.attention import with_virtual_tokens
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.utils.errors import SlzoError
from slzo.utils.settings import constructor_settings, differences
from slzo.zo.estimators import LOZO, Point
from slzo.zo.forward import Span, SuffixForward
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.scopes import (
    ActivationSubspace,
    AllParameters,
    LayerScope,
    LoRA,
    OutlierChannels,
    PrefixTuning,
    RandomLayers,
    ScopeContext,
    SmallestWeights,
)
from slzo.zo.scopes.inputs import record_inputs
from slzo.zo.scopes.linear_maps import linears
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_model import TunedModel

pytestmark = pytest.mark.fast

LAYER = 2
SCOPES = [
    LayerScope(),
    LayerScope("mlp"),
    LayerScope("attention"),
    LayerScope(layers=[1, 3]),
    LayerScope(layers="all"),
    OutlierChannels(5.0),
    OutlierChannels(5.0, complement=True),
    ActivationSubspace(4),
    LoRA(4),
    LoRA(4, layers="all"),
    PrefixTuning(3),
    AllParameters(),
    RandomLayers(0.5),
    SmallestWeights(0.25),
    SmallestWeights(0.25, layers=None),
]


each_scope = pytest.mark.parametrize("scope", SCOPES, ids=described)


def tensors_of(scope, model):
    return tune_scope(scope, model).tensors


@each_scope
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_scope_moves_what_it_names_and_nothing_else(scope, family):
    model = tiny_model(family)
    tuned = tensors_of(scope, model)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    direction = tuned.draw(0, 0, 0)
    tuned.write(Point(direction, 0.1))
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == set(direction) <= set(tuned.names)
    tuned.restore()
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=1e-6)


def names_of(scope, family="llama"):
    return set(tensors_of(scope, tiny_model(family)).names)


def test_the_parts_of_a_layer_add_up():
    whole, attention, mlp = (names_of(LayerScope(part), "qwen3") for part in ("layer", "attention", "mlp"))
    norms = {n for n in whole if "layernorm" in n}
    assert attention.isdisjoint(mlp)
    assert attention | mlp | norms == whole
    layer = tiny_model("qwen3").model.layers[LAYER]
    assert whole == {f"model.layers.{LAYER}.{name}" for name, _ in layer.named_parameters()}
    assert any("q_norm" in name for name in attention)
    assert all("mlp" in name for name in mlp)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_mlp_and_an_attention(family):
    mlp, attention = names_of(LayerScope("mlp"), family), names_of(LayerScope("attention"), family)
    assert mlp
    assert attention
    assert mlp.isdisjoint(attention)
    assert not any("norm" in name.lower() or ".ln_" in name for name in mlp)


def test_tied_embeddings_are_tuned_once():
    model = tiny_model("llama", tie_word_embeddings=True)
    tuned = tensors_of(AllParameters(), model)
    assert tuned.num_elements == sum(p.numel() for p in model.parameters())
    assert "lm_head.weight" not in tuned.names


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_outlier_channels_and_their_complement_are_the_mlp(family):
    model = tiny_model(family)
    top, rest = (tensors_of(OutlierChannels(5.0, complement=other), model) for other in (False, True))
    parts = ModelParts(model)
    weights = [linear for linear in linears(parts, LAYER) if linear.part == "mlp"]
    for linear in weights:
        places = torch.cat([dict(t.items())[linear.name].index for t in (top, rest)])
        assert torch.equal(places.sort().values.long(), torch.arange(linear.weight.numel()))
    for linear in weights[:-1]:
        if linear.module.bias is not None:
            name = linear.name.removesuffix("weight") + "bias"
            places = torch.cat([dict(t.items())[name].index for t in (top, rest)])
            assert torch.equal(places.sort().values.long(), torch.arange(linear.module.bias.numel()))
    # the channel with the largest activation is among them: its column of the down projection moves
    down = weights[-1]
    (inputs,) = record_inputs(parts, [down.module], packed_prompts(16))
    channel = int(inputs.abs().amax(dim=0).argmax())
    before = down.weight.clone()
    top.write(Point(top.draw(0, 0, 0), 1.0))
    changed = (down.weight != before).any(dim=1 if down.transposed else 0)
    assert changed[channel]
    assert int(changed.sum()) == round(0.05 * down.sizes[1])
    for up in weights[:-1]:  # and so do its rows of the others; Phi-3 has two of them in one matrix
        places, (outputs, inputs) = dict(top.items())[up.name].index.long(), up.sizes
        rows = places % outputs if up.transposed else places // inputs
        assert set((rows % down.sizes[1]).tolist()) == set(changed.nonzero()[:, 0].tolist())


def test_the_smallest_weights_are_the_smallest():
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    tuned = tensors_of(SmallestWeights(0.25), model)
    index = dict(tuned.items())["model.layers.0.mlp.up_proj.weight"].index.long()
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[index] = True
    assert int(mask.sum()) == weight.numel() // 4
    assert weight.abs().flatten()[mask].max() <= weight.abs().flatten()[~mask].min()


def test_random_layers_change_from_step_to_step_and_are_the_same_again():
    tuned = tensors_of(RandomLayers(0.5), tiny_model("llama"))
    chosen = []
    for step in range(20):
        names = set(tuned.draw(0, step, 0))
        assert names == set(tuned.draw(0, step, 1)) == set(tuned.draw(0, step, 0))
        layers = {int(n.split(".")[2]) for n in names if n.startswith("model.layers")}
        assert len(layers) == 2
        assert "model.embed_tokens.weight" in names
        chosen.append(tuple(sorted(layers)))
    assert len(set(chosen)) > 2
    assert {layer for pair in chosen for layer in pair} == {0, 1, 2, 3}


def change_of(part, direction):
    """How the model's tensor changes along a direction of the master."""
    part.write(direction, 1.0)
    moved = part.live.clone()
    part.write(None, 0.0)
    return moved - part.live


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_subspace_holds_the_gradient_when_its_rank_is_full(family):
    """V V^T is the identity then, so that moving C is moving W."""
    model = tiny_model(family)
    rank = 32
    tuned = tensors_of(ActivationSubspace(rank), model)
    narrow = next(linear for linear in linears(ModelParts(model), LAYER) if linear.sizes[1] == rank)
    part = dict(tuned.items())[narrow.name]
    gradient = torch.randn(narrow.weight.shape)
    torch.testing.assert_close(change_of(part, part.to_master_gradient(gradient)), gradient, rtol=1e-4, atol=1e-4)


def test_the_subspace_of_some_modules_only():
    tuned = tensors_of(ActivationSubspace(4, target_modules=["down_proj", "up_proj"]), tiny_model())
    assert [name.split(".")[-2] for name in tuned.names] == ["up_proj", "down_proj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_of_the_mlp_by_role(family):
    """One name for it in all families: the only map of the MLP that ends in the hidden size."""
    model = tiny_model(family)
    hidden, inner = 32, 128 if family == "gpt2" else 64
    for scope in (ActivationSubspace(2, target_modules=["mlp_output"]), LoRA(2, target_modules=["mlp_output"])):
        tuned = tensors_of(scope, model)
        (name,) = {re.sub(r"\.lora_.*|\.weight$", "", name) for name in tuned.names}
        assert not re.search("attn|attention", name)
        sizes = [tuple(master.shape) for master in tuned.masters]
        assert sizes in ([(hidden, 2)], [(2, inner), (hidden, 2)])  # C; LoRA's A and B


def test_the_subspace_spans_the_inputs():
    """Inputs made from few directions lie in the subspace of that rank."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    basis = ActivationSubspace(3)._basis("w", rows)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows @ basis @ basis.T, rows, rtol=1e-4, atol=1e-4)


def test_a_single_outlier_does_not_determine_the_subspace():
    rows = torch.eye(4)[[0, 1, 0, 1, 0, 1, 3]] * torch.tensor([1.0, 1, 1, 1, 1, 1, 1e4])[:, None]
    basis = ActivationSubspace(2)._basis("w", rows)
    torch.testing.assert_close(basis @ basis.T, torch.diag(torch.tensor([1.0, 1, 0, 0])))


@each_scope
def test_the_gradient_of_a_master_is_the_transpose_of_its_change(scope):
    tuned = tensors_of(scope, tiny_model("gpt2").double())
    generator = torch.Generator().manual_seed(1)
    for _, part in tuned.items():
        z = torch.randn(part.master.shape, generator=generator)
        g = torch.randn(part.live.shape, generator=generator)
        left = float((change_of(part, z).double() * g).sum())
        right = float((z.double() * part.to_master_gradient(g)).sum())
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4 * g.numel() ** 0.5)


@each_scope
def test_losses_of_a_scope_equal_those_of_the_whole_model(scope, examples):
    """Prefix, pairing and selected rows are right for tensors anywhere in the model."""
    tuned_model = tune_scope(scope, tiny_model("llama", scale=1.5))
    tuned, forward, parts = tuned_model.tensors, tuned_model.forward, tuned_model.parts
    batch = pack(examples)
    points = [Point(tuned.draw(0, 0, query), sign * 1e-2) for query in (0, 1) for sign in (1, -1)]
    expected = []
    for point in points:
        tuned.write(point)
        span = Span(0, parts.num_layers, inside=False)
        whole = SuffixForward(parts, span, PrefixCache(0, budget_gb=0))
        total, weight = whole.loss(batch, None, WholeVocabulary())
        expected.append(total / weight)
    tuned.restore()
    assert len({round(float(e), 4) for e in expected}) > 1
    for paired in (True, False):
        forward.paired = paired
        found = batch_loss(tuned_model, batch).at(points)
        torch.testing.assert_close(found, torch.stack(expected), rtol=2e-5, atol=2e-6)
        tuned.restore()


@pytest.mark.parametrize(
    ("scope", "span"),
    [
        (LayerScope(), Span(2, 3)),
        (LayerScope(layers=[1, 3]), Span(1, 4)),
        (LoRA(2, layers="all"), Span(0, 4)),
        (AllParameters(), Span(0, 4, inside=False)),
    ],
)
def test_the_span_of_a_scope(scope, span):
    forward = tune_scope(scope, tiny_model("llama")).forward
    assert forward.span == span
    assert forward.cache.start == span.start


@each_scope
def test_a_description_brings_the_tuned_model_back(scope, tmp_path):
    model = tiny_model("llama")
    tuned_model = tune_scope(scope, model)
    tuned = tuned_model.tensors
    for master in tuned.masters:
        master.data.add_(torch.randn(master.shape, generator=torch.Generator().manual_seed(5)), alpha=0.1)
    tuned.restore()
    values = tuned.clone_masters()
    path = tmp_path / "description.pt"
    torch.save(tuned_model.description(), path)
    description = torch.load(path, weights_only=True)
    fresh = tiny_model("llama")
    again = TunedModel.from_description(ModelParts(fresh), description)
    again.tensors.load(values)
    assert (again.scope, again.adapter, again.layer) == (tuned_model.scope, tuned_model.adapter, LAYER)
    torch.testing.assert_close(dict(fresh.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)


def test_merged_lora_computes_the_same(tmp_path):
    model = tiny_model("llama")
    tuned_model = tune_scope(LoRA(4), model)
    tuned = tuned_model.tensors
    assert {name.split(".")[2] for name in tuned.names} == {str(LAYER)}
    assert {name.split(".")[4] for name in tuned.names} == {"q_proj", "v_proj"}
    plain = tiny_model("llama")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)  # B is zero
    tuned.write(Point(tuned.draw(0, 0, 0), 0.3))
    expected = model(ids).logits
    assert not torch.allclose(expected, plain(ids).logits, atol=1e-3)
    tuned_model.merge()
    model.save_pretrained(tmp_path)
    for merged in (model, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert [name for name, _ in merged.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("scope", [LoRA(4), PrefixTuning(3), LayerScope()], ids=described)
def test_removing_the_adapter_leaves_the_plain_model(scope):
    model, plain = tiny_model("llama"), tiny_model("llama")
    tuned_model = tune_scope(scope, model)
    tuned_model.tensors.write(Point(tuned_model.tensors.draw(0, 0, 0), 0.3))
    tuned_model.tensors.restore()
    for _ in range(2):
        tuned_model.release()
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=0, atol=0)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_lora_starts_the_same_for_a_seed_and_leaves_the_global_generator_alone():
    model, plain = tiny_model("llama"), tiny_model("llama")
    state = torch.random.get_rng_state()
    first = tensors_of(LoRA(4), model).clone_masters()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    torch.testing.assert_close(tensors_of(LoRA(4), plain).clone_masters(), first, rtol=0, atol=0)


def test_a_learned_prefix_needs_keys_and_values_of_every_layer():
    with pytest.raises(SlzoError, match=r"^model.scope PrefixTuning: .* keys and values.*; use LoRA$"):
        tune_scope(PrefixTuning(3), tiny_model("gemma4_text"))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma4_text"])
def test_a_learned_prefix_computes_what_peft_does(family, examples):
    """Losses with a moved prefix against peft's own prefix tuning, one sequence at a time."""
    model = tiny_model(family, scale=1.5, **PEFT_HEADS.get(family, {}))
    tuned_model = tune_scope(PrefixTuning(3), model, engine=Engine(cache_gb=0))
    tuned = tuned_model.tensors
    tuned.write(Point(tuned.draw(0, 0, 0), 0.3))
    (weight,) = (part.live for _, part in tuned.items())
    total, count = tuned_model.forward.loss(pack(examples), None, CandidateCrossEntropy())
    with torch.no_grad():
        expected, _ = plain_losses(peft_prefix(family, weight, scale=1.5), examples)
    assert float(total / count) == pytest.approx(float(expected), rel=1e-5)


def test_a_large_direction_is_drawn_again_instead_of_held():
    model = tiny_model("llama")
    held = tune_layer(ModelParts(model), LAYER)
    drawn = TunedTensors({name: t.live for name, t in held.items()}, hold_bytes=100)
    first, second = held.draw(0, 3, 1), drawn.draw(0, 3, 1)
    name = next(iter(first))
    assert first[name] is first[name]
    assert second[name] is not second[name]
    assert "no such tensor" not in second
    torch.testing.assert_close(dict(second), dict(first), rtol=0, atol=0)
    forward = layer_forward(ModelParts(model), LAYER, cache_gb=0)
    batch = pack([random_example(random.Random(0))])
    hidden, objective = forward.prefix(batch), CandidateCrossEntropy()
    both = ((held, first), (drawn, second))
    assert torch.equal(*(forward.losses(batch, hidden, t, [Point(z, 1e-2)], objective) for t, z in both))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LayerScope, {"part": "head"}, r"model\.scope\.part 'head': choose one of layer, attention, mlp"),
        (LayerScope, {"layers": [4]}, r"model\.scope\.layers 4: the model has 4 decoder layers"),
        *(
            (kind, {"layers": 2}, r"layers 2: give a list")
            for kind in (LayerScope, LoRA, ActivationSubspace, SmallestWeights)
        ),
        (LayerScope, {"layers": "2"}, r"model\.scope\.layers '2': give a list of numbers, such as \[28\], or all"),
        (LayerScope, {"layers": []}, r"model\.scope\.layers \[\]: give at least one layer"),
        (OutlierChannels, {"percent": 0}, r"model\.scope\.percent 0: must be above 0"),
        (OutlierChannels, {"percent": 0.1}, r"percent 0\.1: selects none of the 64 channels.*raise it"),
        (OutlierChannels, {"percent": 0.1, "complement": True}, r"percent 0\.1: selects none of the 64.*raise it"),
        (OutlierChannels, {"percent": 100, "complement": True}, "percent 100 with complement: selects all.*lower it"),
        (RandomLayers, {"fraction": 0}, r"model\.scope\.fraction 0"),
        (SmallestWeights, {"fraction": 1.5}, r"model\.scope\.fraction 1\.5"),
        (SmallestWeights, {"fraction": 1e-5}, r"fraction 1e-05: selects no element of model\.layers\.0"),
        (ActivationSubspace, {"rank": 0}, r"model\.scope\.rank 0"),
        (ActivationSubspace, {"rank": 33}, "rank 33: the inputs of .* span at most 32 directions"),
        (ActivationSubspace, {"target_modules": ["up"]}, "'up': layer 2 has no such linear map; choose from q_proj"),
        (ActivationSubspace, {"target_modules": []}, r"target_modules \[\]: give at least one"),
        (LoRA, {"target_modules": ["q_proj", "nope"]}, "target_modules 'nope': layer 2 has no such linear map"),
        (LoRA, {"rank": 0}, r"model\.scope\.rank 0: must be at least 1"),
        (LoRA, {"alpha": 0}, r"model\.scope\.alpha 0: must be a number above 0"),
    ],
)
def test_bad_scopes_say_what_is_wrong(kind, options, message):
    with pytest.raises(SlzoError, match=message):
        tensors_of(kind(**options), tiny_model())


def test_a_small_share_is_described():
    assert SmallestWeights(0.001).describe() == "the smallest 0.1% of the weights of all layers"
    assert RandomLayers(0.125).describe() == "a random 12.5% of the layers in each step"


def test_linear_maps_of_a_subclass_are_found():
    """Falcon has a class of its own."""

    class OwnLinear(nn.Linear):
        pass

    parts = ModelParts(tiny_model())
    before = [linear.name for linear in linears(parts, LAYER)]
    for module in parts.layers[LAYER].modules():
        if type(module) is nn.Linear:
            module.__class__ = OwnLinear
    assert [linear.name for linear in linears(parts, LAYER)] == before != []


@pytest.mark.parametrize(
    ("layers", "one"), [([3], True), ((3,), True), ([3, 3], True), ([2, 3], False), ("all", False)]
)
def test_any_collection_of_one_layer_is_one_layer(layers, one):
    assert LayerScope(layers=layers).one_layer is one


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SlzoError, match=r"needs peft, which is not installed; run: pip install 'slzo\[peft\]'"):
        tensors_of(LoRA(4), tiny_model())


def test_a_layer_without_linear_maps_is_named():
    model = tiny_model("llama")
    model.model.layers[LAYER].mlp = nn.Identity()
    with pytest.raises(SlzoError, match=r"model\.scope\.part 'mlp': the layer has no such tensors"):
        LayerScope("mlp").tensors(ScopeContext(ModelParts(model), LAYER, packed_prompts))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LOZO(rank=1), LOZO(rank=2)),
        (LoRA(alpha=1.0), LoRA(alpha=64.0)),
        (ActivationSubspace(rank=1), ActivationSubspace(rank=2)),
        (RandomLayers(0.25), RandomLayers(0.254)),
        (LayerScope(), ActivationSubspace()),
    ],
)
def test_settings_tell_scopes_and_estimators_apart(one, other):
    own, others = (constructor_settings(thing, "model.scope") for thing in (one, other))
    assert own != others
    assert differences(own, others)
    assert json.loads(json.dumps(own)) == own


@each_scope
def test_settings_are_the_class_and_every_argument(scope):
    assert set(constructor_settings(scope, "model.scope")) == {"class", *inspect.signature(type(scope)).parameters}


def test_settings_and_their_differences():
    expected = {"class": "LoRA", "rank": 4, "alpha": 16.0, "target_modules": None, "layers": None}
    assert constructor_settings(LoRA(4), "model.scope") == expected
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == "b: 2 -> 3; c: None -> 4"
    assert differences({"a": "{t}\nIt was"}, {"a": "{t} It was"}) == r"a: '{t}\nIt was' -> {t} It was"


def test_masked_checkpoints_of_another_shape_are_refused():
    tuned = tensors_of(SmallestWeights(0.25), tiny_model())
    description = tuned.description()
    name = tuned.names[0]
    parameters = dict(tiny_model().named_parameters())
    parameters[name] = torch.zeros(200, 200)
    with pytest.raises(SlzoError, match=rf"tensor '{name}' does not fit the model .*\[32, 32\] in the checkpoint"):
        TunedTensors.from_description(parameters, description)


def test_a_prefix_of_other_heads_than_those_of_the_attention_is_refused():
    class Virtual:
        num_tokens = 1

        def of_layer(self, index):
            return torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)

    layer = torch.nn.Module()
    layer.layer_idx = 0
    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(SlzoError, match=r"^model.scope PrefixTuning: this model's attention uses other keys"):
        with_virtual_tokens(Virtual(), layer, states, states)
