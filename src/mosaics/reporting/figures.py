"""Drawings: SVG in the page's own colours with text that can be selected, and PNG files."""

from __future__ import annotations

import html
import io
import re
import textwrap
from pathlib import Path
from typing import Any

COLOURS = ("#3b82d0", "#d9692a", "#2a9d78", "#b56bb5", "#b08a1e", "#7a7f87")
MARKERS = "os^Dv*"
_ROUNDS = ("-", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_DASHES = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)), (0, (8, 3)))
_LONGEST = 64  # characters of a line of a legend
_GREY = "#888888"
_INK = "#010203"  # replaced by the page's own colour


def draw(plot: dict[str, Any], png: Path) -> str:
    """Draw lines.

    Args:
        plot: `title`, `x`, `y` (labels), `log_x`; `curves` (label, seed, x, y): the mean over seeds as a line and how
            far they go, or the intervals `bands` (label -> (x, low, high)); `beside` (label, x, y) as broken lines,
            grey where `label` is no curve's; `marks` (label, x) as upright ones, `lines` (label, y) as level ones;
            `top` of the drawing, if not that of what is drawn.
        png: where a picture goes; its name makes those in the drawing unique.

    Returns:
        The drawing as HTML.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(curve[0] for curve in plot["curves"]))
    bands = plot.get("bands", {})
    for number, label in enumerate(labels):
        colour, marker = colour_of(number), MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        points: dict[float, list[float]] = {}
        for _, _, xs, ys in (curve for curve in plot["curves"] if curve[0] == label):
            for x, y in zip(xs, ys, strict=True):
                points.setdefault(x, []).append(y)
        xs = sorted(points)
        means = [sum(points[x]) / len(points[x]) for x in xs]
        marked = {"marker": marker, "markersize": 5} if len(xs) <= 20 else {}
        dash = _ROUNDS[number // len(COLOURS) % len(_ROUNDS)]  # where colours come again
        axes.plot(xs, means, color=colour, linestyle=dash, label=label, zorder=4 - number / len(labels), **marked)
        spread = bands.get(label) or [(x, min(points[x]), max(points[x])) for x in xs]
        axes.fill_between(*zip(*spread, strict=True), color=colour, alpha=0.18, lw=0)
    greys = 0
    for label, xs, ys in plot.get("beside", []):
        same = label.split(",")[0]  # "transformer, published" has the colour of "transformer"
        if same in labels:
            colour, dash = colour_of(labels.index(same)), "--"
        else:
            colour, dash, greys = _GREY, _DASHES[greys % len(_DASHES)], greys + 1
        axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.3, label=label)
    for number, (label, x) in enumerate(plot.get("marks", [])):
        axes.axvline(x, color=_GREY, linestyle=_DASHES[1 - number % 2], linewidth=1, label=label)
    for number, (label, y) in enumerate(plot.get("lines", []), greys):
        axes.axhline(y, color=_GREY, linestyle=_DASHES[number % len(_DASHES)], linewidth=1, label=label)
    if plot["log_x"] and labels:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for curve in [*plot["curves"], *plot.get("beside", [])] for x in curve[-2]})
        if len(ticks) <= 12:
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        else:
            axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    if "%" in plot["y"]:
        axes.set_ylim(-3, 103)
    if "top" in plot:
        axes.set_ylim(top=plot["top"])
    axes.set_title(plot["title"], loc="left", fontsize=12)
    axes.set_xlabel(plot["x"], fontsize=11)
    axes.set_ylabel(plot["y"], fontsize=11)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)
    handles, named = axes.get_legend_handles_labels()
    if named:
        named = [textwrap.fill(label, _LONGEST) for label in named]
        columns = 1 if max(map(len, named)) > _LONGEST // 2 else 2
        lines = sum(label.count("\n") + 1 for label in named) if columns == 1 else 0
        figure.set_figheight(figure.get_figheight() + 0.18 * max(0, lines - 3))
        figure.legend(handles, named, loc="outside lower left", ncols=columns, fontsize=10.5, frameon=False)
    return embedded(figure, plot["title"], png)


def colour_of(number: int) -> str:
    """The colour of the arrangement of that number."""
    return COLOURS[number % len(COLOURS)]


def embedded(figure, title: str, png: Path) -> str:
    """A matplotlib figure as PNG in a file, and as SVG in the page's own colours."""
    from matplotlib import rc_context

    figure.savefig(png, dpi=150)
    figure.set_layout_engine("none")  # all has its place
    for axes in figure.axes:
        for text in (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(_INK)
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_tick_params(color=_INK, labelcolor=_INK)
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        for text in legend.get_texts() if legend else ():
            text.set_color(_INK)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": png.stem}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    # Several drawings share the page: their names must not.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{png.stem}-", svg)
    # matplotlib writes a paragraph of metadata into each.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return f'<figure role="img" aria-label="{html.escape(title)}">{svg}</figure>'
