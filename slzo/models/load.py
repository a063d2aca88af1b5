"""Load a model and its tokenizer from a built-in name, a local folder, a GGUF file or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from slzo.models.builtin import BUILTIN_MODELS
from slzo.models.engine import DType
from slzo.models.gguf_folder import gguf_to_folder
from slzo.models.loading_check import check_config_file, check_loading, reason_of
from slzo.models.quantization import Quantization, method_of_config, missing_package, quantization_config
from slzo.utils.argument_checks import check_choice
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded
from slzo.utils.hub import HUB_ID, fetch_weights, model_folder, split_revision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_model(name: str, tokenizer_only: bool = False) -> str:
    """Turn a built-in name, folder, ``.gguf`` file or ``ID@REVISION`` of the Hub into the local folder that transformers loads.

    The folder of a Hub model has no weights until they are loaded; its path has the commit, see
    :func:`slzo.utils.hub.commit_of`. With ``tokenizer_only``, it needs no config.

    Raises:
        SlzoError: There is no such file or folder, and the Hub has no such model or cannot be reached.
    """
    if not name.strip():
        raise SlzoError(
            f"model.model {name!r}: is empty; give a built-in name ({', '.join(BUILTIN_MODELS)}), a local Hugging Face folder, a "
            ".gguf file or a Hub id"
        )
    if name in BUILTIN_MODELS:
        return str(BUILTIN_MODELS[name].folder())
    path = expanded(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SlzoError(f"model.model {name!r}: no such GGUF file; check the path")
        return str(gguf_to_folder(path))
    folder = path if path.is_dir() else _hub_folder(name)
    if not (folder / "config.json").is_file():
        if tokenizer_only and (folder / "tokenizer_config.json").is_file():
            return str(folder)
        what = "the folder has no config.json; give a folder written by save_pretrained"
        if any((folder / file).is_file() for file in ("adapter_config.json", "slzo.json")):
            what = "the folder has an adapter or a delta, not a whole model; give its base model, or export with --format merged"
        raise SlzoError(f"model.model {name!r}: {what}")
    check_config_file(name, folder / "config.json")
    if not tokenizer_only and (folder / "adapter_config.json").is_file():  # with peft, transformers adds it silently
        raise SlzoError(
            f"model.model {name!r}: the folder contains a model and an adapter (adapter_config.json); merge them with "
            "merge_and_unload of peft, or move the adapter's files away to tune the model without it"
        )
    return str(folder)


def _hub_folder(name: str) -> Path:
    id, revision = split_revision(name)
    looks_local = name.startswith((".", "/", "~")) or id.count("/") > 1 or Path(name).exists()
    if looks_local or not HUB_ID.fullmatch(id) or revision == "":
        problem = "is a file" if Path(name).is_file() else "no such folder"
        raise SlzoError(
            f"model.model {name!r}: {problem}; give a local Hugging Face folder, a .gguf file, a Hub id like "
            f"'Qwen/Qwen3-8B' or 'Qwen/Qwen3-8B@main', or a built-in name ({', '.join(BUILTIN_MODELS)})"
        )
    if id in BUILTIN_MODELS:
        raise SlzoError(f"model.model {name!r}: a built-in model has no revisions; give {id!r}")
    return model_folder(id, revision)


def _load(name: str, where: str, loader: Any, config: PretrainedConfig | None = None, **kwargs: Any) -> Any:
    """Call ``from_pretrained`` of a transformers class; raise SlzoError with a one-line message if it fails.

    ``config`` is the model's config if it is already loaded, for the message.
    """
    try:
        return loader.from_pretrained(where, **kwargs)
    except Exception as error:  # transformers raises whatever its code meets in broken files
        reason = reason_of(error, config).replace(where, name)  # the cache of the Hub has long paths
        advice = "the folder must hold a complete causal language model and its tokenizer"
        if "trust_remote_code" in str(error):
            advice = "if you trust its authors, set trust_remote_code to true (--help names the option)"
        elif isinstance(error, ImportError) and "toggled on" in reason:  # for an attention of its config.json
            advice = "install it, or remove attn_implementation and _attn_implementation from its config.json"
        elif "quantization_config" in kwargs:
            advice = "model.quantization may need another package or an accelerator; int8 and nf4 run on CPUs"
        elif "offload_folder" in str(error):
            reason = "layers on disk cannot be read directly from its files"
            advice = "set model.offload_folder to a folder with room for them"
        elif kwargs.get("offload_folder") is not None and "No space left on device" in str(error):
            advice = "model.offload_folder needs room for every layer on disk; give another folder"
        raise SlzoError(f"model.model {name!r}: cannot be loaded ({reason}); {advice}") from error


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the config of a model; raise SlzoError if it cannot be read."""
    return _load(name, resolve_model(name), AutoConfig, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    dtype: DType = "float32",
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    device_map: Mapping[str, str] | None = None,
    offload_folder: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a frozen causal language model in evaluation mode on the CPU.

    A vision-language model is loaded completely; :mod:`slzo.models.decoder_layers` finds its text decoder.

    Args:
        name: Name of the model, see :func:`resolve_model`.
        dtype: Type of the weights.
        trust_remote_code: Run code from the model's Hub repository.
        quantization: Quantize the model layer by layer while it is read. Not for a model that is quantized already.
        device_map: Map for transformers, whose hooks then are in the model (see :mod:`slzo.models.device_placement`).
        offload_folder: Folder for transformers to write layers on disk to.
        device: Device of quantized weights; the CPU if left out.

    Raises:
        SlzoError: The model cannot be loaded, lacks weights, or is not a decoder-only language model.
    """
    check_choice("model.dtype", dtype, DType)
    config = load_config(name, trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise SlzoError(
            f"model.model {name!r}: {config.model_type} is an encoder-decoder model; slzo tunes decoder-only language "
            "models such as Llama, Qwen, Mistral, OPT, GPT-2, GPT-NeoX, Gemma and Phi-3"
        )
    kwargs: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        _check_quantized(name, stored, quantization)
    elif quantization is not None:
        kwargs["quantization_config"] = quantization_config(quantization, kwargs["dtype"])
    if stored is not None or quantization is not None:
        # quantize on the final device: bitsandbytes repacks weights for the CPU once they have run there
        kwargs["device_map"] = {"": "cpu" if device is None else str(device)}
    if device_map is not None:
        if stored is not None:
            raise SlzoError(
                f"model.device_map: model {name!r} is quantized ({method_of_config(stored)}); leave the option out"
            )
        kwargs |= {"device_map": dict(device_map), "offload_folder": offload_folder}
    if stored is None:
        kwargs["ignore_mismatched_sizes"] = True  # reported by check_loading, which names the tensor
    where = resolve_model(name)
    fetch_weights(Path(where))
    model, info = _load(name, where, auto_class(config), config, **kwargs)
    check_loading(name, model, info)
    return model.eval().requires_grad_(False)


def _check_quantized(name: str, stored: Any, quantization: Any) -> None:
    """Check that transformers can load a quantized model, and that it is not quantized again."""
    from transformers.quantizers import AutoHfQuantizer  # loads packages that few models need

    method = method_of_config(stored)
    if quantization is not None:
        raise SlzoError(
            f"model.quantization {quantization!r}: model {name!r} is already quantized ({method}); leave the option out"
        )
    try:
        known = AutoHfQuantizer.supports_quant_method(stored if isinstance(stored, dict) else stored.to_dict())
    except (AttributeError, ValueError):
        raise SlzoError(
            f"model.model {name!r}: the quantization_config of its config.json has no quant_method; correct it, or remove it if "
            "the weights are not quantized"
        ) from None
    if not known:
        raise SlzoError(
            f"model.model {name!r}: transformers does not know its quantization {method!r}; give another model"
        )
    missing = missing_package(method)
    if missing is not None:
        raise SlzoError(f"model.model {name!r}: its quantization {missing}")


def auto_class(config: PretrainedConfig) -> Any:
    """Return the transformers class that loads a model: for causal language models, or for vision-language models."""
    cls = type(config)
    needs_images = cls in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and cls not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if needs_images else AutoModelForCausalLM


def load_tokenizer(
    name: str, trust_remote_code: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, with another chat template if given; raise SlzoError if it cannot be loaded."""
    where = resolve_model(name, tokenizer_only=True)
    tokenizer: PreTrainedTokenizerBase = _load(name, where, AutoTokenizer, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions that a model has; ``None`` if it has no limit."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
