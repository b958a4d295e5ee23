"""The page of an evaluation, for a reader who has a minute: the result in words, the plot, tables, and questions with
what was answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mosaics.evaluation.example import Example
from mosaics.evaluation.results import mean, wilson
from mosaics.reporting import Example as Shown
from mosaics.reporting import Lead, Number, Section, Table, draw, shown, write_page
from mosaics.reporting.figures import colour_of
from mosaics.reporting.page import slug

_ABOUT = {
    "recall": "Pairs stand in the prompt, then the first half of one: the model has to give the other half.",
    "new-knowledge": "The answer stands in a long document that is given before the question, as RULER has it.",
    "in-context-learning": "Texts with labels are shown, then one without: which label does it have?",
    "persistent-knowledge": "Questions about what training should have taught; nothing in the prompt says the answer.",
    "perplexity": "The same text, read in windows of growing length: does more context help, or does the model break "
    "down beyond the length that it was trained at?",
    "lm-eval": "Tasks of lm-evaluation-harness.",
}
_COLUMNS = {
    "accuracy": "right (%)",
    "examples": "questions",
    "queries": "questions",
    "distance up to": "distance up to (tokens)",
    "among values": "right among the values there (%)",
    "chance": "chance (%)",
    "naive Bayes": "naive Bayes (%)",
    "nearest text": "nearest text (%)",
    "nats per token": "nats per token (less is better)",
    "context": "context (tokens)",
    "times": "times the training length",
    "length": "length (tokens)",
}
_LOOKED_AT = 5000  # examples among which questions to be shown are looked for
_ODD = re.compile("[\\s\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}


def write_evaluation_page(
    folder: Path,
    result: dict[str, Any],
    variants: dict[str, dict[str, Any]],
    examples: Iterable[Example],
    command: str = "",
    word: Callable[[int], str] = str,
) -> Path:
    """Write report.html into the folder of an evaluation, and its tables as CSV and Markdown.

    Args:
        folder: where to.
        result: whose tables and plot are shown, as `evaluate` or `side_by_side` gives it.
        variants: results by the name of the variant of the model.
        examples: the questions in the order in which they were asked.
        command: that gives the same again.
        word: the text of one token; of questions that are made of tokens.

    Returns:
        The path of report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suite, model = result["suite"], result["model"]
    chances = _chances(result)
    notes = [f"{note[:1].upper()}{note[1:]}" for note in result["summary"].get("notes", [])]
    measured = Section(
        "What was measured",
        " ".join([_ABOUT.get(suite, ""), *notes]).strip(),
        figures=_figures(result, chances, folder),
        terms=[("chance", "one of the possible answers, picked blindly")] if chances else [],
        tables=[_table(title, rows, variants) for title, rows in result["summary"]["tables"].items() if rows],
    )
    sections = [measured]
    found = list(_examples(variants, examples, word))
    if found:
        about = "What the model saw, answered and should have answered; wrong and right ones, if there are both."
        if any("␣" in example.saw for example in found):
            about += " Tokens are shown one by one; ␣ is a space that belongs to one."
        sections.append(Section("Examples", about, examples=found))
    settings = {key: _short(value) for key, value in result["settings"].items() if value not in ({}, None)}
    weights = {"weights": result["weights"]} if result.get("weights") else {}
    sections.append(
        Section(
            "How it was made",
            "Everything on this page is made of results.json beside it; every table lies in the folder tables, too.",
            terms=list(({"suite": suite, "model": model} | weights | settings | _machine()).items()),
            text=[command] if command else [],
        )
    )
    leads = [_lead(name, one, len(variants) > 1) for name, one in variants.items()]
    colours = {name: colour_of(number) for number, name in enumerate(variants)}
    return write_page(folder / "report.html", f"{suite}: {model}".rstrip(": "), leads, sections, colours)


def _lead(variant: str, result: dict[str, Any], several: bool) -> Lead:
    scores = [example["score"] for example in result["examples"]]
    if result["suite"] == "lm-eval":  # an example is a task there
        found = "; ".join(f"{example['id']} {shown(example['score'])}" for example in result["examples"])
        return Lead(f"{result['model'] or 'The model'}{f', {variant}' if several else ''}: {found}.")
    who = f"{result['model'] or 'The model'}{f', {variant},' if several else ''}"
    if not scores:
        return Lead(f"{who} was asked nothing.")
    table = next(iter(result["summary"]["tables"].values()), [])
    asked = None
    if table and {"accuracy", "queries"} <= set(table[0]):  # several questions to an example
        right = round(sum(row["accuracy"] * row["queries"] for row in table) / 100)
        asked = right, sum(row["queries"] for row in table)
    elif set(scores) <= {0, 1}:
        asked = int(sum(scores)), len(scores)
    if asked:
        share = asked[0] / asked[1]
        low, high = wilson(share, asked[1])
        text = f"{who} answers {asked[0]} of {asked[1]} questions right"
        return Lead(f"{text} ({shown(100 * share)} %, 95 % interval {100 * low:.0f}–{100 * high:.0f} %).")
    if table and "nats per token" in table[0]:
        first, last = table[0], table[-1]
        text = f"{who} needs {first['nats per token']:.3f} nats per token with windows of {first['context']} tokens"
        if len(table) > 1:
            gain = first["nats per token"] - last["nats per token"]
            low, high = _interval_of_gain(result, first["times"], last["times"])
            how = "better" if gain > 0 else "worse"
            text += f" and {last['nats per token']:.3f} with {last['context']}, {abs(gain):.3f} {how}"
            text += f" (95 % interval of the gain {low:+.3f} to {high:+.3f}, over stretches)"
            kind = "good" if low > 0 else "bad" if high < 0 else "open"
            return Lead(f"{text}.", kind)
        return Lead(f"{text}.")
    return Lead(f"{who} has a mean score of {mean(scores):.3f} over {len(scores)} questions.")


def _interval_of_gain(result: dict[str, Any], first: Any, last: Any) -> tuple[float, float]:
    """95 % interval of what the longest window gains over the shortest, stretches drawn anew."""
    import numpy as np

    at: dict[Any, list[float]] = {}
    for example in result["examples"]:
        at.setdefault(example["meta"]["multiple"], []).append(example["score"])
    gains = np.array(at[first]) - np.array(at[last])
    drawn = np.random.default_rng(17).integers(0, len(gains), (2000, len(gains)))
    return tuple(np.quantile(gains[drawn].mean(1), [0.025, 0.975]).tolist())


def _chances(result: dict[str, Any]) -> list[float]:
    """What picking blindly would give, in percent, of all that was asked."""
    found = {row.get("chance") for rows in result["summary"]["tables"].values() for row in rows}
    return sorted(found - {None}, reverse=True)


def _figures(result: dict[str, Any], chances: Sequence[float], folder: Path) -> list[str]:
    plot = result["summary"].get("plot")
    if not plot or not plot["curves"]:
        return []
    curves = [(one["label"], 0, one["x"], one["y"]) for one in plot["curves"]]
    bands = {
        one["label"]: list(zip(one["x"], one["low"], one["high"], strict=True))
        for one in plot["curves"]
        if "low" in one
    }
    y = plot["y"].replace("accuracy (%)", "right answers (%)")
    drawn = {"title": f"{result['suite']}: {result['model']}".rstrip(": "), "x": plot["x"], "y": y}
    drawn |= {"log_x": bool(plot.get("log_x")), "curves": curves, "bands": bands}
    drawn["lines"] = [(f"chance ({shown(chance)} %)", chance) for chance in chances]
    return [draw(drawn, folder / "plot.png")]


def _table(title: str, rows: Sequence[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> Table:
    """A table of the summary, with the interval in the cell of what it is of; of variants side by side the best is
    marked."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("low", "high")]
    beside, unit = title.startswith("side by side: "), ""
    if beside:
        title, _, value = title.removeprefix("side by side: ").removesuffix(")").rpartition(" (")
        unit = f" ({'right, %' if value == 'accuracy' else value})"
    lines = []
    for place, row in enumerate(rows):
        line = [_number(row) if key == "accuracy" and row.get(key) is not None else row.get(key) for key in columns]
        if beside:
            tables = {name: one["summary"]["tables"][title] for name, one in variants.items()}
            own = {name: table[place] for name, table in tables.items() if row.get(name) is not None}
            values = {one[value] for one in own.values()}
            best = (max if value == "accuracy" else min)(values) if len(values) > 1 else None
            found = {name: replace(_number(one, value), best=one[value] == best) for name, one in own.items()}
            line = [found.get(key, cell) for key, cell in zip(columns, line, strict=True)]
        lines.append([shown(line[0]), *line[1:]])  # the first cell is a name
    name = f"side by side: {title}" if beside else title
    note = f"{name[:1].upper() + name[1:]}."
    if any(isinstance(cell, Number) and cell.interval for line in lines for cell in line):
        note += " After a share its 95 % interval (Wilson)."
    headings = [f"{key}{unit}" if beside and key in variants else _COLUMNS.get(key, key) for key in columns]
    return Table(slug(name), headings, lines, note)


def _number(row: dict[str, Any], value: str = "accuracy") -> Number:
    shares = value == "accuracy"
    low, high = (row.get("low"), row.get("high")) if shares else (None, None)
    return Number(row[value], low, high, decimals=(1, 0) if shares else (3, 3))


def _examples(
    variants: dict[str, dict[str, Any]], examples: Iterable[Example], word: Callable[[int], str], count: int = 5
) -> Iterable[Shown]:
    """Five questions: those that variants answered differently first, then wrong and right ones in turn."""
    records = {name: {record["id"]: record for record in one["examples"]} for name, one in variants.items()}
    kinds: dict[tuple[bool, ...], list[tuple[int, Example, Sequence[tuple[Any, bool]]]]] = {}
    for example in islice(examples, _LOOKED_AT):
        answers = [_answers(example, by_id.get(example.id)) for by_id in records.values()]
        for number, said in enumerate(zip(*answers, strict=False)):
            kinds.setdefault(tuple(right for _, right in said), []).append((number, example, said))
    for found in kinds.values():  # of examples with several questions, one each before more of the same
        found.sort(key=lambda one: one[0])
    chosen: list[tuple[int, Example, Sequence[tuple[Any, bool]]]] = []
    while len(chosen) < count and any(kinds.values()):
        for kind in sorted(kinds, key=lambda kind: (len(set(kind)) == 1, sum(kind))):
            if kinds[kind] and len(chosen) < count:
                chosen.append(kinds[kind].pop(0 if len(chosen) % 2 == 0 else -1))
    for number, example, said in chosen:
        named = [(name, text, right) for name, (text, right) in zip(variants, said, strict=True)]
        yield _of_text(example, named) if isinstance(example.prompt, str) else _of_tokens(example, number, named, word)


def _answers(example: Example, record: dict[str, Any] | None) -> list[tuple[Any, bool]]:
    """What was answered to each question of an example, and whether that was right; nothing where it is not known."""
    if record is None or record["prediction"] is None:
        return []
    if isinstance(example.prompt, str):
        return [(record["prediction"], bool(record["score"]))] if record["score"] in (0, 1) else []
    asked = example.meta.get("queries", ())
    return [(said, said == query["value"]) for query, said in zip(asked, record["prediction"], strict=False)]


def _about(meta: dict[str, Any]) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in meta.items() if isinstance(value, int | str))


def _of_text(example: Example, said: Sequence[tuple[str, Any, bool]]) -> Shown:
    saw, question = example.prefix, example.prompt
    if not saw.strip() or len(question) > 400:  # the question is the end of a long prompt
        whole = saw + question
        cut = max(whole.rstrip().rfind("\n"), whole.rfind(". ", 0, len(whole) - 20) + 1, len(whole) - 300, 0)
        saw, question = whole[:cut], whole[cut:]
    said = [(name, _short(text), right) for name, text, right in said]
    return Shown(_about(example.meta), saw.strip(), question.strip(), [e.strip() for e in example.references], said)


def _of_tokens(
    example: Example, number: int, said: Sequence[tuple[str, int, bool]], word: Callable[[int], str]
) -> Shown:
    """A question that ends with a token which has stood in the prompt before; what came after it is right."""
    query = example.meta["queries"][number]
    asked, before = query["position"], query["position"] - query["distance"]
    words = [_visible(word(token)) for token in example.prompt[: asked + 1]]
    saw, at = " ".join(words[:asked]), len(" ".join([*words[:before], ""]))
    return Shown(
        _about(example.meta | {"distance": query["distance"]}),
        saw,
        f"… {words[asked]}",
        [_visible(word(query["value"]))],
        [(name, _visible(word(token)), right) for name, token, right in said],
        at,
        at + len(" ".join(words[before : before + 2])),
    )


def _visible(text: str) -> str:
    """The text of a token; of white space and what else shows nothing, a sign."""
    return _ODD.sub(lambda found: _SIGNS.get(found[0], f"⟨{ord(found[0]):x}⟩"), text) or "‧"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = " ".join(text.split())
    return (text if len(text) <= 300 else f"{text[:300]} …") or "(nothing)"


def _machine() -> dict[str, str]:
    import os
    import platform

    import torch

    import mosaics

    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "machine": machine,
        "mosaics": mosaics.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
