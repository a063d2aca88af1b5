"""Export: adapters compute what the tuned model does, and the folder says where it comes from."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import error_line, last_checkpoint, run_dir, slzo_error, summary, tiny_model, tune_scope
from hub_stand_in import HubStandIn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slzo.__main__ import main
from slzo.batches.encoded import prompt_alone
from slzo.batches.packing import pack
from slzo.export.adapter import ADAPTER
from slzo.export.base import write_chat_template
from slzo.export.card import without_folders, write_card, write_licences
from slzo.export.exported import Exported
from slzo.export.facts import Facts
from slzo.export.push import push
from slzo.export.write import FORMATS
from slzo.models.builtin.base import Licence
from slzo.models.logits import needed_logits
from slzo.models.origin import Origin, loadable, origin_of
from slzo.models.peft_files import LowRank, PeftFiles, lora_files
from slzo.utils.errors import SlzoError
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA, PrefixTuning
from tiny import make_tokenizer

IDS = torch.arange(3, 40)[None]


def test_another_base_model_is_refused_with_the_name_of_the_right_one(tmp_path):
    facts = {"base_model": {"name": "mine"}, "fingerprint": {"config": {"hidden_size": 1}}}
    with pytest.raises(SlzoError, match=r"was trained on another base model, called 'mine' \(hidden_size: 1 -> "):
        Exported(tmp_path, facts).check_base(tiny_model("llama"), "model.model")


@pytest.mark.parametrize(
    ("family", "scope"),
    [
        ("llama", ActivationSubspace(4)),
        ("gemma3_text", ActivationSubspace(3, target_modules=["mlp_output"])),
        ("gpt2", ActivationSubspace(4, layers=[1, 3])),
        ("phi3", ActivationSubspace(2)),
        ("llama", LoRA(4)),
        ("gpt2", LoRA(2, layers="all")),
        ("qwen2", PrefixTuning(3)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_base_and_adapter_compute_what_the_tuned_model_does(tmp_path, family, scope):
    from peft import PeftModel

    base = tiny_model(family)
    plain = base(IDS).logits[0]
    tuned_model = tune_scope(scope, tiny_model(family))
    tensors = tuned_model.tensors
    direction = tensors.draw(0, 0, 0)
    tensors.load({name: master + 0.1 * direction[name] for name, master in tensors.clone_masters().items()})
    files = tuned_model.peft_files()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b", **files.config}))
    save_file(dict(files.tensors), tmp_path / "adapter_model.safetensors")
    found = PeftModel.from_pretrained(base, tmp_path).eval()(IDS).logits[0]
    if isinstance(scope, PrefixTuning):  # its attention is replaced, so it runs in parts
        batch = pack([prompt_alone(0, tuple(IDS[0].tolist()))])
        expected, found, plain = needed_logits(tuned_model.parts, batch)[-1], found[-1], plain[-1]
    else:
        tuned_model.merge()
        expected = tuned_model.parts.model(IDS).logits[0]
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("changes", [{"r": None}, {"bias": 5}, {"target_modules": [None]}])
def test_an_adapter_whose_config_was_edited_is_one_line(tmp_path, changes):
    files = tune_scope(LoRA(rank=2), tiny_model("llama")).peft_files()
    (tmp_path / "adapter_config.json").write_text(json.dumps({**files.config, **changes}))
    error = slzo_error(Exported(tmp_path, {}).adapted, tiny_model("llama"), "base")
    assert "the adapter does not fit its base model" in error


def test_the_layout_is_the_one_that_vllm_takes():
    """Names that begin with base_model.model. and end with the two matrices, of one rank, on linear maps of the model."""
    model = tiny_model("llama")
    files = tune_scope(ActivationSubspace(4), tiny_model("llama")).peft_files()
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
    for name, tensor in files.tensors.items():
        path, side = pattern.fullmatch(name).groups()
        outputs, inputs = model.get_submodule(path).weight.shape
        assert tensor.shape == ((4, inputs) if side == "A" else (outputs, 4))
        assert tensor.dtype == torch.float32
        assert path in files.config["target_modules"]
    assert len(files.tensors) == 2 * len(files.config["target_modules"]) == 14
    expected = {"r": 4, "lora_alpha": 4, "bias": "none", "use_dora": False, "modules_to_save": None}
    assert expected.items() <= files.config.items()


def test_smaller_ranks_are_padded():
    generator = torch.Generator().manual_seed(0)

    def pair(rank):
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, 6), (5, rank)))
        return LowRank(a, b)

    maps = {"x": pair(2), "y": pair(4)}
    files = lora_files(maps, 0.5)
    scaling = files.config["lora_alpha"] / files.config["r"]
    for path, expected in maps.items():
        a, b = (files.tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        assert (a.shape, b.shape) == ((4, 6), (5, 4))
        torch.testing.assert_close(scaling * b @ a, 0.5 * expected.b @ expected.a)


def test_whole_tensors_are_no_adapter():
    assert tune_scope(LayerScope(), tiny_model("llama")).peft_files() is None


@pytest.fixture
def run(options):
    """A short run, and the checkpoint that it scored."""

    def fit(*more):
        assert main(["fit", *options, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", *more]) == 0
        return summary()["best_checkpoint"]

    return fit


def card(folder):
    """Metadata and text of a card."""
    _, metadata, text = Path(folder, "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_an_adapter_with_its_card(run, model_dir, capsys, monkeypatch):
    from peft import PeftModel

    monkeypatch.setattr("sys.argv", ["slzo", "fit", f"--model.model={model_dir}"])
    best = run("--model.scope=ActivationSubspace", "--model.scope.rank=4", "--data.num_test=20")
    assert main(["export", f"--ckpt_path={best}", "--output=out", "--base_model=me/tiny"]) == 0
    files = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "slzo.json"}
    assert sum(map(len, files.values())) < 50_000
    assert str(model_dir.parent).encode() not in b"".join(files.values())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), "out")
    metadata, text = card("out")
    known = {"base_model": "me/tiny", "library_name": "peft", "base_model_relation": "adapter"}
    assert known.items() <= metadata.items()
    told = summary()
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(told["score_after"], abs=1e-4)
    command = f"slzo fit --model.model={model_dir.name}"
    for part in (told["layer_reason"], "20 held-out rows", "task sst2", f"{told['score_before']:.4f}", command):
        assert part in text
    assert "no public name" not in text
    assert "datasets" not in metadata  # the rows are local
    assert f"{told['score_after']:.4f} ± {told['score_standard_error']:.4f} (standard error)" in text
    assert "| always the most frequent label | 0.5500 |" in text
    line = error_line(capsys, "export", f"--ckpt_path={best}", "--output=no", "--base_model=/home/me/model")
    assert "must be a Hub id that others can load" in line
    (run_dir() / "summary.json").write_text(json.dumps({**told, "score_after": None, "score_change": None}))
    assert main(["export", f"--ckpt_path={best}", "--output=again"]) == 0
    assert "This state was not scored on held-out rows." in card("again")[1]
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    line = error_line(capsys, "export", f"--ckpt_path={Path('..', best)}", "--output=.")
    assert "output '.': is the current folder; give the name of a new one" in line


def test_the_card_of_a_best_state_of_an_interrupted_run_has_the_scores_of_the_run_that_went_on(run):
    best = Path(run("--guard.factor=null"))
    (run_dir() / "summary.json").rename(run_dir() / "another.json")  # as if it had been stopped
    other = run_dir(1)
    other.mkdir()
    told = json.loads((run_dir() / "another.json").read_text())
    other.joinpath("summary.json").write_text(json.dumps(told | {"best_checkpoint": "elsewhere/" + best.name}))
    assert main(["export", f"--ckpt_path={best}", "--output=no"]) == 0
    assert "This state was not scored on held-out rows." in card("no")[1]
    other.joinpath("summary.json").write_text(json.dumps(told | {"best_checkpoint": str(best.absolute())}))
    assert main(["export", f"--ckpt_path={best}", "--output=out"]) == 0
    assert f"| after | {told['score_after']:.4f}" in card("out")[1]


def test_a_whole_layer_is_merged_or_a_delta(run, model_dir, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(model_dir, own)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(own)
    settings = json.loads((own / "generation_config.json").read_text()) | {"temperature": 0.3, "top_k": 7}
    (own / "generation_config.json").write_text(json.dumps(settings))  # without do_sample, which a save refuses
    (own / "preprocessor_config.json").write_text('{"size": 4}')  # as of a model with image input
    best = run(f"--model.model={own}")
    assert main(["export", f"--ckpt_path={best}", "--output=merged"]) == 0
    assert Path("merged/preprocessor_config.json").read_text() == '{"size": 4}'
    assert main(["export", f"--ckpt_path={best}", "--output=delta", "--format=delta"]) == 0
    merged, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("merged", own))
    assert not torch.equal(merged(IDS).logits, base(IDS).logits)
    tensors, kept = load_file("delta/delta.safetensors"), json.loads(Path("delta/slzo.json").read_text())
    assert set(tensors) == set(kept["tensors"])
    assert all(f".layers.{kept['layer']}." in name for name in tensors)
    assert not base.load_state_dict(tensors, strict=False).unexpected_keys
    assert torch.equal(merged(IDS).logits, base(IDS).logits)
    assert json.loads(Path("merged/generation_config.json").read_text()) == settings
    assert AutoTokenizer.from_pretrained("merged").chat_template == tokenizer.chat_template
    modes = {Path("merged", name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # other users can read the weights too
    metadata, text = card("merged")
    assert "base_model" not in metadata  # nobody could find it
    assert "no public name" in text
    assert "`own`, a local folder" in text
    line = error_line(capsys, "export", f"--ckpt_path={best}", "--output=no", "--format=adapter")
    assert "use --format merged, or delta" in line
    assert not Path("no").exists()
    assert main(["export", f"--ckpt_path={last_checkpoint()}", "--output=last"]) == 0
    assert "This state was not scored" in card("last")[1]


def test_without_a_logger_the_newest_run_is_found_too(options, tmp_path):
    """As ``slzo test`` finds it."""
    own = [*options, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path / 'own'}"]
    assert main(["fit", *own, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]) == 0
    assert main(["test", *own, "--ckpt_path=last"]) == 0
    assert main(["export", f"--ckpt_path={tmp_path / 'own/runs/version_0'}", f"--output={tmp_path / 'tuned'}"]) == 0
    assert (tmp_path / "tuned" / "README.md").is_file()


def test_formats_that_cannot_hold_a_scope_are_refused(run, capsys):
    best = run("--model.scope=PrefixTuning", "--model.eps=1e-1", "--record.test_before=false")
    for name, reason in {
        "merged": "no weight can hold",
        "delta": "tunes none of the base model's own tensors",
        "zip": "adapter, merged, delta",
    }.items():
        assert reason in error_line(capsys, "export", f"--ckpt_path={best}", "--output=no", f"--format={name}")
    assert not Path("no").exists()


def test_a_folder_is_uploaded_to_the_hub(run, capsys, monkeypatch):
    best = run("--model.scope=LoRA", "--record.test_before=false")
    with HubStandIn() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", "hf_made_up")
        assert main(["export", f"--ckpt_path={best}", "--output=out", "--push_to_hub=me/tuned"]) == 0
        assert hub.repositories == ["me/tuned"]
        assert hub.files == {path.name: path.read_bytes() for path in Path("out").iterdir()}
        assert capsys.readouterr().out.endswith(f"Uploaded to {hub.address}/me/tuned\n")
        own, hub.files = Path("out"), {}
        assert push(own, "me/own", private=True) == f"{hub.address}/me/own"
        assert (hub.private, set(hub.files)) == (["me/own"], {path.name for path in own.iterdir()})
        hub.files, hub.private = {}, []
        assert "not uploaded, because it exists and is public" in slzo_error(push, own, "me/own", True)
        assert hub.files == {}
    line = error_line(capsys, "export", f"--ckpt_path={best}", "--output=again", "--push_to_hub=me/tuned")
    assert "push_to_hub 'me/tuned': not uploaded" in line
    assert Path("again/adapter_config.json").is_file()
    line = error_line(capsys, "export", f"--ckpt_path={best}", "--output=no", "--private=true")
    assert "private true: is used only with push_to_hub" in line
    line = error_line(capsys, "export", f"--ckpt_path={best}", "--output=no", "--push_to_hub=/me")
    assert "must be a Hub id" in line
    assert not Path("no").exists()


def test_the_terms_of_a_gemma_go_with_it(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("gemma3_text").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    (base / "GEMMA_TERMS.html").write_text("the terms")
    origin = origin_of(str(base))
    assert (origin.licence.name, origin.licence.address) == ("gemma", "https://ai.google.dev/gemma/terms")
    out.mkdir()
    write_licences(origin, out)
    assert (out / "GEMMA_TERMS.html").read_text() == "the terms"
    assert "subject to the Gemma Terms of Use" in (out / "NOTICE.txt").read_text()


def test_the_licence_of_a_folder_is_that_of_its_card(tmp_path, model_dir):
    folder = tmp_path / "models--me--tiny" / "snapshots" / "0123"
    shutil.copytree(model_dir, folder)
    assert origin_of(str(folder)).licence is None
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.y\n---\nText\n")
    (folder / "LICENSE.txt").write_text("text")
    origin = origin_of(str(folder))
    assert (origin.name, origin.public) == ("me/tiny", True)
    assert (origin.licence.name, origin.licence.title, origin.licence.address) == ("other", "mine", "https://x.y")
    assert [document.name for document in origin.documents] == ["LICENSE.txt"]
    (folder / "LICENSE.txt").unlink()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (text,) = origin_of(str(folder)).documents
    assert (text.name, "Apache License" in text.read_text()) == ("LICENSE", True)
    (folder / "NOTICE").write_text("notice")
    assert [document.name for document in origin_of(str(folder)).documents] == ["NOTICE", "LICENSE"]
    assert origin_of(str(folder), "you/other").name == "you/other"
    with pytest.raises(SlzoError, match="must be a Hub id that others can load"):
        origin_of(str(folder), "/a/folder")


def test_a_built_in_model_is_named_by_its_origin(tmp_path, monkeypatch, model_dir):
    monkeypatch.setenv("SLZO_CACHE", str(tmp_path))
    shutil.copytree(model_dir, tmp_path / "models" / "smollm2-135m")
    origin = origin_of("smollm2-135m")
    assert (origin.name, origin.licence.name) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert origin.gguf == ("SmolLM2-135M-Instruct.Q4_1.gguf", digest)
    assert loadable(origin.name) == "smollm2-135m"
    assert loadable("me/other") == "me/other"


def test_a_gguf_file_is_named_with_its_checksum(tmp_path, monkeypatch, model_dir):
    import gguf

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/me/tiny")
    writer.add_string("general.license", "mit")
    writer.add_tensor("x", torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("slzo.models.origin.resolve_model", lambda name: str(model_dir))
    origin = origin_of(str(path))
    assert origin.gguf == ("tiny.gguf", hashlib.sha256(path.read_bytes()).hexdigest())
    assert (origin.name, origin.public, origin.licence.name) == ("me/tiny", True, "mit")


def test_a_command_in_a_card_names_no_folder_of_this_machine():
    command = (
        "slzo fit --config /home/me/x.yaml --data.data_dir=/data/secret/sst2 --model.model Qwen/Qwen3-8B --a b/c.yaml"
    )
    expected = "slzo fit --config x.yaml --data.data_dir=sst2 --model.model Qwen/Qwen3-8B --a b/c.yaml"
    assert without_folders(command) == expected


def test_names_are_texts_in_a_card(tmp_path):
    """Markdown and HTML in them change nothing else; the code fences are longer than what they hold."""
    name = "a`b``\n---\n# [x](y) <script> | _i_ my_rows"
    licence = Licence("other", name, "javascript:alert(1)")
    metadata = {
        "dtype": "float32",
        "layer": 1,
        "layer_reason": name,
        "hub": {},
        "data": {"rows": {}},
        "settings": {"data.task": name, "data.batch_size": 8},
    }
    told = {"estimator": name, "optimizer": name, "seed": 0, "metric": name, "num_rows": 2, "score_before": None}
    told |= {"score_after": 0.5, "task": name, "command": f"slzo fit {name}", "verdict": name}
    origin = Origin(name, False, licence=licence)
    facts = Facts(
        "adapter", origin, metadata, 1, name, 2, 4, "AutoModelForCausalLM", PeftFiles({"r": 2}, {}), told, True
    )
    write_card(facts, ADAPTER, tmp_path, name)
    metadata, text = card(tmp_path)
    assert metadata["model-index"][0]["name"] == " ".join(name.split())
    shown = r"a\`b\`\` --- # \[x\](y) \<script\> \| \_i\_ my_rows"
    code = "``` a`b`` --- # [x](y) <script> | _i_ my_rows ```"
    assert f"\n# {shown}\n" in text
    assert f"- Data: task {shown}, " in text
    assert f"licence of the base model applies: {shown}." in text
    assert f"{code}, a local folder, with {shown} tuned" in text
    assert f"- Command: {code.replace('a`', 'slzo fit a`', 1)}\n" in text
    assert not re.search(r"(?<!\\)<script", re.sub("```.*?```", "", text.partition("## Use")[0]))


@pytest.mark.parametrize("format", FORMATS.values())
@pytest.mark.parametrize("own", [False, True])
def test_the_code_of_a_card_trusts_the_code_of_a_model_that_has_some(format, own):
    metadata = {"dtype": "float32", "trust_remote_code": own}
    code = format.load_code(
        Facts("merged", Origin("me/tiny", True), metadata, 1, "LoRA", 2, 4, "AutoModelForCausalLM", None)
    )
    assert code.count("trust_remote_code=True") == 2 * own


def adapter_card(model_dir, folder, rank=8, **metadata):
    """The text of an adapter's card."""
    metadata = {
        "dtype": "float32",
        "layer": None,
        "hub": {},
        "data": {"rows": {}},
        "settings": {"data.task": "sst2", "data.batch_size": 8},
        **metadata,
    }
    origin, adapter = origin_of(str(model_dir), "me/tiny"), PeftFiles({"r": rank}, {})
    facts = Facts("adapter", origin, metadata, 1, "LoRA", 2, 4, "AutoModelForCausalLM", adapter)
    write_chat_template(facts, folder)
    write_card(facts, ADAPTER, folder, "title")
    return card(folder)[1]


def test_an_adapter_keeps_the_chat_template_and_the_system_prompt(model_dir, tmp_path):
    text = adapter_card(model_dir, tmp_path, chat=True, system_prompt="Be *kind*.", chat_template="{{ messages }}")
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert 'tokenizer.chat_template = open("PATH/chat_template.jinja").read()' in text
    assert "--chat-template PATH/chat_template.jinja" in text
    assert '[{"role": "system", "content": "Be *kind*."}, {"role": "user", "content": "..."}]' in text


@pytest.mark.parametrize(("rank", "option"), [(9, "--max-lora-rank 16 "), (512, "--max-lora-rank 512 "), (513, None)])
def test_the_card_has_a_command_for_vllm_if_vllm_serves_the_rank(rank, option, model_dir, tmp_path):
    text = adapter_card(model_dir, tmp_path, rank)
    assert (option in text) if option else ("vllm" not in text)
