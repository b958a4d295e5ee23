"""The page in a real browser: Chromium, driven by Playwright."""

import re
import shutil

import pytest
import torch

from helpers import tiny_model, tokens
from mosaics.inspection.page import page

pytestmark = pytest.mark.clients
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = [
    "<script>document.title='bad'</script>",
    "</script><img src=x onerror=\"document.title='bad'\">",
    "&amp;",
    "\n",
]
MIXED = [
    "\N{GRINNING FACE}",
    "",
    "\N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED}",
    "\N{RIGHT-TO-LEFT OVERRIDE}",
    " word",
    "\t",
]
TIME = 90


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def texts():
    return [*HOSTILE, *MIXED, *(f" w{number}" for number in range(TIME))][:TIME]


@pytest.fixture(scope="module")
def found():
    return tiny_model(torch.float32).inspect(tokens(1, TIME))


@pytest.fixture
def opened(browser, found, texts, tmp_path):
    """Opens the page; gives it, and what it complained about."""
    closing = []

    def call(width=1200, dark=False, texts=texts, found=found, **options):
        path = tmp_path / "page.html"
        path.write_text(page(found, texts, lambda token: f"<i>{token}</i>", "a <b>model</b>"), encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", offline=True, **options
        )
        closing.append(context)
        view, said = context.new_page(), []
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on(
            "request",
            lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
        )
        view.goto(path.as_uri())
        view.wait_for_selector("body[data-ready]")
        return view, said

    yield call
    for context in closing:
        context.close()


def expected_marks(found, token):
    """The places that the page marks for a token, when all memories and heads are shown."""
    sums: dict = {}
    for read in found.reads:
        for place, weight in zip(
            read.found[:, token - 1, :4].flatten(), read.weights[:, token - 1, :4].flatten(), strict=True
        ):
            if read.contextual and place >= 0:
                key = int(place), read.memory
                sums[key] = sums.get(key, 0) + float(weight)
    most = max(sums.values(), default=0)
    best = {place: max(w for (p, _), w in sums.items() if p == place) for place, _ in sums}
    return {place for place, weight in best.items() if weight >= most / 50 + 1e-3}, set(best)


def test_page_marks_what_was_read_for_the_word_under_the_pointer(opened, found):
    view, said = opened()
    for token in (30, 60):
        view.keyboard.press("Escape")
        view.hover(f"#t{token}")
        surely, perhaps = expected_marks(found, token)
        marked = {int(x) for x in view.eval_on_selector_all(".mark", "xs => xs.map(x => x.dataset.p)")}
        assert surely <= marked <= perhaps and surely
        p = float(found.forecasts.of_next[token - 1].exp())
        text = view.inner_text("#said")
        assert ("< 0.05 %" if p < 5e-4 else f"{100 * p:.{0 if p >= 0.1 else 1 if p >= 0.01 else 2}f} %") in text
    shown = view.evaluate("[-0.3, -0.004, 0, 0.004, 0.3].map(percent)")  # weights of lla may be negative
    assert shown == ["\N{MINUS SIGN}30 %", "\N{MINUS SIGN}0.40 %", "< 0.05 %", "0.40 %", "30 %"]
    view.select_option("#memory", "long_term")
    view.select_option("#head", "1")
    rows = view.eval_on_selector_all("#found tr td:nth-child(2)", "xs => xs.map(x => x.textContent)")
    assert rows and all(row.startswith("long_term") and row.endswith(".1") for row in rows)
    strongest = max(
        (float(r.weights[1, 59, 0]), int(r.found[1, 59, 0])) for r in found.reads if r.memory == "long_term"
    )
    first = view.eval_on_selector_all("#found tr:nth-child(2) td", "xs => xs.map(x => x.textContent)")
    assert first[3] == str(59 - strongest[1])
    assert said == []


def test_page_says_what_the_key_of_the_chosen_head_holds(opened, found, texts):
    view, said = opened()
    view.click("#map tr:nth-child(3) td:nth-child(3) button")  # head 1 of the second memory
    average = found.averages[1]
    for token in (40, 70):
        view.keyboard.press("Escape")
        view.hover(f"#t{token}")
        there = average.found[1, token - 1] >= 0
        places = average.found[1, token - 1][there].tolist()
        shown = view.eval_on_selector_all("#held .held", "xs => xs.map(x => x.textContent)")
        assert shown == [texts[place].strip("\n") for place in places] and places
        text = view.inner_text("#held")
        percents = [float(x) for x in re.findall(r"([\d.]+) %", text)][: len(places)]
        assert percents == pytest.approx((100 * average.shares[1, token - 1][there]).tolist(), abs=0.8)
        assert [int(x) for x in re.findall(r"\((\d+) back\)", text)] == [token - 1 - p for p in places if p < token - 1]
    view.focus("#text")
    view.keyboard.press("Home")
    assert view.inner_text("#held") == "" and said == []


def test_page_is_used_by_keyboard(opened):
    view, said = opened()
    view.focus("#text")
    view.keyboard.press("Home")
    assert view.inner_text("#said") == "Nothing was read before the first token."
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowRight")
    assert view.get_attribute("#text", "aria-activedescendant") == "t2"
    assert view.get_attribute("#t2", "aria-selected") == "true" and view.locator("[aria-selected=true]").count() == 1
    view.keyboard.press("End")
    assert "ends here" in view.inner_text("#said")
    view.keyboard.press("ArrowUp")
    assert view.get_attribute("#text", "aria-activedescendant") != f"t{TIME}"
    view.hover("#t30")  # what was chosen is held
    assert view.get_attribute("#text", "aria-activedescendant") != "t30"
    button = view.locator("#map button").nth(1)
    button.focus()
    view.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true" and "head 1" in view.inner_text("#charts h3")
    assert said == []


@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_a_telephone_and_follows_its_colours(opened, dark):
    view, said = opened(width=390, dark=dark, has_touch=True)
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.tap("#t40")
    assert view.get_attribute("#t40", "aria-selected") == "true"
    back, ink = view.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    light = [sum(map(int, colour[4:-1].split(","))) for colour in (back, ink)]
    assert (light[0] < light[1]) == dark
    assert said == []


def test_page_shows_hostile_text_as_text(opened, texts):
    view, said = opened()
    assert view.title() == "a <b>model</b>: what was remembered"
    assert view.inner_text("#t0") == HOSTILE[0]
    assert view.locator("img, i, #text script").count() == 0
    assert "202e" in view.inner_text(f"#t{len(HOSTILE) + 3}")  # what would turn the text around is shown instead
    assert view.inner_text(f"#t{len(HOSTILE)}") == MIXED[0]
    for token in range(1, 12):
        view.click(f"#t{token}")
    assert view.title() == "a <b>model</b>: what was remembered" and said == []


def test_page_of_right_to_left_text_begins_on_the_right(opened):
    view, said = opened(texts=[" \N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED}"] * TIME)
    first, second = (view.locator(f"#t{n}").bounding_box() for n in (0, 1))
    assert first["x"] > second["x"] and said == []


@pytest.mark.parametrize(
    "preset", ["titans-lmm-tiny", "mom-tiny", "gam-tiny", "memory-mosaics-v1-tiny", "linear-attention-tiny"]
)
def test_page_of_other_memories_shows_what_they_declare(opened, preset):
    found = tiny_model(torch.float32, preset=preset).inspect(tokens(1, 20))
    view, said = opened(texts=["a"] * 20, found=found)
    drawn = view.locator("svg").count()
    assert drawn > 0 or not (found.shown or found.reads)
    if preset == "titans-lmm-tiny":
        assert "surprise" in view.inner_text("#other-charts") and "step size" in view.inner_text("#other-charts")
    if preset == "mom-tiny":
        assert "routing" in view.inner_text("#other-charts")
    assert said == []


@pytest.mark.slow
def test_page_of_sixteen_thousand_tokens_answers_at_once(opened):
    time = 16384
    model = tiny_model(torch.float32)
    found = model.inspect(tokens(1, time))
    view, said = opened(texts=[f" w{number}" for number in range(time)], found=found)
    assert view.locator(".tok").count() == time + 1
    view.focus("#text")
    view.keyboard.press("End")
    view.keyboard.press("ArrowLeft")
    took = view.evaluate("() => { const t = performance.now(); show(9000, true); return performance.now() - t; }")
    assert took < 1000 and view.inner_text("#word").startswith("“w9000”")
    assert said == []
