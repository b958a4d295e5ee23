"""Every C++ form, forward and backward, over drawn shapes, strides, ranges and dtypes, beside its naive twin: what
`test_sanitized.py` runs under the sanitizers, as `python walk.py SEED DRAWS FILE...`. What each C++ file has under the
name `planted` is called first, in a process of its own, with the address and length of a tensor of 16 doubles."""

import ctypes
import os
import random
import sys
from pathlib import Path

import torch

from mosaics import memories
from mosaics.memories import Block, Common, Context, Layout
from mosaics.ops import compiling
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach, compiled, kernel_regression, single, summary
from mosaics.ops.leaky_average import LeakyAverageState, leaky_average
from mosaics.ops.leaky_average import compiled as leaky_compiled
from mosaics.ops.unit_values import compiled as unit_compiled
from mosaics.ops.unit_values import unit_values

WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128]
TIMES = [1, 2, 3, 47, 48, 49, 95, 127, 128, 129, 200, 300, 800]


def laid(draw: random.Random, x: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory of another order, which ends where the tensor ends."""
    how = draw.choice(["plain", "plain", "tail", "turned", "columns", "row"])
    if how == "tail":  # of a buffer that has grown
        room = torch.full((*x.shape[:2], x.shape[2] + 5, *x.shape[3:]), torch.nan).to(x.dtype)
        room[:, :, 5:] = x
        return room[:, :, 5:]
    if how == "turned":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "columns":
        return x.mT.contiguous().mT
    if how == "row":
        return x[:1].expand(x.shape)
    return x.clone()


def check(*found_expected: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    for number, (found, expected) in enumerate(found_expected):
        assert (found is None) == (expected is None), number
        if found is not None:
            bound = {2: 1e-2, 4: 2e-3, 8: 1e-8}[found.dtype.itemsize]
            error = (found - expected).norm().item()
            assert error <= bound * max(1.0, expected.norm().item()), (number, error)


def both(function, leaves: list[torch.Tensor], backward: bool, sane: bool) -> None:
    """What the compiled form and its twin say, and their gradients."""
    outputs = []
    for name in ("compiled", "naive"):
        own = [x.detach().requires_grad_(backward) for x in leaves]
        out = function(own, name)
        outputs.append([out.detach()])
        if backward:
            weight = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
            outputs[-1] += torch.autograd.grad((out * weight).sum(), own, allow_unused=True)
    if sane:
        check(*zip(*outputs, strict=True))


def sane(draw: random.Random, *tensors: torch.Tensor) -> bool:
    """Whether there are only ordinary numbers: now and then one is put in that is none, or far too large."""
    ordinary = draw.random() < 0.8
    for x in () if ordinary else tensors:
        x.view(-1)[draw.randrange(x.numel())] = draw.choice([torch.nan, torch.inf, -torch.inf, 1e30])
    return ordinary


def joined(read: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What was read, and the logarithm of the sum of weights if it came along, with 0 for -inf."""
    if isinstance(read, torch.Tensor):
        return read
    logs = read[1].masked_fill(read[1] == -torch.inf, 0.0)
    return torch.cat([read[0], logs[..., None].to(read[0].dtype)], dim=-1)


def walk_read(draw: random.Random) -> None:
    dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
    batch, heads, time = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice(TIMES)
    stored = draw.choice([0, 0, 1, 50, 130])
    width, value_width = draw.choice(WIDTHS), draw.choice(WIDTHS)
    delay = draw.choice([None, 0, 1, 1, 5, 64, time + stored + 3])
    window = None if delay is None else draw.choice([None, None, 1, 2, 40, 256, 10**6])
    start = None
    if delay is not None and draw.random() < 0.5:  # any, also such as no document has
        start = torch.randint(-stored - 3, time + 3, (batch, time))
        start = start if draw.random() < 0.3 else start.cummax(1).values.clamp(max=torch.arange(time))
        start = start.to(draw.choice([torch.int64, torch.int32]))
    queries = torch.nn.functional.normalize(torch.randn(batch, heads, time, width), dim=-1).to(dtype)
    keys = torch.nn.functional.normalize(torch.randn(batch, heads, stored + time, width), dim=-1).to(dtype)
    values = torch.randn(batch, heads, stored + time, value_width).to(dtype)
    ordinary = sane(draw, queries, keys, values)
    wide = torch.promote_types(dtype, torch.float32)
    bandwidth = [torch.full((heads,), draw.choice([0.0, 0.05, 3.0, 90.0, -100.0]), dtype=wide)]
    if draw.random() < 0.5:
        bandwidth += [torch.full((heads,), 2.0, dtype=wide), torch.full((heads,), 0.3, dtype=wide)]
    ordered = start is None or bool((start.diff(dim=1) >= 0).all())
    reach, log_sum = Reach(delay, window, start), draw.random() < 0.5
    leaves = [*(laid(draw, x) for x in (queries, keys, values)), *bandwidth]

    def ask(own, form):
        return joined(kernel_regression(*own[:3], Bandwidth(*own[3:]), reach, log_sum=log_sum, form=form))

    both(ask, leaves, draw.random() < 0.7, ordinary and ordered)
    last = None if start is None else start[:, -1:] - (time - 1)
    pairs = leaves[1:3]
    if dtype == torch.float32 and draw.random() < 0.6:
        pairs = [Narrow.of(x, draw.choice([torch.bfloat16, torch.int8])) for x in pairs]
        pairs = pairs if pairs[0].data.dtype == pairs[1].data.dtype else leaves[1:3]
    one = leaves[0][:, :, -1:], *pairs, Bandwidth(*bandwidth), reach._replace(start=last)
    answers = [joined(kernel_regression(*one, log_sum=log_sum, form=form)) for form in ("single", "naive")]
    if ordinary:
        check(answers)
    if delay is not None and ordered:
        wanted = draw.choice([1, 4, 200]), draw.choice([0, 7, 10**6]), torch.randint(-1, 9, (1 + stored + time,))
        forms = ("compiled", "naive")
        given = (*leaves[:2], Bandwidth(*bandwidth), Reach(delay, window, start), *wanted)
        found = [summary(*given, form=form)[1:] for form in forms]
        if ordinary:
            check(*zip(*found, strict=True))


def walk_keys(draw: random.Random) -> None:
    dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
    shape = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice(TIMES[:-1])
    inputs, gate = torch.randn(*shape, draw.choice(WIDTHS)).to(dtype), 3 * torch.randn(shape).to(dtype)
    decay = -torch.rand(shape).to(dtype)
    decay[torch.rand(shape) < 0.1] = -torch.inf
    gate[torch.rand(shape) < 0.1] = -torch.inf
    ordinary = sane(draw, inputs, gate)
    leaves = [laid(draw, inputs), *(laid(draw, x[..., None])[..., 0] for x in (gate, decay))]
    if draw.random() < 0.5:
        leaves += [torch.randn(*shape[:2], inputs.shape[3]), torch.randn(shape[:2])]
    eps = draw.choice([0.0, 1e-3])

    def ask(own, form):
        state = LeakyAverageState(*own[3:]) if own[3:] else None
        return leaky_average(*own[:3], state, eps=eps, form=form)[0]

    both(ask, leaves, draw.random() < 0.7, ordinary)


def walk_values(draw: random.Random) -> None:
    dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16])
    heads = draw.choice([1, 3])
    raw = torch.randn(draw.choice([1, 2]), heads, draw.choice(TIMES), draw.choice(WIDTHS)).to(dtype)
    raw[:, :, draw.randrange(raw.shape[2])] = 0
    ordinary = sane(draw, raw)
    leaves = [laid(draw, raw), torch.rand(heads).to(dtype), torch.rand(heads).to(dtype)]
    eps = draw.choice([0.0, 0.1])
    both(lambda own, form: unit_values(*own, eps=eps, form=form), leaves, draw.random() < 0.7, ordinary)


def walk_token(draw: random.Random) -> None:
    dtype, heads = draw.choice([torch.float32, torch.float64]), draw.choice([1, 3])
    options = {"num_attention_heads": heads}
    reads = [
        {"type": "short_term", "options": options | {"window": draw.choice([2, 5, 40])}},
        {"type": "long_term", "options": options | {"delay": draw.choice([1, 4, 64])}},
    ]
    network = {"type": "feed_forward", "options": {"intermediate_size": draw.choice(WIDTHS)}}
    common = Common(hidden_size=heads * draw.choice(WIDTHS[:11]), bias=draw.random() < 0.5)
    block = Block([draw.sample(reads, draw.choice([1, 2])), [network]], torch.nn.RMSNorm, common, 0).to(dtype).eval()
    for memory in block.memories():
        memory.reset_parameters(0)
    batch, first = draw.choice([1, 2, 8]), draw.choice([1, 7, 300])
    x = torch.randn(batch, first + draw.choice([5, 100]), common.hidden_size, dtype=dtype)
    ordinary = sane(draw, x)
    found = []
    _, state = block(x[:, :first], Layout(batch, first), block.initial_state(), Context())
    for t in range(first, x.shape[1]):
        one, state = block(x[:, t : t + 1], Layout(batch, 1, stored=t), state, Context())
        found.append(one)
    expected, _ = block(x, Layout(*x.shape[:2]), block.initial_state(), Context())  # however it is cut
    if ordinary:
        check((torch.cat(found, dim=1), expected[:, first:]))


def planted(source: str) -> None:
    """How a process ends that calls what is planted in a C++ file; what it says is between two lines with its path."""
    print(source, file=sys.stderr, flush=True)
    if (child := os.fork()) == 0:
        x = torch.zeros(16, dtype=torch.float64)
        compiling.library(Path(source)).planted(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(16))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(source, "ended with", code, file=sys.stderr, flush=True)


def main() -> None:
    for source in sys.argv[3:]:
        planted(source)
    for form in (compiled, single, leaky_compiled, unit_compiled):
        assert form.available(), form
    for source in sorted(Path(memories.__file__).parent.rglob("*.cpp")):
        assert compiling.library(source), source
    for form in (single, leaky_compiled, unit_compiled):
        form.WORTH = 1  # threads for anything
    draw = random.Random(int(sys.argv[1]))
    for count in range(int(sys.argv[2])):
        seed = draw.getrandbits(32)
        for walk in (walk_read, walk_keys, walk_values, torch.no_grad()(walk_token)):
            torch.manual_seed(seed)
            torch.set_num_threads(1 + seed % 2)
            try:
                walk(random.Random(seed))
            except Exception as error:
                raise AssertionError(f"{walk.__name__} with seed {seed}, draw {count}") from error
    print("walked", sys.argv[2])


if __name__ == "__main__":
    main()
