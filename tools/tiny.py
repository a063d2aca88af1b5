"""A tiny random model with its tokenizer, and made-up rows, for runs of a second."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(family: str = "llama", seed: int = 0, scale: float = 3.0, **changes: Any) -> PreTrainedModel:
    """Make a random model of a family; ``scale`` enlarges its weights, so that logits differ enough between tokens."""
    options = {**SIZES, **changes}
    config = AutoConfig.for_model(family, **{name: value for name, value in options.items() if value is not None})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(scale)
    return model


def make_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer of at most ``vocabulary`` tokens; those of single bytes are always there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["It was great. It was terrible. A good movie, a bad movie."] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_model(folder: Path) -> None:
    """Write a tiny Llama as a Hugging Face folder."""
    tiny_model("llama", scale=1.0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Write made-up SST-2 rows with the Hub's fields to a folder below ``folder``."""
    (folder / "sst2").mkdir(parents=True)
    generator = random.Random(1)
    words = {0: ["bad", "dull", "poor", "weak"], 1: ["good", "fine", "warm", "sharp"]}
    for name, count in (("train", 80), ("validation", 24)):
        with (folder / "sst2" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for idx in range(count):
                label = idx % 2
                text = f"a {generator.choice(words[label])} film {name} {idx}" + " really" * generator.randrange(4)
                file.write(json.dumps({"idx": idx, "sentence": text, "label": label}) + "\n")
