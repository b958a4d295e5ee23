"""`mosaics info`: the paper's figures, and every kind of source."""

import json
import shutil

import pytest

from mosaics.ops import compiling
from mosaics.ops.leaky_average.compiled import SOURCE


@pytest.mark.parametrize(
    ("words", "parameters", "gflops"),
    [
        (["memory-mosaics-v2-large"], 9.9e9, 18.9),
        (["memory-mosaics-v2-large", "--without", "long_term"], 8.3e9, 15.6),
        (["memory-mosaics-v2-small"], 2.039e9, None),
        (["memory-mosaics-v2-small", "--without", "long_term"], 1.735e9, None),
    ],
)
def test_info_gives_the_figures_of_the_paper(mosaics, words, parameters, gflops):
    code, output, _ = mosaics("info", *words, "--context", 256, "--json")
    found = json.loads(output)
    assert code == 0 and found["parameters"]["total"] == pytest.approx(parameters, rel=4e-3)
    assert sum(found["parameters"]["by_kind"].values()) == found["parameters"]["total"]
    assert ("long_term" in found["parameters"]["by_kind"]) == ("--without" not in words)
    assert gflops is None or found["flops_per_token"] / 1e9 == pytest.approx(gflops, abs=0.05)


def test_info_prints_a_table(mosaics):
    code, output, _ = mosaics("info", "memory-mosaics-v2-large", "--context", 256)
    assert code == 0
    for text in ("9.926 B", "18.94 GFLOPs", "long_term", "decoding state at 256"):
        assert text in output


def test_info_state_grows_with_the_context(mosaics):
    sizes = [
        json.loads(mosaics("info", "memory-mosaics-v2-tiny", "--json", "--context", n)[1])["state_bytes"]
        for n in (64, 1024, 2048)
    ]
    assert sizes[0] < sizes[1] < sizes[2] < 2.1 * sizes[1]


def test_info_state_follows_its_dtype(mosaics, refused):
    words = ["info", "memory-mosaics-v2-tiny", "--json", "--context", 4096]
    plain, half, eighth = (
        json.loads(mosaics(*words, *more)[1])["state_bytes"]
        for more in ([], ["--state-dtype", "bfloat16"], ["--state-dtype", "int8"])
    )
    assert plain / 2 < half < 0.51 * plain
    assert plain / 4 < eighth < 0.27 * plain
    assert "choose bfloat16 or int8" in refused(*words, "--state-dtype", "int4")


def test_info_reads_runs_checkpoints_exports_and_recipes(mosaics, small_run):
    sources = [small_run, small_run / "export", small_run / "checkpoints" / "step-00000002"]
    found = [json.loads(mosaics("info", source, "--json")[1]) for source in sources]
    assert found[0]["parameters"] == found[1]["parameters"] == found[2]["parameters"]
    assert found[0]["context_length"] == 48
    recipe = json.loads(mosaics("info", small_run / "recipe.yaml", "--json")[1])
    assert recipe["parameters"] == found[0]["parameters"]
    assert mosaics("info", "quickstart")[0] == 0


def test_info_takes_a_run_before_its_first_checkpoint(mosaics, small_run, tmp_path):
    begun = shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoints"))
    before, after = (json.loads(mosaics("info", run, "--json")[1]) for run in (begun, small_run))
    assert before | {"model": ""} == after | {"model": ""}


def test_info_lists_tensors(mosaics, small_run):
    tensors = json.loads(mosaics("info", small_run, "--tensors", "--json")[1])["tensors"]
    assert tensors["lm_head.weight"] == [300, 16]
    assert "300x16" in mosaics("info", small_run, "--tensors")[1]


def test_info_refuses_in_one_sentence(refused, tmp_path):
    assert "memory-mosaics-v2-large" in refused("info", "memory-mosaic-v2-large")
    assert "neither" in refused("info", tmp_path)
    assert "--context is 0" in refused("info", "memory-mosaics-v2-tiny", "--context", 0)
    assert "long_term" in refused("info", "memory-mosaics-v2-tiny", "--without", "longterm")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused("info", tmp_path)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Libraries are looked for as in a new process."""
    compiling.library.cache_clear()
    monkeypatch.setattr(compiling, "_told", [])
    for name in ("CXX", "MOSAICS_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    compiling.library.cache_clear()


def test_info_of_the_system_says_which_forms_run_and_why(mosaics, anew, refused):
    code, output, _ = mosaics("info", "--system", "--json")
    found = json.loads(output)
    assert code == 0 and set(found["devices"]) == {"cpu", "cuda", "mps"} and found["versions"]["torch"]
    compiled = "compiled" if compiling.library(SOURCE) else "chunked"
    assert found["forms"]["cpu"]["leaky_average"]["training"] == compiled
    assert compiling.about(SOURCE) in found["why"]["leaky_average"]["compiled"]
    assert "leave out the model" in refused("info", "memory-mosaics-v2-tiny", "--system")
    assert "--system" in refused("info")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MOSAICS_COMPILE", "0", "MOSAICS_COMPILE=0 forbids to compile; unset it"),
        ("CXX", "no-such-compiler", "there is no C++ compiler 'no-such-compiler'; install one"),
    ],
)
def test_info_of_the_system_says_what_to_do_without_a_compiler(mosaics, anew, name, value, said):
    anew.setenv(name, value)
    code, output, _ = mosaics("info", "--system")
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert code == 0 and f"{name} {value}" in lines
    assert {"kernel_regression, training, delay shifted", "unit_values, one token in_place"} <= set(lines)
    assert any(line.startswith("kernel_regression, single not compiled") and said in line for line in lines)
