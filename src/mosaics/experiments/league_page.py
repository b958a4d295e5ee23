"""The page of a league: standings of every task, differences with their intervals, costs, and what was not run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaics.experiments.claims import Check, Term
from mosaics.experiments.evidence import difference
from mosaics.experiments.league import CLAIMED, NAME
from mosaics.experiments.points import draw_evaluation, grid, shown_range, simple_predictors
from mosaics.experiments.report import variant_text
from mosaics.experiments.study import Evaluation, Setting, Study
from mosaics.reporting import draw, markdown

_HEAD = """\
# One memory in the place of another

Made from `{folder}/league.json` and `systems.json` by `mosaics report {folder} --output {page}`; what the papers \
claim is all that is written by hand. Every \
system stands in the place of the contextual memories of the first one, with as many parameters (the feed-forward \
networks make up for what the memories differ in), the same rows in the same order, equally many tuning trials and the \
same questions. *Beside {first}*: the difference, with its 95 % interval over seeds and questions around it; **bold** \
where the interval leaves 0 out. The models are small and the budgets short: who has not learnt a task here may do so \
later.
"""


def league_page(record: dict[str, Any], folder: Path, page: Path, speeds: dict[str, Any] | None = None) -> str:
    """The page of a kept league, in Markdown; with `speeds` as `benchmarks/systems.py` measures them."""
    study = Study.model_validate(record["study"])
    labels = [arrangement.label for arrangement in study.arrangements]
    seeds = ", ".join(map(str, study.seeds))
    machine = record["machine"]
    parts = [
        _HEAD.format(folder=folder.name, page=page.as_posix(), first=labels[0]),
        f"Commit {record['commit']}, {machine.get('processor', machine['device'])}, torch {machine['torch']}, seeds "
        f"{seeds}:\n\n```\n{record['command']}\n```\n",
    ]
    if outside := [name for name in CLAIMED if name not in labels]:
        parts.append(f"Not in this league: {', '.join(outside)}.\n")
    for setting in study.settings:
        training = setting.training
        tried = ", ".join(f"{rate:g}" for rate in setting.tuning.get("training.learning_rate", ()))
        rates = f"learning rates tried for each: {tried}" if tried else f"learning rate {training['learning_rate']:g}"
        rates += " and on while the best is at the edge" if setting.beyond else ""
        rates += (
            ", and maps that start as published or with 0.02"
            if "model.initializer_range" in setting.tuning
            else ("; maps start as v2's do (v1's as its authors have them), and no other start was tried")
        )
        size = f"{training['batch_size']} × {training['context_length']} tokens"
        parts.append(f"## {setting.name}\n\nAt most {training['steps']} steps of {size}; {rates}.\n")
        models = [m for m in record["models"] if m["setting"] == setting.name]
        for evaluation in setting.evaluations:
            rows = _rows(record, setting, evaluation)
            if rows:
                parts.append(f"**{evaluation.title or evaluation.name}** {_unit(evaluation)}:\n")
                parts.append(_standings(record, setting, evaluation, rows, models, labels))
                parts.append(f"![{evaluation.name}]({image(setting, evaluation.name).as_posix()})\n")
        if _learning(setting, models):
            parts.append(f"![learning]({image(setting, 'learning').as_posix()})\n")
        missing = [label for label in labels if not any(m["arrangement"] == label for m in models)]
        if missing:
            parts.append(f"Not run: {', '.join(missing)}.\n")
    parts += ["## What they cost\n", _costs(record, labels)]
    if speeds is not None:
        parts += ["## How fast they are\n", _speeds(speeds, labels)]
    parts.append("## What their papers claim\n")
    parts.append(markdown(["system", "at its own size"], [[name, CLAIMED.get(name, "")] for name in labels]))
    return "\n".join(parts)


def draw_league(record: dict[str, Any], page: Path) -> None:
    """Draw the plots of the page beside it."""
    study = Study.model_validate(record["study"])
    for setting in study.settings:
        for evaluation in setting.evaluations:
            if rows := _rows(record, setting, evaluation):
                png = page.parent / image(setting, evaluation.name)
                png.parent.mkdir(exist_ok=True)
                draw_evaluation(evaluation.model_dump(mode="json"), rows, record, png)
        models = [m for m in record["models"] if m["setting"] == setting.name]
        if curves := _learning(setting, models):
            on_text = setting.data.corpus is not None
            y = "nats per token" if on_text else "right answers (%)"
            title = f"{'Held-out loss' if on_text else 'New questions of the training side'}, {setting.name}"
            plot = {"title": title, "x": "optimisation step", "y": y, "log_x": False, "curves": curves}
            draw(plot, page.parent / image(setting, "learning"))


def image(setting: Setting, name: str) -> Path:
    """Where the plot of an evaluation lies, from the page."""
    return Path("images") / f"{'-'.join(f'{NAME} {setting.name} {name}'.replace(',', '').split())}.png"


def _learning(setting: Setting, models: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The probes of every training: label, seed, steps, values."""
    kept = [m for m in models if not m["trial"] and m["probes"]]
    return [(m["arrangement"], m["seed"], [p[0] for p in m["probes"]], [p[2] for p in m["probes"]]) for m in kept]


def _rows(record: dict[str, Any], setting: Setting, evaluation: Evaluation) -> list[dict[str, Any]]:
    wanted = (setting.shown_as, evaluation.name)
    own = {m["arrangement"] for m in record["models"] if m["setting"] == setting.name}
    return [r for r in record["rows"] if (r["setting"], r["evaluation"]) == wanted and r["arrangement"] in own]


def _unit(evaluation: Evaluation) -> str:
    if evaluation.suite == "perplexity":
        return "(nats per token, by multiples of the training length; less is better)"
    if evaluation.suite == "regbench-variation":
        return "(total variation; less is better)"
    at = "shots" if evaluation.options.get("shots") else "automata" if evaluation.suite == "regbench" else "tokens"
    return f"(% right, by {at}; mean over seeds, lowest … highest)"


def _standings(
    record: dict[str, Any],
    setting: Setting,
    evaluation: Evaluation,
    rows: Sequence[dict[str, Any]],
    models: Sequence[dict[str, Any]],
    labels: Sequence[str],
) -> str:
    points, xs = grid(rows), sorted({row["x"] for row in rows})
    lines = []
    for label in labels:
        own = [m for m in models if m["arrangement"] == label]
        kept = [m for m in own if not m["trial"]]
        if not kept or label not in points:
            if own:
                lines.append([label, "diverged"])
            continue
        learnt = (
            ", ".join(str(m["enough_at"] or "never") for m in kept) if setting.probe and setting.probe.enough else ""
        )
        line = [label, f"{kept[0]['parameters']:,}", variant_text(kept[0]).removeprefix("learning rate "), learnt]
        line += [shown_range(list(points[label][x].values())) if x in points[label] else "" for x in xs]
        far = dict.fromkeys((0, len(xs) - 1))
        lines.append([*line, *(_beside(rows, setting, evaluation, label, labels[0], at) for at in far)])
    for name, found in simple_predictors(record, setting.shown_as, evaluation.name).items():
        lines.append([f"*{name}*", "", "", "", *(found.get(x, "") for x in xs)])
    columns = ["system", "parameters", "best rate", "learnt at step", *(f"{x:g}" for x in xs)]
    columns += [f"beside {labels[0]} at {x:g}" for x in dict.fromkeys((xs[0], xs[-1]))]
    return markdown(columns, [[*line, *[""] * (len(columns) - len(line))] for line in lines])


def _beside(
    rows: Sequence[dict[str, Any]], setting: Setting, evaluation: Evaluation, label: str, first: str, at: int
) -> str:
    if label == first:
        return ""
    left, right = (
        Term(arrangement=name, setting=setting.shown_as, evaluation=evaluation.name, at=at) for name in (label, first)
    )
    check = Check(says="", left=left, relation=">=", right=right)
    found = difference(check, list(rows))
    if found is None:
        return ""
    text = f"{found['estimate']:+.3g} ({found['low']:+.3g} … {found['high']:+.3g})"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def _speeds(record: dict[str, Any], labels: Sequence[str]) -> str:
    """Times as parts of those of v2 and of a Llama in the same run, a line for each system that was measured."""
    cases = {(row["system"], row["dtype"], row["part"], row["context"]): row for row in record["rows"]}
    asked = list(dict.fromkeys((part, context) for *_, part, context in cases))
    lines = []
    for system, dtype in dict.fromkeys(key[:2] for key in cases):
        own = [cases.get((system, dtype, *case)) for case in asked]
        last = next(case for case in reversed(own) if case is not None)
        line = [system, dtype, f"{last['parameters']:,}", f"{last['state_bytes']:,}"]
        for case in own:
            if case is None or "to_v2" not in case:
                line += [(case or {}).get("left_out", ""), "", ""]
            else:
                line += [f"{1000 * case['seconds']:.3g}", *(_ratio(case[key]) for key in ("to_v2", "to_llama"))]
        lines.append(line)
    names = {"training": "training step at {:,}", "decoding": "token after {:,}"}
    columns = ["system", "dtype", "parameters", "bytes of state"]
    for part, context in asked:
        columns += [f"{names[part].format(context)} (ms)", "to v2", "to a Llama"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in record["rows"]))
    machine, missing = record["machine"], [label for label in labels[1:] if label not in {line[0] for line in lines}]
    about = (
        f"Commit {commits}, {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"the last run was `{record['command']}`. Median of the ratios of rounds in turn, lowest and highest; below 1 "
        "it is faster. The Llama has as many parameters and transformers' default cache, which is copied at each token."
    )
    left = [f"Not measured: {', '.join(missing)}.\n"] if missing else []
    return "\n".join([f"{about}\n", markdown(columns, lines), *left])


def _ratio(found: Sequence[float]) -> str:
    middle, low, high = found
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


def _costs(record: dict[str, Any], labels: Sequence[str]) -> str:
    lines = []
    for label in labels:
        for cost in (c for c in record["costs"] if c["arrangement"] == label):
            models = [
                m
                for m in record["models"]
                if (m["arrangement"], m["setting"]) == (label, cost["setting"]) and m["steps"]
            ]
            if models:
                step = 1000 * sum(m["seconds"] for m in models) / sum(m["steps"] for m in models)
                lines.append(
                    [cost["setting"], label, *(f"{n:,}" for n in cost["state_bytes"])]
                    + [f"{models[0]['flops_per_token']:.3g}", f"{step:,.0f}"]
                )
    columns = ["task", "system", "bytes of state at 1×", "at 8×", "FLOPs a token", "ms a training step"]
    return markdown(columns, sorted(lines, key=lambda line: line[0]))
