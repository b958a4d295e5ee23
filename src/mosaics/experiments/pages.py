"""A page of Markdown made of kept results alone: every claim, its verdict, the numbers that decided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mosaics.experiments.league import NAME
from mosaics.experiments.league_page import draw_league, league_page
from mosaics.experiments.points import draw_evaluation, shown_range, simple_predictors
from mosaics.experiments.records import read_record, trainings
from mosaics.experiments.report import numbers
from mosaics.experiments.reproduce import CLAIMS
from mosaics.reporting import draw, markdown, shown

_HEAD = """\
# What was measured

Made from the files in `{folder}` by `mosaics report {folder} --output {page}`; nothing here is written by hand. The \
claims are defined in `mosaics reproduce --list`; each file names the commit that it was measured with, and holds each \
trial, curve, seed and single answer. Intervals hold 95 %: over seeds and examples drawn anew, and for shares at least \
Newcombe's. A claim *can't be told* where a premise is not met or an interval has both signs; *left out* is what is \
compared with what has not learnt the task at the training length. *Found* are both sides, the right one with margin. \
Seconds are those of machines that did other things beside.
"""


def records_in(folder: Path) -> list[dict[str, Any]]:
    """All kept claims of a folder, in the order of the claims.

    Raises:
        ValueError: a file holds no results.
    """
    found = {record["name"]: record for record in map(read_record, _files(folder)) if "verdict" in record}
    names = [*(name for name in CLAIMS if name in found), *(name for name in found if name not in CLAIMS)]
    return [found[name] for name in names]


def league_in(folder: Path, name: str = NAME) -> dict[str, Any] | None:
    """The kept league of a folder, or the speeds of its systems, if there is one; raises as `records_in`."""
    return next((record for record in map(read_record, _files(folder)) if record["name"] == name), None)


def _files(folder: Path) -> list[Path]:
    if not (found := sorted(folder.glob("*.json"))):
        raise ValueError(f"there are no results in {folder}; make some with mosaics reproduce NAME --results {folder}")
    return found


def write_results_page(folder: Path, page: Path) -> list[Path]:
    """Write the page of a folder's results, with a plot for each evaluation in `images` beside it, and if there is a
    league the page of that, `league.md`, beside it.

    Returns:
        The pages.

    Raises:
        ValueError: there are no results.
    """
    written, records = [], records_in(folder)
    page.parent.mkdir(parents=True, exist_ok=True)
    if records:
        page.write_text(results_page(records, folder, page), encoding="utf-8")
        written.append(page)
    for record in records:
        (page.parent / "images").mkdir(exist_ok=True)
        for plot in _learning(record):
            draw(plot, page.parent / _image(record, plot["title"], plot["x"]))
        for setting, evaluation, rows in filter(lambda asked: _is_drawn(asked[1]), _asked(record)):
            draw_evaluation(evaluation, rows, record, page.parent / _image(record, setting, evaluation["name"]))
    if league := league_in(folder):
        other = page.with_name(f"{NAME}.md")
        other.write_text(league_page(league, folder, page, league_in(folder, "systems")), encoding="utf-8")
        draw_league(league, other)
        written.append(other)
    return written


def results_page(records: Sequence[dict[str, Any]], folder: Path, page: Path) -> str:
    """The page's text."""
    parts = [_HEAD.format(folder=folder.name, page=page.as_posix()), "## Verdicts\n", _verdicts(records)]
    for record in records:
        parts += _record(record)
    return "\n".join(parts)


def _verdicts(records: Sequence[dict[str, Any]]) -> str:
    known = {record["name"]: record for record in records}
    rows = []
    for name, claim in CLAIMS.items():
        if record := known.get(name):
            verdict = record["verdict"]
            seeds = ", ".join(map(str, record["study"]["seeds"]))
            rows.append([f"`{name}`", claim.paper, f"**{verdict['verdict']}**", "; ".join(verdict["why"]), seeds])
        else:
            rows.append([f"`{name}`", claim.paper, "not run", "", ""])
    return markdown(["", "claim", "verdict", "since not", "seeds"], rows)


def _record(record: dict[str, Any]) -> Iterable[str]:
    verdict, machine, study = record["verdict"], record["machine"], record["study"]
    yield f"## `{record['name']}`: {verdict['verdict']}\n"
    if claim := CLAIMS.get(record["name"]):
        yield f"{claim.paper} Here: {claim.here}\n"
    words = f"{machine.get('processor', machine['device'])}, torch {machine['torch']}"
    yield f"Commit {record['commit']}, {words}, seeds {', '.join(map(str, study['seeds']))}:\n"
    yield f"```\n{record['command']}\n```\n"
    if claim and record.get("definition", claim.definition) != claim.definition:
        yield "**What is asked, or what must hold, was changed since; this is the verdict of before.**\n"
    if checks := verdict["checks"]:
        yield markdown(["", "must hold", "found", "by", "95 % interval", ""], map(_check, checks))
    if models := [model for model in record["models"] if "trial" in model]:
        yield _models(study, models)
        yield from _to_equal_loss(study, models)
        yield from _to_enough(study, models)
        for plot in _learning(record):
            picture = _image(record, plot["title"], plot["x"]).as_posix()
            yield f"![{plot['title']}, by {plot['x']}]({picture})\n"
    for setting, evaluation, rows in _asked(record):
        name = evaluation["name"] if evaluation["name"] == setting else f"{setting}: {evaluation['name']}"
        yield f"**{name}** – {evaluation['title'] or 'answers'}; mean over seeds (95 % interval):\n"
        yield _answers(record, rows, simple_predictors(record, setting, evaluation["name"]))
        if _is_drawn(evaluation):
            yield f"![{name}]({_image(record, setting, evaluation['name']).as_posix()})\n"


def _check(check: dict[str, Any]) -> list[Any]:
    kind = "" if check["kind"] == "claim" else check["kind"]
    if check["left"] is None:
        return [kind, check["says"], "not measured", "", "", check["verdict"]]
    found = f"{shown(check['left'])} {'≥' if check['relation'] == '>=' else '≤'} {shown(check['right'])}"
    interval = f"{shown(check['low'])} … {shown(check['high'])}"
    return [kind, check["says"], found, check["estimate"], interval, check["verdict"]]


def _models(study: dict[str, Any], models: Sequence[dict[str, Any]]) -> str:
    """A line for each arrangement and setting: what its best trial was, and how long its trainings took."""
    known = [one for setting in study["settings"] for one in (setting, setting.get("start")) if one]
    probes = {setting["name"]: setting.get("probe") or {} for setting in known}
    rows = []
    for setting, arrangement, found, kept in trainings(models):
        variant = {"learning rate": kept[0]["learning_rate"]} | kept[0].get("variant", {})
        best = ", ".join(f"{_short(key)} {shown(value)}" for key, value in variant.items() if key != _RATE)
        learnt = ", ".join(str(m["enough_at"] or "never") for m in kept) if probes[setting].get("enough") else ""
        steps = shown_range([m["steps"] for m in kept])
        row = [setting, arrangement, kept[0]["parameters"], sum(m["trial"] for m in found), best, learnt, steps]
        rows.append([*row, f"{sum(m['seconds'] for m in found) / 3600:.2f}"])
    columns = ["setting", "arrangement", "parameters", "trials", "best", "enough learnt at step", "steps", "hours"]
    return markdown(columns, rows)


_RATE = "training.learning_rate"


def _to_equal_loss(study: dict[str, Any], models: Sequence[dict[str, Any]]) -> Iterable[str]:
    """On text, the steps and seconds until the first arrangement and each other have the loss at which the worse of
    both ended."""
    first, *others = [arrangement["label"] for arrangement in study["arrangements"]]
    for setting in study["settings"]:
        if setting["data"]["corpus"] is None:
            continue
        mine = [m for m in models if m["setting"] == setting["name"] and not m["trial"] and m["probes"]]
        probes = {(m["arrangement"], m["seed"]): m["probes"] for m in mine}
        rows = []
        for other in others:
            both = [
                (probes[first, seed], probes[other, seed])
                for label, seed in probes
                if label == other and (first, seed) in probes
            ]
            losses = [max(one[-1][2], two[-1][2]) for one, two in both]
            ours, theirs = ([reached(p[i], y) for p, y in zip(both, losses, strict=True)] for i in (0, 1))
            numbers = [losses, *([at[0] for at in side] for side in (ours, theirs))]
            numbers += [[one[i] / two[i] for one, two in zip(ours, theirs, strict=True)] for i in (0, 1)]
            if both:
                rows.append([other, *map(shown_range, numbers)])
        if rows:
            yield f"To equal loss on held-out rows of `{setting['name']}`, that at which the worse of both ended:\n"
            columns = ["other", "loss", f"steps, {first}", "steps, other", "share of the steps", "of the seconds"]
            yield markdown(columns, rows)


def _to_enough(study: dict[str, Any], models: Sequence[dict[str, Any]]) -> Iterable[str]:
    """In a world, the steps until enough was learnt, and how many times those of the first arrangement each other took:
    from what seeds and the steps between two looks leave open."""
    first, *others = [arrangement["label"] for arrangement in study["arrangements"]]
    for setting in study["settings"]:
        probe = setting.get("probe") or {}
        if setting["data"]["corpus"] is not None or not probe.get("enough"):
            continue
        mine = [m for m in models if m["setting"] == setting["name"] and not m["trial"]]
        at = {(m["arrangement"], m["seed"]): m for m in mine}
        rows = []
        for other in others:
            both = [(at[first, seed], m) for (label, seed), m in at.items() if label == other and (first, seed) in at]
            if not both or any(one["enough_at"] is None for one, _ in both):
                continue
            never = any(two["enough_at"] is None for _, two in both)
            steps = [(one["enough_at"], two["enough_at"] or two["steps"]) for one, two in both]
            seconds = [tuple(map(_seconds, pair, ends)) for pair, ends in zip(both, steps, strict=True)]
            every = probe["every"]
            low = min((theirs - every * (not never)) / ours for ours, theirs in steps)
            high = max(theirs / max(1, ours - every) for ours, theirs in steps)
            middle = sum(theirs for _, theirs in steps) / sum(ours for ours, _ in steps)
            factor = f"at least {shown(low)}" if never else f"{shown(middle)} ({shown(low)} … {shown(high)})"
            times = shown(sum(theirs for _, theirs in seconds) / sum(ours for ours, _ in seconds))
            took = [", ".join(f"{end:,}" for end in side) for side in zip(*steps, strict=True)]
            rows.append([other, took[0], f"never in {took[1]}" if never else took[1], factor])
            rows[-1].append(f"at least {times}" if never else times)
        if rows:
            yield (
                f"To {probe['enough']:g} % of held-out questions of `{setting['name']}`, looked at every "
                f"{probe['every']} steps:\n"
            )
            yield markdown(["other", f"steps, {first}", "steps, other", "times the steps", "times the seconds"], rows)


def _seconds(model: dict[str, Any], step: int) -> float:
    return model["seconds"] * step / model["steps"]


def _learning(record: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Curves of what was learnt, against steps and seconds, in the settings that the claim names; those of a seed are
    drawn at the pace of all."""
    shown_ones = CLAIMS[record["name"]].curves if record["name"] in CLAIMS else ()
    for setting in record["study"]["settings"] if shown_ones else ():
        if setting["name"] not in shown_ones:
            continue
        mine = [m for m in record["models"] if m["setting"] == setting["name"] and not m["trial"] and m["probes"]]
        text = setting["data"]["corpus"] is not None
        plot = {"title": setting["name"], "y": "nats per token, held out" if text else "held-out questions right (%)"}
        for x in ("optimisation step", "seconds"):
            curves = []
            for m in mine:
                own = [one for one in mine if one["arrangement"] == m["arrangement"]]
                pace = sum(one["seconds"] for one in own) / sum(one["steps"] for one in own) if x == "seconds" else 1
                xs, ys = [pace * step for step, *_ in m["probes"]], [value for *_, value in m["probes"]]
                curves.append((m["arrangement"], m["seed"], xs, ys))
            yield plot | {"x": x, "log_x": True, "curves": curves}


def reached(probes: Sequence[Sequence[float]], loss: float) -> tuple[float, float]:
    """Steps and seconds until probes (step, seconds, loss) first are down to a loss, straight between them."""
    for before, after in zip(probes, probes[1:], strict=False):
        if before[2] > loss >= after[2]:
            share = (before[2] - loss) / (before[2] - after[2])
            return tuple(a + share * (b - a) for a, b in zip(before[:2], after[:2], strict=True))
    return tuple(probes[0][:2])


def _short(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")


def _asked(record: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Setting, evaluation and rows of everything that was asked."""
    for setting in {s.get("series") or s["name"]: s for s in record["study"]["settings"]}.values():
        shown_as = setting.get("series") or setting["name"]
        for evaluation in setting.get("evaluations", ()):  # an experiment of its own has none
            wanted = (shown_as, evaluation["name"])
            if rows := [row for row in record["rows"] if (row["setting"], row["evaluation"]) == wanted]:
                yield shown_as, evaluation, rows


def _is_drawn(evaluation: dict[str, Any]) -> bool:
    """Not where the same models are asked the same again with something changed."""
    return not any(evaluation.get(key) for key in ("changes", "without", "without_longest", "stretch"))


def _answers(record: dict[str, Any], rows: Sequence[dict[str, Any]], simple: dict[str, dict[float, float]]) -> str:
    xs = sorted({row["x"] for row in rows})
    lines = [[label, *(str(points.get(x, "")) for x in xs)] for label, points in numbers(record, rows).items()]
    lines += [[f"*{name}*", *(points.get(x, "") for x in xs)] for name, points in simple.items()]
    return markdown(["", *(f"{x:g}" for x in xs)], lines)


def _image(record: dict[str, Any], setting: str, name: str) -> Path:
    words = "-".join((record["name"], setting, name)).lower()
    name = "".join(c if c.isalnum() else "-" for c in words)
    return Path("images") / f"results-{'-'.join(filter(None, name.split('-')))}.png"
