"""A read of one query that leaves out what a sketch of the keys proves to matter little."""

import math

import pytest
import torch
import torch.nn.functional as F

from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.memories.contract.sketches import MANY, TOGETHER, SketchedPairs
from mosaics.models.memory_file import load_memory, read_context, save_memory
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach, bounded, kernel_regression, weights
from mosaics.ops.kernel_regression import single as single_form
from mosaics.ops.kernel_regression.sketch import Sketched, sketch_of

pytestmark = pytest.mark.skipif(not single_form.available(), reason="there is no C++ compiler")

SIZES = [(1, 2, 700, 16, 8), (2, 1, 333, 7, 5), (1, 1, 4096, 33, 32), (1, 3, 130, 1, 1)]


def keys_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Unit keys: random; in clusters; all but equal; half of them opposite; such that rounding pulls all one way."""
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "clusters":
        x = torch.randn(*shape[:2], 9, shape[3], dtype=torch.float64)[:, :, torch.randint(9, shape[2:3])] + 0.2 * x
    elif kind == "equal":
        x = torch.ones_like(x) + 1e-3 * x
    elif kind == "opposite":
        x[:, :, ::2] = -x[:, :, 1::2][:, :, : x[:, :, ::2].shape[2]] if shape[2] % 2 == 0 else -x[:, :, ::2]
    elif kind == "rounded":
        x = torch.full_like(x, 0.49999 / 127)
        x[..., 0] = 1 + torch.arange(shape[2], dtype=torch.float64) * 1e-7
    return F.normalize(x, dim=-1).to(dtype)


@pytest.mark.parametrize("kind", ["random", "clusters", "equal", "opposite", "rounded"])
@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", SIZES)
def test_the_error_is_at_most_the_tolerance(size, stored, kind):
    torch.manual_seed(0)
    batch, heads, slots, width, value_width = size
    dtype = torch.float64 if stored == "float64" else torch.float32
    keys = keys_of(kind, (batch, heads, slots, width), dtype)
    values = torch.randn(batch, heads, slots, value_width, dtype=dtype)
    if stored in ("bfloat16", "int8"):
        keys, values = (Narrow.of(x, getattr(torch, stored)) for x in (keys, values))
    wide_keys, wide_values = (x.widened() if isinstance(x, Narrow) else x for x in (keys, values))
    queries = F.normalize(wide_keys[:, :, -1:] + 0.1 * torch.randn(batch, heads, 1, width, dtype=dtype), dim=-1)
    for beta in (-30.0, 0.0, 3.0, 40.0, 900.0):
        bandwidth = Bandwidth(torch.full((heads,), beta, dtype=dtype))
        for sketched in (slots, slots - 50, 1):
            if stored == "int8":
                parts = keys.data[:, :, :sketched], keys.scale[:, :, :sketched], None
            else:
                parts = sketch_of((keys.data if isinstance(keys, Narrow) else keys)[:, :, :sketched])
            for start in (None, torch.full((batch, 1), -slots // 3)):
                reach = Reach(3, start=start)
                wanted, log_sum = kernel_regression(
                    *(x.double() for x in (queries, wide_keys, wide_values)),
                    Bandwidth(bandwidth.base.double()),
                    reach,
                    log_sum=True,
                    form="naive",
                )
                longest = wide_values.double().norm(dim=-1).amax()
                own = 1e-12 if dtype == torch.float64 else 1e-5 * (1 + abs(beta) / 20)
                for tolerance in (0.3, 1e-2, 1e-4):
                    read, log = bounded.kernel_regression(
                        queries, Sketched(keys, *parts, tolerance), values, bandwidth, reach, log_sum=True
                    )
                    error = (read.double() - wanted).norm(dim=-1).amax() / longest
                    assert error <= tolerance + own
                    assert ((log_sum - log.double()) <= tolerance / 2 + own * (1 + abs(beta))).all()


def test_little_is_read_where_little_matters():
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(1, 2, 8192, 32), dim=-1)
    values, counts = torch.randn(1, 2, 8192, 32), torch.zeros(1, 2, dtype=torch.int64)
    bandwidth = Bandwidth(torch.tensor([100.0, 0.1]))
    sketched = Sketched(keys, *sketch_of(keys), 1e-3)
    bounded.kernel_regression(keys[:, :, -1:], sketched, values, bandwidth, Reach(0), counts=counts)
    assert counts[0, 0] < 0.05 * 8192
    assert counts[0, 1] == 8192  # all weights are alike


def test_what_is_no_number_is_not_passed_over():
    torch.manual_seed(0)
    keys, values = torch.randn(1, 1, 500, 8), torch.randn(1, 1, 500, 8)
    keys[0, 0, 70, 3] = math.nan
    read = bounded.kernel_regression(
        torch.randn(1, 1, 1, 8), Sketched(keys, *sketch_of(keys), 0.1), values, Bandwidth(torch.ones(1)), Reach(1)
    )
    assert read.isnan().all()


def test_keys_with_a_sketch_are_keys_to_every_other_read():
    torch.manual_seed(0)
    keys, values, bandwidth = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), Bandwidth(torch.ones(2))
    sketched, queries = Sketched(keys, *sketch_of(keys), 0.5), torch.randn(1, 2, 3, 8)
    for form in (None, "naive"):
        read = kernel_regression(queries, sketched, values, bandwidth, Reach(1), form=form)
        assert torch.equal(read, kernel_regression(queries, keys, values, bandwidth, Reach(1), form=form))
    one = queries[:, :, -1:]
    exact = kernel_regression(one, keys, values, bandwidth, Reach(1), form="single")
    assert torch.equal(kernel_regression(one, sketched, values, bandwidth, Reach(1), form="single"), exact)
    assert torch.equal(weights(one, sketched, bandwidth, Reach(1)), weights(one, keys, bandwidth, Reach(1)))


def model_of(tolerance: float | None, preset: str = "memory-mosaics-v2-tiny", **more) -> MosaicForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return MosaicForCausalLM(MosaicConfig.from_preset(preset, **sizes, read_tolerance=tolerance, **more)).eval()


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "transformer-tiny"])
def test_a_model_with_a_tolerance_answers_nearly_alike(preset, state_dtype, monkeypatch, tmp_path):
    monkeypatch.setattr("mosaics.memories.contract.sketches.MANY", 300)
    monkeypatch.setattr("mosaics.memories.contract.sketches.TOGETHER", 32)
    exact, near = (model_of(x, preset, state_dtype=state_dtype) for x in (None, 1e-3))
    calls, read = [], bounded.kernel_regression
    monkeypatch.setattr(bounded, "kernel_regression", lambda *a, **k: calls.append(1) or read(*a, **k))
    torch.manual_seed(1)
    ids = torch.randint(64, (2, 250))
    caches = [read_context(model, ids) for model in (exact, near)]
    with torch.inference_mode():
        for step in range(150):
            token = torch.randint(64, (2, 1))
            a, b = (m(token, past_key_values=c).logits for m, c in zip((exact, near), caches, strict=True))
            # A small difference may round what is stored to the next number of fewer bits.
            torch.testing.assert_close(b, a, atol=5e-3 if state_dtype is None else 5e-2, rtol=0)
            ids = torch.cat([ids, token], dim=1)
            if step == 110:  # sketches follow their rows
                for cache in caches:
                    cache.reorder_cache(torch.tensor([1, 0]))
                ids = ids[[1, 0]]
    assert calls
    # A file has no sketch, and is as it was.
    one = read_context(near, ids[:1])
    size = save_memory(tmp_path / "near", near, one, ids[:1])
    assert size == save_memory(tmp_path / "exact", exact, read_context(exact, ids[:1]), ids[:1])
    load_memory(tmp_path / "exact", near)


def test_sketches_are_made_some_keys_at_a_time_and_let_go_of():
    pairs = SketchedPairs(tolerance=0.01)
    total = 0
    torch.manual_seed(0)
    keys = []
    for time in (MANY - 1, *[1] * (TOGETHER + 2)):
        new = torch.randn(2, 1, time, 4)
        keys.append(new)
        with torch.no_grad():
            given, _ = pairs.append(new, torch.randn(2, 1, time, 4))
        total += time
        assert isinstance(given, Sketched) == (total >= MANY)
        if total >= MANY:
            assert given.data.shape[2] == (MANY if total < MANY + TOGETHER else MANY + TOGETHER)
            data, scale, radius = sketch_of(torch.cat(keys, dim=2)[:, :, : given.data.shape[2]])
            assert torch.equal(given.data, data) and torch.equal(given.scale, scale)
            assert torch.equal(given.radius, radius)
    pairs.release()
    assert pairs.sketch is None


@pytest.mark.parametrize("wrong", [0, 1, -0.1, "0.1", True, math.nan])
def test_a_tolerance_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="read_tolerance"):
        model_of(wrong)
