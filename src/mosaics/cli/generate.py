"""`mosaics generate`: continue a prompt, or ask a document that was read once."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

EXAMPLE = 'mosaics generate runs/first --prompt "def " --max-new-tokens 100 --seed 1'


def generate(
    model: Annotated[str, Argument(metavar="MODEL", help="An exported model, a run's folder, a hub id, or demo.")],
    prompt: Annotated[
        list[str] | None,
        Option(help="The text to go on from; - reads it from standard input. Several are answered together."),
    ] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, Option(help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens with this much probability.")] = 0.95,
    seed: Annotated[int, Option(help="Seed of the draws.")] = 0,
    context_file: Annotated[Path | None, Option(metavar="FILE", help="A text to read before every prompt.")] = None,
    save_memory: Annotated[
        Path | None, Option(metavar="FILE", help="Keep what is remembered of the --context-file here.")
    ] = None,
    memory: Annotated[
        Path | None, Option(metavar="FILE", help="A memory kept by --save-memory, in the place of --context-file.")
    ] = None,
    state_dtype: Annotated[
        str | None,
        Option(help="How the pairs of the context are kept: bfloat16 or int8; else as they are computed."),
    ] = None,
    read_tolerance: Annotated[
        float | None,
        Option(help="How far what is read of many pairs may be off, as a share of the longest value; else not at all."),
    ] = None,
) -> None:
    """Continue a prompt and stream the text to standard output.

    With --context-file, prompts are asked after that text. --save-memory keeps what the model remembers of it, so
    that --memory answers the next prompts without reading it again; the answers are the same. --state-dtype makes both
    the memory in use and the file smaller, at a small loss.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    if context_file is not None and memory is not None:
        raise ValueError("--context-file and --memory both give what comes before the prompt; leave one out")
    if save_memory is not None and context_file is None:
        raise ValueError("--save-memory keeps what is remembered of a --context-file; name that too")
    if memory is not None and state_dtype is not None:
        raise ValueError(
            "--memory has the dtype that it was saved with; leave out --state-dtype, or read the --context-file again"
        )
    if not prompt and save_memory is None:
        raise ValueError("there is nothing to go on from; give a --prompt")
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt or ()]
    from mosaics.training.sources import open_source

    loaded, tokenizer = open_source(model, state_dtype, read_tolerance)
    before = None
    if context_file is not None:
        before = _read(loaded, tokenizer, context_file, save_memory)
    elif memory is not None:
        before = _load(loaded, memory)
    how = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if before is None and len(prompts) == 1:
        stream(loaded, tokenizer, prompts[0], **how)
    elif prompts:
        answer(loaded, tokenizer, prompts, before, **how)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raises `ValueError` for an option that can't be."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    if temperature and not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"--temperature is {temperature}; it must be 0, or a number from 0.000001 to 1000000")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p is {top_p}; it must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; it must be from 0 to {2**63 - 1}")


def _read(model, tokenizer, file: Path, keep: Path | None) -> tuple[Any, Any]:
    """Reads a file; returns the cache and the tokens."""
    from rich.progress import Progress

    from mosaics.models.memory_file import read_context, save_memory

    check_mosaic(model)
    if keep is not None and not keep.absolute().parent.is_dir():
        raise ValueError(f"--save-memory: there is no folder {keep.absolute().parent}; make it first")
    try:
        ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text (byte {error.start}); convert it first") from None
    if not ids.shape[1]:
        raise ValueError(f"{file} is empty; give a text")
    begin = time.monotonic()
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("reading", total=ids.shape[1])
        cache = read_context(model, ids.to(model.device), told=lambda count: progress.advance(bar, count))
    _say(f"read {ids.shape[1]:,} tokens of {file}, {file.stat().st_size:,} bytes", begin)
    if keep is not None:
        begin = time.monotonic()
        size = save_memory(keep, model, cache, ids)
        _say(f"kept them in {keep}, {size:,} bytes", begin)
    return cache, ids


def _load(model, file: Path) -> tuple[Any, Any]:
    """Takes up a memory; returns the cache and the tokens."""
    from mosaics.models.memory_file import load_memory

    check_mosaic(model)
    begin = time.monotonic()
    cache, ids = load_memory(file, model)
    _say(f"took up {ids.shape[1]:,} tokens from {file}, {file.stat().st_size:,} bytes", begin)
    return cache, ids


def _say(what: str, begin: float) -> None:
    print(f"{what}, in {time.monotonic() - begin:.2f} s", file=sys.stderr)


def check_mosaic(model) -> None:
    """Raises `ValueError` for a model that keeps no memory."""
    from mosaics.models import MosaicForCausalLM

    if not isinstance(model, MosaicForCausalLM):
        raise ValueError("only a mosaic keeps a memory; mosaics convert makes one of a Llama")


def stream(model, tokenizer, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Print the prompt and its continuation token by token."""
    import transformers

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].shape[1]:
        raise ValueError("the prompt is empty and the tokenizer has no begin-of-text; give a --prompt")
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **_options(model, max_new_tokens, temperature, top_p, seed))


def answer(
    model, tokenizer, prompts: list[str], before: tuple[Any, Any] | None, max_new_tokens, temperature, top_p, seed
) -> None:
    """Print every prompt with its continuation; `before` is the cache of a context and its tokens `(1, time)`.

    The tokens of a prompt follow those of the context: the whole is not split into tokens again.
    """
    import torch

    rows = [torch.tensor(tokenizer(text, add_special_tokens=before is None).input_ids).long() for text in prompts]
    if not all(map(len, rows)):
        raise ValueError("a --prompt is empty; say what is asked")
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    cache = None
    if before is not None:
        cache, context = before
        context = context.to(ids).expand(len(rows), -1)
        cache.batch_repeat_interleave(len(rows))
        ids, mask = torch.cat([context, ids], dim=1), torch.cat([torch.ones_like(context), mask], dim=1)
    options = _options(model, max_new_tokens, temperature, top_p, seed)
    ids, mask = ids.to(model.device), mask.to(model.device)
    written = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1] :]
    for prompt, row in zip(prompts, written, strict=True):
        print(prompt + tokenizer.decode(row, skip_special_tokens=True))


def _options(model, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    """What `generate` is given: nothing but what was asked for; a folder may bring penalties, beams or limits."""
    import torch
    import transformers

    torch.manual_seed(seed)
    kept = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**kept)
    draws: dict[str, Any] = {"do_sample": False}
    if temperature:
        draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"max_new_tokens": max_new_tokens} | draws
