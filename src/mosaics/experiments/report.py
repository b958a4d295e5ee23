"""The report of a study for a reader who has a minute: what came out in words, a plot and a table for each dimension,
questions with what was answered, tuning, budgets, and where it comes from. Beside it results.json and the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mosaics.experiments.claims import Check, Term
from mosaics.experiments.evidence import Answers, difference, intervals
from mosaics.experiments.points import grid, plot_of, simple_predictors
from mosaics.experiments.records import trainings
from mosaics.experiments.trainings import write_json
from mosaics.reporting import Example, Lead, Number, Section, Table, draw, shown, write_page
from mosaics.reporting.figures import colour_of
from mosaics.reporting.page import slug

_ABOUT = {
    "recall": "Pairs of made-up words stand in the prompt, then one of the first words: which word went with it?",
    "new-knowledge": "A document states made-up facts (the color of somebody is red) among sentences about nothing, "
    "and is then asked about one of them. The people asked about occur in no training document.",
    "in-context-learning": "Groups of words are shown with labels that exist only in the prompt; another group is to "
    "be given its label. Four of ten words tell nothing.",
    "persistent-knowledge": "Facts that the training documents stated again and again are asked for, without being "
    "stated in the prompt.",
    "perplexity": "The same stretches of held-out text are read in windows of growing length: does more context help, "
    "or does the model break down beyond the length that it was trained at?",
    "many-shot": "Texts with labels are shown, so many of every class, then one without: which label does it have?",
    "documents": "The answer stands in a long document that is given before the question, as RULER has it.",
    "attention": "How much the last position reads from each distance; 1 is an even spread.",
    "regbench": "Sequences of automata that the model has never met: is the likeliest next letter one that the "
    "automaton allows?",
    "regbench-variation": "Half the sum of differences between the model's and the automaton's next-letter "
    "probabilities; 0 is perfect.",
}
_SIMPLE = {
    "chance": "one of the possible answers, picked blindly",
    "last words": "no memory: the answer that most often followed the same last words in training",
    "word counts": "no memory for what goes with what: of the possible answers, the one that the prompt has most often",
    "repeated ending": "look-up: goes on as the prompt did after the longest earlier occurrence of its last words",
    "naive bayes": "counts, without training, which words stand with which label in the prompt",
    "nearest text": "look-up: the label of the text in the prompt whose words are most like those of the question",
    "bigram": "counts of word pairs in the text that was trained on (Kneser-Ney)",
    "trigram": "counts of three words in a row in the text that was trained on (Kneser-Ney)",
}
_DECIMALS = {"perplexity": (3, 3), "regbench-variation": (3, 3), "attention": (2, 2)}
_SHARES = (1, 0)
_UNITS_APART = {"perplexity": " nats per token"} | dict.fromkeys(("world", "many-shot", "documents"), " points")
_LOSSES = ("perplexity", "regbench-variation")  # less is better


def write_report(
    results: dict[str, Any], folder: Path, verdict: Sequence[Section | Lead] = (), command: str = ""
) -> Path:
    """Write results.json, report.html, and beside it a PNG for each plot and the tables as CSV and Markdown.

    Args:
        results: as `run_study` gives them.
        folder: where to.
        verdict: of a claim: leads that come before those of the study, and sections that follow them.
        command: that gives the same again.

    Returns:
        The path of report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    study = results["study"]
    leads = [part for part in verdict if isinstance(part, Lead)]
    sections = [part for part in verdict if isinstance(part, Section)]
    asked = list(_asked(results))
    leads += [_lead(results, setting, evaluation, rows) for setting, evaluation, rows in asked]
    named: set[str] = set()
    for setting, evaluation, rows in asked:
        sections.append(_dimension(results, setting, evaluation, rows, folder, named))
    sections += [part for part in (_examples(results), *_trained(results, folder)) if part is not None]
    sections.append(provenance(results, command))
    return write_page(folder / "report.html", study["title"], leads, sections, colours(results))


def colours(results: dict[str, Any]) -> dict[str, str]:
    """The colour of every arrangement."""
    labels = [arrangement["label"] for arrangement in results["study"]["arrangements"]]
    return {label: colour_of(number) for number, label in enumerate(labels)}


def _asked(results: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Setting, evaluation and rows of everything that was asked; settings of one series count as one."""
    found: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for setting in results["study"]["settings"]:
        for evaluation in setting["evaluations"]:
            found.setdefault((setting["series"] or setting["name"], evaluation["name"]), (setting, evaluation))
    for wanted, (setting, evaluation) in found.items():
        rows = [row for row in results["rows"] if (row["setting"], row["evaluation"]) == wanted]
        if rows:
            yield setting, evaluation, rows


def _title(setting: dict[str, Any], evaluation: dict[str, Any]) -> str:
    title = evaluation["title"] or evaluation["name"]
    title += "".join(f", {key.rpartition('.')[2].replace('_', ' ')} {x}" for key, x in evaluation["changes"].items())
    if evaluation["stretch"]:
        title += f", positions stretched ({evaluation['stretch']})"
    if evaluation["without"]:
        title += f", without {' and '.join(evaluation['without'])}"
    elif evaluation.get("without_longest"):
        title += f", without {evaluation['without_longest']:.0%} of the heads, those that read farthest"
    elif setting["name"] != "text" and not evaluation["name"].startswith(setting["name"]):
        title += f" ({setting['series'] or setting['name']})"
    return title


def _length(setting: dict[str, Any]) -> int:
    return setting["training"].get("context_length", 512)


def _where(setting: dict[str, Any], evaluation: dict[str, Any], x: float) -> str:
    """A point of an evaluation in words."""
    if evaluation["suite"] == "perplexity":
        return f"{x:g} times the training length" if x != 1 else "the training length"
    if evaluation["suite"] == "attention":
        return f"{x:g} tokens away"
    if evaluation["suite"].startswith("regbench"):
        return f"{x:g} automata learnt from"
    if evaluation["options"].get("shots"):
        return f"{x:g} example{'s' if x != 1 else ''} of every class"
    times = x / _length(setting)
    return f"{x:g} tokens, {times:g} times the training length" if times != 1 else f"{x:g} tokens, the training length"


def numbers(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, dict[float, Number]]:
    """The mean over seeds of every arrangement at every point, with its interval over seeds and questions drawn anew
    (for shares at least Wilson's)."""
    found: dict[str, dict[float, Number]] = {}
    decimals = _decimals(results, rows)
    for arrangement, points in grid(rows).items():
        mine = [row for row in rows if row["arrangement"] == arrangement]
        seeds = {row["seed"] for row in mine}
        ends: list[tuple[float, float] | None] = [None] * len(points)
        if len({(row["seed"], row["x"]) for row in mine}) == len(seeds) * len(points):
            ends = intervals(Answers(mine))
        for (x, values), interval in zip(sorted(points.items()), ends, strict=True):
            values = [value for value in values.values() if value is not None]
            mean = sum(values) / len(values) if values else None
            low, high = interval or (None, None)
            found.setdefault(arrangement, {})[x] = Number(mean, low, high, decimals=decimals)
    return found


def _decimals(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How many decimals the numbers of an evaluation and their intervals have."""
    name = rows[0]["evaluation"]
    known = [e for setting in results["study"]["settings"] for e in setting["evaluations"] if e["name"] == name]
    return _DECIMALS.get(known[0]["suite"], _SHARES) if known else _SHARES


def _counts(rows: Sequence[dict[str, Any]], arrangement: str, x: float) -> tuple[int, int] | None:
    """Right answers and questions of all seeds together; None where answers are not right or wrong."""
    found = [row for row in rows if (row["arrangement"], row["x"]) == (arrangement, x)]
    scores = [score for row in found for score in row.get("scores", [])]
    return (int(sum(scores)), len(scores)) if scores and set(scores) <= {0, 1} else None


def _lead(
    results: dict[str, Any], setting: dict[str, Any], evaluation: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> Lead:
    """What came out at the last point, in a sentence."""
    known, last = numbers(results, rows), max(row["x"] for row in rows)
    less = evaluation["suite"] in _LOSSES
    first, *others = [label for label in known if last in known[label]] or list(known)
    where = _where(setting, evaluation, last)
    said = []
    for label in (first, *others):
        number, counts = known[label].get(last, Number(None)), _counts(rows, label, last)
        if counts:
            interval = f" (95 % interval {number.interval} %)" if number.interval else ""
            what = f"answers {counts[0]} of {counts[1]} questions" if label == first else f"{counts[0]}"
            said.append(f"{label} {what}{interval}")
        else:
            unit = _unit(evaluation)
            interval = f" (95 % interval {number.interval})" if number.interval else ""
            what = f"has {number.shown} {unit}" if label == first else number.shown
            said.append(f"{label} {what}{interval}")
    text = f"{_title(setting, evaluation)}, at {where}: {'; '.join(said)}."
    simple = simple_predictors(results, setting["series"] or setting["name"], evaluation["name"])
    reached = {name: points[last] for name, points in simple.items() if last in points}
    if reached:
        name = (min if less else max)(reached, key=reached.get)
        unit = " %" if evaluation["suite"] not in _LOSSES else ""
        text += f" The best simple predictor here ({name}) has {_rounded(results, rows, reached[name])}{unit}."
    kinds = []
    for label in others:
        apart = _apart(rows, first, label, last, less)
        if apart is None:
            kinds.append("open")
            text += f" One training and one document do not say how far {first} and {label} are apart by chance."
            continue
        unit = _UNITS_APART.get(evaluation["suite"], "")
        estimate, low, high = (_rounded(results, rows, apart[key]) for key in ("estimate", "low", "high"))
        if apart["low"] > 0:
            kinds.append("good")
            text += f" {first} is better than {label} by {estimate}{unit} (95 % interval {low}–{high})."
        elif apart["high"] < 0:
            kinds.append("bad")
            estimate, low, high = (_rounded(results, rows, -apart[key]) for key in ("estimate", "high", "low"))
            text += f" {first} is worse than {label} by {estimate}{unit} (95 % interval {low}–{high})."
        else:
            kinds.append("open")
            text += f" {first} and {label} can't be told apart (95 % interval of the difference {low} to {high})."
    kind = kinds[0] if kinds and len(set(kinds)) == 1 else "open"
    return Lead(text, kind)


def _rounded(results: dict[str, Any], rows: Sequence[dict[str, Any]], value: float) -> str:
    return Number(value, decimals=_decimals(results, rows)).shown


def _apart(rows: Sequence[dict[str, Any]], first: str, label: str, x: float, less: bool) -> dict[str, Any] | None:
    """By how much the first is better at a point; None where it can't be said."""
    setting, evaluation = rows[0]["setting"], rows[0]["evaluation"]
    terms = []
    for name in (first, label):
        mine = sorted({row["x"] for row in rows if row["arrangement"] == name})
        if x not in mine:
            return None
        terms.append(Term(arrangement=name, setting=setting, evaluation=evaluation, at=mine.index(x)))
    sides = [[row for row in rows if row["arrangement"] == name] for name in (first, label)]
    if not all(Answers(side).can_be_drawn_anew for side in sides):
        return None
    check = Check(says="", left=terms[0], relation="<=" if less else ">=", right=terms[1])
    return difference(check, list(rows))


def _unit(evaluation: dict[str, Any]) -> str:
    return {"perplexity": "nats per token", "attention": "times an even spread", "regbench": "% right"}.get(
        evaluation["suite"], "total variation" if evaluation["suite"] in _LOSSES else "% right"
    )


def _dimension(
    results: dict[str, Any],
    setting: dict[str, Any],
    evaluation: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    folder: Path,
    named: set[str],
) -> Section:
    """Plot, explanations and table of one evaluation."""
    shown_as, title = setting["series"] or setting["name"], _title(setting, evaluation)
    known = numbers(results, rows)
    simple = simple_predictors(results, shown_as, evaluation["name"])
    name = f"{slug(shown_as)}-{slug(evaluation['name'])}"
    bands = {
        label: [(x, n.low, n.high) for x, n in sorted(points.items())]
        for label, points in known.items()
        if all(n.low is not None for n in points.values())
    }
    plot = plot_of(evaluation, rows, results) | {"bands": bands, "lines": [], "title": title}
    plot["beside"] += [(label, *zip(*sorted(points.items()), strict=True)) for label, points in simple.items()]
    xs, less = sorted({row["x"] for row in rows}), evaluation["suite"] in _LOSSES
    best = {
        x: (min if less else max)(n[x].value for n in known.values() if x in n and n[x].value is not None)
        for x in xs
        if any(x in n and n[x].value is not None for n in known.values())
    }
    judged = evaluation["suite"] != "attention" and len(known) > 1
    lines = [
        [label] + [replace(n, best=judged and n.value == best.get(x)) if (n := points.get(x)) else None for x in xs]
        for label, points in known.items()
    ]
    decimals = _decimals(results, rows)
    for label, points in (simple | {label: dict(points) for label, points in evaluation["beside"].items()}).items():
        lines.append([label, *(Number(points.get(x), decimals=decimals) for x in xs)])
    seeds = len({row["seed"] for row in rows})
    counts = {len(row["scores"]) for row in rows if "scores" in row}
    what = "stretches of text" if evaluation["suite"] == "perplexity" else "questions"
    many = f"{'–'.join(str(n) for n in sorted({min(counts), max(counts)}))} {what} at each point, " if counts else ""
    note = f"{_unit(evaluation)}; {'less' if less else 'more'} is better. " if judged else f"{_unit(evaluation)}. "
    note = note[:1].upper() + note[1:]
    note += f"{many}{seeds} training{'s' if seeds > 1 else ''} each; mean{' and 95 % interval' if bands else ''}."
    columns = ["", *(_column(setting, evaluation, x) for x in xs)]
    about = _ABOUT.get(evaluation["options"].get("task", evaluation["suite"]), _ABOUT.get(evaluation["suite"], ""))
    terms = [(word, _explained(word)) for word in simple if _explained(word) and word not in named]
    series = [s for s in results["study"]["settings"] if (s["series"] or s["name"]) == shown_as]
    budgets = dict.fromkeys(map(_budget_line, series))
    by_seed = _by_seed(results, rows, name, evaluation)
    return Section(
        title,
        " ".join([about, *budgets]).strip(),
        figures=[draw(plot, folder / f"{name}.png")],
        terms=terms,
        tables=[Table(name, columns, lines, note)],
        more=[Section("every training by itself", tables=[by_seed])] if seeds > 1 else [],
    )


def _explained(name: str) -> str:
    if name.startswith("nearest ") and name not in _SIMPLE:
        count = name.split()[1]
        return (
            f"look-up: the label of most of the {count} examples in the prompt that share most words with the question"
        )
    return _SIMPLE.get(name, "")


def _column(setting: dict[str, Any], evaluation: dict[str, Any], x: float) -> str:
    if evaluation["suite"] in ("world", "documents") and not evaluation["options"].get("shots"):
        return f"{x:g} tokens ({x / _length(setting):g}×)"
    words = {"perplexity": f"{x:g}× length", "attention": f"{x:g} tokens", "regbench": f"{x:g} automata"}
    words["regbench-variation"] = words["regbench"]
    return words.get(evaluation["suite"], f"{x:g} shot{'s' if x != 1 else ''}")


def _by_seed(results: dict[str, Any], rows: Sequence[dict[str, Any]], name: str, evaluation: dict[str, Any]) -> Table:
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        [arrangement, f"{x:g}", *(Number(found.get(seed), decimals=_decimals(results, rows)) for seed in seeds)]
        for arrangement, points in grid(rows).items()
        for x, found in points.items()
    ]
    return Table(f"{name}-by-seed", ["", "at", *(f"seed {seed} ({_unit(evaluation)})" for seed in seeds)], lines)


def _budget_line(setting: dict[str, Any]) -> str:
    training, data = setting["training"], setting["data"]
    what = data["corpus"] or (
        f"documents of the world {data['world']}" if data["world"] else f"sequences of {data['automata']} automata"
    )
    return (
        f"Trained on {what}: at most {training['steps']:,} steps of {training['batch_size']} × "
        f"{training['context_length']} tokens."
    )


def _examples(results: dict[str, Any]) -> Section | None:
    """Questions with what each model answered."""
    more = []
    for setting, evaluation, _ in _asked(results):
        wanted = (setting["series"] or setting["name"], evaluation["name"])
        found = [e for e in results.get("examples", []) if (e["setting"], e["evaluation"]) == wanted]
        if found:
            shown_ones = [
                Example(
                    _where(setting, evaluation, one["x"]),
                    one["saw"],
                    one["question"],
                    [one["expected"]],
                    [(label, text or "(nothing)", right) for label, (text, right) in one["said"].items()],
                    one["at"],
                )
                for one in found
            ]
            more.append(Section(_title(setting, evaluation), examples=shown_ones))
    if not more:
        return None
    about = (
        "What the models saw, answered and should have answered (first seed); good and bad ones, longest first. The "
    )
    about += "place that holds the answer is marked."
    if len(more) == 1:
        return Section("Examples", about, examples=more[0].examples)
    return Section("Examples", about, examples=more[0].examples[:5], more=more[1:])


def _trained(results: dict[str, Any], folder: Path) -> list[Section]:
    """Tuning and budgets."""
    curves, trials, budget = [], [], []
    for setting in results["study"]["settings"]:
        models = [m for m in results["models"] if m["setting"] == setting["name"]]
        plotted = [
            (m["arrangement"], m["seed"], *zip(*m["curve"], strict=True))
            for m in models
            if m["curve"] and not m["trial"]
        ]
        if plotted:
            plot = {
                "title": f"Training loss, {setting['name']}",
                "x": "optimisation step",
                "y": "nats per counted token",
            }
            plot |= {"log_x": False, "curves": plotted}
            curves.append(draw(plot, folder / f"{slug(setting['name'])}-training.png"))
        for arrangement in dict.fromkeys(m["arrangement"] for m in models if m["trial"]):
            mine = [
                m for m in models if m["arrangement"] == arrangement and m["curve"] and m["seed"] == models[0]["seed"]
            ]
            lines = [
                (variant_text(m) + (" (taken)" if not m["trial"] else ""), 0, *zip(*m["curve"], strict=True))
                for m in mine
            ]
            if lines:
                name = f"{slug(setting['name'])}-{slug(arrangement)}-trials"
                plot = {"title": f"Trials of {arrangement}, {setting['name']}", "x": "optimisation step"}
                plot |= {"y": "nats per counted token", "log_x": False, "curves": lines}
                trials.append(draw(plot, folder / f"{name}.png"))
    study, lines = results["study"], []
    several = len({m["setting"] for m in results["models"]}) > 1
    for m in results["models"]:
        loss = "diverged" if m["held_out_loss"] is None else Number(m["held_out_loss"], decimals=(4, 4))
        role = "tuning trial" if m["trial"] else "taken"
        lines.append(
            [m["arrangement"], m["setting"], m["seed"], variant_text(m), m["steps"], m.get("enough_at"), loss, role]
        )
    for setting, arrangement, _, kept in trainings(results["models"]):
        tokens, seconds = sum(m["tokens"] for m in kept) / len(kept), sum(m["seconds"] for m in kept) / len(kept)
        steps = sorted({m["steps"] for m in kept})
        budget.append(
            [
                arrangement,
                setting,
                kept[0]["parameters"],
                "–".join(f"{n:,}" for n in (steps[0], steps[-1])[: len(steps)]),
            ]
            + [round(tokens), f"{3 * kept[0]['flops_per_token'] * tokens:.3g}", f"{seconds:.0f}"]
            + [f"{tokens / seconds:,.0f}" if seconds else None]
        )
    tuned = any(m["trial"] for m in results["models"])
    about = "What was tried for every arrangement, on the first seed, and which was taken (the lowest loss on held-out "
    about += "rows, or where a goal was set what reached it soonest)."
    if not tuned:
        about = (
            "Nothing was tuned: every arrangement has the same learning rate. Differences may be those of its choice."
        )
    columns = ["arrangement", "task", "seed", "tried", "steps", "learnt at step", "held-out loss (nats)", ""]
    tuning = Section(
        "Tuning",
        about,
        figures=trials,
        tables=[Table("tuning", columns, lines, "Loss on held-out rows at the training length; less is better.")],
        more=[Section("training curves", figures=curves)] if curves else [],
    )
    columns = ["arrangement", "task", "parameters", "steps", "tokens", "FLOPs", "seconds", "tokens a second"]
    where = {m["hardware"] for m in results["models"] if m.get("hardware")}
    note = f"Means of {len(study['seeds'])} training{'s' if len(study['seeds']) > 1 else ''}"
    note += f" ({'; '.join(sorted(where))}). " if where else ". "
    note += "Of one training; a step counts as three forward passes in the FLOPs."
    what = "tasks" if several else "task"
    about = f"What each arrangement was given, in the same {what}, on the same rows in the same order."
    return [tuning, Section("Budget", about, tables=[Table("budget", columns, budget, note)])]


def variant_text(model: dict[str, Any]) -> str:
    """What of a training was tried or taken, in words."""
    variant = {"learning rate": model["learning_rate"]}
    variant |= {k.rpartition(".")[2].replace("_", " "): v for k, v in model.get("variant", {}).items()}
    return ", ".join(f"{k} {'as published' if v is None else shown(v)}" for k, v in variant.items())


def provenance(results: dict[str, Any], command: str = "") -> Section:
    """The command, versions and machine that a page comes from."""
    from mosaics.experiments.records import commit, processor

    about = {"seeds": ", ".join(map(str, results["study"]["seeds"]))}
    about |= {"commit": commit() or "not from a checkout", "processor": processor()}
    about |= {key: str(value) for key, value in results["machine"].items()}
    text = [command] if command else []
    more = "Everything on this page is made of results.json beside it; every table lies in the folder tables, too."
    return Section("How it was made", more, terms=list(about.items()), text=text)
