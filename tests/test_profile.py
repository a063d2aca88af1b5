"""The outlier profile: statistics of each layer, the rules that only look at them, and what is reported."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import choose, layer_statistics, random_example, random_prompts, tiny_model

from slzo.batches.packing import pack
from slzo.models.parts import ModelParts
from slzo.report.profile_files import bos_note, format_profile, profile_content
from slzo.training import profiling
from slzo.training.profiling import sequence_notes
from slzo.utils.errors import SlzoError
from slzo.zo.processes import Processes
from slzo.zo.profile import OutlierProfile, profile_layers, usable_sequences
from slzo.zo.selection import Choice, FirstOutlierLayer, MaxRatioJump, SelectionContext
from slzo.zo.selection.base import Margin

pytestmark = pytest.mark.fast


def with_outlier(layer, channel):
    """A tiny Llama in which one layer writes a huge value into one channel."""
    model = tiny_model("llama", scale=1.0)
    model.model.layers[layer].mlp.down_proj.weight[channel] *= 1e7
    return model


def test_a_planted_outlier_layer_is_found_with_its_channel():
    parts, prompts = ModelParts(with_outlier(2, 13)), random_prompts()
    layers = profile_layers(parts, [pack(prompts)])
    assert choose(FirstOutlierLayer(), layers).layer == choose(MaxRatioJump(), layers).layer == 2
    assert (layers[2].channel, layers[2].same_channel) == (13, 1)
    positions = [profile_layers(parts, [pack([prompt])])[2].position for prompt in prompts]
    assert layers[2].same_position == positions.count(layers[2].position) / len(positions)


@pytest.mark.parametrize("packed", [True, False])
def test_statistics_equal_a_plain_computation(packed):
    model, examples = with_outlier(1, 5), random_prompts()
    layers = profile_layers(ModelParts(model, packed), [pack(examples[:7]), pack(examples[7:])])
    plain = tiny_model("llama", scale=1.0)
    plain.load_state_dict(model.state_dict())
    for index, got in enumerate(layers):
        figures = []
        for example in examples:
            found = []
            handle = plain.model.layers[index].register_forward_hook(lambda m, i, o, found=found: found.append(o))
            with torch.no_grad():
                plain(input_ids=torch.tensor([example.sequences[0].ids[:-1]]))
            handle.remove()
            hidden = found[0][0].double()
            size, rest = hidden.abs(), hidden[1:].abs()
            z = (hidden - hidden.mean()) / hidden.std(correction=0)
            ratios = size.max() / size.median(), rest.max() / rest.median()
            figures.append(torch.stack([size.max(), size.median(), ratios[0], (z**4).mean(), rest.max(), ratios[1]]))
        figures = torch.stack(figures)
        names = ("max_abs", "median_abs", "ratio", "kurtosis", "rest_max_abs", "rest_ratio")
        assert [getattr(got, name) for name in names] == pytest.approx(figures.mean(0).tolist(), rel=1e-4)
        errors = figures.std(0) / math.sqrt(12)
        assert (got.max_abs_se, got.ratio_se) == pytest.approx((float(errors[0]), float(errors[2])), rel=1e-4)


def test_sequences_of_one_token_are_left_out():
    generator = random.Random(3)
    short, long = [random_example(generator, 20 + i, 1, (1,)) for i in range(3)], random_prompts()
    parts = ModelParts(tiny_model("llama", scale=1.0))
    batches = [pack([*short, *long])]
    assert [len(ids) for ids in usable_sequences(batches)] == [len(e.sequences[0].ids) - 1 for e in long]
    mixed, only = profile_layers(parts, batches), profile_layers(parts, [pack(long)])
    assert [layer.ratio for layer in mixed] == pytest.approx([layer.ratio for layer in only], rel=1e-4)


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer():
    half = tiny_model("llama", scale=1.0).to(torch.float16)
    half.model.layers[1].mlp.up_proj.weight *= 3e4
    half.model.layers[1].mlp.gate_proj.weight *= 3e4
    broken = tiny_model("llama", scale=1.0)
    broken.model.layers[3].mlp.down_proj.weight[0, 0] = math.nan
    for model, words in (
        (half, "float16: .*layer 1 .*bfloat16"),
        (broken, "float32: .*layer 3 .*weights may be damaged"),
    ):
        with pytest.raises(SlzoError, match=rf"model\.dtype {words}"):
            profile_layers(ModelParts(model), [pack(random_prompts())])


# ---- rules -----------------------------------------------------------------------------------------------------------------


def test_both_thresholds_must_be_passed():
    layers = layer_statistics((50, 5000), (5000, 500), (200, 2000), (9000, 9000))
    reason = "first layer with max > 100 and max/median > 1000"
    thresholds = (("max_abs", 100.0), ("ratio", 1000.0))
    assert choose(FirstOutlierLayer(), layers) == Choice(2, reason, "first outlier layer", thresholds=thresholds)
    assert choose(FirstOutlierLayer(max_abs=10), layers).layer == 0
    assert choose(FirstOutlierLayer(ratio=100), layers).layer == 1


def test_no_outlier_is_an_error():
    layers = layer_statistics((1, 4), (2, 40), (3, 50))
    with pytest.raises(SlzoError, match="closest is layer 2 with max 3 and ratio 50"):
        choose(FirstOutlierLayer(), layers)


def test_the_margin_is_over_the_chosen_layer_and_those_before_it():
    layers = layer_statistics((20, 40), (796, 750), (1000, 996), (23000, 13644), (23000, 1001), error=0.01)
    choice = choose(FirstOutlierLayer(), layers)
    assert choice.layer == 3  # the layers after it do not matter
    assert choice.margin.errors == pytest.approx(4 / 9.96)
    assert choice.margin.description == (
        "layer 2 is 0.4 standard errors below the threshold of 1,000 (max/median 996 ± 9.96)"
    )
    lone = choose(FirstOutlierLayer(), layer_statistics((20, 40), (23000, 1010), error=0.01))
    assert lone.margin.errors == pytest.approx(10 / 10.1)
    assert lone.margin.description.startswith("layer 1 is 1.0 standard errors above")


def test_a_layer_below_both_thresholds_must_pass_both():
    choice = choose(FirstOutlierLayer(), layer_statistics((99, 10), (23000, 13644), error=0.01))
    assert choice.margin.errors == pytest.approx(12644 / 136.44)  # not the 1 of layer 0's magnitude


@pytest.mark.parametrize("rule", [FirstOutlierLayer(), MaxRatioJump()])
def test_without_standard_errors_there_is_no_margin(rule):
    assert choose(rule, layer_statistics((20, 40), (23000, 13644))).margin is None


def test_the_margin_of_the_largest_growth():
    layers = layer_statistics((20, 40), (796, 750), (1000, 700), (23000, 14000), error=0.05)
    choice = choose(MaxRatioJump(), layers)
    # layer 0 grows 40 times (one error, from 1 exactly), layer 3 20 times (two errors)
    assert choice.layer == 0
    assert choice.margin.errors == pytest.approx(math.log(2) / (0.05 * math.sqrt(3)))
    assert choice.margin.description == "layer 0's growth of 40 times is 8.0 standard errors above layer 3's of 20"


def test_a_rule_that_does_not_tell_the_layers_apart_says_so():
    over, under = (2984, 4926), (2000, 900)

    def note(*layers):
        return choose(FirstOutlierLayer(), layer_statistics(*layers)).note

    every = note(*[over] * 4)
    assert every.startswith("All 4 layers are above the thresholds: the rule's choice carries no information here; ")
    assert "slzo sweep" in every
    assert "--model.layer" in every
    assert note(over, over, over, under).startswith("3 of 4 layers, starting with the first, are above the thresholds")
    assert not note(over, under, under, under)
    assert not note(under, over, over, over)


# ---- the report ------------------------------------------------------------------------------------------------------------


def last_lines(layers, *notes):
    profile = OutlierProfile(tuple(layers), 16, 1, notes, bos_token_id=None)
    return format_profile(profile, choose(FirstOutlierLayer(), layers)).splitlines()[-2:]


def test_the_report_says_in_one_line_how_clear_the_choice_is():
    close = layer_statistics((1000, 996), (23000, 13644), error=0.01)
    found, note = last_lines(close, "A note.")
    assert found.startswith("Not clear: layer 0 is 0.4 standard errors below the threshold of 1,000 (max/median 996 ± ")
    for advice in ("--profiler.text_file", "--profiler.num_sequences", "--model.layer"):
        assert advice in found
    assert note == "A note."
    clear = last_lines(layer_statistics((800, 700), (23000, 13644), error=0.01))[-1]
    assert clear.startswith("Clear for prompts like these: layer 0 is 42.9 standard errors below")
    unknown = last_lines(layer_statistics((800, 700), (23000, 13644)))
    assert "lear" not in "".join(unknown)


def test_outliers_at_bos_in_all_sequences_are_reported():
    layer = replace(layer_statistics((2984, 4926))[0], token="<bos>", token_id=2)
    layer = replace(layer, rest_max_abs=602.4, rest_ratio=992.6)
    assert bos_note(layer, 2) == (
        "In all sequences the outlier of layer 0 is at '<bos>', whatever the prompt: without it max 602, max/median 993."
    )
    assert bos_note(layer, None) is bos_note(layer, 5) is None
    assert bos_note(replace(layer, position=1), 2) is bos_note(replace(layer, same_position=0.9), 2) is None


def test_problems_with_the_prompts_are_reported():
    different = [(1, i) for i in range(12)]
    assert sequence_notes(12, 12, different) == []
    assert sequence_notes(16, 14, different) == [
        "Averaged over all 14 sequences; 16 were requested (profiler.num_sequences).",
        "Left out 2 of 14 sequences, which have only one token.",
    ]
    assert sequence_notes(12, 12, [(1, 2)] * 12)[0].startswith("All 12 prompts are equal: standard errors would")
    assert sequence_notes(12, 12, [(1, i % 3) for i in range(12)])[0].startswith("Only 3 prompts are different: ")


def test_the_file_holds_profile_and_choice():
    """Checkpoints hold the same, so the keys of a format stay."""
    profile = OutlierProfile(tuple(layer_statistics((1, 4), (2, 40))), 10, 1, ("of all",), bos_token_id=0)
    margin = Margin(3.5, "layer 0 is near")
    choice = Choice(1, "a rule", "outlier layer", margin, "of the choice", (("max_abs", 100.0),))
    content = profile_content(profile, choice)
    assert [layer["ratio"] for layer in content.pop("layers")] == [4, 40]
    assert content == {
        "num_sequences": 10,
        "num_forward_passes": 1,
        "dominant_layer": 1,
        "rule": "a rule",
        "title": "outlier layer",
        "margin": 3.5,
        "margin_reason": "layer 0 is near",
        "notes": ("of all", "of the choice", bos_note(profile.layers[1], 0)),
        "thresholds": (("max_abs", 100.0),),
    }
    infinite = profile_content(profile, replace(choice, margin=Margin(math.inf, "no spread")))  # JSON has no infinity
    assert (infinite["margin"], infinite["margin_reason"]) == (None, "")


def test_a_wrong_threshold_is_named():
    with pytest.raises(SlzoError, match=r"^profiler\.rule\.ratio nan: must be"):
        FirstOutlierLayer(ratio=float("nan"))


def test_a_rule_that_fails_on_the_first_process_fails_on_all():
    """Its error is broadcast like a choice, so no process waits for the others."""
    layers = tuple(profile_layers(ModelParts(tiny_model()), [pack(random_prompts())]))
    context, sent = SelectionContext(layers), []
    first = SimpleNamespace(processes=Processes(2, 0, broadcast=lambda value: sent.append(value) or value))
    other = SimpleNamespace(processes=Processes(2, 1, broadcast=lambda _: sent[-1]))
    with pytest.raises(SlzoError, match="threshold"):
        profiling.choose(FirstOutlierLayer(max_abs=1e9), context, first)
    with pytest.raises(SlzoError, match="threshold"):
        profiling.choose(MaxRatioJump(), context, other)
    chosen = profiling.choose(MaxRatioJump(), context, first)
    assert len(sent) == 2
    assert profiling.choose(FirstOutlierLayer(max_abs=1e9), context, other).layer == chosen.layer
