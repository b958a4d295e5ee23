"""Benchmarks run on tiny sizes, compare equals, and count what they say."""

import json
import statistics
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from helpers import tiny_config
from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.experiments import bench as module
from mosaics.experiments import measuring
from mosaics.experiments.bench import PARTS, Bench, bench, decoding


def settings(**changes) -> Bench:
    values = dict(contexts=(16, 24), batch_sizes=(1, 2), rounds=3, dtype="float32", device="cpu", memory=False)
    return Bench(tiny_config(), **{**values, **changes})


@pytest.fixture(scope="module")
def results() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measuring.LIMITS, "cpu", (64, 2**16))
        patch.setattr(measuring, "SHORTEST", 0.001)
        patch.setattr(module, "TOKENS", 3)
        return bench(settings())


@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny", "transformer-long-short-tiny"])
def test_bench_peer_has_as_many_parameters(preset):
    here = Bench(tiny_config(preset), device="cpu")
    ours, theirs = (here.build(name).num_parameters() for name in ("mosaic", "llama"))
    assert theirs == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "options", "said"),
    [
        ("gam-tiny", {}, "no heads"),
        ("memory-mosaics-v2-tiny", {"long_term.num_attention_heads": 2}, r"different numbers of heads \(4, 2\)"),
    ],
)
def test_bench_refuses_what_no_llama_is_like(preset, options, said):
    config = MosaicConfig.from_preset(preset, **options)
    with pytest.raises(ValueError, match=said):
        Bench(config, device="cpu").peer  # noqa: B018


def test_bench_peer_is_a_llama_of_the_same_shape():
    ours, theirs = tiny_config(), settings().build("llama-eager").config
    assert theirs.model_type == "llama" and theirs._attn_implementation == "eager"
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(theirs, name) == getattr(ours, name)


def test_bench_measures_every_part_context_and_batch(results):
    cases = {(case["part"], case["context"], case["batch_size"]): case for case in results["cases"]}
    once = {(part, context, 1) for part in PARTS for context in (16, 24)}
    assert set(cases) == once | {("decoding", 16, 2), ("decoding", 24, 2)}
    assert set(cases["training", 16, 1]["contestants"]) == {"mosaic", "llama"}
    assert set(cases["decoding", 24, 2]["contestants"]) == {"mosaic", "llama", "llama-static"}
    for case in cases.values():
        tokens = case["batch_size"] if case["part"] == "decoding" else case["context"]
        for found in case["contestants"].values():
            assert len(found["samples"]) == 3 and found["seconds"] == statistics.median(found["samples"])
            assert found["tokens_per_second"] == pytest.approx(tokens / found["seconds"])
    assert json.loads(json.dumps(results)) == results


def test_bench_ratio_is_that_of_rounds_and_of_the_fastest_peer(results):
    for case in results["cases"]:
        found, ratio = case["contestants"], case["ratio"]
        peers = {name: one["seconds"] for name, one in found.items() if name != "mosaic"}
        assert ratio["peer"] == min(peers, key=peers.get)
        rounds = [a / b for a, b in zip(found["mosaic"]["samples"], found[ratio["peer"]]["samples"], strict=True)]
        assert [ratio["lowest"], ratio["median"], ratio["highest"]] == sorted(rounds)


def test_bench_shares_are_counted_work_over_measured_limits(results):
    limits = results["limits"]
    with torch.device("meta"):
        model = MosaicForCausalLM(tiny_config())
    for case in results["cases"]:
        figures, one = model.describe(case["context"]), case["contestants"]["mosaic"]
        if case["part"] == "training":
            work = 3 * figures["flops_per_token"] * case["context"] / limits["flops_per_second"]
        elif case["part"] == "decoding":
            weights = figures["parameters"]["total"] - figures["parameters"]["by_kind"]["embedding"]
            work = (4 * weights + case["batch_size"] * figures["state_bytes"]) / limits["bytes_per_second"]
        else:
            continue
        assert one["share"] == pytest.approx(work / one["seconds"])


def test_bench_exponents_and_state_bytes(results):
    times = {c["context"]: c["contestants"]["llama"]["seconds"] for c in results["cases"] if c["part"] == "prefill"}
    slope = torch.tensor(times[24] / times[16]).log() / torch.tensor(24 / 16).log()
    found = [e["exponent"] for e in results["exponents"] if (e["part"], e["contestant"]) == ("prefill", "llama")]
    assert found == pytest.approx([slope.item()], rel=1e-4)
    # Two blocks of width 16 in float32: the pairs of the long-term memory, or keys and values.
    assert results["models"]["mosaic"]["state_bytes_per_token"] == 2 * 2 * 16 * 4
    assert results["models"]["llama"]["state_bytes_per_token"] == 2 * 2 * 16 * 4


@pytest.mark.parametrize("name", ["mosaic", "llama", "llama-static"])
def test_bench_decodes_what_generate_does(name):
    here = settings()
    model = here.build(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that what is remembered decides
    ids = module._tokens(here, 16, 1)
    step = decoding(here, name, model, 16, 2)
    found = torch.cat([step() for _ in range(4)], dim=1)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected[:, 17:].expand(2, -1))


@pytest.mark.slow
def test_peak_memory_counts_weights_gradients_moments_and_logits():
    config, contexts = tiny_config(vocab_size=100_000), (8, 64)
    here = Bench(config, parts=("training",), contexts=contexts, device="cpu", dtype="float32")
    peaks = measuring.alone(module._peaks, here, "training", "llama")
    if peaks == [None, None]:
        pytest.skip("the system does not tell")
    weights, logits = 4 * 2 * 16 * 100_000, 4 * 64 * 100_000
    assert peaks[0] == pytest.approx(4 * weights, rel=0.1)  # the short context's logits are less than the gradients
    assert 3 * weights + 2 * logits < peaks[1] < 4 * weights + 5 * logits


def test_bench_goes_on_when_the_process_that_measures_memory_is_killed(monkeypatch, capsys):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(measuring, "alone", killed)
    monkeypatch.setitem(measuring.LIMITS, "cpu", (64, 2**16))
    found = bench(settings(parts=("prefill",), contexts=(16,), rounds=1, memory=True))
    assert "peak_bytes" not in found["cases"][0]["contestants"]["llama"]
    assert "warning: the process that ran llama alone was killed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": ("trainig",)}, "did you mean training"),
        ({"parts": ()}, "no parts"),
        ({"peers": ("gpt",)}, "choose one of llama"),
        ({"peers": ("llama-static",), "parts": ("prefill",)}, "add llama"),
        ({"contexts": (1,)}, "at least 2"),
        ({"batch_sizes": (0,)}, "at least 1"),
        ({"rounds": 0}, "at least 1"),
        ({"dtype": "float8"}, "did you mean float32"),
        ({"device": "gpu0"}, "choose one of auto, cpu, cuda"),
    ],
)
def test_bench_refuses_in_a_sentence(changes, said):
    with pytest.raises(ValueError, match=said):
        settings(**changes)
