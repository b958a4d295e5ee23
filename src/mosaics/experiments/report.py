"""The report of a study: results.json, plots as PNG, and one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mosaics.experiments.trainings import write_json

COLOURS = ("#3b82d0", "#d9692a", "#2a9d78", "#b56bb5", "#b08a1e", "#7a7f87")
MARKERS = "os^Dv*"
_INK = "#010203"  # replaced by the page's own colour
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfc; --line: #d5d7da; --faint: #5d6168; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e8ea; --paper: #16181b; --line: #3a3e44; --faint: #a2a7ae; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; color: var(--ink); } figure svg { width: 100%; height: auto; }
figcaption, footer, .faint { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; }
summary { cursor: pointer; } strong.holds { color: #2a9d78; } strong.fails { color: #d9692a; }
strong.open { color: #7a7f87; }
"""


def write_report(results: dict[str, Any], folder: Path, head: str = "") -> Path:
    """Write results.json, a PNG for each plot, and report.html.

    Args:
        results: as `run_study` gives them.
        folder: where to.
        head: HTML that comes first, under the title.

    Returns:
        The path of report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    study = results["study"]
    parts = [f"<h1>{_text(study['title'])}</h1>", head, _summary(results)]
    series: dict[str, list[dict[str, Any]]] = {}
    for setting in study["settings"]:
        series.setdefault(setting["series"] or setting["name"], []).append(setting)
    for name, settings in series.items():
        parts.append(f"<h2>{_text(name)}</h2>{''.join(map(_setting_line, settings))}")
        for evaluation in {e["name"]: e for setting in settings for e in setting["evaluations"]}.values():
            rows = [row for row in results["rows"] if (row["setting"], row["evaluation"]) == (name, evaluation["name"])]
            png = folder / f"{_slug(name)}-{_slug(evaluation['name'])}.png"
            parts.append(draw_evaluation(evaluation, rows, results, png))
            parts.append(_baselines(name, evaluation["name"], results))
            parts.append(_details("figures", table(*_grid(rows, evaluation["beside"]))))
        for setting in settings:
            models = [m for m in results["models"] if m["setting"] == setting["name"] and not m["trial"]]
            curves = {
                "title": f"Training loss, {setting['name']}",
                "x": "optimisation step",
                "y": "nats per counted token",
                "log_x": False,
                "curves": [(m["arrangement"], m["seed"], *zip(*m["curve"], strict=True)) for m in models if m["curve"]],
            }
            parts.append(_details("training", draw(curves, folder / f"{_slug(setting['name'])}-training.png")))
    parts.append("<h2>Models</h2>" + _models(results))
    parts.append(footer(study["seeds"], results["machine"]))
    return write_page(folder / "report.html", study["title"], parts)


def write_page(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Write an HTML page that needs nothing else, and return its path."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def footer(seeds: Iterable[int], machine: dict[str, Any]) -> str:
    """Where the figures come from."""
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f"<footer>Seeds {', '.join(map(str, seeds))}. {_text(where)}.</footer>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shown(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 10 else f"{value:,.1f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(shown(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers as `shown` gives them."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(shown(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def simple_predictors(record: dict[str, Any], setting: str, evaluation: str) -> dict[str, dict[float, float]]:
    """What simple predictors reach, by name and point."""
    found: dict[str, dict[float, float]] = {}
    for row in record.get("baselines", []):
        if (row["setting"], row["evaluation"]) == (setting, evaluation):
            for name, y in row.items():
                if name not in ("setting", "evaluation", "x") and y is not None:
                    found.setdefault(name.replace("_", " "), {})[row["x"]] = y
    return found


def _details(title: str, inside: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{inside}</details>"


def _setting_line(setting: dict[str, Any]) -> str:
    training, data = setting["training"], setting["data"]
    what = data["corpus"] or (
        f"world {data['world']}" if data["world"] else f"sequences of {data['automata']} automata"
    )
    tried = (
        f"{key.partition('.')[2].replace('_', ' ')} {', '.join('as published' if v is None else str(v) for v in tried)}"
        for key, tried in setting["tuning"].items()
    )
    tuned = f"; tried for each arrangement: {'; '.join(tried)}" if setting["tuning"] else ""
    return (
        f'<p class="faint">Trained on {_text(what)}: {training["steps"]} steps of {training["batch_size"]} × '
        f"{training['context_length']} tokens{tuned}.</p>"
    )


def _baselines(setting: str, evaluation: str, results: dict[str, Any]) -> str:
    """What needs no memory for what goes with what, or only a simple look-up in the prompt."""
    found = [b for b in results["baselines"] if (b["setting"], b["evaluation"]) == (setting, evaluation)]
    if not found:
        return ""
    names = [key for key in found[0] if key not in ("setting", "evaluation", "x")]
    rows = [[name.replace("_", " "), *(row.get(name) for row in found)] for name in names]
    return _details("simple predictors (%)", table(["at", *(f"{row['x']:g}" for row in found)], rows))


def grid(rows: Iterable[dict[str, Any]]) -> dict[str, dict[float, dict[int, float]]]:
    """y by arrangement, x and seed."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for row in rows:
        found.setdefault(row["arrangement"], {}).setdefault(row["x"], {})[row["seed"]] = row["y"]
    return found


def _grid(rows: Sequence[dict[str, Any]], beside: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    seeds = sorted({row["seed"] for row in rows})
    table = [
        [arrangement, f"{x:g}", sum(found.values()) / len(found), *(found.get(seed) for seed in seeds)]
        for arrangement, points in grid(rows).items()
        for x, found in points.items()
    ]
    table += [[label, f"{x:g}", y, *(None for _ in seeds)] for label, points in beside.items() for x, y in points]
    return ["arrangement", "at", "mean", *(f"seed {seed}" for seed in seeds)], table


def _summary(results: dict[str, Any]) -> str:
    """First and last point of every evaluation, worst and best seed."""
    lines = []
    names = list(dict.fromkeys((row["setting"], row["evaluation"]) for row in results["rows"]))
    for setting, evaluation in names:
        here = [row for row in results["rows"] if (row["setting"], row["evaluation"]) == (setting, evaluation)]
        for arrangement, points in grid(here).items():
            first, last = min(points), max(points)
            name = evaluation if setting == evaluation else f"{setting}: {evaluation}"
            ends = (f"{shown_range(list(points[x].values()))} at {x:g}" for x in (first, last))
            lines.append([name, arrangement, *ends])
    if not lines:
        return ""
    note = '<p class="faint">Mean over seeds, with the lowest and the highest.</p>'
    return "<h2>At a glance</h2>" + table(["question", "arrangement", "first", "last"], lines) + note


def shown_range(values: Sequence[float]) -> str:
    """The mean, with the lowest and the highest where there are several; of trainings that diverged, nothing."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    middle = shown(sum(values) / len(values))
    return middle if min(values) == max(values) else f"{middle} ({shown(min(values))} … {shown(max(values))})"


def _models(results: dict[str, Any]) -> str:
    columns = [
        "setting",
        "arrangement",
        "seed",
        "learning rate",
        "parameters",
        "FLOPs a token",
        "held-out loss",
        "minutes",
        "",
    ]
    rows = [
        [
            m["setting"],
            m["arrangement"],
            m["seed"],
            f"{m['learning_rate']:g}",
            m["parameters"],
            f"{m['flops_per_token']:.3g}",
            m["held_out_loss"],
            m["seconds"] / 60,
            "diverged" if m["held_out_loss"] is None else "tuning trial" if m["trial"] else "",
        ]
        for m in results["models"]
    ]
    return table(columns, rows)


# Plots

_RIGHT = "right answers (%)"
_AXES = {
    "perplexity": ("context, as a multiple of the training length", "nats per token"),
    "attention": ("distance (tokens)", "weight (even spread = 1)"),
    "regbench": ("automata learnt from", "likeliest letter is possible (%)"),
    "regbench-variation": ("automata learnt from", "total variation"),
}


def draw_evaluation(
    evaluation: dict[str, Any], rows: Sequence[dict[str, Any]], results: dict[str, Any], png: Path
) -> str:
    """Draw the answers to one evaluation, all arrangements and seeds; see `draw`."""
    return draw(_plot_of(evaluation, rows, results), png)


def _plot_of(evaluation: dict[str, Any], rows: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    suite, options = evaluation["suite"], evaluation["options"]
    x, y = _AXES.get(suite, ("shots" if options.get("shots") else "tokens of context and question", _RIGHT))
    curves = []
    for arrangement, points in grid(rows).items():
        for seed in sorted({seed for found in points.values() for seed in found}):
            line = [(at, found[seed]) for at, found in points.items() if seed in found]
            curves.append((arrangement, seed, *zip(*line, strict=True)))
    known = [
        b
        for b in results["baselines"]
        if b["evaluation"] == evaluation["name"] and rows and b["setting"] == rows[0]["setting"] and "chance" in b
    ][:1]
    lines = [(name, b[name]) for b in known for name in ("chance", "bigram", "trigram") if name in b]
    title = evaluation["title"] or evaluation["name"]
    if evaluation["without"]:
        title += f" (without {', '.join(evaluation['without'])})"
    beside = [(label, *zip(*points, strict=True)) for label, points in evaluation["beside"].items()]
    more = {"log_x": suite != "attention", "curves": curves, "beside": beside, "lines": lines}
    return {"title": title, "x": x, "y": y} | more


def draw(plot: dict[str, Any], png: Path) -> str:
    """Draws `curves` (label, seed, x, y): the mean over seeds as a line, and how far they go; `beside` (label, x, y) as
    broken lines, and `marks` (label, x) as upright ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(curve[0] for curve in plot["curves"]))
    for number, label in enumerate(labels):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        points: dict[float, list[float]] = {}
        for _, _, xs, ys in (curve for curve in plot["curves"] if curve[0] == label):
            for x, y in zip(xs, ys, strict=True):
                points.setdefault(x, []).append(y)
        xs = sorted(points)
        few = len(xs) <= 20
        axes.plot(
            xs,
            [sum(points[x]) / len(points[x]) for x in xs],
            color=colour,
            marker=marker if few else None,
            markersize=4,
            label=label,
        )
        axes.fill_between(
            xs, [min(points[x]) for x in xs], [max(points[x]) for x in xs], color=colour, alpha=0.18, lw=0
        )
    for number, (label, xs, ys) in enumerate(plot.get("beside", []), len(labels)):
        same = label.split(",")[0]  # "transformer, published" has the colour of "transformer"
        number = labels.index(same) if same in labels else number
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=3, linestyle="--", linewidth=1, label=label)
    for number, (label, x) in enumerate(plot.get("marks", [])):
        axes.axvline(x, color="#888888", linestyle=(":", "--")[number % 2], linewidth=1, label=label)
    for number, (label, y) in enumerate(plot.get("lines", [])):
        axes.axhline(y, color="#888888", linestyle=(":", "--")[number % 2], linewidth=1, label=label)
    if plot["log_x"] and labels:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for curve in [*plot["curves"], *plot.get("beside", [])] for x in curve[-2]})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    if "%" in plot["y"]:
        axes.set_ylim(-3, 103)
    axes.set(title=plot["title"], xlabel=plot["x"], ylabel=plot["y"])
    axes.grid(alpha=0.25)
    if labels:
        axes.legend(fontsize="small", framealpha=0)
    return embedded(figure, plot["title"], png)


def embedded(figure, title: str, png: Path) -> str:
    """A matplotlib figure as PNG in a file, and as SVG in the page's own colours."""
    from matplotlib import rc_context

    figure.savefig(png, dpi=150)
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_color(_INK)
        for text in axes.get_legend().get_texts() if axes.get_legend() else ():
            text.set_color(_INK)
        for line in (*axes.spines.values(), axes.xaxis, axes.yaxis):
            line.set_edgecolor(_INK) if hasattr(line, "set_edgecolor") else line.set_tick_params(
                color=_INK, labelcolor=_INK
            )
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": png.stem}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    # Several drawings share the page: their names must not.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{png.stem}-", svg)
    return f'<figure role="img" aria-label="{_text(title)}">{svg}</figure>'
