import json
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import random_example, tiny_model

from slzo.batches.packing import pack
from slzo.callbacks.profile_notes import bos_note, sequence_notes
from slzo.callbacks.profile_report import format_profile
from slzo.utils.errors import SlzoError
from slzo.models.parts import ModelParts
from slzo.zo.profile import LayerStatistics, OutlierProfile, profile_layers, usable_sequences
from slzo.zo.selection import Choice, FirstOutlierLayer, FixedLayer, Margin, MaxRatioJump


def prompts(count=12):
    generator = random.Random(2)
    return [random_example(generator, i, 4 + i % 5, (1,)) for i in range(count)]


def with_outlier(layer, channel):
    """A tiny Llama in which one layer writes a huge value into one channel."""
    model = tiny_model("llama", scale=1.0)
    model.model.layers[layer].mlp.down_proj.weight[channel] *= 1e7
    return model


def test_a_planted_outlier_layer_is_found_with_its_channel():
    layers, passes = profile_layers(ModelParts(with_outlier(2, 13)), [pack(prompts())])
    assert FirstOutlierLayer().select(layers).layer == 2
    assert MaxRatioJump().select(layers).layer == 2
    assert layers[2].channel == 13
    assert passes == 1


@pytest.mark.parametrize("packed", [True, False])
def test_statistics_equal_a_plain_computation(packed):
    model, examples = with_outlier(1, 5), prompts()
    layers, _ = profile_layers(ModelParts(model, packed), [pack(examples[:7]), pack(examples[7:])])
    plain = tiny_model("llama", scale=1.0)
    plain.load_state_dict(model.state_dict())
    for index in range(4):
        largest, medians, ratios, kurtosis, rest, rest_ratios = [], [], [], [], [], []
        for example in examples:
            found = []
            handle = plain.model.layers[index].register_forward_hook(lambda m, i, o, found=found: found.append(o))
            with torch.no_grad():
                plain(input_ids=torch.tensor([example.sequences[0].ids[:-1]]))
            handle.remove()
            hidden = found[0][0].double()
            largest.append(hidden.abs().max())
            medians.append(hidden.abs().median())
            ratios.append(largest[-1] / medians[-1])
            z = (hidden - hidden.mean()) / hidden.std(correction=0)
            kurtosis.append((z**4).mean())
            rest.append(hidden[1:].abs().max())
            rest_ratios.append(rest[-1] / hidden[1:].abs().median())
        got = layers[index]
        for value, expected in (
            (got.max_abs, largest),
            (got.median_abs, medians),
            (got.ratio, ratios),
            (got.kurtosis, kurtosis),
            (got.rest_max_abs, rest),
            (got.rest_ratio, rest_ratios),
        ):
            assert value == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
        for error, values in ((got.max_abs_se, largest), (got.ratio_se, ratios)):
            assert error == pytest.approx(float(torch.stack(values).std() / math.sqrt(12)), rel=1e-4)


def statistics(*pairs, error=None):
    """Layers of these magnitudes and ratios, whose standard errors are this share of them."""
    layers = [LayerStatistics(i, m, m / r, r, 3.0, 0, 0, 0) for i, (m, r) in enumerate(pairs)]
    if error is None:
        return layers
    return [replace(layer, max_abs_se=layer.max_abs * error, ratio_se=layer.ratio * error) for layer in layers]


def test_the_shares_say_where_the_outliers_are():
    layers, _ = profile_layers(ModelParts(with_outlier(2, 13)), [pack(prompts())])
    assert layers[2].same_channel == 1
    examples = prompts()
    positions = []
    for example in examples:
        found, _ = profile_layers(ModelParts(with_outlier(2, 13)), [pack([example])])
        positions.append(found[2].position)
    assert layers[2].same_position == positions.count(layers[2].position) / len(positions)


def test_sequences_of_one_token_are_left_out():
    generator = random.Random(3)
    short, long = [random_example(generator, 20 + i, 1, (1,)) for i in range(3)], prompts()
    parts = ModelParts(tiny_model("llama", scale=1.0))
    batches = [pack([*short, *long])]
    assert [len(ids) for ids in usable_sequences(batches)] == [len(e.sequences[0].ids) - 1 for e in long]
    mixed, only = profile_layers(parts, batches)[0], profile_layers(parts, [pack(long)])[0]
    for one, other in zip(mixed, only, strict=True):
        assert one.ratio == pytest.approx(other.ratio, rel=1e-4)


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer():
    model = tiny_model("llama", scale=1.0).to(torch.float16)
    model.model.layers[1].mlp.up_proj.weight *= 3e4
    model.model.layers[1].mlp.gate_proj.weight *= 3e4
    with pytest.raises(
        SlzoError, match=r"model\.dtype float16: what layer 1 puts out is not finite.*bfloat16 or float32"
    ):
        profile_layers(ModelParts(model), [pack(prompts())])
    broken = tiny_model("llama", scale=1.0)
    broken.model.layers[3].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(
        SlzoError, match=r"model\.dtype float32: what layer 3 puts out is not finite.*weights are broken"
    ):
        profile_layers(ModelParts(broken), [pack(prompts())])


def test_both_thresholds_must_be_passed():
    layers = statistics((50, 5000), (5000, 500), (200, 2000), (9000, 9000))
    reason = "first layer with max > 100 and max/median > 1000"
    thresholds = (("max_abs", 100.0), ("ratio", 1000.0))
    assert FirstOutlierLayer().select(layers) == Choice(2, reason, "first outlier layer", thresholds=thresholds)
    assert FirstOutlierLayer(max_abs=10).select(layers).layer == 0
    assert FirstOutlierLayer(ratio=100).select(layers).layer == 1


def test_no_outlier_is_an_error_or_a_stated_fallback():
    layers = statistics((1, 4), (2, 40), (3, 50))
    with pytest.raises(SlzoError, match="closest is layer 2 with max 3 and ratio 50"):
        FirstOutlierLayer().select(layers)
    choice = FirstOutlierLayer(fallback="max_ratio_jump").select(layers)
    assert choice.layer == 1
    assert "none, so" in choice.reason
    assert choice.title == "chosen layer"  # it is no outlier layer then


def test_the_margin_is_over_the_chosen_layer_and_those_before_it():
    layers = statistics((20, 40), (796, 750), (1000, 996), (23000, 13644), (23000, 1001), error=0.01)
    choice = FirstOutlierLayer().select(layers)
    assert choice.layer == 3  # what comes after it does not decide
    assert choice.margin.errors == pytest.approx(4 / 9.96)
    assert choice.margin.words == "layer 2 is 0.4 standard errors below the threshold of 1,000 (max/median 996 +- 9.96)"
    lone = FirstOutlierLayer().select(statistics((20, 40), (23000, 1010), error=0.01))
    assert lone.margin.errors == pytest.approx(10 / 10.1)
    assert lone.margin.words.startswith("layer 1 is 1.0 standard errors above")


def test_a_layer_below_both_thresholds_must_pass_both():
    layers = statistics((99, 10), (23000, 13644), error=0.01)
    choice = FirstOutlierLayer().select(layers)
    assert choice.margin.errors == pytest.approx(12644 / 136.44)  # not the 1 of layer 0's magnitude


def test_without_standard_errors_there_is_no_margin():
    layers = statistics((20, 40), (23000, 13644))
    for rule in (
        FirstOutlierLayer(),
        MaxRatioJump(),
        FixedLayer(1),
        FirstOutlierLayer(ratio=1e6, fallback="max_ratio_jump"),
    ):
        assert rule.select(layers).margin is None


def test_the_margin_of_the_largest_growth():
    choice = MaxRatioJump().select(statistics((20, 40), (796, 750), (1000, 700), (23000, 14000), error=0.05))
    # layer 0 grows 40 times (one error, from 1 exactly), layer 3 20 times (two errors)
    assert choice.layer == 0
    assert choice.margin.errors == pytest.approx(math.log(2) / (0.05 * math.sqrt(3)))
    assert choice.margin.words == "layer 0's growth of 40 times is 8.0 standard errors above layer 3's of 20"


def test_a_fallback_is_as_clear_as_its_closest_call():
    layers = statistics((20, 40), (796, 998), (1000, 900), error=0.01)
    choice = FirstOutlierLayer(fallback="max_ratio_jump").select(layers)
    assert choice.margin.words.startswith("layer 1 is 0.2 standard errors below the threshold of 1,000")


def test_a_rule_that_tells_no_layer_from_another_says_so():
    over, under = (2984, 4926), (2000, 900)
    every = FirstOutlierLayer().select(statistics(*[over] * 4))
    assert every.note.startswith(
        "All 4 layers are over the thresholds: the rule's answer carries no information here; "
    )
    assert "slzo sweep" in every.note
    assert "--model.layer" in every.note
    most = FirstOutlierLayer().select(statistics(over, over, over, under))
    assert most.note.startswith(
        "3 of 4 layers are over the thresholds, from the first on: the rule's answer carries little"
    )
    assert not FirstOutlierLayer().select(statistics(over, under, under, under)).note
    assert not FirstOutlierLayer().select(statistics(under, over, over, over)).note


def profile(layers, choice, notes=()):
    margin = choice.margin or Margin(None, "")
    return OutlierProfile(choice.layer, choice.reason, 16, 1, tuple(layers), choice.title, *margin, notes)


def test_the_report_says_in_one_line_how_clear_the_choice_is():
    layers = statistics((1000, 996), (23000, 13644), error=0.01)
    lines = format_profile(profile(layers, FirstOutlierLayer().select(layers), ("A note.",))).splitlines()
    assert lines[-2].startswith(
        "Not clear: layer 0 is 0.4 standard errors below the threshold of 1,000 (max/median 996 +- "
    )
    for advice in ("--profiler.text_file", "--profiler.num_sequences", "--model.layer"):
        assert advice in lines[-2]
    assert lines[-1] == "A note."
    layers = statistics((800, 700), (23000, 13644), error=0.01)
    lines = format_profile(profile(layers, FirstOutlierLayer().select(layers))).splitlines()
    assert lines[-1].startswith("Clear for prompts like these: layer 0 is 42.9 standard errors below")
    layers = statistics((800, 700), (23000, 13644))
    found = profile(layers, FirstOutlierLayer().select(layers))
    assert "lear" not in format_profile(found)


def test_outliers_at_bos_in_all_sequences_are_told():
    layer = replace(statistics((2984, 4926))[0], token="<bos>", token_id=2, same_position=1.0)
    layer = replace(layer, rest_max_abs=602.4, rest_ratio=992.6)
    assert bos_note(layer, 2) == (
        "In all sequences the outlier of layer 0 is at '<bos>', whatever the prompt: without it max 602, max/median 993."
    )
    assert bos_note(layer, None) is None
    assert bos_note(layer, 5) is None
    assert bos_note(replace(layer, position=1), 2) is None
    assert bos_note(replace(layer, same_position=0.9), 2) is None


def test_what_was_wrong_with_the_prompts_is_told_in_a_line_each():
    different = [(1, i) for i in range(12)]
    assert sequence_notes(12, 12, different) == []
    fewer, short = sequence_notes(16, 14, different)
    assert fewer == "Asked for 16 sequences (profiler.num_sequences), there were 14: averaged over those."
    assert short == "2 of 14 sequences have one token only: they are left out."
    assert sequence_notes(12, 12, [(1, 2)] * 12)[0].startswith(
        "All 12 prompts are equal: standard errors would mean nothing"
    )
    assert sequence_notes(12, 12, [(1, i % 3) for i in range(12)])[0].startswith("Only 3 prompts are different: ")


def test_fixed_layer():
    layers = statistics((1, 4), (2, 40))
    assert FixedLayer(1).select(layers) == Choice(1, "fixed to layer 1", "chosen layer")
    with pytest.raises(SlzoError, match=r"profiler\.rule\.index 2: the model has layers 0 to 1"):
        FixedLayer(2).select(layers)


def test_a_profile_survives_json():
    layers = tuple(statistics((1, 4), (2, 40), error=0.1))
    profile = OutlierProfile(1, "rule", 10, 1, layers, "first outlier layer", 3.5, "layer 0 is near", ("one", "two"))
    assert OutlierProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_a_profile_of_a_former_version_is_read():
    new = {"max_abs_se", "ratio_se", "same_channel", "same_position", "rest_max_abs", "rest_ratio"}
    content = OutlierProfile(1, "rule", 10, 1, tuple(statistics((1, 4), (2, 40)))).to_dict()
    content["layers"] = [{k: v for k, v in layer.items() if k not in new} for layer in content["layers"]]
    former = {k: v for k, v in content.items() if k not in {"margin", "margin_reason", "notes"}}
    found = OutlierProfile.from_dict(json.loads(json.dumps(former)))
    assert (found.margin, found.notes, found.layers[1].ratio_se) == (None, (), None)
    assert "<- dominant" in format_profile(found)
