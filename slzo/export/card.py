"""Write the model card: README.md with the Hub's metadata, and how to use the folder, how it was trained, scores and licence."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData

from slzo.export.answer_code import answer_code
from slzo.export.base import CHAT_TEMPLATE, ExportFormat
from slzo.export.facts import Facts
from slzo.models.origin import Origin
from slzo.tasks.base import HubSource
from slzo.utils.pluralize import pluralize
from slzo.utils.sampling_error import plus_minus
from slzo.version import __version__

_SPECIAL = re.compile(r"[\\`*<>\[\]|~]|(?<!\w)_|_(?!\w)|^#")
_ADDRESS = re.compile(r"(https?:)?[^\s()<>:]+")
_CHOICES = ("accuracy", "answer_f1", "question_em")
"""Metrics of tasks that choose among candidates."""

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FOLDERS = re.compile(r"(?<=[=\s'\":\[,])(?:~|\.\.)?/[^\s'\",\]]*/")


def write_card(facts: Facts, format: ExportFormat, folder: Path, title: str) -> None:
    """Write ``README.md`` to a folder; the model's name is ``title``."""
    metadata = _metadata(facts, format, title).to_yaml()
    parts = [f"---\n{metadata}\n---", f"# {_text(title)}", *_sections(facts, format)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _metadata(facts: Facts, format: ExportFormat, title: str) -> ModelCardData:
    licence, source = facts.origin.licence, facts.data_set
    known: dict[str, Any] = (
        {} if licence is None else {"license": licence.name, "license_link": licence.address or None}
    )
    if licence is not None and licence.name == "other":
        known["license_name"] = _line(licence.title)
    if facts.origin.public:  # the Hub validates the id
        known |= {"base_model": facts.origin.name, "base_model_relation": format.hub_relation}
    return ModelCardData(
        model_name=_line(title),
        library_name=format.library,
        pipeline_tag="text-generation",
        tags=["slzo", "zeroth-order", *(["lora"] if facts.rank is not None else [])],
        datasets=None if source is None else [source.path],
        eval_results=_results(facts, source),
        **known,
    )


def _results(facts: Facts, source: HubSource | None) -> list[EvalResult] | None:
    if not facts.scored:
        return None
    summary = facts.summary
    name, metric = _line(summary["task"]), _line(summary["metric"])
    answers = "text-generation" if facts.metadata.get("chat") or metric == "reward" else "question-answering"
    kind = "text-classification" if metric in _CHOICES else answers
    score = round(summary["score_after"], 4)
    if source is None:
        return [EvalResult(kind, name, name, metric, score)]
    place: dict[str, Any] = {
        "dataset_config": source.config,
        "dataset_split": source.test,
        "dataset_revision": source.revision,
    }
    return [EvalResult(kind, source.path, name, metric, score, **place)]


def _sections(facts: Facts, format: ExportFormat) -> Iterator[str]:
    yield _what(facts)
    yield f"## Use\n\n```python\n{format.load_code(facts)}\n\n{answer_code(facts)}\n```{_vllm(facts)}"
    yield f"## Training\n\n{_training(facts)}"
    yield f"## Scores\n\n{_scores(facts)}"
    yield f"## Licence\n\n{_licence(facts)}"


def _what(facts: Facts) -> str:
    origin = facts.origin
    base = (
        f"[{origin.name}](https://huggingface.co/{origin.name})"
        if origin.public
        else f"{_code(origin.name)}, a local folder"
    )
    base += "" if origin.commit is None else f" at commit {_code(origin.commit)}"
    lines = [f"{base}, with {_text(facts.scope)} tuned with slzo {__version__}: {facts.num_tuned:,} tuned numbers."]
    if not origin.public:
        lines.append("The base model has no public name. Replace its name in this card with that of your copy.")
    if origin.gguf is not None:
        file, digest = origin.gguf
        lines.append(
            f"It was tuned on weights that came from the GGUF file {_code(file)} (SHA-256 `{digest}`), so on quantized "
            "values. With the original weights the results differ slightly, and the scores may differ."
        )
    return "\n\n".join(lines)


def _vllm(facts: Facts) -> str:
    """Return the vLLM command; empty if vLLM does not serve the folder as an adapter."""
    most = next((rank for rank in _VLLM_RANKS if facts.rank is not None and rank >= facts.rank), None)
    if most is None:
        return ""
    name = shlex.quote(facts.origin.name)
    command = f"vllm serve {name} --enable-lora --max-lora-rank {most} --lora-modules tuned=PATH_OR_REPOSITORY"
    if facts.metadata.get("chat_template"):
        command += f" --chat-template PATH/{CHAT_TEMPLATE}"
    return f"\n\nvLLM: {_code(command)}"


def _training(facts: Facts) -> str:
    metadata, summary = facts.metadata, facts.summary
    lines = [f"- Method: {_text(facts.scope)}"]
    if summary:
        method = _text(f"{summary['estimator']}, {summary['optimizer']}")
        lines[0] += f", {method}; {pluralize(facts.step, 'step')}, seed {_text(summary['seed'])}"
    if metadata["layer"] is not None:
        lines.append(
            f"- Layer: {metadata['layer']} of {facts.num_layers} (counted from 0): {_text(metadata['layer_reason'])}"
        )
    names = {"train": "training", "dev": "dev", "test": "held-out"}
    rows = "".join(f", {pluralize(facts.num_rows(split), f'{name} row')}" for split, name in names.items())
    size = f", batches of {metadata['settings']['data.batch_size']}"
    lines.append(f"- Data: task {_text(facts.task)}{_text(rows)}{_text(size)}{_source(facts.data_set)}")
    if summary.get("command"):
        lines.append(f"- Command: {_code(without_folders(summary['command']))}")
    return "\n".join(lines)


def _source(source: HubSource | None) -> str:
    """Return where the rows came from; empty if it was not the Hub."""
    if source is None:
        return ""
    config = f", configuration {_code(source.config)}" if source.config else ""
    commit = f" at commit {_code(source.revision)}" if source.revision else ""
    return f"; from [{_text(source.path)}](https://huggingface.co/datasets/{quote(source.path)}){config}{commit}"


def without_folders(command: str) -> str:
    """Remove the folders of this machine from a command; only the last part of each path remains."""
    return _FOLDERS.sub("", command)


def _scores(facts: Facts) -> str:
    if not facts.scored:
        return "This state was not scored on held-out rows."
    summary = facts.summary
    error, before = summary.get("score_change_standard_error"), summary["score_before"]
    change = "" if error is None else f" (change {summary['score_change']:+.4f}, standard error {error:.4f})"
    own, share = summary.get("score_standard_error"), summary.get("majority_share")
    lines = [
        f"| {_text(summary['metric'])} on {pluralize(summary['num_rows'], 'held-out row')} | |",
        "|---|---|",
        f"| before | {'not scored' if before is None else f'{before:.4f}'} |",
        f"| after | {summary['score_after']:.4f}{plus_minus(own)}{'' if own is None else ' (standard error)'}{change} |",
    ]
    if share is not None:
        lines.append(f"| always the most frequent label | {share:.4f} |")
    if summary.get("verdict"):
        lines += ["", _text(summary["verdict"])]
    return "\n".join(lines)


def _licence(facts: Facts) -> str:
    licence = facts.origin.licence
    files = ", ".join(_code(document.name) for document in facts.origin.documents)
    kept = f" This folder contains its text: {files}." if files else ""
    if licence is None:
        unknown = "" if files else f" It is not known here; see {_code(facts.origin.name)}."
        return f"The licence of the base model applies.{kept}{unknown}"
    link = (
        f"[{_text(licence.title)}]({licence.address})" if _ADDRESS.fullmatch(licence.address) else _text(licence.title)
    )
    text = f"The licence of the base model applies: {link}.{kept}"
    return f"{text}\n\n{licence.notice}." if licence.notice else text


def _line(value: object) -> str:
    return " ".join(str(value).split())


def _text(value: object) -> str:
    """Return a value on one line, escaped for Markdown."""
    return _SPECIAL.sub(r"\\\g<0>", _line(value))


def _code(text: str) -> str:
    """Return a text as code on one line, between more backticks than it contains in a row."""
    line = _line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def write_licences(origin: Origin, folder: Path) -> None:
    """Copy the base model's licence texts, and write NOTICE.txt if the licence requires a notice in every copy."""
    for document in origin.documents:
        shutil.copyfile(document, folder / document.name)
    if origin.licence is not None and origin.licence.notice:
        (folder / "NOTICE.txt").write_text(f"{origin.licence.notice}\n", encoding="utf-8")
