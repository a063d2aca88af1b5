"""Compare the first greedy token of an exported folder in transformers and in llama.cpp.

    python3 llama.cpp/convert_hf_to_gguf.py tuned --outfile tuned.gguf --outtype f32
    python tools/research/llama_cpp_check.py --folder tuned --gguf tuned.gguf --rows predictions.jsonl

The prompts come from a file that ``slzo predict`` wrote. Both programs get the text, so their tokenizers are compared too.
llama.cpp runs in the package xllamacpp: pip install xllamacpp.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slzo.utils.errors import SlzoError

sys.path.insert(0, str(Path(__file__).parents[1]))
from options import command

_NUM_PROMPTS = 20


def tokens_of_transformers(folder: str, prompts: list[str]) -> list[str]:
    """Return the likeliest next token of each prompt as text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        last = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in prompts]
    return [str(tokenizer.decode(int(logits.argmax()))) for logits in last]


def tokens_of_llama_cpp(gguf: str, prompts: list[str]) -> list[str]:
    """Return the likeliest next token of each prompt as text."""
    try:
        import xllamacpp
    except ImportError as error:
        raise SlzoError("xllamacpp: is not installed; run pip install xllamacpp") from error

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = 2048
    params.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    request = {"max_tokens": 1, "temperature": 0}
    answers = [server.handle_completions(request | {"prompt": prompt}) for prompt in prompts]
    return [(json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]["text"] for answer in answers]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print how many first tokens agree, and those that do not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="folder that slzo export --format merged wrote")
    parser.add_argument("--gguf", required=True, help="the same model, converted by llama.cpp")
    parser.add_argument("--rows", required=True, help="file that slzo predict wrote")
    args = parser.parse_args(argv)
    lines = Path(args.rows).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:_NUM_PROMPTS]]
    found_by_llama_cpp = tokens_of_llama_cpp(args.gguf, prompts)  # first, since its package may be missing
    pairs = list(zip(tokens_of_transformers(args.folder, prompts), found_by_llama_cpp, strict=True))
    for prompt, (expected, found) in zip(prompts, pairs, strict=True):
        if expected != found:
            print(f"{prompt!r}: transformers {expected!r}, llama.cpp {found!r}")
    print(f"same first token for {sum(expected == found for expected, found in pairs)} of {len(pairs)} prompts")


if __name__ == "__main__":
    sys.exit(main())
