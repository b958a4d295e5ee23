"""`mosaics generate`: continue a prompt."""

import sys
from typing import Annotated

from typer import Argument, Option

EXAMPLE = 'mosaics generate runs/first --prompt "def " --max-new-tokens 100 --seed 1'


def generate(
    model: Annotated[str, Argument(metavar="MODEL", help="An exported model, a run's folder, or a hub id.")],
    prompt: Annotated[str, Option(help="The text to go on from; - reads it from standard input.")],
    max_new_tokens: Annotated[int, Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, Option(help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens with this much probability.")] = 0.95,
    seed: Annotated[int, Option(help="Seed of the draws.")] = 0,
) -> None:
    """Continue a prompt and stream the text to standard output."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    if temperature and not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"--temperature is {temperature}; it must be 0, or a number from 0.000001 to 1000000")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p is {top_p}; it must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; it must be from 0 to {2**63 - 1}")
    if prompt == "-":
        prompt = sys.stdin.read()
    from mosaics.models.loading import load_exported

    loaded, tokenizer = load_exported(model)
    stream(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, seed)


def stream(model, tokenizer, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Print the prompt and its continuation token by token."""
    import torch
    import transformers

    torch.manual_seed(seed)
    # Nothing but what was asked for: a folder may bring penalties, beams or limits of its own.
    kept = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**kept)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].shape[1]:
        raise ValueError("the prompt is empty and the tokenizer has no begin-of-text; give a --prompt")
    draws = {"do_sample": False}
    if temperature:
        draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **draws)
