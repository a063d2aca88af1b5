import json
import random

import pytest
import torch
from conftest import random_example, tiny_model

from slzo.batches.packing import pack
from slzo.errors import SlzoError
from slzo.models.parts import ModelParts
from slzo.zo.profile import LayerStatistics, OutlierProfile, profile_layers
from slzo.zo.selection import Choice, FirstOutlierLayer, FixedLayer, MaxRatioJump


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
        largest, medians, ratios, kurtosis = [], [], [], []
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
        got = layers[index]
        for value, expected in (
            (got.max_abs, largest),
            (got.median_abs, medians),
            (got.ratio, ratios),
            (got.kurtosis, kurtosis),
        ):
            assert value == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def statistics(*pairs):
    return [LayerStatistics(i, m, m / r, r, 3.0, 0, 0, 0) for i, (m, r) in enumerate(pairs)]


def test_both_thresholds_must_be_passed():
    layers = statistics((50, 5000), (5000, 500), (200, 2000), (9000, 9000))
    reason = "first layer with max > 100 and max/median > 1000"
    assert FirstOutlierLayer().select(layers) == Choice(2, reason, "first outlier layer")
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


def test_fixed_layer():
    layers = statistics((1, 4), (2, 40))
    assert FixedLayer(1).select(layers) == Choice(1, "fixed to layer 1", "chosen layer")
    with pytest.raises(SlzoError, match=r"profiler\.rule\.index 2: the model has layers 0 to 1"):
        FixedLayer(2).select(layers)


def test_a_profile_survives_json():
    profile = OutlierProfile(1, "rule", 10, 1, tuple(statistics((1, 4), (2, 40))), "first outlier layer")
    assert OutlierProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
