"""The model card: README.md with the Hub's metadata, and what someone who finds the folder has to know."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from slzo import __version__
from slzo.export.facts import Facts
from slzo.models.origin import Origin
from slzo.tasks.base import Kind
from slzo.tasks.registry import get_task
from slzo.utils.errors import SlzoError

_LIBRARIES = {"adapter": "peft", "merged": "transformers", "delta": "transformers"}
_RELATIONS = {"adapter": "adapter", "merged": "finetune", "delta": "finetune"}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_PLACES = re.compile(r"(?<=[=\s'\":\[,])(?:~|\.\.)?/[^\s'\",\]]*/(?=[^\s'\",\]]*)")


def write_card(facts: Facts, folder: Path, title: str) -> None:
    """Write ``README.md`` into a folder that will have the name ``title``."""
    parts = [f"---\n{_metadata(facts, title).to_yaml()}\n---", f"# {title}", *_sections(facts)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _metadata(facts: Facts, title: str) -> ModelCardData:
    licence, hub = facts.origin.licence, _data_set(facts)
    known: dict[str, Any] = (
        {} if licence is None else {"license": licence.name, "license_link": licence.address or None}
    )
    if licence is not None and licence.name == "other":
        known["license_name"] = licence.title
    if facts.origin.public:  # the Hub looks it up
        known |= {"base_model": facts.origin.name, "base_model_relation": _RELATIONS[facts.format]}
    return ModelCardData(
        model_name=title,
        library_name=_LIBRARIES[facts.format],
        pipeline_tag="text-generation",
        tags=["slzo", "zeroth-order", *(["lora"] if facts.rank is not None else [])],
        datasets=None if hub is None else [hub],
        eval_results=_results(facts, hub),
        **known,
    )


def _results(facts: Facts, hub: str | None) -> list[EvalResult] | None:
    if not facts.scored:
        return None
    told, task = facts.summary, str(facts.summary["task"])
    generates = facts.data.get("task") is not None and _kind(facts) is Kind.GENERATION
    kind = "question-answering" if generates else "text-classification"
    return [
        EvalResult(kind, hub or task, task, told["metric"], round(told["score_after"], 4), dataset_split="validation")
    ]


def _kind(facts: Facts) -> Kind | None:
    try:
        return get_task(str(facts.data.get("task"))).kind
    except SlzoError:
        return None


def _data_set(facts: Facts) -> str | None:
    """The Hub id of the data set, if the task has one."""
    try:
        source = get_task(str(facts.data.get("task"))).hub
    except SlzoError:  # one of the user's own
        return None
    return None if source is None else source.path


def _sections(facts: Facts) -> Iterator[str]:
    yield _what(facts)
    yield f"## Use\n\n{_use(facts)}"
    yield f"## Training\n\n{_training(facts)}"
    yield f"## Scores\n\n{_scores(facts)}"
    yield f"## Licence\n\n{_licence(facts)}"


def _what(facts: Facts) -> str:
    origin = facts.origin
    base = (
        f"[{origin.name}](https://huggingface.co/{origin.name})"
        if origin.public
        else f"`{origin.name}`, a local folder"
    )
    lines = [
        f"{base}, with {facts.scope} tuned by zeroth-order steps (forward passes only) with "
        f"slzo {__version__}: {facts.num_tuned:,} tuned numbers."
    ]
    if not origin.public:
        lines.append(
            "The base model has no name that others can load; put yours in its place where this card names it."
        )
    if origin.gguf is not None:
        file, digest = origin.gguf
        lines.append(
            f"It was tuned on weights that came from the GGUF file `{file}` (SHA-256 `{digest}`), so on quantized values: on "
            "the original weights it computes something slightly different, and its scores may differ."
        )
    return "\n\n".join(lines)


def _use(facts: Facts) -> str:
    base = facts.origin.name
    load = f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{facts.note["dtype"]}")'
    tokens = f'tokenizer = AutoTokenizer.from_pretrained("{base}")'
    if facts.format == "adapter":
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
        code = f'{imports}\n\n{load}\nmodel = PeftModel.from_pretrained(base, "PATH_OR_REPOSITORY")\n{tokens}'
    elif facts.format == "delta":
        imports = (
            "from safetensors.torch import load_file\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
        )
        code = f'{imports}\n\n{load}\nbase.load_state_dict(load_file("PATH/delta.safetensors"), strict=False)\n{tokens}'
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY")'
        )
    text = f"```python\n{code}\n```"
    if facts.rank is not None:
        most = next((str(rank) for rank in _VLLM_RANKS if rank >= facts.rank), "")
        text += f"\n\nvLLM: `vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules tuned=PATH_OR_REPOSITORY`"
    return text


def _training(facts: Facts) -> str:
    note, told = facts.note, facts.summary
    lines = [f"- Method: {facts.scope}"]
    if told:
        lines[0] += f", {told['estimator']}, {told['optimizer']}; {facts.step} steps, seed {told['seed']}"
    if note["layer"] is not None:
        lines.append(f"- Layer: {note['layer']} of {facts.num_layers} (counted from 0): {note['layer_reason']}")
    if facts.data:
        rows = f", {facts.data['num_train']} training rows" if "num_train" in facts.data else ""
        size = f", batches of {facts.data['batch_size']}" if "batch_size" in facts.data else ""
        lines.append(f"- Data: task {facts.data.get('task')}{rows}{size}")
    if told.get("command"):
        lines.append(f"- Command: `{without_places(told['command'])}`")
    return "\n".join(lines)


def without_places(command: str) -> str:
    """A command without the folders of this machine: of absolute paths only the last part is left."""
    return _PLACES.sub("", command)


def _scores(facts: Facts) -> str:
    told, lines = facts.summary, []
    if facts.scored:
        error = told.get("score_change_standard_error")
        change = "" if error is None else f" (change {told['score_change']:+.4f}, standard error {error:.4f})"
        before = told["score_before"]
        lines += [
            f"| {told['metric']} on {told['num_rows']} held-out rows | |",
            "|---|---|",
            f"| before | {'not scored' if before is None else f'{before:.4f}'} |",
            f"| after | {told['score_after']:.4f}{change} |",
        ]
        if told.get("verdict"):
            lines += ["", told["verdict"]]
    else:
        lines.append("This state was not scored on held-out rows.")
    return "\n".join(lines)


def _licence(facts: Facts) -> str:
    licence = facts.origin.licence
    if licence is None:
        return f"That of the base model, which is not known here; see `{facts.origin.name}`."
    link = f"[{licence.title}]({licence.address})" if licence.address else licence.title
    files = ", ".join(f"`{document.name}`" for document in facts.origin.documents)
    text = f"That of the base model holds for this too: {link}."
    if files:
        text += f" Its texts lie beside this card: {files}."
    return f"{text}\n\n{licence.notice}." if licence.notice else text


_NOTICE = "NOTICE.txt"


def write_licences(origin: Origin, folder: Path) -> None:
    """Copy the texts that lie beside the base model; where the licence has a sentence for every copy, write that too."""
    for document in origin.documents:
        shutil.copyfile(document, folder / document.name)
    if origin.licence is not None and origin.licence.notice:
        (folder / _NOTICE).write_text(f"{origin.licence.notice}\n", encoding="utf-8")
