"""What was found at the points of an evaluation, in order, in words and in a plot: what reports and pages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mosaics.experiments.records import by_predictor
from mosaics.reporting import draw, shown

_RIGHT = "right answers (%)"
_AXES = {
    "perplexity": ("context, as a multiple of the training length", "nats per token"),
    "attention": ("distance (tokens)", "weight (even spread = 1)"),
    "regbench": ("automata learnt from", "likeliest letter is possible (%)"),
    "regbench-variation": ("automata learnt from", "total variation"),
}

_LEVEL = ("chance", "bigram", "trigram")  # simple predictors that are drawn, alike at all points
_CURVES = ("naive bayes", "nearest 5", "kernel 4x16", "kernel 4x32")


def grid(rows: Iterable[dict[str, Any]]) -> dict[str, dict[float, dict[int, float]]]:
    """y by arrangement, x and seed."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for row in rows:
        found.setdefault(row["arrangement"], {}).setdefault(row["x"], {})[row["seed"]] = row["y"]
    return found


def simple_predictors(record: dict[str, Any], setting: str, evaluation: str) -> dict[str, dict[float, float]]:
    """What simple predictors reach, by name and point."""
    found: dict[str, dict[float, float]] = {}
    for row in record.get("baselines", []):
        if (row["setting"], row["evaluation"]) == (setting, evaluation):
            for name, y in by_predictor(row).items():
                if y is not None:
                    found.setdefault(name.replace("_", " "), {})[row["x"]] = y
    return found


def shown_range(values: Sequence[float]) -> str:
    """The mean, with the lowest and the highest where there are several; of trainings that diverged, nothing."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    middle = shown(sum(values) / len(values))
    return middle if min(values) == max(values) else f"{middle} ({shown(min(values))} … {shown(max(values))})"


def draw_evaluation(
    evaluation: dict[str, Any], rows: Sequence[dict[str, Any]], results: dict[str, Any], png: Path
) -> str:
    """Draw the answers to one evaluation, all arrangements and seeds; see `draw`."""
    return draw(plot_of(evaluation, rows, results), png)


def plot_of(evaluation: dict[str, Any], rows: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """The answers to one evaluation as `draw` takes them."""
    suite, options = evaluation["suite"], evaluation["options"]
    x, y = _AXES.get(suite, ("shots" if options.get("shots") else "tokens of context and question", _RIGHT))
    curves = []
    for arrangement, points in grid(rows).items():
        for seed in sorted({seed for found in points.values() for seed in found}):
            line = [(at, found[seed]) for at, found in points.items() if seed in found]
            curves.append((arrangement, seed, *zip(*line, strict=True)))
    known = simple_predictors(results, rows[0]["setting"], evaluation["name"]) if rows else {}
    lines = [(name, next(iter(known[name].values()))) for name in _LEVEL if name in known]
    title = evaluation["title"] or evaluation["name"]
    if evaluation["without"]:
        title += f" (without {', '.join(evaluation['without'])})"
    beside = [(label, *zip(*points, strict=True)) for label, points in evaluation["beside"].items()]
    beside += [(name, *zip(*sorted(known[name].items()), strict=True)) for name in _CURVES if name in known]
    more = {"log_x": suite != "attention", "curves": curves, "beside": beside, "lines": lines}
    return {"title": title, "x": x, "y": y} | more
