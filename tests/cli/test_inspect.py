import json
import re

import pytest
import torch
from pyarrow import parquet

from mosaics.cli import inspect as verb
from mosaics.training.sources import open_source

TEXT = "import os\n\n\ndef first(x):\n    return os.path(x)\n"


@pytest.fixture
def inspected(mosaics, small_run, tmp_path):
    def call(*words):
        return mosaics("inspect", small_run, "--output", tmp_path / "page.html", *words)

    return call


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_inspect_writes_a_page_and_its_numbers(inspected, small_run, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    code, said, _ = inspected("--prompt-file", tmp_path / "text", "--data", tmp_path / "data.json")
    assert code == 0 and re.match(r"The long-term memory gave ", said) and "nats on average, without the" in said
    shown = data_of((tmp_path / "page.html").read_text())
    model, tokenizer = open_source(small_run)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert shown["ids"] == ids[0].tolist() and "".join(shown["pieces"]) == tokenizer.decode(ids[0])
    tables = json.loads((tmp_path / "data.json").read_text())["tables"]
    found = model.inspect(ids)
    expected = found.forecasts.of_next[:-1]
    assert torch.allclose(torch.tensor(tables["tokens"][0]["log_prob"][1:]), expected, rtol=1e-5)
    assert tables["forecasts"][0]["position"][:6] == [1] * 5 + [2]
    gained = torch.tensor(tables["tokens"][0]["log_prob without long_term"][1:])
    assert torch.allclose(expected - gained, found.gain("long_term")[:-1], atol=1e-5)
    pairs = [p for p in tables["pairs"] if (p["memory"], p["layer"], p["head"]) == ("long_term", 1, 0)]
    (read,) = (r for r in found.reads if (r.memory, r.layer_index) == ("long_term", 1))
    there = read.found[0] >= 0
    assert pairs[0]["found"] == read.found[0][there].tolist()
    assert torch.allclose(torch.tensor(pairs[0]["weight"]), read.weights[0][there], rtol=1e-5)
    (held,) = (p for p in tables["averages"] if (p["memory"], p["layer"], p["head"]) == ("short_term", 0, 1))
    average = next(a for a in found.averages if (a.memory, a.layer_index) == ("short_term", 0))
    there = average.found[1] >= 0
    assert held["found"] == average.found[1][there].tolist() and held["position"] == there.nonzero()[:, 0].tolist()
    assert torch.allclose(torch.tensor(held["share"]), average.shares[1][there], rtol=1e-5)


def test_inspect_writes_parquet_with_the_same_rows(inspected, tmp_path):
    for name in ("data.json", "data.parquet"):
        assert inspected("--prompt", TEXT, "--data", tmp_path / name, "--top", 6)[0] == 0
    tables = json.loads((tmp_path / "data.json").read_text())["tables"]
    rows = parquet.read_table(tmp_path / "data.parquet").to_pandas()
    for name, parts in tables.items():
        own = rows[rows.table == name]
        assert len(own) == sum(len(next(v for v in p.values() if isinstance(v, list))) for p in parts)
        for column in {c for part in parts for c in part}:
            assert column in own.columns
    weights = [w for part in tables["pairs"] for w in part["weight"]]
    assert rows[rows.table == "pairs"].weight.tolist() == pytest.approx(weights, rel=1e-5)


def test_inspect_goes_on_from_a_memory(inspected, mosaics, small_run, tmp_path):
    (tmp_path / "text").write_text("import os, sys\n" * 9)
    kept = ("--context-file", tmp_path / "text", "--save-memory", tmp_path / "a.memory")
    assert mosaics("generate", small_run, *kept)[0] == 0
    code, _, _ = inspected("--prompt", "import os", "--memory", tmp_path / "a.memory")
    assert code == 0
    shown = data_of((tmp_path / "page.html").read_text())
    assert shown["before"] > 20 and "".join(shown["context"].values()).endswith("import os, sys\n")


def test_inspect_refuses_what_it_cannot_look_into(inspected, refused, mosaics, small_run, tmp_path, monkeypatch):
    page = ("--output", tmp_path / "page.html")
    own = ("inspect", small_run)
    assert "give a --prompt" in refused("inspect", "demo", *page)  # that is no run
    assert "the text is empty" in refused(*own, *page, "--prompt", "")
    assert "leave one out" in refused(*own, *page, "--prompt", "a", "--prompt-file", tmp_path / "b")
    assert "No such file" in refused(*own, *page, "--prompt-file", tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "not utf-8 at byte 3" in refused(*own, *page, "--prompt-file", tmp_path / "latin")
    assert "make it first" in refused(*own, "--prompt", "a", "--output", tmp_path / "none" / "page.html")
    assert "make it first" in refused(*own, *page, "--prompt", "a", "--data", tmp_path / "none" / "data.json")
    assert "neither .json nor .parquet" in refused(*own, *page, "--prompt", "a", "--data", tmp_path / "data.csv")
    assert "is a folder" in refused(*own, "--prompt", "a", "--output", tmp_path)
    assert "--top is 0" in refused(*own, *page, "--prompt", "a", "--top", 0)
    assert "there is no memory" in refused(*own, *page, "--prompt", "a", "--memory", tmp_path / "none")
    assert "leave out --state-dtype" in refused(
        *own, *page, "--prompt", "a", "--memory", tmp_path / "none", "--state-dtype", "int8"
    )
    monkeypatch.setattr(verb, "LONGEST", 3)
    assert "give from 1 to 3" in refused(*own, *page, "--prompt", TEXT)
    assert not (tmp_path / "page.html").exists()
