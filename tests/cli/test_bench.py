"""`mosaics bench`: tables, JSON, refusals, interruption."""

import json

import pytest

from mosaics.experiments import bench as module
from mosaics.experiments import measuring

SIZES = (
    "--contexts 16,24 --rounds 1 --no-memory --batch-sizes 1 --device cpu --dtype float32 --model.hidden_size 16 "
    "--model.num_hidden_layers 1 --model.num_attention_heads 2 --model.vocab_size 61"
).split()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setitem(measuring.LIMITS, "cpu", (64, 2**16))
    monkeypatch.setattr(measuring, "SHORTEST", 0.001)
    monkeypatch.setattr(module, "TOKENS", 3)


def test_bench_prints_json(mosaics):
    code, output, error = mosaics("bench", *SIZES, "--parts", "training", "--json")
    found = json.loads(output)
    assert code == 0 and "training, context 24" in error
    assert [case["context"] for case in found["cases"]] == [16, 24]
    ours, theirs = (found["models"][name]["parameters"] for name in ("mosaic", "llama"))
    assert theirs == pytest.approx(ours, rel=0.01)
    assert found["machine"]["torch"] and found["settings"]["model"]["hidden_size"] == 16


def test_bench_keeps_json_beside_the_tables(mosaics, refused, tmp_path):
    kept = tmp_path / "found.json"
    code, output, _ = mosaics("bench", *SIZES, "--parts", "training", "--results", kept)
    assert code == 0 and "training, time of a step" in output
    assert [case["context"] for case in json.loads(kept.read_text())["cases"]] == [16, 24]
    assert "make it first" in refused("bench", *SIZES, "--results", tmp_path / "none" / "found.json")


def test_bench_prints_tables_and_marks_what_was_disturbed(mosaics, monkeypatch):
    busy = iter(range(0, 10**9, 10**6))  # another process that uses very many cores
    monkeypatch.setattr(measuring, "others", lambda: float(next(busy)))
    code, output, error = mosaics("bench", *SIZES, "--parts", "decoding")
    assert code == 0 and "warning: other processes use" in error
    for text in ("decoding, time of a token", "| 16*", "| llama-static", "exponent of the context: mosaic", "* other"):
        assert text in output


def test_bench_prints_what_is_measured_when_it_is_interrupted(mosaics, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(module._MAKE, "prefill", interrupted)
    code, output, error = mosaics("bench", *SIZES, "--parts", "training,prefill")
    assert code == 130 and "training, time of a step" in output and "error: interrupted" in error


def test_bench_refuses_in_one_sentence(refused):
    assert "memory-mosaics-v2-tiny" in refused("bench", "--preset", "memory-mosaics-v2-tniy")
    assert "window" in refused("bench", "--model.windw", 3)
    assert "--training.steps" in refused("bench", "--training.steps", 3)
    assert "--contexts is 'many'" in refused("bench", "--contexts", "many")
    assert "did you mean decoding" in refused("bench", "--parts", "decodin")
    assert "takes no surplus" in refused("bench", "surplus")
