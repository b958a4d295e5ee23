"""Running a suite: every answer is on disk as soon as it is there; tables and plots are made from the answers.

FOLDER/examples.jsonl   settings, then one answer a line, while the evaluation runs and after it
FOLDER/results.json     suite, model, settings, every example, summary
FOLDER/table.txt        the summary's tables
FOLDER/plot.png         the summary's curves
"""

import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from mosaics.evaluation.example import Example, Record

Row = dict[str, Any]


class Suite(BaseModel, ABC):
    """A set of questions, how they are answered, and what the answers say. The fields are its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """What the command line calls it."""

    @property
    def block(self) -> int:
        """Examples that are answered and written together."""
        return 16

    def sources(self) -> list[str]:
        """Files that the questions come from: their content is part of the settings."""
        return []

    @abstractmethod
    def examples(self, scorer) -> Iterable[Example]:
        """The questions, the same whenever the settings are the same."""

    @abstractmethod
    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        """The model's answers to some of the questions."""

    @abstractmethod
    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """What the answers say: `tables` (title -> rows of columns) and, if there is something to draw, `plot` (`x`,
        `y`, `log_x`, `curves`: `label`, `x`, `y`, perhaps `low` and `high`)."""


def evaluate(
    suite: Suite,
    scorer,
    output: Path | str | None = None,
    *,
    model: str = "",
    show_progress: bool = False,
    more_settings: dict[str, Any] | None = None,
    with_plot: bool = True,
) -> dict[str, Any]:
    """Ask a model everything that a suite asks.

    Args:
        suite: the questions.
        scorer: the model, a `Scorer` or anything that answers like one.
        output: a folder for the results. If it holds a part of the same evaluation, that goes on.
        model: what the model is called in the results.
        show_progress: on stderr, a bar in a terminal and a line every ten seconds elsewhere.
        more_settings: what else decides the answers (as the memories that were taken out).
        with_plot: whether to draw plot.png, which takes longer than to write all else.

    Returns:
        `suite`, `model`, `settings`, `examples` and `summary`, as in results.json.

    Raises:
        ValueError: the folder holds another evaluation, or the suite can't ask what it was set to ask.
        OSError: the folder can't be written.
    """
    settings = suite.model_dump(mode="json", exclude_none=True) | (more_settings or {})
    settings["sources"] = {Path(path).name: _file_digest(path) for path in suite.sources()}
    fingerprint = getattr(scorer, "fingerprint", None)
    header = {
        "suite": suite.name,
        "model": model,
        "weights": fingerprint() if fingerprint else "",
        "settings": settings,
    }
    done: dict[str, Record] = {}
    log = nullcontext()
    if output is not None:
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        done = _open_log(output / "examples.jsonl", header)
        log = open(output / "examples.jsonl", "a", encoding="utf-8")
    records: list[Record] = []
    questions = suite.examples(scorer)
    total = len(questions) if hasattr(questions, "__len__") else None
    with log as stream, progress(suite.name, total, show_progress) as advance:
        for block in _blocks(questions, suite.block):
            asked = [example for example in block if not _answered(example, done)]
            answered = {record.id: record for record in suite.answer(scorer, asked)} if asked else {}
            if stream is not None:
                stream.writelines(
                    json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in answered.values()
                )
                stream.flush()
            records += [answered.get(example.id) or done[example.id] for example in block]
            advance(len(block))
    try:
        summary = suite.summarise(records)
    except (KeyError, TypeError, ValueError) as error:
        if not done:
            raise
        raise ValueError(
            f"{output / 'examples.jsonl'} has an answer that can't be counted ({error!r}); remove it and evaluate again"
        ) from error
    result = header | {"examples": [record.to_dict() for record in records], "summary": summary}
    if output is not None:
        save(result, output, with_plot)
    return result


def side_by_side(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Results of one suite for several variants of a model, as one result.

    Args:
        results: what `evaluate` gave for each variant, by its name.

    Returns:
        A result whose examples and rows name their variant; tables `side by side` have a column for each.
    """
    first = next(iter(results.values()))
    examples, tables, curves = [], {}, []
    for variant, result in results.items():
        for example in result["examples"]:
            meta = example["meta"] | {"variant": variant}
            examples.append(example | {"id": f"{variant}: {example['id']}", "meta": meta})
        for title, rows in result["summary"]["tables"].items():
            tables.setdefault(title, []).extend({"variant": variant} | row for row in rows)
        for one in result["summary"].get("plot", {}).get("curves", []):
            curves.append(one | {"label": f"{one['label']}, {variant}"})
    beside: dict[str, list[Row]] = {}
    for title, rows in first["summary"]["tables"].items():
        value = next((column for column in ("accuracy", "nats per token") if rows and column in rows[0]), None)
        if value is None:
            continue
        for number, row in enumerate(rows):
            columns = {key: row[key] for key in list(row)[: list(row).index(value)]}
            for variant, result in results.items():
                other = result["summary"]["tables"][title]
                columns[variant] = other[number][value] if number < len(other) else None
            beside.setdefault(f"side by side: {title} ({value})", []).append(columns)
    summary = {"tables": beside | tables, "notes": first["summary"].get("notes", [])}
    if curves:
        summary["plot"] = first["summary"]["plot"] | {"curves": curves}
    settings = first["settings"] | {"variants": list(results)}
    return first | {"settings": settings, "examples": examples, "summary": summary}


def save(result: dict[str, Any], output: Path, with_plot: bool = True) -> None:
    """Write results.json, table.txt and, if wanted, plot.png, each at once."""
    _write(output / "results.json", json.dumps(result, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    _write(output / "table.txt", tables_text(result).encode())
    if with_plot and result["summary"].get("plot"):
        draw(result, output / "plot.png")


def _answered(example: Example, done: dict[str, Record]) -> bool:
    record = done.get(example.id)
    return record is not None and record.prompt_digest == example.digest


def _blocks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    examples = iter(examples)
    while block := list(islice(examples, size)):
        yield block


def _open_log(path: Path, header: dict[str, Any]) -> dict[str, Record]:
    """The answers that are there already; a line that was cut off is dropped."""
    lines, records = [], []
    try:
        lines = io.StringIO(path.read_text(encoding="utf-8")).readlines() if path.exists() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged (byte {error.start}); remove it and evaluate again") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    if lines:
        try:
            before, *records = (json.loads(line) for line in lines)
            if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
                raise TypeError("its first line holds no settings")
            records = [Record.from_dict(record) for record in records]
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and evaluate again") from None
        _refuse_other(before, header, path.parent)
    _write(path, "".join(lines or [json.dumps(header, ensure_ascii=False) + "\n"]).encode())
    return {record.id: record for record in records}


def _refuse_other(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    now = json.loads(json.dumps(now))
    before, now = (header | header["settings"] | {"settings": None} for header in (before, now))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            difference = f"{key} {before.get(key)!r} instead of {now.get(key)!r}"
            raise ValueError(f"{folder} holds an evaluation with {difference}; name another --output")


def _file_digest(path: str | Path) -> str:
    if not Path(path).is_file():
        return ""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class progress:  # noqa: N801  (used as a function)
    """Shows on stderr how far something is: a bar in a terminal, elsewhere a line every ten seconds.

    As a context it gives a function that takes how many more are done.
    """

    def __init__(self, name: str, total: int | None, shown: bool):
        self._name, self._total, self._shown, self._done, self._bar = name, total, shown, 0, None
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Callable[[int], None]:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(file=sys.stderr), transient=True)
            self._task = self._bar.add_task(self._name, total=self._total)
            self._bar.start()
        return self._advance

    def _advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._shown and now - self._said >= 10:
            self._said = now
            of = f"/{self._total}" if self._total else ""
            speed = self._done / (now - self._began)
            print(f"{self._name}: {self._done}{of} examples, {speed:.2g} a second", file=sys.stderr, flush=True)

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()


# Numbers


def wilson(score: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval); it stays inside [0, 1] and is honest for few trials.

    Args:
        score: the share, 0 to 1.
        count: trials.
    """
    if not count:
        return 0.0, 1.0
    z = 1.959963984540054
    middle = score + z * z / (2 * count)
    half = z * math.sqrt(score * (1 - score) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records by the values of their meta, in sorted order."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record.meta[key] for key in keys)].append(record)
    return dict(sorted(groups.items()))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def accuracy_row(records: Sequence[Record]) -> Row:
    """Accuracy in percent with its interval and the number of examples."""
    score = mean(record.score for record in records)
    low, high = wilson(score, len(records))
    return {"accuracy": 100 * score, "low": 100 * low, "high": 100 * high, "examples": len(records)}


def curve(label: str, rows: Sequence[Row], x: str, y: str = "accuracy") -> dict[str, Any]:
    """A curve of the plot from rows of a table."""
    drawn: dict[str, Any] = {"label": label, "x": [row[x] for row in rows], "y": [row[y] for row in rows]}
    if rows and y == "accuracy":
        drawn |= {"low": [row["low"] for row in rows], "high": [row["high"] for row in rows]}
    return drawn


# For people


def tables_text(result: dict[str, Any]) -> str:
    """The tables of a result as text."""
    lines = [f"{result['suite']} · {result['model']}".rstrip(" ·")]
    for title, rows in result["summary"]["tables"].items():
        lines += ["", title]
        if not rows:
            lines.append("  (nothing)")
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [columns] + [[_shown(row.get(column)) for column in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
        for line in cells:
            parts = (
                f"{cell:>{w}}" if right else f"{cell:<{w}}"
                for cell, w, right in zip(line, widths, numeric, strict=True)
            )
            lines.append("  " + "  ".join(parts).rstrip())
    notes = result["summary"].get("notes", [])
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """The plot of a result, as PNG."""
    from matplotlib.figure import Figure

    plot = result["summary"]["plot"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for one in plot["curves"]:
        line = axes.plot(one["x"], one["y"], marker="o", markersize=3, label=one["label"])[0]
        if "low" in one:
            axes.fill_between(one["x"], one["low"], one["high"], alpha=0.15, color=line.get_color(), linewidth=0)
    if plot.get("log_x"):
        axes.set_xscale("log", base=2)
        ticks = sorted({x for one in plot["curves"] for x in one["x"]})
        if len(ticks) <= 12:
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
    axes.set(xlabel=plot["x"], ylabel=plot["y"], title=f"{result['suite']} · {result['model']}".rstrip(" ·"))
    axes.grid(alpha=0.3)
    if plot["curves"]:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    _write(path, buffer.getvalue())
