"""The report is one file that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest

from mosaics.experiments.report import write_report


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    """The page, of a study whose first arrangement has an awkward name."""
    renamed = json.loads(json.dumps(results).replace("memory-mosaics-v2", "a <b> & c"))
    return write_report(renamed, tmp_path_factory.mktemp("report"))


def test_write_report_is_self_contained_and_well_formed(report):
    page = report.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert not re.search(r'(src|href)="(?!#)', page) and "@import" not in page and "<script" not in page
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(page)
    assert not open_tags
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    assert page.count("<svg") == 4 and "currentColor" in page  # two evaluations, two trainings


def test_write_report_shows_every_arrangement_with_its_baselines_and_trials(report, results):
    page = report.read_text(encoding="utf-8")
    for words in ("a &lt;b&gt; &amp; c", "transformer", "tuning trial", "last words", "word counts", "0.001, 0.002"):
        assert words in page
    assert {path.name for path in report.parent.glob("*.png")} == {
        "recall-recall.png",
        "recall-training.png",
        "text-loss.png",
        "text-training.png",
    }
    assert len(json.loads((report.parent / "results.json").read_text(encoding="utf-8"))["rows"]) == len(results["rows"])
    assert "<b>" not in page
