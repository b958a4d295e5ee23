"""The tables about libraries in the docs are made of what lies in results/."""

import importlib.util
from pathlib import Path

import pytest

from mosaics.experiments.records import read_record

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "script, tables, name",
    [("choosing", "bound_tables", "choosing"), ("united", "tables", "united"), ("united", "tables", "uniting")],
)
def test_tables_of_the_docs_are_those_of_the_results(script, tables, name):
    spec = importlib.util.spec_from_file_location(script, ROOT / "benchmarks" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = read_record(ROOT / "results" / f"{name}.json")
    lines = [line for line in getattr(module, tables)(record).splitlines() if line.startswith("| ")]
    said = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert len(lines) > 5 and not [line for line in lines if line not in said]
    assert record["command"] in said and record["commit"] in said
