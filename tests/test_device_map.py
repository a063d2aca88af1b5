"""Layers on several devices and on disk: the same steps, each layer read once a step, and what is refused."""

import random
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from helpers import each_family, error_line, last_checkpoint, random_example, tiny_model, tuned
from transformers import AutoModelForCausalLM, cache_utils

from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.lightning.trainer import ZOTrainer
from slzo.models import device_map
from slzo.models.device_map import DeviceMapOptions, LayerDevices
from slzo.models.device_placement import DevicePlacement, load_with_device_map
from slzo.models.engine import Engine
from slzo.models.fingerprint import Fingerprint
from slzo.models.load import load_model
from slzo.models.placement import ON_MAIN_DEVICE
from slzo.models.shape import skeleton_of
from slzo.models.startup_check import split_and_verify
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.scopes import AllParameters, LayerScope, LoRA, PrefixTuning
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned_model import TunedModel

CPU = torch.device("cpu")
LAYER = 1
ON_DISK = {"model.layers.0": "disk", "model.layers.2": "disk", "model.layers.3": "disk"}


def placed(folder, given=ON_DISK, dtype="float32", offload_folder=None):
    """The model and its placement."""
    return load_with_device_map(str(folder), dtype, False, DeviceMapOptions(given, offload_folder), CPU)


def parts_of(loaded, onednn=False):
    model, placement = loaded
    return split_and_verify(model, onednn=onednn, placement=placement)


def rows():
    generator = random.Random(0)
    return TrainBatch(pack([random_example(generator, i, 9 + i) for i in range(3)]), ())


def in_memory(folder, *dtype):
    return load_model(str(folder), *dtype), ON_MAIN_DEVICE


def steps(loaded, scope=None, onednn=False, before_step=lambda: None):
    """Masters and losses after three steps of two queries, evaluated together, and what took them."""
    batch = rows()
    parts = parts_of(loaded, onednn)
    engine = Engine(paired=True, queries_at_once=2)
    scope = LayerScope() if scope is None else scope
    own = TunedModel.from_scope(parts, scope, LAYER, engine=engine, prompts=lambda _: [batch.packed])
    stepper = Stepper(own, CandidateCrossEntropy(), SPSA(), StepOptions(1e-3, num_queries=2))
    optimizer = torch.optim.SGD(own.tensors.masters, lr=1e-4)
    losses = []
    for step in range(3):
        before_step()
        done = stepper.step(batch, step, optimizer)
        losses.append((done.estimate.loss, done.estimate.projected_grad))
    return own.tensors.clone_masters(), losses, stepper


def same(found, expected):
    return found[1] == expected[1] and all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])


@pytest.mark.parametrize(
    "scope",
    [pytest.param(LayerScope(), marks=pytest.mark.slow), LoRA(), PrefixTuning(num_tokens=2)],
    ids=lambda s: type(s).__name__,
)
def test_the_steps_are_the_same_to_the_bit(model_dir, scope):
    expected = steps(in_memory(model_dir), scope)
    found = steps(placed(model_dir), scope)
    assert same(found, expected)
    assert found[2].model.base == expected[2].model.base


@pytest.mark.parametrize("given", [ON_DISK, {"": "disk"}], ids=["the others", "all"])
@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_tuned_layer_is_in_memory_whatever_the_map_says(model_dir, given, onednn):
    model, placement = placed(model_dir, given)
    found = steps((model, placement), onednn=onednn)
    assert same(found, steps(in_memory(model_dir), onednn=onednn))
    on_meta = {name.split(".")[2] for name, tensor in model.named_parameters() if tensor.is_meta}
    assert on_meta == {"0", "2", "3"}
    assert model.device == CPU


def test_each_layer_is_visited_once_a_step(model_dir):
    (model, placement), visits = placed(model_dir), []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: visits.append(number))
    _, _, stepper = steps((model, placement), before_step=visits.clear)
    # the states that enter the tuned layer are kept since the first step; two queries have four points
    assert visits == [LAYER] * 4 + [2, 3]
    stepper.model.clear_prefix()
    visits.clear()
    stepper.loss(rows())
    assert visits == [0]


def test_weights_on_disk_are_read_once_a_step(model_dir, monkeypatch):
    """Although the last layer runs twice: for keys and values, and for the last tokens."""
    (model, placement), reads, plain = placed(model_dir), [], AlignDevicesHook.pre_forward

    def counting(self, module, *args, **kwargs):
        reads.append(module)
        return plain(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counting)
    steps((model, placement), before_step=reads.clear)
    assert [list(model.model.layers).index(layer) for layer in reads] == [2, 3]
    assert all(tensor.is_meta for tensor in model.model.layers[3].parameters())


def test_a_layer_goes_back_unless_it_has_changed(model_dir):
    model, placement = placed(model_dir, {"": "disk"})
    away = lambda: {name.split(".")[2] for name, tensor in model.named_parameters() if tensor.is_meta}  # noqa: E731
    parts = parts_of((model, placement))
    TunedModel.from_scope(parts, LayerScope(), 2).release()
    TunedModel.from_scope(parts, LoRA(), 1).release()
    assert away() == {"0", "1", "2", "3"}
    changed = TunedModel.from_scope(parts, LayerScope(), 2)
    changed.tensors.load({name: master + 1 for name, master in changed.tensors.clone_masters().items()})
    changed.release()
    assert away() == {"0", "1", "3"}


def test_scopes_of_the_whole_model_are_refused(model_dir):
    parts = parts_of(placed(model_dir))
    with pytest.raises(SlzoError, match=r"model.device_map: .* model.scope tunes all; tune only some"):
        TunedModel.from_scope(parts, AllParameters())


@each_family
@torch.no_grad()
def test_every_family_runs_from_disk(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    path = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    from_disk, placement = placed(tmp_path, {path: "disk", f"{path}.1": "cpu"})
    assert placement.places.offloaded == [0, 2, 3]
    assert torch.equal(from_disk(ids).logits, load_model(str(tmp_path))(ids).logits)
    assert Fingerprint.of(from_disk, placement) == Fingerprint.of(load_model(str(tmp_path)))
    assert parts_of((from_disk, placement)).packed


def test_files_of_another_type_are_converted_at_each_visit(model_dir):
    assert same(steps(placed(model_dir, dtype="bfloat16")), steps(in_memory(model_dir, "bfloat16")))


@pytest.fixture
def pickled(tmp_path):
    """A model whose weights are in a file that cannot be read in parts."""
    model, folder = tiny_model(), tmp_path / "model"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_layers_that_the_files_do_not_hold_are_written_to_the_folder(pickled, tmp_path):
    with pytest.raises(
        SlzoError, match=r"layers on disk cannot be read directly from its files\); set model.offload_folder to"
    ):
        placed(pickled)
    loaded = placed(pickled, offload_folder=str(tmp_path / "offload"))
    written = list((tmp_path / "offload").rglob("*.safetensors"))
    assert len(written) == 3 * 9
    assert same(steps(loaded), steps(in_memory(pickled)))
    model, _ = loaded
    del loaded, _
    assert all(path.exists() for path in written)  # the model still reads them
    del model
    assert not any(path.exists() for path in written)


@pytest.mark.parametrize("how", ["auto", "balanced", "sequential"])
def test_as_many_layers_as_fit_stay_in_memory(how, monkeypatch):
    skeleton = skeleton_of(tiny_model().config)
    layer = sum(4 * p.numel() for p in skeleton.model.layers[0].parameters())
    outside = sum(4 * p.numel() for p in skeleton.parameters()) - 4 * layer
    for num_layers in (0, 2, 4):
        # one more has room while it runs
        free = outside + 1000 + (num_layers + 1) * layer
        monkeypatch.setattr(device_map, "free_bytes", lambda _, free=free: free)
        places = DeviceMapOptions(how, reserved=1000).places(skeleton, CPU)
        assert places.places == ("cpu",) * num_layers + ("disk",) * (4 - num_layers)
    assert places.describe() == "layers 0 to 3 on cpu"


def test_places_on_cards(monkeypatch):
    """Names only: no card is needed to read a map."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    skeleton, card = skeleton_of(tiny_model().config), torch.device("cuda", 0)
    given = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": 1}
    places = DeviceMapOptions(given).places(skeleton, card)
    assert places.places == ("cpu", "disk", "cuda:1", "cuda:0")
    assert (places.away, places.offloaded, places.elsewhere) == ([0, 1, 2], [0, 1], [2])
    assert places.of_modules(skeleton) == {
        **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cuda:0"),
        **{f"model.layers.{number}": place for number, place in enumerate(places.places)},
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("all", "'all': choose one of auto, balanced, sequential, or give a device"),
        ({}, "{}: choose one of"),
        ({"model.layers.0": None}, "None: not a device; give a number, cpu or disk"),
        ({"model.layers.0": "dsk"}, "'dsk': no such device for a run on cpu; choose one of cpu, disk"),
        ({"model.layers.0": 0}, "0: no such device for a run on cpu"),
        ({"model.layer.0": "disk"}, r"'model.layer.0': .* its decoder layers are model.layers.0 to .*\.3"),
        ({"model.layers.9": "disk"}, "'model.layers.9': the model has no such module"),
        ({"model.layers.1.mlp": "disk"}, "'model.layers.1.mlp': splits decoder layer 1; give one device"),
        ({"lm_head": "disk"}, "'lm_head': is needed at every step and stays on cpu; put only decoder layers"),
        ({"model.norm": "disk"}, "'model.norm': is needed at every step"),
    ],
)
def test_wrong_maps_are_refused(given, message):
    with pytest.raises(SlzoError, match=f"model.device_map {message}"):
        DeviceMapOptions(given).places(skeleton_of(tiny_model().config), CPU)


def test_a_layer_may_be_named_in_pieces_that_are_in_one_place():
    given = {"model.layers.1": "disk", "model.layers.1.mlp": "disk"}
    assert DeviceMapOptions(given).places(skeleton_of(tiny_model().config), CPU).offloaded == [1]


@pytest.mark.parametrize(
    ("engine", "quantization", "message"),
    [(Engine(paired=False), None, "model.engine.paired false"), (Engine(), "int8", "model.quantization int8")],
)
def test_options_that_do_not_go_together(engine, quantization, message):
    with pytest.raises(SlzoError, match=f"model.device_map 'auto': cannot be combined with {message}; leave one out"):
        DeviceMapOptions.of("auto", None, engine, quantization)


def test_wrong_folders_are_refused(model_dir, tmp_path):
    with pytest.raises(SlzoError, match=r"model.offload_folder 'x': is used only with model.device_map"):
        DeviceMapOptions.of(None, "x", Engine(), None)
    (tmp_path / "file").touch()
    with pytest.raises(SlzoError, match=r"model.offload_folder .*file': cannot be written \(File exists\)"):
        placed(model_dir, offload_folder=str(tmp_path / "file"))
    with pytest.raises(SlzoError, match=r"model.offload_folder '/proc/x': cannot be written"):
        placed(model_dir, offload_folder="/proc/x")


def test_a_full_folder(pickled, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.integrations.accelerate.save_file", full)
    with pytest.raises(SlzoError, match=r"No space left .*; model.offload_folder needs room for every"):
        placed(pickled, offload_folder=str(tmp_path / "offload"))
    assert list((tmp_path / "offload").iterdir()) == []


def test_a_quantized_model_is_refused(model_dir, monkeypatch):
    config = load_model(str(model_dir)).config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    monkeypatch.setattr("slzo.models.load.load_config", lambda *_: config)
    monkeypatch.setattr("slzo.models.load._check_quantized", lambda *_: None)
    with pytest.raises(SlzoError, match=r"model.device_map: model .* is quantized \(bitsandbytes\)"):
        placed(model_dir)


# ---- from the command line -----------------------------------------------------------------------------------------------------

FROM_DISK = '--model.device_map={"model.layers.0": "disk", "model.layers.3": "disk"}'


def test_a_run_with_layers_on_disk_is_that_without(options, capsys):
    options = [*options, "--model.engine.onednn=false", "--model.engine.paired=true"]
    options.append("--trainer.max_steps=4")
    assert main(["fit", *options]) == 0
    options.remove("--model.engine.paired=true")
    assert main(["fit", *options, FROM_DISK]) == 0
    shown = capsys.readouterr().out
    assert "layers 0 on disk, 1 to 2 on cpu, 3 on disk" in shown
    expected, found = (tuned(last_checkpoint(number)) for number in (0, 1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # where layers are is no part of what was trained
    checkpoint = f"--ckpt_path={last_checkpoint(1)}"
    assert main(["test", *options, checkpoint, FROM_DISK]) == 0
    assert main(["fit", *options, checkpoint, "--trainer.max_steps=5"]) == 0


def test_a_sweep_gives_each_layer_back(options, monkeypatch):
    made, plain = [], DevicePlacement.__init__
    monkeypatch.setattr(DevicePlacement, "__init__", lambda self, *args: made.append(self) or plain(self, *args))
    assert main(["sweep", *options, "--layers=[0,2]", "--steps=1", '--model.device_map={"": "disk"}']) == 0
    assert sorted(made[0]._handles) == [0, 1, 2, 3]


def test_a_plan_says_where_the_layers_go(options, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    assert main(["plan", *options, FROM_DISK]) == 0
    assert "layers 0 on disk, 1 to 2 on cpu, 3 on disk" in capsys.readouterr().out
    assert main(["plan", *options]) == 0
    assert "on disk" not in capsys.readouterr().out


def test_several_processes_are_refused_before_loading(options, capsys, monkeypatch):
    monkeypatch.setattr(ZOTrainer, "world_size", 2)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    error = error_line(capsys, "fit", *options, "--model.device_map=auto")
    assert "model.device_map 'auto': works only in one process, and this run has 2; set trainer" in error


def test_wrong_options_are_one_line(options, capsys):
    for given in ("all", '{"model.layers.0": "dsk"}', '{"model.layers.0.mlp": "disk"}'):
        error = error_line(capsys, "fit", *options, f"--model.device_map={given}")
        assert error.startswith("slzo: error: model.device_map")
    assert not list(Path("runs").glob("*"))


@pytest.mark.fast
@pytest.mark.skipif(not hasattr(cache_utils, "KVSharingDict"), reason="older transformers move them in the layers")
def test_keys_and_values_that_layers_share_come_back_from_another_device(monkeypatch):
    """``cpu:0`` stands for the other device."""
    moves = []
    monkeypatch.setattr(cache_utils.KVSharingDict, "to", lambda self, device, **_: moves.append(str(device)) or self)
    model = tiny_model("gemma4_text")
    DevicePlacement(model, LayerDevices("model.layers", "cpu", ("cpu", "cpu:0", "cpu", "cpu")), {})
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    assert moves == ["cpu:0", "cpu"]
