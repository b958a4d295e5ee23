"""Time and memory of a mosaic beside those of the Llama that a user would take instead, and the machine's limits.

Both are built with equally many parameters and measured in the same process in turn (A B A B ...); a ratio is the
median of the ratios of the rounds, so that a machine that slows down does not favour either.
"""

from __future__ import annotations

import difflib
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosaics.experiments import measuring
from mosaics.experiments.studies import machine
from mosaics.experiments.trainings import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from mosaics import MosaicConfig

CONTEXTS = {"training": (1024, 2048, 4096), "prefill": (1024, 4096, 16384), "decoding": (1024, 4096, 16384)}
PARTS = tuple(CONTEXTS)
PEERS = {
    "llama": "LlamaForCausalLM with PyTorch's fused attention",
    "llama-eager": "the same with attention written out",
    "llama-static": "the same with a cache of fixed room, in decoding",
}
TOKENS = 16  # decoded for one sample


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        config: the mosaic.
        parts: some of `PARTS`.
        contexts: in tokens, for all parts; empty: `CONTEXTS`.
        batch_sizes: of decoding; training and prefill take one sequence.
        rounds: samples of each contestant.
        device: `auto`, `cpu`, `cuda` or `mps`.
        dtype: `auto`, `float32` or `bfloat16`: of matrix products in training, of the weights elsewhere. `auto` is what
            training takes.
        peers: some of `PEERS`; the fastest of them is compared with.
        compiled: whether all take part under `torch.compile` too.
        memory: whether peak memory is measured, in processes of their own.

    Raises:
        ValueError: a value is impossible.
    """

    config: MosaicConfig
    parts: tuple[str, ...] = PARTS
    contexts: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = (1, 8)
    rounds: int = 5
    device: str = "auto"
    dtype: str = "auto"
    peers: tuple[str, ...] = ("llama", "llama-static")
    compiled: bool = False
    memory: bool = True

    def __post_init__(self) -> None:
        for what, given, known in (
            ("parts", self.parts, PARTS),
            ("peers", self.peers, PEERS),
            ("device", (self.device,), ("auto", "cpu", "cuda", "mps")),
            ("dtype", (self.dtype,), ("auto", "float32", "bfloat16")),
        ):
            if not given:
                raise ValueError(f"no {what} are given; choose some of {', '.join(known)}")
            for name in given:
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1)
                    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
                    raise ValueError(f"{what} has {name!r}, which is none; {hint}")
        for what, given, least in (
            ("contexts", self.contexts, 2),
            ("batch-sizes", self.batch_sizes, 1),
            ("rounds", (self.rounds,), 1),
        ):
            if given and min(given) < least:
                raise ValueError(f"{what} has {min(given)}; give numbers of at least {least}")
        if not self.batch_sizes:
            raise ValueError("no batch-sizes are given; give numbers of at least 1")
        if set(self.peers) == {"llama-static"} and set(self.parts) != {"decoding"}:
            raise ValueError("peers has llama-static alone, which takes part in decoding only; add llama")
        self.torch_dtype, self.peer  # noqa: B018  what they refuse is refused before anything is measured

    @cached_property
    def torch_device(self) -> torch.device:
        """Where it is measured."""
        from mosaics.training.recipe import TrainingSection
        from mosaics.training.setup import pick_device

        return pick_device(TrainingSection(device=self.device), key="device")

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """What `dtype` stands for here."""
        from mosaics.training.recipe import TrainingSection
        from mosaics.training.setup import pick_precision

        return pick_precision(TrainingSection(precision=self.dtype), self.torch_device)

    @cached_property
    def peer(self) -> MosaicConfig:
        """The Llama, as a mosaic of attention memories of which it is made: as many blocks, heads and parameters."""
        import mosaics
        from mosaics.models.matching import matched

        c = self.config
        if len(heads := c.values_of("num_attention_heads")) != 1:
            have = f"different numbers of heads ({', '.join(map(str, heads))})" if heads else "no heads"
            raise ValueError(f"the memories of this model have {have}, and there is no Llama like it to compare with")
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")
        start = mosaics.MosaicConfig.from_preset(
            "transformer-tiny", num_attention_heads=heads[0], **{name: getattr(c, name) for name in same}
        )
        return matched(start, c)

    def contestants(self, part: str) -> list[str]:
        """Who takes part; the first is the mosaic."""
        names = ["mosaic", *(peer for peer in self.peers if part == "decoding" or peer != "llama-static")]
        return names + [f"{name}-compiled" for name in names] if self.compiled else names

    def cases(self, part: str) -> list[tuple[int, int]]:
        """Contexts and batch sizes, short contexts first."""
        sizes = self.batch_sizes if part == "decoding" else (1,)
        return [(context, size) for context in sorted(set(self.contexts or CONTEXTS[part])) for size in sizes]

    def build(self, name: str, seed: int = 0) -> PreTrainedModel:
        """A contestant with random weights.

        Args:
            name: as `contestants` gives it.
            seed: of the weights.
        """
        import torch

        import mosaics
        from mosaics.models.convert import to_llama

        torch.manual_seed(seed)
        if name.startswith("mosaic"):
            return mosaics.MosaicForCausalLM(self.config).to(self.torch_device)
        llama = to_llama(mosaics.MosaicForCausalLM(self.peer))
        llama.set_attn_implementation("eager" if "-eager" in name else "sdpa")
        return llama.to(self.torch_device)


def bench(settings: Bench, results: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure.

    Args:
        settings: what.
        results: filled on the way, so that what is interrupted is not lost.

    Returns:
        `machine`, `commit`, `settings`, `models` (`parameters`, `state_bytes_per_token`), `limits` (measured matrix
        products in FLOP/s, copies in bytes/s), `exponents` (of time with context, by part, batch size and contestant)
        and `cases`: `part`, `context`, `batch_size`, `others` (cores that other processes used meanwhile),
        `contestants` (`seconds` and `samples` of a step, a prompt or a decoded token, `tokens_per_second`, `share` of
        the limit, `peak_bytes`), `ratio` (`mosaic` and `peer`, the faster of each, and of their times the `median`,
        `lowest` and `highest`).
    """
    import torch
    import transformers

    from mosaics.system import processor

    results = {} if results is None else results
    device, dtype = settings.torch_device, settings.torch_dtype
    figures = {"mosaic": settings.config, "llama": settings.peer}
    figures = {name: _Figures(config, dtype) for name, config in figures.items()}
    results |= {
        "machine": machine()
        | {"transformers": transformers.__version__, "processor": processor(), "threads": torch.get_num_threads()},
        "commit": _commit(),
        "settings": {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": settings.rounds,
            "model": settings.config.to_diff_dict(),
        },
        "models": {name: figure.summary() for name, figure in figures.items()},
        "limits": measuring.limits(device, dtype),
        "cases": [],
        "exponents": [],
    }
    measuring.warn_if_loud()
    for part in settings.parts:
        cases = settings.cases(part)
        models = {name: settings.build(name) for name in settings.contestants(part)}
        for number, (context, size) in enumerate(cases, 1):
            say(f"{part}, context {context}, batch {size} ({number} of {len(cases)})")
            results["cases"].append(_case(settings, part, models, context, size, figures, results["limits"]))
        del models
        torch.cuda.empty_cache()  # for the processes that measure memory; without CUDA it does nothing
        results["exponents"] += _exponents(part, results["cases"])
        if settings.memory:
            for name in settings.contestants(part):
                if name.endswith("-compiled"):
                    continue
                say(f"{part}, peak memory of {name}")
                try:
                    peaks = measuring.alone(_peaks, settings, part, name)
                except BrokenProcessPool:
                    say(f"warning: the process that ran {name} alone was killed, probably for want of memory")
                    continue
                for case, peak in zip((c for c in results["cases"] if c["part"] == part), peaks, strict=True):
                    case["contestants"][name]["peak_bytes"] = peak
    return results


def _case(settings, part, models, context, size, figures, limits) -> dict[str, Any]:
    """Measure one context and batch size."""
    runs = {}
    for name, model in models.items():
        with _forgiving(name):
            run = _MAKE[part](settings, name, model, context, size)
            run()
            runs[name] = run
    before, began = measuring.others(), time.perf_counter()
    samples = measuring.paired(runs, settings.rounds, settings.torch_device, TOKENS if part == "decoding" else None)
    others = None if before is None else (measuring.others() - before) / (time.perf_counter() - began)
    tokens, found = size if part == "decoding" else context * size, {}
    for name, times in samples.items():
        seconds = statistics.median(times)
        figure = figures[name.split("-")[0]]
        found[name] = {"seconds": seconds, "samples": times, "tokens_per_second": tokens / seconds}
        if part == "decoding":
            found[name]["share"] = figure.decoding_bytes(context, size) / limits["bytes_per_second"] / seconds
        else:
            flops = figure.flops_per_token(context, part == "training") * tokens
            found[name]["share"] = flops / limits["flops_per_second"] / seconds
    groups: list[list[str]] = [[], []]
    for name in found:
        groups[not name.startswith("mosaic")].append(name)
    mosaic, peer = (min(group, key=lambda name: found[name]["seconds"]) for group in groups)
    ratios = [a / b for a, b in zip(samples[mosaic], samples[peer], strict=True)]
    ratio = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {
        "part": part,
        "context": context,
        "batch_size": size,
        "others": others,
        "contestants": found,
        "ratio": {"mosaic": mosaic, "peer": peer} | ratio,
    }


def training_step(settings: Bench, name: str, model, context: int, size: int) -> Callable[[], Any]:
    """A step as `mosaics train` does it: autocast, backward, clip, AdamW."""
    import torch

    from mosaics.training.setup import autocast

    ids = _tokens(settings, context, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    model.train()
    call, own = _call(model, name), {"loss_only": True} if name.startswith("mosaic") else {}

    def step() -> None:
        with autocast(settings.torch_device, settings.torch_dtype):
            loss = call(input_ids=ids, labels=ids, use_cache=False, **own).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def prefill(settings: Bench, name: str, model, context: int, size: int) -> Callable[[], Any]:
    """Reading a prompt, up to the logits of the next token."""
    import torch

    ids = _tokens(settings, context, size)
    model.eval().to(settings.torch_dtype)
    call = _call(model, name)
    return torch.inference_mode()(lambda: call(input_ids=ids, use_cache=True, logits_to_keep=1))


def decoding(settings: Bench, name: str, model, context: int, size: int) -> Callable[[], Any]:
    """Decoding the likeliest token, each call one more; the prompt is read here, once for all rows."""
    import torch
    from transformers import DynamicCache, StaticCache

    model.eval().to(settings.torch_dtype)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        out = model(_tokens(settings, context, 1), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(size)
        if "-static" in name:
            read, cache = cache, StaticCache(model.config, context + TOKENS * (settings.rounds + 1) + 2)
            for index, layer in enumerate(read.layers):
                cache.update(layer.keys, layer.values, index)
            del read
    token = out.logits[:, -1:].argmax(-1).repeat_interleave(size, dim=0)
    call = _call(model, name)

    @torch.inference_mode()
    def decode() -> torch.Tensor:
        nonlocal token
        token = call(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return token

    return decode


_MAKE = {"training": training_step, "prefill": prefill, "decoding": decoding}


def _tokens(settings: Bench, context: int, size: int):
    import torch

    generator = torch.Generator().manual_seed(context)
    return torch.randint(settings.config.vocab_size, (size, context), generator=generator).to(settings.torch_device)


def _call(model, name: str):
    import torch

    return torch.compile(model) if name.endswith("-compiled") else model


@contextmanager
def _forgiving(name: str) -> Iterator[None]:
    """What torch.compile can't do is said and left out."""
    try:
        yield
    except Exception as error:
        if not name.endswith("-compiled"):
            raise
        say(f"warning: {name} is left out: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")


class _Figures:
    """What a model does and holds, counted (see `describe`)."""

    def __init__(self, config: MosaicConfig, dtype: torch.dtype) -> None:
        import torch

        import mosaics

        with torch.device("meta"):
            self._model = mosaics.MosaicForCausalLM(config).to(dtype)

    def summary(self) -> dict[str, Any]:
        """Parameters, and bytes of decoding state for one more token of a long context."""
        far = 2**20
        state = [self._model.describe(context)["state_bytes"] for context in (far, far + 1)]
        return {"parameters": self._model.num_parameters(), "state_bytes_per_token": state[1] - state[0]}

    def flops_per_token(self, context: int, training: bool) -> float:
        """Backward is twice forward; after a prompt, only the last position has logits."""
        forward = self._model.describe(context)["flops_per_token"]
        return 3 * forward if training else forward - 2 * self._model.lm_head.weight.numel() * (1 - 1 / context)

    def decoding_bytes(self, context: int, size: int) -> int:
        """What is read for a token of each of `size` rows: all weights but the embedding's table, and the state."""
        kinds = self._model.describe(context)["parameters"]
        weights = kinds["total"] - (0 if self._model.config.tie_word_embeddings else kinds["by_kind"]["embedding"])
        return weights * self._model.dtype.itemsize + size * self._model.describe(context)["state_bytes"]


def _exponents(part: str, cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of log time over log context, by least squares; nothing for a single context."""
    times: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for case in cases:
        if case["part"] == part:
            for name, found in case["contestants"].items():
                point = (math.log(case["context"]), math.log(found["seconds"]))
                times.setdefault((case["batch_size"], name), []).append(point)
    return [
        {
            "part": part,
            "batch_size": size,
            "contestant": name,
            "exponent": statistics.linear_regression(*zip(*points, strict=True)).slope,
        }
        for (size, name), points in times.items()
        if len(points) > 1
    ]


def _peaks(settings: Bench, part: str, name: str) -> list[int | None]:
    """Peak bytes of every case of a contestant: weights, gradients and moments included, libraries not.

    On CUDA what torch's allocator held at most. On Linux the highest resident memory less that before the model was
    built. This runs in a process of its own, whose C library returns what is freed at once (see `measuring.alone`), and
    after the smallest case was run once, so that what libraries keep does not count.
    """
    import gc

    import torch

    cuda, cases = settings.torch_device.type == "cuda", settings.cases(part)
    base, peaks = 0, []
    for warm in (True, False):
        model = settings.build(name)
        for context, size in cases[:1] if warm else cases:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            run = _MAKE[part](settings, name, model, context, size)
            if part == "decoding":  # reading the prompt is the other part
                measuring.forget_peak()
            for _ in range(2):
                run()
            peak = torch.cuda.max_memory_allocated() if cuda else measuring.resident("VmHWM")
            peaks.append(None if peak is None else peak - base)
            del run
            gc.collect()
            measuring.forget_peak()
        if warm:
            del model
            gc.collect()
            peaks, base = [], 0 if cuda else measuring.resident("VmRSS") or 0
    return peaks


def _commit() -> str | None:
    """The commit of the sources, with `-dirty` if they were changed; None outside a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
