"""The page of a run: what it came to in words, then loss, learning rate, gradients, speed, what the memories do,
samples and the lengths of the documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy import interp

from mosaics.reporting import COLOURS, Lead, Number, Section, Table, draw, embedded, shown, write_page
from mosaics.reporting.page import slug
from mosaics.training.metrics import is_number, read_metrics
from mosaics.training.recipe import Recipe, data_of, open_recipe

_BITS, _NATS = "validation_bits_per_byte", "validation_nats_per_token"
_NUMBERS = {
    "pairs read": "how many pairs a read spreads over (the exponential of the entropy of its weights)",
    "bandwidth": "how sharply keys are told apart: the weight of a pair is exp(bandwidth × key · query)",
    "log gate": "logarithm of the weight with which a token enters the keys",
    "decay": "what is left of the keys' average after a token; near 1 they reach far back",
    "pairs": "pairs that may be read",
}


def write_run_page(run: Path, output: Path) -> Path:
    """Write the page of a run, finished or not, with its tables as CSV and Markdown beside it.

    Args:
        run: the run's folder.
        output: the page, an .html file; plots go beside it as PNG.

    Returns:
        `output`.

    Raises:
        ValueError: the folder holds no run, or one that has not logged anything yet.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is no run (it has no recipe.yaml); name the folder of mosaics train --run")
    recipe, lines = open_recipe(run), read_metrics(run / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run} has logged nothing yet; wait for its first validation")
    output.parent.mkdir(parents=True, exist_ok=True)
    steps = [line for line in lines if is_number(line.get("loss")) and is_number(line.get("tokens"))]
    validated = [line for line in lines if is_number(line.get(_BITS)) and is_number(line.get(_NATS))]
    minutes = _minutes(steps)
    sections = [
        _losses(steps, validated, minutes, recipe, output),
        _steps(steps, recipe, output),
        _memories(validated, recipe, output),
        _samples(validated),
        _lengths(run, recipe, output),
        Section(
            "Recipe",
            "Every key with its value, as the run's recipe.yaml has it.",
            more=[Section("recipe.yaml", text=[recipe.to_yaml()])],
        ),
    ]
    leads = _leads(run, recipe, lines, steps, validated, minutes)
    return write_page(output, f"The run {run.resolve().name}", leads, [section for section in sections if section])


def _minutes(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Minutes of training up to each logged step, without validations and checkpoints."""
    found, seconds, before = [], 0.0, 0
    for line in steps:
        speed = line.get("tokens_per_second")
        if is_number(speed) and speed > 0:
            seconds += (line["tokens"] - before) / speed
        before = line["tokens"]
        found.append(seconds / 60)
    return found


def _minutes_at(wanted: Sequence[int], steps: Sequence[dict[str, Any]], minutes: Sequence[float]) -> list[float]:
    """Minutes of training up to some steps, which need not have been logged."""
    return interp(wanted, [0, *(line["step"] for line in steps)], [0.0, *minutes]).tolist()


def _leads(
    run: Path,
    recipe: Recipe,
    lines: Sequence[dict[str, Any]],
    steps: Sequence[dict[str, Any]],
    validated: Sequence[dict[str, Any]],
    minutes: Sequence[float],
) -> list[Lead]:
    last, leads = recipe.training.last_step, []
    done = lines[-1]["step"]
    what = f"{done:,} of {last:,} steps" + ("" if done < last else ", which is all")
    if steps:
        speed = steps[-1]["tokens"] / (60 * minutes[-1]) if minutes[-1] else 0
        what += f"; {steps[-1]['tokens']:,} tokens in {minutes[-1]:.1f} minutes, {speed:,.0f} tokens a second"
    leads.append(Lead(f"{what}.", "good" if done >= last else "open"))
    if validated:
        first, end = validated[0], validated[-1]
        text = f"Held-out text takes {end[_BITS]:.3f} bits per byte at step {end['step']:,}"
        if end is not first:
            text += f" ({first[_BITS]:.3f} at step {first['step']:,})"
        best = min(validated, key=lambda line: line[_BITS])
        kind = "good"
        if best is not end and end[_BITS] > 1.01 * best[_BITS]:
            kind = "bad"
            text += f"; it was lower at step {best['step']:,} ({best[_BITS]:.3f}), and has risen since: the training "
            text += "text may be learnt by heart"
        elif len(validated) > 2:
            fall = 100 * (validated[-2][_BITS] - end[_BITS]) / validated[-2][_BITS]
            text += f"; over the last {end['step'] - validated[-2]['step']:,} steps it fell by {fall:.1f} %"
        leads.append(Lead(f"{text}.", kind))
    skipped = [line for line in lines if "error" in line]
    if skipped:
        leads.append(
            Lead(f"{len(skipped)} steps had a loss or gradient that was not finite: {skipped[0]['error']}.", "bad")
        )
    norms = [line["gradient_norm"] for line in steps if is_number(line.get("gradient_norm"))]
    if norms:
        share = sum(norm > recipe.training.gradient_clip for norm in norms) / len(norms)
        text = (
            f"The gradient was clipped (above {recipe.training.gradient_clip:g}) in {100 * share:.0f} % of the logged "
        )
        text += (
            f"steps; its norm is {shown(sorted(norms)[len(norms) // 2])} in the middle and {shown(max(norms))} at most."
        )
        leads.append(Lead(text))
    return leads


def _losses(
    steps: Sequence[dict[str, Any]],
    validated: Sequence[dict[str, Any]],
    minutes: Sequence[float],
    recipe: Recipe,
    output: Path,
) -> Section:
    figures, per_step = [], recipe.tokens_per_step
    if steps:
        curves = [("training", 0, [line["tokens"] / 1e6 for line in steps], [line["loss"] for line in steps])]
        if validated:
            at = [line["step"] * per_step / 1e6 for line in validated]
            curves.append(("held-out text", 0, at, [line[_NATS] for line in validated]))
        plot = {
            "title": "Loss by tokens",
            "x": "million tokens",
            "y": "nats per token",
            "log_x": False,
            "curves": curves,
            "top": _top([line["loss"] for line in steps]),
        }
        figures.append(draw(plot, output.parent / "loss-tokens.png"))
        curves = [("training", 0, minutes, [line["loss"] for line in steps])]
        if validated:
            timed = _minutes_at([line["step"] for line in validated], steps, minutes)
            curves.append(("held-out text", 0, timed, [line[_NATS] for line in validated]))
        plot |= {"title": "Loss by time", "x": "minutes of training", "curves": curves}
        figures.append(draw(plot, output.parent / "loss-time.png"))
    rows = [
        [str(line["step"]), line["step"] * per_step, line[_BITS], line[_NATS], line.get("validation_tokens")]
        for line in validated
    ]
    columns = ["step", "tokens trained on", "bits per byte", "nats per token", "held-out tokens"]
    note = "Held-out text, end-of-text not counted; less is better."
    return Section("Loss", figures=figures, tables=[Table("validation", columns, rows, note)] if rows else [])


def _top(losses: Sequence[float]) -> float:
    """Where a drawing of losses ends: the fall of the first steps would make all others look alike."""
    return 1.1 * max(losses[len(losses) // 12 :])


def _steps(steps: Sequence[dict[str, Any]], recipe: Recipe, output: Path) -> Section | None:
    """Learning rate, gradient norm and speed."""
    figures = []
    wanted = {
        "learning_rate": ("Learning rate", "learning rate", []),
        "gradient_norm": (
            "Gradient norm before clipping",
            "norm",
            [(f"clipped above {recipe.training.gradient_clip:g}", recipe.training.gradient_clip)],
        ),
        "tokens_per_second": ("Speed of training", "tokens a second", []),
    }
    for key, (title, y, levels) in wanted.items():
        known = [line for line in steps if is_number(line.get(key))]
        if known:
            curve = ("" if not levels else "norm", 0, [line["step"] for line in known], [line[key] for line in known])
            plot = {"title": title, "x": "step", "y": y, "log_x": False, "curves": [curve], "lines": levels}
            figures.append(draw(plot, output.parent / f"{slug(key)}.png"))
    return (
        Section("Steps", "Validations and checkpoints are not counted in the speed.", figures=figures)
        if figures
        else None
    )


def _memories(validated: Sequence[dict[str, Any]], recipe: Recipe, output: Path) -> Section | None:
    """What the memories of each layer do, over training."""
    found: dict[tuple[str, str], dict[int, list[tuple[int, dict[str, float]]]]] = {}
    for line in validated:
        for one in line.get("memories") or []:
            found.setdefault((one["memory"], one["number"]), {}).setdefault(one["layer"], []).append(
                (line["step"], one)
            )
    if not found:
        return None
    figures, rows = [], []
    for (memory, number), layers in found.items():
        curves, bands = [], {}
        for layer, points in sorted(layers.items()):
            label = f"layer {layer}"
            curves.append((label, 0, [step for step, _ in points], [one["mean"] for _, one in points]))
            bands[label] = [(step, one["mean"], one["mean"]) for step, one in points]
            first, last = points[0][1], points[-1][1]
            rows.append(
                [
                    f"{memory}, {label}",
                    number,
                    first["mean"],
                    last["mean"],
                    f"{shown(last['low'])} … {shown(last['high'])}",
                ]
            )
        plot = {
            "title": f"{memory}: {number}",
            "x": "step",
            "y": number,
            "log_x": False,
            "curves": curves,
            "bands": bands,
        }
        figures.append(draw(plot, output.parent / f"memory-{slug(memory)}-{slug(number)}.png"))
    names = list(dict.fromkeys(number for _, number in found))
    terms = [(name, _NUMBERS[name]) for name in names if name in _NUMBERS]
    columns = ["memory", "number", "at the start", "now", "now, tenth to ninetieth percentile"]
    about = "Means over heads and positions of one row of held-out text, measured with every validation."
    return Section("What the memories do", about, figures, terms, [Table("memories", columns, rows)])


def _samples(validated: Sequence[dict[str, Any]]) -> Section | None:
    """What the model wrote, as it learnt."""
    written = [line for line in validated if line.get("samples")]
    if not written:
        return None
    few = [written[i] for i in sorted({0, len(written) // 3, 2 * len(written) // 3, len(written) - 1})]
    about = "The model goes on from the beginning of the same held-out document (its first tokens are given)."
    parts = [f"step {line['step']:,}\n\n{line['samples'][0]}" for line in few]
    return Section("Samples", about, text=parts)


def _lengths(run: Path, recipe: Recipe, output: Path) -> Section | None:
    """How long the documents are that were trained on."""
    try:
        manifest = json.loads((data_of(run, recipe) / "manifest.json").read_text(encoding="utf-8"))
        counts = manifest["report"]["splits"]["train"]
        lengths, tokens = counts["lengths"], counts["length_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = [
        [f"{2**i:,} to {2 ** (i + 1) - 1:,}", n, _percent(n, lengths), _percent(t, tokens)]
        for i, (n, t) in enumerate(zip(lengths, tokens, strict=True))
        if n
    ]
    about = f"{sum(lengths):,} documents of {sum(tokens):,} tokens; a sequence of training has "
    about += f"{recipe.training.context_length:,} tokens, and longer documents are "
    about += f"{'split' if recipe.data.long_documents == 'split' else 'cut off'}."
    columns = ["tokens in a document", "documents", "of documents (%)", "of tokens (%)"]
    return Section("Lengths of documents", about, [_bars(rows, output)], tables=[Table("lengths", columns, rows)])


def _percent(count: int, counts: Sequence[int]) -> Number:
    return Number(100 * count / sum(counts), decimals=(1, 1))


def _bars(rows: Sequence[Sequence[Any]], output: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 0.5 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(
        [p - 0.2 for p in places], [row[2].value for row in rows], 0.4, color=COLOURS[0], label="of documents (%)"
    )
    axes.barh([p + 0.2 for p in places], [row[3].value for row in rows], 0.4, color=COLOURS[1], label="of tokens (%)")
    axes.set_yticks(list(places), [row[0] for row in rows], fontsize=10)
    axes.invert_yaxis()
    axes.set_title("Tokens in a document", loc="left", fontsize=12)
    figure.legend(loc="outside lower left", ncols=2, fontsize=10.5, frameon=False)
    return embedded(figure, "Tokens in a document", output.parent / "lengths.png")
