"""Documents that are left out of a read change it by no more than was allowed, whatever the keys are."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mosaics.library.choosing import BoundedStore, sketch_of_store
from mosaics.memories import Context
from mosaics.memories.contract import Store
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach
from mosaics.ops.kernel_regression.choosing import largest_shares, needed

HEADS, WIDTH = 2, 8
BEFORE = Reach(1)


def unit(*shape, make):
    return F.normalize(torch.randn(*shape, generator=make, dtype=torch.float64), dim=-1)


def keys_of(kind: str, sizes: list[int], queries: torch.Tensor, make: torch.Generator) -> list[torch.Tensor]:
    """Keys `(1, heads, pairs, width)` of each document."""
    documents = []
    for number, size in enumerate(sizes):
        near = queries[:1, :, number % queries.shape[2], None].expand(1, HEADS, size, WIDTH)
        if kind == "random":
            keys = unit(1, HEADS, size, WIDTH, make=make)
        elif kind == "topics":  # a document's keys are around one of the queries
            keys = F.normalize(near + 0.3 * unit(1, HEADS, size, WIDTH, make=make), dim=-1)
        elif (
            kind == "borders"
        ):  # all keys alike, between two numbers of 8 bits, and a document as near as its number says
            scale = near.abs().amax(-1, keepdim=True) / 127
            keys = F.normalize(
                (near / scale).floor() * scale + 0.499 * scale - 0.03 * number * unit(WIDTH, make=make), dim=-1
            )
        else:  # nearly all that is near is in many documents that weigh little each
            away = F.normalize(-near + 1.2 * unit(1, HEADS, size, WIDTH, make=make), dim=-1)
            keys = torch.where(torch.arange(size)[:, None] == 0, near, away)
        documents.append(keys)
    return documents


def bounded_store(stores, computed, tolerance, fetched):
    def fetch(i):
        fetched.append(i)
        return stores[i]

    sketches = [sketch_of_store(store, computed) for store in stores]
    return BoundedStore.united([BoundedStore.of(s, tolerance, partial(fetch, i)) for i, s in enumerate(sketches)])


@pytest.mark.parametrize("kind", ["random", "topics", "borders", "one near each"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
def test_a_read_of_chosen_documents_is_within_the_tolerance(kind, dtype):
    make, left_out = torch.Generator().manual_seed(3), 0
    computed = torch.float32 if dtype in (torch.bfloat16, torch.int8) else dtype
    sizes = [1, 40, 7, 16, 3, 25, 1, 60]
    for beta in (-30.0, 2.0, 80.0, 400.0):
        queries = unit(2, HEADS, 3, WIDTH, make=make)
        values = [unit(1, HEADS, size, 5, make=make) for size in sizes]
        own = queries.to(computed), unit(2, HEADS, 3, 5, make=make).to(computed)
        stores = []
        for k, v in zip(keys_of(kind, sizes, queries, make), values, strict=True):
            k, v = k.to(computed), v.to(computed)
            if computed != dtype:
                k, v = Narrow.of(k, dtype), Narrow.of(v, dtype)
                stores.append(Store(k.data, v.data, k.scale, v.scale))
            else:
                stores.append(Store(k, v))
        whole, longest = Store.united(stores), 1.01
        bandwidth = Bandwidth(torch.tensor([beta, beta / 2], dtype=computed))
        shown = Context(reads=[])
        exact = whole.read_beside(*own[:1], *own, bandwidth, BEFORE, shown, ("m", 0))
        shares = shown.reads[1].weights.split(sizes, dim=-1)
        noise = 1e-9 if computed == torch.float64 else 1e-6 * (1 + abs(beta) / 20)
        for tolerance in (0.3, 1e-3):
            fetched = []
            bounded = bounded_store(stores, computed, tolerance, fetched)
            context = Context(reads=[])
            read = bounded.read_beside(*own[:1], *own, bandwidth, BEFORE, context, ("m", 0))
            assert (read - exact).norm(dim=-1).amax() <= tolerance * longest + noise, (beta, tolerance)
            weights = [r.weights for r in context.reads]
            total = sum(w.sum(-1) for w in weights)
            torch.testing.assert_close(total, torch.ones_like(total))
            out = [i for i in range(len(sizes)) if i not in fetched]
            assert all(w.sum() == 0 for i, w in enumerate(weights[1].split(sizes, dim=-1)) if i in out)
            assert sum(shares[i].sum(-1) for i in out or [0]).amax() <= tolerance / 2 or not out
            left_out += len(out)
        bounds = bounded.data, bounded.scale, bounded.radius, bounded.sizes
        assert needed(largest_shares(own[0], *own, *bounds, bandwidth, BEFORE), 0.0) == list(range(len(sizes)))
    assert left_out >= (6 if kind == "topics" else 1)
