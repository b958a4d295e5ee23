"""The page of an evaluation says what the answers say."""

import html
import re

import pytest

from mosaics.evaluation import Example, Record
from mosaics.evaluation.page import write_evaluation_page
from mosaics.evaluation.results import accuracy_row, side_by_side, wilson


def result(scores, name="m", suite="recall") -> tuple[dict, list[Example]]:
    """A result with so many right and wrong answers, and its examples."""
    examples = [
        Example(f"q{i}", f" Which pet has number {i}?", [f"cat{i}"], prefix=f"Number {i} has the pet cat{i}. " * 40)
        for i in range(len(scores))
    ]
    records = [
        Record.of(e, e.references[0] if s else "dog", s, length=64) for e, s in zip(examples, scores, strict=True)
    ]
    summary = {"tables": {"by length": [{"length": 64} | accuracy_row(records)]}}
    found = {"suite": suite, "model": name, "weights": "", "settings": {"samples": len(scores), "sources": {}}}
    return found | {"examples": [r.to_dict() for r in records], "summary": summary}, examples


def text_of(page) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_page_leads_with_the_share_and_its_interval(tmp_path):
    found, examples = result([1] * 7 + [0] * 3)
    page = write_evaluation_page(tmp_path, found, {"whole": found}, examples, "mosaics evaluate m")
    low, high = (round(100 * end) for end in wilson(0.7, 10))
    text = text_of(page)
    assert f"m answers 7 of 10 questions right (70.0 %, 95 % interval {low}–{high} %)." in text
    assert text.count("✓ right") == 2 and text.count("✗ wrong") == 3 and "mosaics evaluate m" in text
    assert "right (%)" in text and "questions" in text and "samples 10" in text
    table = (tmp_path / "tables" / "by-length.csv").read_text().splitlines()
    assert table[1].split(",")[:2] == ["64", "70.0"] and table[1].endswith(",10")


def test_page_counts_the_questions_of_examples_that_have_several(tmp_path):
    found, examples = result([0.5, 0.25])
    found["summary"]["tables"]["by length"] = [
        {"length": n, "accuracy": a, "queries": 40} for n, a in ((8, 50), (16, 25))
    ]
    text = text_of(write_evaluation_page(tmp_path, found, {"whole": found}, examples))
    low, high = (round(100 * end) for end in wilson(3 / 8, 80))
    assert f"m answers 30 of 80 questions right (37.5 %, 95 % interval {low}–{high} %)." in text


def test_page_shows_what_was_seen_asked_and_answered(tmp_path):
    found, examples = result([0])
    page = write_evaluation_page(tmp_path, found, {"whole": found}, examples)
    text = text_of(page)
    assert "Which pet has number 0?" in text and "right: cat0" in text and "whole: dog ✗ wrong" in text
    # What matters is where the answer stood the last time.
    assert re.search(r"<blockquote>… .* pet <mark>cat0</mark>\.</blockquote>", page.read_text(encoding="utf-8"))


def test_page_shows_questions_that_are_made_of_tokens(tmp_path):
    ids = [0, 5, 15, 6, 16, *range(20, 120), 6, 16, 21, 5, 15]
    queries = [{"position": 105, "distance": 102, "value": 16}, {"position": 108, "distance": 107, "value": 15}]
    example = Example("row", ids, [], meta={"length": 110, "queries": queries})
    variants = {}
    for name, said in (("whole", [16, 15]), ("without", [16, 7])):
        variants[name] = result([])[0] | {"examples": [Record.of(example, said, 0.5).to_dict()]}
    words = {5: " <b>key", 15: " \N{RIGHT-TO-LEFT OVERRIDE}value\n", 7: ""}

    def page_of(*word) -> str:
        return write_evaluation_page(tmp_path, result([])[0], variants, [example], "", *word).read_text("utf-8")

    page = page_of(lambda token: words.get(token, f" w{token}"))
    key, value = "␣&lt;b&gt;key", "␣⟨202e⟩value↵"
    differing, same = re.findall(r'<li class="example">(.*?)<ul', page, flags=re.S)
    assert "length 110, distance 107" in differing and f"<strong>… {key}</strong>" in differing
    assert f"<blockquote>␣w0 <mark>{key} {value}</mark> ␣w6 ␣w16 ␣w20" in differing and " …</blockquote>" in differing
    assert f"right:</span> {value}</p>" in differing and "<strong>… ␣w6</strong>" in same
    assert "<mark>␣w6 ␣w16</mark> ␣w20" in same and "␣w119" not in differing
    for said in (f"whole: <q>{value}</q>", "without: <q>‧</q>"):
        assert said in page
    assert page.count("✓ right") == 3 and page.count("✗ wrong") == 1 and "␣ is a space" in page
    page = page_of()
    assert "<mark>5 15</mark>" in page and "␣" not in page and "whole: <q>15</q>" in page
    rows = [Example(str(n), ids, [], meta={"length": n, "queries": queries}) for n in (1, 2, 3)]
    found = result([])[0] | {"examples": [Record.of(row, [16, 15], 1).to_dict() for row in rows]}
    text = text_of(write_evaluation_page(tmp_path, found, {"whole": found}, rows))
    asked = [(1, 102), (3, 107), (2, 102), (2, 107), (3, 102)]  # one of each row, from both ends
    assert re.findall(r"length (\d), distance (\d+)", text) == [(str(n), str(back)) for n, back in asked]
    for record in (variants["whole"]["examples"][0], variants["without"]["examples"][0]):
        record["prediction"] = None
    assert "Examples" not in page_of()


def test_page_of_variants_prefers_questions_that_they_answer_differently(tmp_path):
    (whole, examples), (without, _) = result([1] * 9 + [0]), result([1] * 8 + [0, 0])
    variants = {"whole": whole, "without long_term": without}
    page = write_evaluation_page(tmp_path, side_by_side(variants), variants, examples)
    text = text_of(page)
    assert text.index("Which pet has number 8?") >= 0
    assert "m, whole, answers 9 of 10" in text and "m, without long_term, answers 8 of 10" in text
    table = (tmp_path / "tables" / "side-by-side-by-length.md").read_text()
    assert "| whole (right, %) | without long_term (right, %) |" in table
    ends = ["–".join(f"{100 * end:.0f}" for end in wilson(share, 10)) for share in (0.9, 0.8)]
    assert f"| 64 | **90.0 ({ends[0]})** | 80.0 ({ends[1]}) |" in table


def test_page_names_and_draws_chance(tmp_path):
    found, examples = result([1, 0])
    found["summary"]["tables"]["by length"][0]["chance"] = 12.5
    curve = {"label": "a", "x": [1, 2], "y": [3, 4]}
    found["summary"]["plot"] = {"x": "length", "y": "accuracy (%)", "curves": [curve]}
    text = text_of(write_evaluation_page(tmp_path, found, {"whole": found}, examples))
    assert "chance (12.5 %)" in text and "one of the possible answers, picked blindly" in text


@pytest.mark.parametrize("suite, says", [("lm-eval", "m: q0 1;"), ("recall", "m answers 1 of 2")])
def test_page_counts_tasks_not_as_questions(suite, says, tmp_path):
    found, examples = result([1, 0], suite=suite)
    assert says in text_of(write_evaluation_page(tmp_path, found, {"whole": found}, examples))


@pytest.mark.parametrize("gain, kind", [(0.1, "good"), (-0.1, "bad"), (0.0, "open")])
def test_page_says_what_more_context_gains(gain, kind, tmp_path):
    sign = (-1, 0, 1)
    records = [
        {"id": f"{i}-{m}", "prompt_digest": "", "prediction": None, "references": []}
        | {"score": 3.0 - gain * m + 0.01 * i + (m == 2 and not gain) * 0.1 * sign[i % 3], "meta": {"multiple": m}}
        for i in range(9)
        for m in (1, 2)
    ]
    rows = [{"context": 32 * m, "times": m, "nats per token": 3.035 - gain * m} for m in (1, 2)]
    found = {"suite": "perplexity", "model": "m", "weights": "", "settings": {}, "examples": records}
    found |= {"summary": {"tables": {"loss by context": rows}}}
    page = write_evaluation_page(tmp_path, found, {"whole": found}, [])
    assert f'<li class="{kind}">' in page.read_text(encoding="utf-8")
    if gain:
        how = "better" if gain > 0 else "worse"
        once, twice = (f"{row['nats per token']:.3f}" for row in rows)
        text = text_of(page)
        assert f"{once} nats per token with windows of 32 tokens and {twice} with 64, 0.100 {how}" in text
        assert f"(95 % interval of the gain {gain:+.3f} to {gain:+.3f}, over stretches)" in text
