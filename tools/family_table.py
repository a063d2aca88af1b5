"""Find which model types of transformers slzo can tune, by testing each on a tiny random model.

The tiny model of a type has the type's default configuration with widths, windows and lengths scaled down. A model that the
start-up check accepts is compared with plain forward passes of a second copy, with its own attention, on other rows and split
before every layer. The tool stops at a wrong result.

    python tools/family_table.py --markdown docs/families.md
    python tools/family_table.py --types llama mixtral
"""

import argparse
import logging
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.models.logits import final_states
from slzo.models.parts import ModelParts
from slzo.models.startup_check import split_and_verify
from slzo.models.twin import MAX_LENGTH, enlarge, tiny_config
from slzo.private.models import model_from_config
from slzo.utils.errors import SlzoError

# fields that default configurations lack, but that all models of the type have
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "lfm2": {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
}
_TOLERANCE = 1e-4
_GLUE = "\x00"  # keeps a name and its marks on one line


@dataclass(frozen=True)
class Verdict:
    """Result for a model type.

    Attributes:
        model_type: Name in ``config.json``.
        runs: ``packed``, ``padded``, ``refused``, or ``not built``.
        note: Why the model is refused or was not built, in a few words.
        limit: The longest rows that it runs, if they are shorter than those of the test.
        error: Largest relative difference of logits from plain forward passes.
        experts: Whether the model is a mixture of experts.
    """

    model_type: str
    runs: str
    note: str = ""
    limit: str = ""
    error: float = 0.0
    experts: bool = False


def tiny_model(model_type: str) -> PreTrainedModel:
    """Make a tiny random model of a type; may raise any exception if its default configuration is not sufficient."""
    config = AutoConfig.for_model(model_type, **_LEFT_OUT.get(model_type, {}))
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind: Any = (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[type(config)]
    if kind.config_class is not type(config):
        config = config.get_text_config(decoder=True)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(1)
    model = model_from_config(kind, tiny_config(config), torch.float32)
    enlarge(model)
    return model.eval().requires_grad_(False)


def verdict_of(model_type: str) -> Verdict:
    """Test one model type.

    Raises:
        AssertionError: The start-up check accepts a model whose results are wrong.
    """
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return Verdict(model_type, "not built", _first_words(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parts = split_and_verify(model, onednn=False)
        except SlzoError as error:
            reason = str(error).partition(" is not supported: ")[2].partition("; use a causal")[0]
            # if a plain pass fails for another reason than missing inputs, the tiny model is at fault
            works = not reason.startswith("a plain forward pass failed") or "pixel_values" in reason
            return Verdict(model_type, "refused" if works else "not built", reason)
    difference = largest_error(parts, tiny_model(model_type))
    assert difference <= _TOLERANCE, f"{model_type}: accepted, but its logits are wrong by {difference:.2g}"
    limit = "" if parts.limits.longest is None else f"up to {parts.limits.longest} tokens of {MAX_LENGTH}"
    experts = any("expert" in name for name, _ in model.named_parameters())
    return Verdict(model_type, "packed" if parts.packed else "padded", "", limit, difference, experts)


@torch.no_grad()
def largest_error(parts: ModelParts, whole: PreTrainedModel) -> float:
    """Return the largest difference from plain forward passes, over all splits, relative to the largest logit."""
    generator, longest = random.Random(5), parts.limits.longest or 44
    examples = []
    for number, (prompt, answers) in enumerate(((7, (1, 1)), (longest - 3, (3, 2)), (10, (2,)), (longest // 2, (1,)))):
        start = generator.choices(range(3, 300), k=prompt)
        sequences = [EncodedSequence((*start, *generator.choices(range(3, 300), k=k)), k) for k in answers]
        examples.append(EncodedExample(number, tuple(sequences), ()))
    expected = []
    for sequence in (sequence for example in examples for sequence in example.sequences):
        logits = whole(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0].float()
        expected.append(logits[-sequence.num_answer - 1 : -1])
    plain = torch.cat(expected)
    batch, errors = pack(examples), []
    for layer in range(parts.num_layers):
        below = parts.run(batch, 0, layer) if layer else None
        ours = parts.head(final_states(parts, batch, layer, below)[0])[batch.token_logit]
        errors.append(float((ours - plain).abs().max() / plain.abs().max()))
    return max(errors)


def _first_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:100]


def all_types() -> list[str]:
    """Return all model types with a causal model, also those with image input, without encoder-decoders."""
    names = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
    return [name for name in names if not _encodes(name)]


def _encodes(model_type: str) -> bool:
    try:
        return bool(getattr(AutoConfig.for_model(model_type), "is_encoder_decoder", False))
    except Exception:
        return False


def markdown_page(verdicts: Iterable[Verdict]) -> str:
    """Return the page, with a section for each result."""
    groups: dict[str, list[Verdict]] = {runs: [] for runs in ("packed", "padded", "refused", "not built")}
    for verdict in sorted(verdicts, key=lambda v: v.model_type):
        groups[verdict.runs].append(verdict)
    worst = max((v.error for v in groups["packed"] + groups["padded"]), default=0.0)
    text = f"""# Model types

Look up the `model_type` of your model's config.json. These are all causal model types of transformers
{transformers.__version__}, without encoder-decoders. (MoE) marks mixtures of experts. (images) marks models with image input,
whose text decoder is tuned.

| result | model types | meaning |
|---|---:|---|
| [packed](#packed) | {len(groups["packed"])} | The model runs without padding. |
| [padded](#padded) | {len(groups["padded"])} | The model runs with its own attention and masks. The results are as exact. |
| [refused](#refused) | {len(groups["refused"])} | slzo refuses the model. |
| [not built](#not-built) | {len(groups["not built"])} | No tiny model could be made. The check at the start of a run decides. |

```bash
python tools/family_table.py --markdown docs/families.md
```

Each type was tested on a tiny random model. In float32 the logits differ from those of plain forward passes, one sequence
at a time, by at most {worst:.0e} of the largest logit, over every layer that the model can be split before. Gemma 4 E2B and
E4B, whose later layers take keys and values from earlier ones, run packed too (`tests/test_shared_key_values.py`);
`PrefixTuning` refuses them.

## Packed

{_names(groups["packed"])}

## Padded

{_names(groups["padded"])}

## Refused

"""
    reasons = sorted({_reason(verdict) for verdict in groups["refused"]})
    for reason in reasons:
        names = _names(verdict for verdict in groups["refused"] if _reason(verdict) == reason)
        text += textwrap.indent(f"- {reason}:\n{names}\n", "  ")[2:]
    return f"{text}\n## Not built\n\n{_names(groups['not built'])}\n"


def _names(verdicts: Iterable[Verdict]) -> str:
    names = ", ".join(_marked(verdict).replace(" ", _GLUE) for verdict in verdicts)
    return textwrap.fill(names, 140, break_on_hyphens=False).replace(_GLUE, " ")


def _marked(verdict: Verdict) -> str:
    marks = [" (MoE)"] if verdict.experts else []
    if verdict.runs != "not built" and verdict.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        marks.append(" (images)")
    if verdict.limit:
        marks.append(f" ({verdict.limit})")
    return verdict.model_type + "".join(marks)


def _reason(verdict: Verdict) -> str:
    """Return the reason of a refusal without its figures and the words of other libraries."""
    return re.split(r", relative error|, found|, of shape| \(|: ", verdict.note)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Test the model types and write the page."""
    parser = argparse.ArgumentParser(description="Find which model types of transformers slzo can tune.")
    parser.add_argument("--markdown", help="file to write the page to; left out, it is printed")
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types to test (default: all)")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.types or []) - set(all_types()))
    if unknown:
        parser.error(f"--types {' '.join(unknown)}: transformers has no causal model of this type")
    logging.disable(logging.WARNING)  # transformers logs warnings about many configurations
    verdicts = []
    for model_type in options.types or all_types():
        verdicts.append(verdict_of(model_type))
        print(f"{model_type}: {verdicts[-1].runs} {verdicts[-1].note}", file=sys.stderr, flush=True)
    page = markdown_page(verdicts)
    if options.markdown is None:
        print(page)
    else:
        Path(options.markdown).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
