"""Memory is estimated before the model is loaded."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import FAMILIES, error_line, random_example, summary, tiny_model, write_lines
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

import family_table
from memory_table import table as memory_table
from slzo.__main__ import main
from slzo.batches.packing import Block
from slzo.models import load
from slzo.models.load import load_model
from slzo.models.shape import model_shape, shape_of, skeleton_of
from slzo.models.startup_check import split_and_verify
from slzo.training import memory_estimate, memory_plan
from slzo.training.memory_estimate import (
    PROGRAM_BYTES,
    TOKENIZER_BYTES,
    MemoryInputs,
    MemoryPlan,
    Workload,
    tuning_bytes,
)
from slzo.zo.optim import OptimizerOptions
from slzo.zo.scopes import LoRA
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_model import TunedModel
from tiny import make_tokenizer
from write_shape import Shape, write_shape

PROGRAM = PROGRAM_BYTES + 32000 * TOKENIZER_BYTES  # with the vocabulary of Llama 2


EQUAL_LAYERS = [family for family in FAMILIES if family != "gemma4_text"]


@pytest.mark.parametrize("family", EQUAL_LAYERS)
def test_the_shape_counts_the_parameters(family):
    model = tiny_model(family)
    shape = shape_of(skeleton_of(model.config))
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    maps = sum(p.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear | Conv1D) for p in m.parameters())
    assert shape.linear == maps
    assert shape.weight_bytes(torch.float16, None) == 2 * shape.num_parameters


def test_the_weights_are_not_read(model_dir):
    shape, skeleton = model_shape(str(model_dir))
    assert shape.stored_bytes == (model_dir / "model.safetensors").stat().st_size
    assert shape.stored_dtype == torch.float32
    assert all(p.device.type == "meta" for p in skeleton.parameters())


@pytest.fixture
def llama():
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    return shape_of(skeleton_of(LlamaConfig(vocab_size=32000, **sizes)))


def test_the_arithmetic_of_llama_2_7b(llama):
    assert llama.num_parameters == 6_738_415_616
    layer, outside = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 32000 * 4096 + 4096 + 32 * 2 * 4096
    assert llama.weight_bytes(torch.float16, "int8", full_layers=1) == 2 * outside + 31 * layer + 2 * layer
    assert llama.weight_bytes(torch.float16, "nf4") == 2 * outside + 32 * layer * 4.5 / 8
    tuned = {"masters": 4 * layer, "directions and gradient": 4 * layer}
    inputs = MemoryInputs(llama, torch.float16, "nf4", tuned, 1, 5, Workload(100, 10, 1000), 2**30, on_cpu=False)
    plan = inputs.plan()
    assert plan.parts["weights"] == llama.weight_bytes(torch.float16, "nf4", 1)
    assert plan.parts["logits"] == 10 * 32000 * 4 * 3
    assert "prefix cache" not in plan.parts  # it is in the memory of the CPU
    assert plan.total == plan.needed == sum(plan.parts.values())
    stored = replace(llama, stored_bytes=13 * 10**9, stored_dtype=torch.bfloat16)
    on_cpu = replace(inputs, shape=stored, dtype=torch.bfloat16, quantization=None, on_cpu=True).plan()
    assert on_cpu.parts["prefix cache"] == 1000 * 4096 * 2
    assert on_cpu.mapped == 2 * llama.num_parameters
    converted = replace(inputs, shape=stored, quantization=None, on_cpu=True).plan()
    assert converted.total == converted.loading == PROGRAM + 13 * 10**9 + 2 * llama.num_parameters


@pytest.mark.parametrize(
    ("dtype", "queries", "at_once", "copies"),
    [
        (torch.float32, 1, 1, 1),  # the gradient takes the memory of the first direction
        (torch.float32, 3, 1, 2),
        (torch.float32, 3, 3, 3),
        (torch.float32, 3, 8, 3),
        (torch.bfloat16, 1, 1, 2),  # a rounded direction is not the gradient
        (torch.bfloat16, 3, 2, 3),
    ],
)
def test_what_tuning_takes(dtype, queries, at_once, copies):
    tuned = TunedTensors({"a": torch.zeros(4, 5, dtype=dtype), "b": torch.zeros(6, dtype=dtype)})
    adam = OptimizerOptions.of(torch.optim.Adam)
    parts = tuning_bytes(tuned, queries, at_once, adam)
    assert (parts["masters"], parts["best masters"], parts["Adam state"]) == (4 * 26, 4 * 26, 2 * 4 * 26)
    assert parts["directions and gradient"] == copies * 4 * 26
    assert parts["rounding"] == (0 if dtype == torch.float32 else 3 * 4 * 20)
    tuned.hold_bytes = 4 * 26 - 1  # too large to hold a direction, or a copy for a rollback
    parts = tuning_bytes(tuned, queries, at_once, adam)
    assert (parts["directions and gradient"], parts["best masters"]) == (4 * 26, 0)


def test_generated_answers_take_keys_and_values(llama):
    assert llama.key_values == 2 * 4096
    work = Workload(100, cached_tokens=1000, prompt_tokens=500, answer_tokens=300)
    inputs = MemoryInputs(llama, torch.bfloat16, None, {}, 1, 5, work, 2**30)
    parts = inputs.plan().parts
    assert parts["kept prompts"] == 500 * (4096 + 5 * 2 * 4096) * 2
    assert parts["keys and values of answers"] == 300 * 32 * 2 * 4096 * 2
    # the prefix cache comes first, and the two have one budget
    little = replace(inputs, cache_bytes=1000 * 4096 * 2 + 7).plan().parts
    assert little["kept prompts"] == 7
    assert "kept prompts" not in replace(inputs, start=0).plan().parts


def test_a_derivative_takes_activations_keys_and_values_and_directions(llama):
    work = Workload(100, vocabulary_rows=10, train_tokens=80)
    inputs = MemoryInputs(llama, torch.bfloat16, None, {}, 1, 28, work, 0, differentiated=1, records=True)
    parts = inputs.plan().parts
    assert parts["activations for the derivative"] == 80 * (3 * 11008 + 6 * 4096 + 2 * 4096) * 2
    assert parts["keys and values above"] == 80 * 3 * 2 * 4096 * 2  # layers 29 to 31
    assert parts["directions of tokens"] == 10 * 4096 * 4 * 40
    assert "float32 layers above" not in parts
    two_above = replace(inputs, start=29)
    assert two_above.plan().parts["float32 layers above"] == 2 * (llama.linear + llama.layer_rest) * 4
    for change in ({"quantization": "int8"}, {"away": 3}, {"num_shards": 2}, {"dtype": torch.float32}):
        assert "float32 layers above" not in replace(two_above, **change).plan().parts
    # answers are generated before the derivative, so the larger of the two counts
    generates = replace(inputs, workload=replace(work, answer_tokens=10_000)).plan().parts
    assert "keys and values of answers" in generates
    assert not generates.keys() & {"activations for the derivative", "keys and values above", "directions of tokens"}


@pytest.mark.parametrize("family", EQUAL_LAYERS)
def test_the_shape_knows_what_attention_keeps(family):
    """As much as transformers' own cache holds for a token, where all layers attend alike."""
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(torch.tensor([[5]]), use_cache=True).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    if (
        "num_key_value_heads" not in type(model.config)().to_dict()
    ):  # given to all tiny models; this one has no such option
        del model.config.num_key_value_heads
    assert shape_of(skeleton_of(model.config)).key_values == max(held)


def test_of_unequal_layers_the_shape_has_the_mean():
    """Gemma 4: global layers have larger heads, and the last layers keep nothing. Its config refuses to give one number."""
    model = tiny_model("gemma4_text")
    with torch.no_grad():
        cache = model(torch.tensor([[5]]), use_cache=True).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.keys is not None]
    assert len(set(held)) > 1
    assert shape_of(model).key_values == sum(held) // len(model.model.layers)


@pytest.mark.slow
def test_a_shape_without_attention_has_no_key_values():
    shape = shape_of(family_table.tiny_model("mamba"))
    assert shape.key_values == 0
    work = Workload(100, prompt_tokens=50, answer_tokens=30)
    assert (
        "keys and values of answers" not in MemoryInputs(shape, torch.float32, None, {}, 1, 1, work, 2**20).plan().parts
    )


@pytest.fixture
def _not_loaded(monkeypatch):
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))


@pytest.mark.usefixtures("_not_loaded")
def test_a_plan_is_printed_without_loading(options, capsys):
    assert main(["plan", *options]) == 0
    shown = capsys.readouterr().out
    for words in ("masters", "peak", "model.engine.cache_gb 0"):
        assert words in shown
    assert "model.quantization" not in shown  # the float32 files are mapped
    assert main(["plan", *options, "--model.dtype=bfloat16"]) == 0
    assert "model.quantization int8" in capsys.readouterr().out


@pytest.mark.usefixtures("_not_loaded")
def test_a_plan_for_two_processes_has_the_gradient_buckets_and_no_device_map(options, capsys):
    assert main(["plan", *options, "--trainer.devices=2", "--trainer.strategy=ddp"]) == 0
    shown = capsys.readouterr().out
    sizes = dict(re.findall(r"(masters|gradient buckets) +([\d.e-]+) GiB", shown))
    assert sizes["gradient buckets"] == sizes["masters"]
    assert "model.device_map" not in shown  # it needs a run of one process


@pytest.mark.usefixtures("_not_loaded")
def test_a_plan_counts_the_layers_that_run_in_float32(options, capsys):
    perturbs_output = [
        *options,
        "--model.estimator=LayerOutputPerturbation",
        "--model.eps=auto",
        "--model.optimizer=AdamW",
    ]
    for layer, dtype, counted in ((1, "bfloat16", True), (0, "bfloat16", False), (1, "float32", False)):
        assert main(["plan", *perturbs_output, f"--model.layer={layer}", f"--model.dtype={dtype}"]) == 0
        assert ("float32 layers above" in capsys.readouterr().out) is counted


@pytest.mark.usefixtures("_not_loaded")
@pytest.mark.parametrize(
    ("estimator", "kept"),
    [
        (["SPSA"], []),
        (["LayerOutputPerturbation", "--model.eps=auto"], ["activations for", "keys and values above"]),
        (["Backprop", "--model.optimizer=AdamW"], ["activations for"]),
    ],
    ids=["SPSA", "output", "Backprop"],
)
def test_a_plan_counts_what_an_estimator_keeps(estimator, kept, options, capsys):
    assert main(["plan", *options, f"--model.estimator={estimator[0]}", *estimator[1:], "--model.layer=1"]) == 0
    shown = capsys.readouterr().out
    assert [words for words in ("activations for", "keys and values above") if words in shown] == kept


@pytest.mark.usefixtures("_not_loaded")
def test_a_plan_counts_the_tokens_of_a_pass(options, capsys):
    kept = []
    for limit in ([], ["--data.tokens_per_pass=1"]):
        assert main(["plan", *options, *limit, "--model.estimator=Backprop", "--model.optimizer=AdamW"]) == 0
        kept.append(float(re.search(r"activations for the derivative +(\S+) GiB", capsys.readouterr().out)[1]))
    assert kept[1] < kept[0] / 2  # a row at a time, instead of a batch


@pytest.mark.usefixtures("_not_loaded")
def test_a_plan_is_for_the_largest_batch(options, capsys, monkeypatch):
    short, long = (Block([random_example(random.Random(0), 0, size, (1, 1))]) for size in (4, 900))
    kept = []
    for blocks in ([short, long], [long], [short]):
        monkeypatch.setattr(memory_plan, "training_blocks", lambda data, blocks=blocks: [blocks])
        assert main(["plan", *options, "--model.estimator=Backprop", "--model.optimizer=AdamW"]) == 0
        kept.append(float(re.search(r"activations for the derivative +(\S+) GiB", capsys.readouterr().out)[1]))
    assert kept[0] == kept[1] > kept[2]


FIRST_ORDER = ["--model.estimator=Backprop", "--model.optimizer=AdamW"]


def planned(capsys, *options):
    """The peak in the table of a plan, and the lines of the comparison with first order."""
    capsys.readouterr()
    assert main(["plan", *options]) == 0
    table, _, compared = capsys.readouterr().out.partition("\nPeak ")
    return re.search(r"  peak +(\S+ GiB)", table)[1], compared.splitlines()


@pytest.mark.usefixtures("_not_loaded")
def test_a_plan_compares_with_first_order(options, capsys, monkeypatch):
    monkeypatch.setattr(memory_estimate, "PROGRAM_BYTES", 0)  # far larger than the parts of a tiny model
    lines = []
    for layer in (0, 2):
        own, (title, line) = planned(capsys, *options, f"--model.layer={layer}")
        other, none = planned(capsys, *options, *FIRST_ORDER, f"--model.layer={layer}")
        assert "this run first order (--model.estimator Backprop --model.optimizer AdamW)" in title
        assert re.fullmatch(rf"  layer {layer} +{own} +{other}", line)
        assert none == []
        lines.append(line)
    assert len({line.split()[4] for line in lines}) == 2  # first order takes less with fewer layers above
    first, _, last = planned(capsys, *options)[1][1:]
    assert [first, last] == lines
    own, (_, line) = planned(capsys, *options, "--model.scope=LoRA", "--model.scope.layers=all")
    other, _ = planned(capsys, *options, *FIRST_ORDER, "--model.scope=LoRA", "--model.scope.layers=all")
    assert re.fullmatch(rf"  tuned +{own} +{other}", line)


@pytest.mark.usefixtures("_not_loaded")
@pytest.mark.parametrize("generates", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_layer_that_is_not_chosen_yet_is_where_more_memory_is_taken(options, generates, capsys, monkeypatch):
    """Of a model of 4 layers, layer 2 is both in the middle and next to the last one."""
    model = tiny_model("llama", num_hidden_layers=8)
    model.save_pretrained("deep")
    make_tokenizer().save_pretrained("deep")
    monkeypatch.setattr(memory_estimate, "PROGRAM_BYTES", 0)
    more = ["--model.model=deep", *([] if generates else FIRST_ORDER)]
    if generates:
        task = {"prompt": "{sentence} is", "train_file": "train.jsonl", "max_new_tokens": 2}
        write_lines("train.jsonl", [{"sentence": f"film {number} " * 9} for number in range(40)])
        more += [
            f"--data.task={json.dumps({'class_path': 'TemplateTask', 'init_args': task})}",
            "--data.reward=json_valid",
        ]
        more += ["--data.data_dir=null"]
    unknown, middle, late = (
        planned(capsys, *options, *more, *layer)[0] for layer in ([], ["--model.layer=4"], ["--model.layer=6"])
    )
    assert middle != late
    assert unknown == (late if generates else middle)


@pytest.mark.usefixtures("_not_loaded")
def test_the_comparison_says_whether_first_order_fits_or_is_as_small(options, capsys, monkeypatch):
    options = [*options, "--model.layer=2"]
    _, (_, line) = planned(capsys, *options)  # nearly all of it is the program
    assert line.endswith(" GiB, nearly the same: prefer it")
    monkeypatch.setattr("slzo.commands.plan.free_bytes", lambda device: 2**20)
    _, (_, line) = planned(capsys, *options)
    assert line.endswith(" GiB, more than the 0.000977 GiB that are free")


@pytest.mark.usefixtures("_not_loaded")
@pytest.mark.parametrize("more", ["--model.quantization=int8", "--data.objective=CandidateErrors"])
def test_without_a_first_order_there_is_no_comparison(more, options, capsys):
    assert planned(capsys, *options, more)[1] == []


@pytest.mark.parametrize(("free", "expected"), [(100, 110), (99, None), (None, None)])
def test_first_order_is_offered_where_it_fits_besides_mapped_weights(free, expected, monkeypatch):
    plan = MemoryPlan({"weights": 60, "activations": 50}, loading=0, mapped=10)
    monkeypatch.setattr(memory_plan, "first_order", lambda options, rows: options)
    monkeypatch.setattr(memory_plan, "memory_inputs", lambda *_: SimpleNamespace(plan=lambda: plan))
    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: free)
    assert memory_plan.first_order_bytes("options", None, 1, torch.device("cpu")) == expected


@pytest.mark.usefixtures("_not_loaded")
def test_a_run_that_cannot_fit_is_refused_before_loading(options, capsys, monkeypatch):
    monkeypatch.setattr("slzo.fit.free_bytes", lambda device: 2**20)
    error = error_line(capsys, "fit", *options)
    assert error.startswith("slzo: error: model.model ")
    assert "GiB of memory, but 0.000977 GiB is free; use a smaller model" in error
    assert not list(Path("runs").glob("*"))


def test_the_summary_has_estimate_and_peak(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2", "--model.layer=2"]) == 0
    shown, found = capsys.readouterr().out, summary()
    planned, peak = found["planned_memory_gb"], found["peak_memory_gb"]
    assert f"Memory     about {planned:.3g} GiB" in shown
    assert f"Memory     {peak:.2f} GiB at most, {planned:.2f} planned" in shown


def test_an_adapter_counts_by_its_own_size(options, capsys, model_dir):
    assert main(["plan", *options, "--model.scope=LoRA", "--model.scope.layers=all"]) == 0
    planned = float(re.search(r"masters +(\S+) GiB", capsys.readouterr().out)[1])
    tuned = TunedModel.from_scope(split_and_verify(load_model(str(model_dir))), LoRA(layers="all"))
    assert planned * 2**30 == pytest.approx(4 * tuned.tensors.num_elements, rel=0.01)


def test_layers_that_are_elsewhere_take_the_room_of_one(llama):
    layer = 2 * (llama.linear + llama.layer_rest)
    stored = replace(llama, stored_bytes=2 * llama.num_parameters, stored_dtype=torch.bfloat16)
    inputs = MemoryInputs(stored, torch.bfloat16, None, {"masters": 7}, 1, 4, Workload(100), 0, away=20)
    plan = inputs.plan()
    assert plan.parts["weights"] == plan.mapped == 2 * llama.num_parameters - 19 * layer
    assert inputs.non_weight_bytes == plan.total - plan.parts["weights"]
    converted = replace(inputs, dtype=torch.float32).plan()
    whole, away = 4 * llama.num_parameters, 19 * 2 * layer
    assert converted.loading == PROGRAM + (2 * llama.num_parameters + whole) * (whole - away) // whole
    # the largest pass is that of training or of scoring
    for trained, option in ((100, "data.tokens_per_pass 50"), (80, "data.eval_batch_tokens 50")):
        *_, (last, smaller) = replace(inputs, workload=Workload(100, train_tokens=trained)).alternatives()
        assert last == option
        assert smaller.total < plan.total
    # the most that the option can do
    (fewest,) = (plan for option, plan in inputs.alternatives() if "device_map" in option)
    assert fewest.parts["weights"] == 2 * llama.num_parameters - 30 * layer
    # a device map is not advised where there is one, and neither is quantization, which cannot be combined with it
    options = [option for option, _ in replace(inputs, where="layers 0 to 19 on disk").alternatives()]
    assert not re.search("device_map|quantization", " ".join(options))


def test_the_table_in_the_documents_is_that_of_the_code():
    documented = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    assert memory_table() in documented


def test_a_written_shape_loads(tmp_path):
    shape = Shape(layers=3, hidden=64, inner=96, heads=4, kv_heads=2, vocabulary=300, positions=128)
    count = write_shape(shape, tmp_path)
    model = load.load_model(str(tmp_path), "bfloat16")
    assert model.num_parameters() == count == model_shape(str(tmp_path))[0].num_parameters
    assert 0.01 < float(model.model.layers[1].mlp.up_proj.weight.float().std()) < 0.03
    tokenizer = load.load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer("A bad film: 1").input_ids, skip_special_tokens=True) == "A bad film: 1"
