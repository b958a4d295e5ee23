"""The report is one file that needs nothing else, and says what the numbers say."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest

from mosaics.evaluation.results import wilson
from mosaics.experiments.report import _dimension, _title, numbers, write_report
from mosaics.reporting import Lead, Section, draw, figures


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    """The page, of a study whose first arrangement has an awkward name."""
    renamed = json.loads(json.dumps(results).replace("memory-mosaics-v2", "a <b> & c"))
    return write_report(renamed, tmp_path_factory.mktemp("report"), command="mosaics compare --output 'x y'")


class Page(HTMLParser):
    """Tags are closed in order; `text` is all that is read, `cells` those of tables."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.cells = "", []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_write_report_is_self_contained_and_well_formed(report):
    page = report.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert not re.search(r'(src|href)="(?!#|data:text/(csv|markdown);)', page)
    assert "@import" not in page and "<script" not in page and "url(http" not in page
    Page(page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    # Two evaluations, two trainings, two arrangements' trials of each; text in them can be selected.
    assert page.count("<svg") == 8 and "currentColor" in page and re.search(r"<text [^>]*>nats per token</text>", page)


def test_write_report_leads_with_every_evaluation_and_ends_with_its_command(report, results):
    text = Page(report.read_text(encoding="utf-8")).text
    body = text[text.index("</style>") if "</style>" in text else 0 :]
    places = [
        body.index(words)
        for words in (
            "Recall of pairs, at 512 tokens, 8 times the training length: a <b> & c",
            "Loss on held-out text, at 8 times the training length: a <b> & c has",
            "last words",
            "Examples",
            "Tuning",
            "Budget",
            "mosaics compare --output 'x y'",
        )
    ]
    assert places == sorted(places)
    for words in ("transformer", "tuning trial", "no memory: the answer that most often", "look-up: goes on", "seed 1"):
        assert words in body
    assert not re.search(
        r"\b(first|last)\b", " ".join(Page(report.read_text(encoding="utf-8")).cells).replace("last words", "")
    )
    assert {path.name for path in report.parent.glob("*.png")} >= {"recall-recall.png", "text-loss.png"}
    assert len(json.loads((report.parent / "results.json").read_text(encoding="utf-8"))["rows"]) == len(results["rows"])


def test_write_report_shows_the_numbers_of_the_results(report, results):
    """Every mean with its interval is on the page, in the CSV beside it and in the one inside it."""
    page = report.read_text(encoding="utf-8")
    cells = [" ".join(cell.split()) for cell in Page(page).cells]
    inside = [base64.b64decode(text).decode() for text in re.findall(r'href="data:text/csv[^,]*,([^"]*)"', page)]
    for evaluation in ("recall", "loss"):
        rows = [row for row in results["rows"] if row["evaluation"] == evaluation]
        name = f"{rows[0]['setting']}-{evaluation}"
        beside = (report.parent / "tables" / f"{name}.csv").read_text(encoding="utf-8")
        assert beside in inside
        folded = (report.parent / "tables" / f"{name}-by-seed.csv").read_text(encoding="utf-8")
        assert folded in inside
        lines = {line[0]: line for line in csv.reader(io.StringIO(beside))}
        for arrangement, points in numbers(results, rows).items():
            line = lines[arrangement.replace("memory-mosaics-v2", "a <b> & c")]
            for place, (x, number) in enumerate(sorted(points.items())):
                mean = [row["y"] for row in rows if (row["arrangement"], row["x"]) == (arrangement, x)]
                assert number.value == pytest.approx(sum(mean) / len(mean))
                assert [float(cell) for cell in line[1 + 3 * place : 4 + 3 * place]] == pytest.approx(
                    [number.value, number.low, number.high]
                )
                shown = f"{number.shown} {number.interval}"
                assert shown in cells or f"★ {shown}" in cells


def test_write_report_shows_what_was_asked_and_answered(report, results):
    page = Page(report.read_text(encoding="utf-8")).text
    assert 0 < len(results["examples"]) <= 5
    for example in results["examples"]:
        assert example["question"] in page
        assert example["at"] is None or example["saw"][example["at"] :].startswith(f"{example['expected']}")
        for said, right in example["said"].values():
            assert said.strip() in page and right == (said.strip() == example["expected"])
    assert page.count("✓ right") + page.count("✗ wrong") == 2 * len(results["examples"])


def planted(share: list[int]) -> dict:
    """Results of two arrangements that answer so many of 100 questions."""
    evaluation = {"name": "e", "title": "Questions", "suite": "world", "options": {"task": "recall"}, "without": [],
                  "changes": {}, "stretch": None, "beside": {}}  # fmt: skip
    training = {"steps": 10, "context_length": 64, "batch_size": 4}
    data = {"corpus": None, "world": "recall", "automata": None}
    setting = {
        "name": "s",
        "series": None,
        "evaluations": [evaluation],
        "training": training,
        "data": data,
        "tuning": {},
    }
    rows = [
        {"arrangement": name, "setting": "s", "evaluation": "e", "seed": 0, "x": x, "y": float(right)}
        | {"scores": [1.0] * right + [0.0] * (100 - right)}
        for name, right in zip("ab", share, strict=True)
        for x in (64, 512)
    ]
    study = {
        "title": "a against b",
        "settings": [setting],
        "seeds": [0],
        "arrangements": [{"label": "a"}, {"label": "b"}],
    }
    return {"study": study, "rows": rows, "models": [], "baselines": [], "machine": {}}


@pytest.mark.parametrize(
    "share, says, kind",
    [
        ([100, 62], "a is better than b by 38.0 points", "good"),
        ([62, 100], "a is worse than b by 38.0 points", "bad"),
        ([62, 66], "a and b can't be told apart", "open"),
    ],
)
def test_write_report_says_who_is_better_if_that_can_be_said(share, says, kind, tmp_path):
    page = write_report(planted(share), tmp_path).read_text(encoding="utf-8")
    lead = re.search(r'<li class="(\w+)">(Questions.*?)</li>', page)
    low, high = (100 * end for end in wilson(share[0] / 100, 100))
    assert lead[1] == kind and says in lead[2].replace("&#39;", "'")
    said = re.search(
        rf"a answers {share[0]} of 100 questions \(95 % interval (\d+)–(\d+) %\); b {share[1]} \(", lead[2]
    )
    assert low - 1.5 < int(said[1]) <= low + 0.5 and high - 0.5 <= int(said[2]) < high + 1.5  # at least Wilson's


def test_write_report_gives_no_interval_where_nothing_can_be_drawn_anew(tmp_path):
    results = planted([100, 62])
    results["study"]["settings"][0]["evaluations"][0]["suite"] = "perplexity"
    for row in results["rows"]:  # stretches of one document, one training
        row |= {"y": 1.5 + (row["arrangement"] == "b"), "scores": [1.25, 1.75], "groups": [2]}
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert "interval" not in page.split("</ul>")[0] and "One training and one document do not say" in page
    assert numbers(results, results["rows"])["a"][64].low is None
    for row in results["rows"]:
        row["groups"] = [1, 1]
    assert numbers(results, results["rows"])["a"][64].low == 1.25


def test_titles_tell_apart_what_is_asked_again_with_something_changed():
    setting = planted([1, 2])["study"]["settings"][0]
    plain = setting["evaluations"][0] | {"name": "s again"}
    titles = [_title(setting, plain | more) for more in ({}, {"changes": {"long_term.delay": 4}}, {"stretch": "yarn"})]
    assert titles == ["Questions", "Questions, delay 4", "Questions, positions stretched (yarn)"]


def test_draw_has_the_mean_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "embedded", lambda figure, *_: figure)
    curves = [("a", 0, [1, 2], [1.0, 5.0]), ("a", 1, [1, 2], [2.0, 9.0])]
    figure = draw({"title": "t", "x": "x", "y": "y", "log_x": False, "curves": curves}, tmp_path / "a.png")
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.5, 7.0]


def test_draw_tells_many_curves_apart_and_shows_the_first_above_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "embedded", lambda figure, *_: figure)
    curves = [(f"{number}", 0, [1, 2], [1.0, 2.0]) for number in range(4 * len(figures.COLOURS))]
    lines = draw({"title": "t", "x": "x", "y": "y", "log_x": False, "curves": curves}, tmp_path / "a.png").axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == len(curves)
    assert all(lines[0].get_zorder() > line.get_zorder() for line in lines[1:])


def test_draw_writes_numbers_beside_the_axis_however_many_points_there_are(tmp_path):
    xs = list(range(25, 1000, 25))
    plot = {"title": "t", "x": "optimisation step", "y": "nats", "log_x": True}
    drawing = draw(plot | {"curves": [("a", 0, xs, xs)]}, tmp_path / "a.png")
    assert {"50", "100", "200", "500"} <= set(re.findall(r">([0-9]+)<", drawing))


def test_draw_breaks_long_names(tmp_path):
    name = "learning rate 0.008, initializer range 0.02, warmup steps 50, final learning rate ratio 0.01 (taken)"
    plot = {"title": "t", "x": "x", "y": "y", "log_x": False, "curves": [(name, 0, [1, 2], [1, 2])]}
    said = re.findall(r"<text [^>]*>([^<]*)</text>", draw(plot, tmp_path / "a.png"))
    assert max(map(len, said)) <= 64 and name in " ".join(said)


def test_table_marks_the_best_alone(tmp_path):
    results = planted([100, 62])
    setting = results["study"]["settings"][0]
    section = _dimension(results, setting, setting["evaluations"][0], results["rows"], tmp_path, set())
    marked = [[cell.best for cell in row[1:]] for row in section.tables[0].rows]
    assert marked == [[True, True], [False, False]]
    assert "| a | **100.0 (96–100)** |" in section.tables[0].markdown()


def test_write_report_takes_a_verdict_first(tmp_path):
    verdict = [Lead("It holds.", "good"), Section("The verdict", "why")]
    text = write_report(planted([1, 2]), tmp_path, verdict).read_text(encoding="utf-8")
    assert text.index("It holds.") < text.index("Questions (s), at") < text.index("The verdict") < text.index("Budget")
