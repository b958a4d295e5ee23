"""What a read that may be wrong by a little saves: the share of pairs that have to be read, milliseconds a token, the
error that was met; beside the full read of the same tokens, and beside a Llama of as many parameters with its static
cache.

python benchmarks/bounds.py MODEL [--lengths 16384 65536]         # an exported model with a long-term memory
python benchmarks/bounds.py MODEL --text novels.jsonl --lengths 262144 1048576 --state-dtype int8
python benchmarks/bounds.py MODEL --groups --lengths 16384        # what groups of pairs with bounds would have to read

The text is source code of Python's standard library, or the records of a .jsonl file; after it the text's next tokens
are read one at a time, by a state with and one without a tolerance and by the Llama in turn. Medians. What is longer
than a piece is read in pieces, each from a new beginning, and their pairs are put together, as for documents that are
united: the pairs of a million tokens are there without the days that reading them together takes. The Llama's cache is
filled with random keys and values, which cost what real ones cost, and keeps them in the dtype of its weights.
"""

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from kept import text_tokens
from long_context import filled
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from mosaics.experiments.bench import Bench
from mosaics.experiments.records import commit, processor
from mosaics.memories.contract import Pairs
from mosaics.models.cache import open_cache
from mosaics.models.loading import load_exported
from mosaics.models.memory_file import read_context
from mosaics.ops.kernel_regression import bounded

TOKENS = 48
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


def record_tokens(tokenizer, path: Path, count: int) -> Tensor:
    """The first tokens `(1, count)` of the records of a file, as many as there are."""
    ids: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
            if len(ids) >= count:
                break
    return torch.tensor([ids[:count]])


def stores(cache, stack) -> list[Pairs]:
    """All stores of a cache that grow without limit."""
    return [p for p in open_cache(cache, stack)[0].parts() if isinstance(p, Pairs) and p.limit is None]


def remembered(model, ids: Tensor, piece: int) -> DynamicCache:
    """Of a text: read whole, or in pieces whose pairs are put together."""
    states, cache = [], None
    for part in ids.split(piece, dim=1):
        cache = read_context(model, part)
        states.append(stores(cache, model.model.stack))
    for at, newest in enumerate(states[-1] if len(states) > 1 else ()):
        every = [read[at] for read in states]
        for name in ("keys", "values", "key_scales", "value_scales"):
            if getattr(newest, name) is not None:
                joined = torch.cat([getattr(pairs, name)[:, :, : pairs.used] for pairs in every], 2)
                for pairs in every:
                    setattr(pairs, name, None)  # not to be held twice
                setattr(newest, name, joined)
        newest.used = sum(pairs.used for pairs in every)
    return cache


def decoding(model, ids: Tensor, length: int, piece: int) -> None:
    """Reads `length` tokens, then the next with every tolerance."""
    cache = remembered(model, ids[:, :length], piece)
    llama = Bench(model.config, device="cpu", dtype="float32").build("llama-static").eval()
    beside = filled(llama, "llama-static", length, len(TOLERANCES) * TOKENS)
    shares: list[float] = []
    read = bounded.kernel_regression

    def counted(queries, keys, *rest, **options):
        counts = torch.zeros(queries.shape[:2], dtype=torch.int64)
        out = read(queries, keys, *rest, **options, counts=counts)
        shares.extend((counts / keys.shape[2]).flatten().tolist())
        return out

    for tolerance in TOLERANCES:
        plain, near = copy.deepcopy(cache), copy.deepcopy(cache)
        for pairs in stores(near, model.model.stack):
            pairs.tolerance = tolerance
        for pairs in stores(plain, model.model.stack):
            pairs.tolerance = 0
        times: list[list[float]] = [[], [], []]
        losses: list[list[float]] = [[], []]
        difference, shares[:] = 0.0, []
        for at in range(length, length + TOKENS):
            logits = []
            for number, (one, own) in enumerate(((model, plain), (model, near), (llama, beside))):
                began = time.perf_counter()
                logits.append(one(ids[:, at : at + 1], past_key_values=own).logits[:, -1])
                times[number].append(1e3 * (time.perf_counter() - began))
                if one is model:
                    losses[number].append(F.cross_entropy(logits[-1], ids[:, at + 1]).item())
            difference = max(difference, (logits[0] - logits[1]).abs().max().item())
        bounded.kernel_regression = counted
        model(ids[:, length + TOKENS : length + TOKENS + 1], past_key_values=near)
        bounded.kernel_regression = read
        exact, quick, peer = (statistics.median(x[4:]) for x in times)  # the first makes the sketch
        change = sum(losses[1]) / TOKENS - sum(losses[0]) / TOKENS
        print(
            f"| {length:,} | {tolerance:g} | {100 * statistics.mean(shares):.1f} | "
            f"{100 * statistics.median(shares):.1f} | {exact:.1f} | {quick:.1f} | {exact / quick:.2f} | {peer:.1f} | "
            f"{difference:.1e} | {change:+.1e} |",
            flush=True,
        )


def groups(model, ids: Tensor, length: int, piece: int) -> None:
    """Of the keys of each head the share that groups with bounds have to read; with the newest keys as queries."""
    memories = [m for m in model.modules() if hasattr(m, "bandwidth")]
    cache = remembered(model, ids[:, :length], piece)
    state = open_cache(cache, model.model.stack)[0]
    long = [p for p in state.parts() if isinstance(p, Pairs) and p.limit is None]
    memories = [m for m in memories if m.window is None]
    print("| block | head | beta | tolerance | needed (%) | " + "in order (%) | halved (%) |\n" + "|---" * 7 + "|")
    for layer, (memory, pairs) in enumerate(zip(memories, long, strict=True)):
        keys = pairs.keys[0, :, : pairs.used].float()
        beta = memory.bandwidth().at(torch.tensor([length - 512]))[:, 0]
        for head, x in enumerate(keys):
            queries, old = x[-512::16], x[:-512]
            logits = beta[head] * queries @ old.T
            weight = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
            divided = [torch.arange(len(old) // 16 * 16).view(-1, 16), halved(old, 16)]
            for tolerance in (1e-1, 1e-3):
                needed = (weight < 1 - tolerance / 2).float().mean().item()
                visited = [share(queries, old[g], beta[head], tolerance) for g in divided]
                figures = " | ".join(f"{100 * x:.1f}" for x in (needed, *visited))
                print(f"| {layer} | {head} | {beta[head]:.0f} | {tolerance:g} | {figures} |", flush=True)


def halved(keys: Tensor, size: int) -> Tensor:
    """Groups of equal size, made by halving along the longest direction again and again."""
    parts = [torch.arange(len(keys))]
    while len(parts[0]) > size:
        halves = []
        for part in parts:
            x = keys[part] - keys[part].mean(0)
            direction = torch.randn(x.shape[1])
            for _ in range(4):
                direction = F.normalize(x.T @ (x @ direction), dim=0)
            order = (x @ direction).argsort()
            halves += [part[order[: len(part) // 2]], part[order[len(part) // 2 :]]]
        parts = halves
    least = min(map(len, parts))
    return torch.stack([part[:least] for part in parts])


def share(queries: Tensor, grouped: Tensor, beta: Tensor, tolerance: float) -> float:
    """The share of groups `(groups, size, width)` that are read, best first, until the others can't matter: with the
    better of the bounds by angle, by ball and by box."""
    centre = grouped.mean(1)
    axis = F.normalize(centre, dim=-1)
    angle = torch.acos((grouped @ axis[..., None])[..., 0].amin(1).clamp(-1, 1))
    by_angle = torch.cos((torch.acos((queries @ axis.T).clamp(-1, 1)) - angle).clamp(min=0))
    by_ball = queries @ centre.T + (grouped - centre[:, None]).norm(dim=-1).amax(1)
    by_box = queries.clamp(min=0) @ grouped.amax(1).T + queries.clamp(max=0) @ grouped.amin(1).T
    most = beta * torch.stack([by_angle, by_ball, by_box]).amin(0) + math.log(grouped.shape[1])
    own = torch.logsumexp(beta * torch.einsum("qw,gsw->qgs", queries, grouped), -1)
    order = most.argsort(-1, descending=True)
    most, own = most.gather(-1, order), own.gather(-1, order)
    left = torch.flip(torch.logcumsumexp(torch.flip(most, [-1]), -1), [-1])[:, 1:]
    read = torch.logcumsumexp(own, -1)[:, :-1]
    return ((left - read > math.log(tolerance / 2)).sum(-1) + 1).float().mean().item() / len(grouped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536], help="in tokens")
    parser.add_argument("--groups", action="store_true", help="say what groups with bounds would have to read")
    parser.add_argument("--piece", type=int, default=65536, help="tokens that are read together")
    parser.add_argument("--text", type=Path, help="a .jsonl file whose records have a `text`")
    parser.add_argument("--state-dtype", choices=["bfloat16", "int8"], help="in which pairs are kept")
    given = parser.parse_args()
    tokenizer = load_exported(given.model)[1]
    options = {"read_tolerance": TOLERANCES[0], "state_dtype": given.state_dtype}
    model = AutoModelForCausalLM.from_pretrained(given.model, **options).eval()
    print(f"commit {commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    if not given.groups:
        print(
            "| pairs | tolerance | read, mean of heads (%) | median (%) | full (ms a token) | bounded (ms a token) | "
            "ratio | Llama, static cache (ms a token) | largest difference of a logit | loss (nats) |\n|" + "---|" * 10
        )
    torch.manual_seed(0)
    count = max(given.lengths) + TOKENS + 2
    ids = text_tokens(tokenizer, count)[0] if given.text is None else record_tokens(tokenizer, given.text, count)
    if ids.shape[1] < count:
        parser.error(f"the text has {ids.shape[1]:,} tokens and {count:,} are needed; give a longer text")
    with torch.inference_mode():
        for length in given.lengths:
            (groups if given.groups else decoding)(model, ids, length, given.piece)


if __name__ == "__main__":
    main()
