"""Model families: mixtures of experts, attention sinks, windows that only a twin shows, and the page of all types."""

import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers import error_line, last_checkpoint, packed_prompts, random_example, tiny_model, tuned, tuned_layer
from transformers import AutoConfig

import family_table
from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.evaluation.decoding import decode
from slzo.models import attention, linear
from slzo.models.load import load_model
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.models.startup_check import split_and_verify
from slzo.models.twin import ORIGINAL_LENGTH, WINDOW, tiny_config, tiny_twin
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.profile import profile_layers
from slzo.zo.scopes import (
    ActivationSubspace,
    AllParameters,
    LayerScope,
    LoRA,
    OutlierChannels,
    RandomLayers,
    ScopeContext,
    SmallestWeights,
)
from slzo.zo.scopes.linear_maps import linears, mlp_output
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned_model import TunedModel
from tiny import make_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SELECTION = [
    *("llama", "diffllama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phi3", "gemma3", "llava"),
    *("qwen3_next", "jamba", "llama4_text", "lfm2", "recurrent_gemma", "mamba2", "bloom"),
    *("gemma3n_text", "zaya", "hrm_text"),
]


def names_of(tensors):
    return {name for name, _ in tensors.items()}


@pytest.mark.parametrize("model_type", SELECTION)
def test_the_page_says_what_happens(model_type):
    """What is accepted is compared with plain forward passes there, split before every layer."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    marks = {
        section.splitlines()[0]: re.findall(rf"(?<!\S){model_type}((?: \(\w+\))*)[,\n]", section)
        for section in sections
    }
    ((title, found),) = [(title, found) for title, found in marks.items() if found]
    verdict = family_table.verdict_of(model_type)
    assert (verdict.runs, len(found)) == (title.lower(), 1)
    assert verdict.experts == ("(MoE)" in found[0])
    if model_type in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        assert verdict.runs == "packed"
        assert verdict.error < 1e-5


def test_a_wrong_model_does_not_get_onto_the_page(monkeypatch):
    monkeypatch.setattr(family_table, "split_and_verify", lambda model, **_: ModelParts(model, onednn=False))
    with pytest.raises(AssertionError, match=r"lfm2: accepted, but its logits are wrong by \d"):
        family_table.verdict_of("lfm2")


@pytest.mark.parametrize(
    "scope", [LayerScope(), LayerScope("mlp"), LoRA(2), LoRA(2, layers="all"), ActivationSubspace(2)]
)
def test_a_layer_that_shares_tensors_with_others_is_refused(scope):
    """As in Zamba2: the loss of the layers between them would be wrong, and a merged layer would change the others."""
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(
        SlzoError, match=r"model.layer \d: shares tensors with layers \d, which would change too; tune a layer"
    ):
        TunedModel.from_scope(ModelParts(model), scope, 2)
    TunedModel.from_scope(ModelParts(model), LayerScope(), 3)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("gemma4_text", "mlp.down_proj"),
        ("falcon_h1", "feed_forward.down_proj"),
        ("bamba", "feed_forward.down_proj"),
        ("mamba", None),
    ],
)
def test_the_output_of_the_mlp_is_not_that_of_another_module(model_type, expected):
    parts = ModelParts(family_table.tiny_model(model_type), packed=False)
    found = mlp_output(parts, linears(parts, 1))
    assert (found and found.path) == expected


def test_a_map_that_no_layer_runs_is_named():
    parts = ModelParts(family_table.tiny_model("mamba"), packed=False)
    with pytest.raises(
        SlzoError, match=r"model.scope: the model does not run .*layers.1.mixer.* once for each token, so"
    ):
        TunedModel.from_scope(parts, ActivationSubspace(2), 1, prompts=packed_prompts)


# ---- the start-up check ----------------------------------------------------------------------------------------------------


def test_a_twin_is_of_the_same_kind_with_all_kinds_of_layers():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=26, sliding_window=4096)
    twin = tiny_config(config)
    assert (twin.sliding_window, twin.hidden_size, config.sliding_window) == (WINDOW, 32, 4096)
    assert twin.layer_types == config.layer_types[:6]
    assert set(twin.layer_types) == set(config.layer_types)
    heads = tiny_config(AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8))
    assert (heads.num_attention_heads, heads.num_key_value_heads) == (4, 2)
    model = tiny_model("mistral")
    before = torch.random.get_rng_state()
    assert type(tiny_twin(model)).__name__ == "MistralForCausalLM"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_window_that_no_short_row_reaches_is_seen(monkeypatch):
    plain = attention.packed_attention_forward

    def without_window(*args, sliding_window=None, **kwargs):
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention, "packed_attention_forward", without_window)
    assert split_and_verify(tiny_model("llama")).packed
    with pytest.warns(UserWarning, match="a tiny model of this type gives different logits"):
        assert not split_and_verify(tiny_model("mistral", sliding_window=4096)).packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_each_other_are_found_in_any_dtype(dtype):
    model = tiny_model("llama")
    # far less than rounding changes in half precision, and only forwards, from row to row
    model.model.layers[2].register_forward_pre_hook(
        lambda _module, inputs: (inputs[0] + 1e-12 * inputs[0].roll(1, dims=1), *inputs[1:])
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        parts = split_and_verify(model.to(dtype))
    assert not parts.packed
    assert "rows of a batch affect each other" in str(told[-1].message)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
ORIGINAL = {"original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("family", "rope", "options", "longest"),
    [("llama", DYNAMIC, {}, 256), ("phi3", {**LONG, **ORIGINAL}, ORIGINAL, 40)],
)
def test_rows_stay_within_the_length_that_rotary_embeddings_were_made_for(family, rope, options, longest):
    model = tiny_model(family, rope_parameters=rope, **options)
    parts = split_and_verify(model)
    assert (parts.packed, parts.limits.longest) == (True, longest)
    generator = random.Random(0)
    with torch.no_grad():
        needed_logits(parts, pack([random_example(generator, 0, longest - 1), random_example(generator, 1, 5)]))
        with pytest.raises(SlzoError, match=rf"data\.max_length: .* set it to {longest} or less"):
            needed_logits(parts, pack([random_example(generator, 0, longest + 5), random_example(generator, 1, 5)]))
    assert longest > ORIGINAL_LENGTH


def test_a_head_that_cannot_be_selected_is_run_whole(monkeypatch):
    def fails(self, hidden_states):
        raise AttributeError("'SelectedHead' object has no attribute 'other'")

    monkeypatch.setattr(linear.SelectedHead, "forward", fails)
    parts = split_and_verify(tiny_model("llama"))
    assert not parts.limits.selects_tokens
    hidden, ids = torch.randn(3, 32), torch.tensor([5, 2])
    torch.testing.assert_close(parts.head(hidden, ids), parts.head(hidden)[:, ids])


def test_a_model_without_a_twin_is_padded(monkeypatch):
    def fails(model):
        raise KeyError("no such layer")

    monkeypatch.setattr("slzo.models.startup_check.tiny_twin", fails)
    with pytest.warns(UserWarning, match="no tiny model of this type can be made for the check: 'no such layer'"):
        assert not split_and_verify(tiny_model("llama")).packed


@pytest.mark.parametrize(
    ("model_type", "shape"), [("gemma3n_text", r"\(4, 1, 2, 32\)"), ("deepseek_v4", r"\(1, 2, 4, 32\)")]
)
def test_a_model_with_several_states_per_token_is_refused(model_type, shape):
    with pytest.raises(SlzoError, match=f"its layers pass on more than one state per token, of shape {shape} for two"):
        split_and_verify(family_table.tiny_model(model_type))


def test_a_refused_model_leaves_no_run_folder(tmp_path, sst2_options, capsys):
    family_table.tiny_model("gemma3n_text").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    error = error_line(capsys, "fit", *sst2_options, f"--model.model={tmp_path / 'model'}")
    assert "Gemma3nForCausalLM is not supported: its layers pass on more than one state per token" in error
    assert not Path("runs").exists()


# ---- experts and sinks -----------------------------------------------------------------------------------------------------


def test_sinks_are_seen_while_answers_are_generated():
    model, generator = family_table.tiny_model("gpt_oss"), random.Random(0)
    prompts = [generator.choices(range(3, 300), k=k) for k in (3, 9, 14)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    parts = split_and_verify(family_table.tiny_model("gpt_oss"))
    assert parts.packed
    assert decode(parts, prompts, set(), max_new_tokens=6).answers == expected


def test_a_model_that_sees_padding_generates_rows_of_equal_length_together():
    generator = random.Random(0)
    prompts = [generator.choices(range(3, 300), k=k) for k in (3, 9, 9, 14)]
    with pytest.warns(UserWarning, match="padding is used"):
        parts = split_and_verify(family_table.tiny_model("recurrent_gemma"))
    assert not parts.limits.left_padding
    together = decode(parts, prompts, set(), max_new_tokens=5).answers
    assert together == [decode(parts, [prompt], set(), max_new_tokens=5).answers[0] for prompt in prompts]


def test_a_mixture_of_experts_is_tuned_and_its_router_stays(one_token_examples):
    parts = ModelParts(tiny_model("mixtral", **EXPERTS))
    model = tuned_layer(parts, 1)
    before = {name: tensor.clone() for name, tensor in parts.model.named_parameters()}
    optimizer = torch.optim.SGD(model.tensors.masters, lr=1e-3)
    stepper = Stepper(model, CandidateCrossEntropy(), SPSA(), StepOptions(1e-3))
    stepper.step(TrainBatch(pack(one_token_examples), ()), 0, optimizer)
    moved = {name for name, tensor in parts.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= moved
    assert all(name.startswith("model.layers.1.") and "mlp.gate" not in name for name in moved)
    statistics = profile_layers(parts, [pack(one_token_examples)])
    assert len(statistics) == parts.num_layers


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "jamba"])
def test_routers_are_tuned_where_asked_for(family):
    model = family_table.tiny_model(family)
    parts = ModelParts(model, packed=False, onednn=False)
    layer = 3
    context = ScopeContext(parts, layer, lambda _: ())
    for scope, with_routers in (
        (LayerScope(), LayerScope(routers=True)),
        (LayerScope("mlp"), LayerScope("mlp", routers=True)),
        (AllParameters(), AllParameters(routers=True)),
        (RandomLayers(), RandomLayers(routers=True)),
    ):
        plain, more = (names_of(chosen.tensors(context)) for chosen in (scope, with_routers))
        extra = more - plain
        assert plain < more
        assert any("experts" in name for name in plain)
        assert all("mlp.gate." in name or "router." in name for name in extra), extra
        assert scope.describe() != with_routers.describe()


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (OutlierChannels(), r"model\.scope OutlierChannels: layer 1 is a mixture of experts.*q_proj"),
        (SmallestWeights(), r"model\.scope SmallestWeights: layer 0 is a mixture of experts"),
        (ActivationSubspace(4), r"model\.scope\.target_modules: layer 1 is a mixture of experts.*\(q_proj, k_proj"),
        (ActivationSubspace(4, target_modules=["mlp_output"]), "layer 1 has no such linear map; choose from q_proj"),
    ],
)
def test_scopes_of_linear_maps_refuse_experts_in_one_line(scope, message):
    parts = ModelParts(tiny_model("mixtral", **EXPERTS))
    with pytest.raises(SlzoError, match=message):
        TunedModel.from_scope(parts, scope, 1)


@pytest.mark.parametrize(
    "scope", [LoRA(2, target_modules=["q_proj"]), ActivationSubspace(2, target_modules=["q_proj", "v_proj"])]
)
def test_the_attention_beside_experts_is_tuned_as_in_others(scope, examples):
    parts = ModelParts(tiny_model("mixtral", **EXPERTS))
    model = TunedModel.from_scope(parts, scope, 1, prompts=lambda _: [pack(examples)])
    assert all("self_attn" in name for name in names_of(model.tensors))


def test_a_gate_is_a_router_only_beside_experts():
    context = ScopeContext(ModelParts(tiny_model("llama")), 1, lambda _: ())
    assert names_of(LayerScope().tensors(context)) == names_of(LayerScope(routers=True).tensors(context))


def test_the_text_decoder_of_a_model_that_looks_at_images_is_loaded(tmp_path):
    model = family_table.tiny_model("llava")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert isinstance(loaded, type(model))
    parts = split_and_verify(loaded)
    assert parts.layers is loaded.model.language_model.layers
    assert family_table.largest_error(parts, model) < 1e-5


@pytest.mark.parametrize("layers", [None, "all"])
def test_lora_leaves_the_image_encoder_alone(layers):
    """Its layers have the same numbers, and linear maps of the same names."""
    parts = ModelParts(family_table.tiny_model("llava"), onednn=False)
    model = TunedModel.from_scope(parts, LoRA(2, target_modules=["q_proj"], layers=layers), 1)
    chosen = [1] if layers is None else range(parts.num_layers)
    assert {name.partition(".self_attn")[0] for name in model.tensors.names} == {
        f"{parts.layers_path}.{layer}" for layer in chosen
    }
    assert model.span.inside


def test_all_parameters_are_those_of_the_text_model():
    parts = ModelParts(family_table.tiny_model("llava"), onednn=False)
    names = set(TunedModel.from_scope(parts, AllParameters()).tensors.names)
    others = {name for name, _ in parts.model.named_parameters()} - names
    assert {name.partition(".")[0] for name in names} == {"model", "lm_head"}
    assert {".".join(name.split(".")[:2]) for name in others} == {"model.vision_tower", "model.multi_modal_projector"}


def test_a_mixture_of_experts_is_fitted_from_a_folder(tmp_path, options):
    tiny_model("mixtral", scale=1.0, **EXPERTS).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    steps = ["--trainer.max_steps=2", "--model.scope=LayerScope", "--model.scope.routers=true"]
    assert main(["fit", *options, f"--model.model={tmp_path / 'model'}", *steps]) == 0
    assert any("mlp.gate" in name for name in tuned(last_checkpoint()))
