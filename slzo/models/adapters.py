"""Modules that a scope adds to a model, through peft: LoRA matrices and learned prefixes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slzo.errors import SlzoError
from slzo.models.attention import LearnedPrefix

_NAME = "slzo"
_PREFIX_MODULE = "slzo_prefix"


class Adapter(Protocol):
    """Settings of extra modules: primitives only, so that a checkpoint can hold them."""

    def inject(self, model: PreTrainedModel) -> LearnedPrefix | None:
        """Add the modules to a model, in place; returns a prefix that its attention has to see."""

    def remove(self, model: PreTrainedModel) -> None:
        """Take them out again; the model's own weights stay as they are."""

    def save_merged(self, model: PreTrainedModel, folder: str) -> None:
        """Write the tuned model to a folder, as a plain one where its weights can hold what the modules do."""

    def to_dict(self) -> dict[str, Any]:
        """Kind and settings."""


def adapter_from_dict(data: dict[str, Any]) -> Adapter:
    """Inverse of :meth:`Adapter.to_dict`."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    kinds: dict[str, Any] = {"lora": LoRASettings, "prefix": PrefixSettings}
    return kinds[data["kind"]](**values)


def _to_dict(kind: str, settings: Any) -> dict[str, Any]:
    return {"kind": kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}}


def _import_peft(scope: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise SlzoError(
            f"model.scope {scope}: needs peft, which is not installed; run: pip install 'slzo[peft]'"
        ) from error
    return peft


# ---- LoRA ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRASettings:
    """Where LoRA matrices go.

    Attributes:
        rank: Their rank.
        alpha: Their product is scaled by alpha / rank.
        target_modules: Names of linear maps; ``None`` for peft's choice.
        layers: Decoder layers.
        seed: Of their first values: A random, B zero, so that the model is unchanged.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None
    layers: tuple[int, ...]
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """See :class:`Adapter`."""
        return _to_dict("lora", self)

    def inject(self, model: PreTrainedModel) -> None:
        """See :class:`Adapter`.

        Raises:
            SlzoError: peft is missing or finds nothing to adapt.
        """
        peft = _import_peft("LoRA")
        try:
            config = peft.LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                target_modules=None if self.target_modules is None else list(self.target_modules),
                layers_to_transform=list(self.layers),
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise SlzoError(
                f"model.scope LoRA: {reason}; check model.scope.rank and set model.scope.target_modules to names of linear maps "
                "of the layers, like [q_proj, v_proj]"
            ) from error
        model.requires_grad_(False).eval()

    def remove(self, model: PreTrainedModel) -> None:
        """See :class:`Adapter`."""
        _unload_lora(model, merge=False)

    def save_merged(self, model: PreTrainedModel, folder: str) -> None:
        """See :class:`Adapter`: the matrices' products are added to the weights."""
        _unload_lora(model, merge=True)
        model.save_pretrained(folder)


def lora_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices by the model's names."""
    return {name: tensor for name, tensor in model.named_parameters() if f".{_NAME}." in name and ".lora_" in name}


def _unload_lora(model: PreTrainedModel, merge: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


# ---- prefix tuning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixSettings:
    """A learned prefix of keys and values in every layer.

    Attributes:
        first_tokens: Its first values are the keys and values of these tokens, one position each.
        model_name: The base model, which an exported adapter names.
    """

    first_tokens: tuple[int, ...]
    model_name: str

    def to_dict(self) -> dict[str, Any]:
        """See :class:`Adapter`."""
        return _to_dict("prefix", self)

    @torch.no_grad()
    def inject(self, model: PreTrainedModel) -> LearnedPrefix:
        """See :class:`Adapter`.

        Raises:
            SlzoError: peft is missing, or the layers' keys differ in shape.
        """
        peft = _import_peft("PrefixTuning")
        ids = torch.tensor([self.first_tokens], device=model.device)
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
        states = [part[0] for layer in layers for part in (layer.keys, layer.values)]  # each (heads, tokens, head_dim)
        shape = states[0].shape
        if any(part.shape != shape for part in states):
            raise SlzoError("model.scope PrefixTuning: the layers' keys and values differ in shape; use LoRA")
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=shape[1],
            num_layers=len(layers),
            num_attention_heads=shape[0],
            token_dim=shape[0] * shape[2],
            encoder_hidden_size=shape[0] * shape[2],
            base_model_name_or_path=self.model_name,
        )
        encoder = peft.PrefixEncoder(config).to(model.device, model.dtype)
        # peft's order: one row a token, in it keys and values of each layer
        encoder.embedding.weight.copy_(torch.stack(states).permute(2, 0, 1, 3).flatten(1))
        prefix = _Prefix(encoder, config).requires_grad_(False)
        model.add_module(_PREFIX_MODULE, prefix)
        return prefix

    def remove(self, model: PreTrainedModel) -> None:
        """See :class:`Adapter`."""
        delattr(model, _PREFIX_MODULE)

    def save_merged(self, model: PreTrainedModel, folder: str) -> None:
        """See :class:`Adapter`: no weight can hold a prefix, so this writes an adapter that peft loads."""
        peft = _import_peft("PrefixTuning")
        prefix = model.get_submodule(_PREFIX_MODULE)
        assert isinstance(prefix, _Prefix)
        self.remove(model)
        wrapped = peft.get_peft_model(model, prefix.config)
        wrapped.prompt_encoder["default"].load_state_dict(prefix.encoder.state_dict())
        wrapped.save_pretrained(folder)


class _Prefix(nn.Module):
    """Reads keys and values out of peft's encoder."""

    def __init__(self, encoder: nn.Module, config: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config

    @property
    def num_tokens(self) -> int:
        """See :class:`slzo.models.attention.LearnedPrefix`."""
        return int(self.config.num_virtual_tokens)

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """See :class:`slzo.models.attention.LearnedPrefix`."""
        weight: Tensor = self.encoder.embedding.weight  # type: ignore[union-attr, assignment]
        shape: Sequence[int] = (self.num_tokens, self.config.num_layers, 2, self.config.num_attention_heads, -1)
        keys, values = weight.view(shape)[:, index].permute(1, 2, 0, 3)
        return keys, values


def prefix_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The prefix by its name in the model."""
    return {n: tensor for n, tensor in model.named_parameters() if n.startswith(f"{_PREFIX_MODULE}.")}
