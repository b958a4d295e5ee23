"""The page of kept results, and that the one in the docs is made of what lies in results/."""

from pathlib import Path

import pytest
from tests.experiments.conftest import OPTIONS

from mosaics.experiments.pages import records_in, results_page, write_results_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    from mosaics.cli import main

    folder = tmp_path_factory.mktemp("kept")
    words = ["reproduce", "table12", "--seeds", "0", "--samples", "2", "--output", folder / "out", *OPTIONS]
    assert main([*map(str, words), "--results", str(folder / "results")]) == 0
    return folder / "results"


@pytest.mark.slow
def test_page_has_the_verdict_the_command_and_every_number(kept, tmp_path):
    [page] = write_results_page(kept, tmp_path / "page.md")
    text, [record] = page.read_text(encoding="utf-8"), records_in(kept)
    assert record["command"] in text and str(record["commit"]) in text
    assert f"## `table12`: {record['verdict']['verdict']}" in text and "| `table3` |" in text and "not run" in text
    assert all(check["says"] in text for check in record["verdict"]["checks"])
    assert all(f"| {row['x']:g} " in text for row in record["rows"])
    images = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert images and all((tmp_path / image).is_file() for image in images)


@pytest.mark.slow
def test_page_follows_the_numbers(kept, tmp_path):
    [record] = records_in(kept)
    before = results_page([record], kept, tmp_path / "page.md")
    record["rows"][0]["y"] += 12.5
    record["verdict"]["checks"][0]["low"] -= 1.25
    assert results_page([record], kept, tmp_path / "page.md") != before


def test_page_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(ValueError, match="there are no results in"):
        records_in(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results that mosaics wrote"):
        records_in(tmp_path)


def test_page_in_the_docs_is_made_of_the_results():
    page = ROOT / "docs" / "results.md"
    made = results_page(records_in(ROOT / "results"), ROOT / "results", Path("docs/results.md"))
    assert page.read_text(encoding="utf-8") == made, "run mosaics report results --output docs/results.md"
    images = [line.split("](")[1].rstrip(")") for line in made.splitlines() if line.startswith("![")]
    assert all((page.parent / image).is_file() for image in images)
