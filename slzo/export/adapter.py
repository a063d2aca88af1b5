"""Export an adapter that peft loads and, for LoRA, vLLM and others: kilobytes to use on top of the base model."""

from pathlib import Path

from safetensors.torch import save

from slzo.export.base import ExportFormat, load_base_code
from slzo.export.facts import Facts
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json
from slzo.zo.tuned_model import TunedModel

ADAPTER_CONFIG_FILE = "adapter_config.json"


def write_adapter(tuned_model: TunedModel, facts: Facts, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        SlzoError: The tuned change does not have a low rank.
    """
    if facts.adapter is None:
        raise SlzoError(
            f"format adapter: the change of {facts.scope} does not have a low rank; use --format merged, or delta for "
            "the tuned tensors alone"
        )
    origin = facts.origin
    revision = {} if origin.commit is None else {"revision": origin.commit}
    config = {"base_model_name_or_path": origin.name, **revision, **facts.adapter.config}
    write_json(folder / ADAPTER_CONFIG_FILE, config)
    (folder / "adapter_model.safetensors").write_bytes(save(dict(facts.adapter.tensors), {"format": "pt"}))


def load_code(facts: Facts) -> str:
    """Return the Python code that loads the adapter."""
    base, tokenizer = load_base_code(facts, "base")
    imports = f"from peft import PeftModel\nfrom transformers import {facts.auto_class}, AutoTokenizer"
    return f'{imports}\n\n{base}\nmodel = PeftModel.from_pretrained(base, "PATH_OR_REPOSITORY")\n{tokenizer}'


ADAPTER = ExportFormat(
    write_adapter,
    "peft and, for LoRA and ActivationSubspace, vLLM; kilobytes",
    load_code,
    base_words="for",
    library="peft",
    hub_relation="adapter",
)
