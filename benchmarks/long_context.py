"""Long contexts beside a Llama of equal size: a training step, reading the end of a context, decoding after it.

python benchmarks/long_context.py                    # a tiny model; about ten minutes on one core
python benchmarks/long_context.py --train 2048 --decode 8192 --preset NAME --set hidden_size=512 window=256

Peak memory is that of `mosaics bench`: resident, beyond the libraries, in a process for each row, weights included.
Decoding takes part in turn (A B A B ...) in one process. What comes before the last tokens of a context is not read:
the mosaic's memories and the Llama's caches are filled with random keys and values, which cost what real ones cost.
"""

import argparse
import dataclasses
import gc
import statistics
import time

import torch
import torch.nn.functional as F
import yaml
from transformers import DynamicCache, StaticCache

from mosaics import MosaicConfig
from mosaics.experiments import measuring
from mosaics.experiments.bench import Bench, training_step
from mosaics.experiments.records import commit, processor
from mosaics.memories.contract import Pairs
from mosaics.models.memory_file import CHUNK, read_context

STATES = {"mosaic": None, "mosaic, state in bfloat16": "bfloat16", "mosaic, state in int8": "int8"}
PEERS = ("llama", "llama-static")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, nargs="*", default=[8192, 32768], help="contexts of a training step")
    parser.add_argument("--decode", type=int, nargs="*", default=[32768, 131072], help="contexts of decoding")
    parser.add_argument("--last", type=int, default=1024, help="tokens at the end of a context that are read")
    parser.add_argument("--tokens", type=int, default=4, help="decoded for one sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="memory-mosaics-v2-tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the model")
    given = parser.parse_args()
    sizes = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in given.set)}
    settings = Bench(MosaicConfig.from_preset(given.preset, **sizes), device="cpu", dtype=given.dtype)
    print(f"commit {commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    dtype = str(settings.torch_dtype).removeprefix("torch.")
    print(f"{given.preset} {' '.join(given.set)}, {settings.build('mosaic').num_parameters():,} parameters, {dtype}\n")

    print("| training step at | | seconds | peak (MiB) |\n|---|---|---|---|")
    for context in given.train:
        for name in ("mosaic", "llama"):
            seconds, peak = measuring.alone(train, settings, name, context)
            print(f"| {context:,} | {name} | {seconds:.1f} | {mebibytes(peak)} |", flush=True)
    last = f"last {given.last:,} tokens (s)"
    print(f"\n| context | | {last} | peak of that (MiB) | state (MiB) | ms a token | ratio | peak of that (MiB) |")
    print("|" + "---|" * 8)
    for context in given.decode:
        sizes = context, given.last, given.tokens
        alone = {name: measuring.alone(read_and_decode, settings, name, *sizes) for name in (*STATES, *PEERS)}
        times = measuring.alone(decode_in_turn, settings, context, given.tokens, given.rounds)
        best = min(PEERS, key=lambda name: statistics.median(times[name]))
        for name, (chunk, reading, state, decoding) in alone.items():
            ratio = statistics.median(a / b for a, b in zip(times[name], times[best], strict=True))
            read = "" if chunk is None else f"{chunk:.1f}"
            found = (
                mebibytes(reading),
                mebibytes(state),
                f"{1e3 * statistics.median(times[name]):.1f}",
                f"{ratio:.2f}",
            )
            print(f"| {context:,} | {name} | {read} | {' | '.join(found)} | {mebibytes(decoding)} |", flush=True)


def mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def train(settings: Bench, name: str, context: int) -> tuple[float, int | None]:
    """Seconds and peak bytes of a training step, after a short one."""
    training_step(settings, name, settings.build(name), 256, 1)()  # what libraries keep does not count
    base = measuring.resident("VmRSS")
    step = training_step(settings, name, settings.build(name), context, 1)
    measuring.forget_peak()
    began = time.perf_counter()
    step()
    seconds, peak = time.perf_counter() - began, measuring.resident("VmHWM")
    return seconds, None if peak is None else peak - base


def build(settings: Bench, name: str):
    """A contestant at evaluation, the mosaic with its `state_dtype`."""
    model = settings.build(name.split(",")[0]).eval().to(settings.torch_dtype)
    for memory in model.model.stack.memories() if name in STATES else ():
        memory.common = dataclasses.replace(memory.common, state_dtype=STATES[name])
    return model


@torch.inference_mode()
def filled(model, name: str, context: int, room: int) -> DynamicCache | StaticCache:
    """A cache as after `context` tokens."""
    if name in STATES:
        cache = read_context(model, torch.zeros(1, min(context, 256), dtype=torch.long))
        for _ in range(256, context, CHUNK):
            count = min(CHUNK, context - cache.get_seq_length())
            for layer in cache.layers:
                for part in layer.state.parts():
                    if isinstance(part, Pairs):
                        part.append(*pairs(model, count))
                        if part.limit:
                            part.release()
                layer.positions += count
        return cache
    cache = DynamicCache() if name == "llama" else StaticCache(model.config, context + room)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*pairs(model, context), layer)
    return cache


def pairs(model, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random unit vectors as the keys and values of so many tokens."""
    heads = model.config.num_attention_heads
    shape = (1, heads, count, model.config.hidden_size // heads)
    return tuple(F.normalize(torch.randn(shape), dim=-1).to(model.dtype) for _ in range(2))


def cache_bytes(cache) -> int:
    """Bytes of what a cache holds, room to grow included."""
    parts = [part for layer in cache.layers for part in (layer.state.parts() if hasattr(layer, "state") else [layer])]
    tensors = [x for part in parts for x in vars(part).values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def decoder(model, cache):
    """A function that decodes one more token."""

    @torch.inference_mode()
    def decode() -> None:
        nonlocal token
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    token = torch.zeros(1, 1, dtype=torch.long)
    return decode


def read_and_decode(
    settings: Bench, name: str, context: int, last: int, tokens: int
) -> tuple[float | None, int | None, int, int | None]:
    """Seconds and peak bytes of reading the `last` tokens (of a mosaic), bytes of the cache, peak bytes of decoding."""
    warm = build(settings, name)
    decoder(warm, filled(warm, name, 512, tokens))()
    del warm
    gc.collect()
    base, seconds, reading = measuring.resident("VmRSS"), None, None
    model = build(settings, name)
    if name in STATES:
        cache = filled(model, name, context - last, tokens)
        gc.collect()
        measuring.forget_peak()
        began = time.perf_counter()
        read_context(model, torch.zeros(1, last, dtype=torch.long), cache=cache)
        seconds, peak = time.perf_counter() - began, measuring.resident("VmHWM")
        reading = None if peak is None else peak - base
    else:
        cache = filled(model, name, context, tokens + 1)
    held = cache_bytes(cache)
    gc.collect()
    measuring.forget_peak()
    decode = decoder(model, cache)
    for _ in range(tokens):
        decode()
    peak = measuring.resident("VmHWM")
    return seconds, reading, held, None if peak is None else peak - base


def decode_in_turn(settings: Bench, context: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a token of every contestant, in every round."""
    runs = {}
    for name in (*STATES, *PEERS):
        model = build(settings, name)
        runs[name] = decoder(model, filled(model, name, context, tokens * (rounds + 1) + 2))
        runs[name]()
    return measuring.paired(runs, rounds, torch.device("cpu"), tokens)


if __name__ == "__main__":
    main()
