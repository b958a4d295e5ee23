"""Results as they are kept: compact JSON with every trial, curve, seed and single answer; documents are made of it."""

from __future__ import annotations

import base64
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mosaics.experiments.trainings import write_json

FORMAT = "mosaics-results-1"
_POINTS = 120  # of a curve that are kept


def write_record(path: Path, name: str, results: dict[str, Any], command: str, **more: Any) -> None:
    """Write what a study gave.

    Args:
        path: the file.
        name: of the claim or comparison.
        results: as `run_study` gives them, with a `verdict` or without.
        command: that gives them again.
        more: further entries.
    """
    about = {"format": FORMAT, "name": name, "command": command, "commit": commit()}
    about |= {"machine": results["machine"] | {"processor": processor()}}
    kept = {key: results[key] for key in ("study", "verdict", "baselines") if key in results}
    models = [model | {"curve": _thinned(model["curve"])} for model in results["models"]]
    rows = [row | {"scores": packed(row["scores"])} if "scores" in row else row for row in results["rows"]]
    if "baselines" in kept:
        kept["baselines"] = [_each_score(row, packed) for row in kept["baselines"]]
    write_lines(path, about | more | kept | {"models": models, "rows": rows})


def trainings(
    models: Sequence[dict[str, Any]],
) -> Iterable[tuple[str, str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Setting, arrangement, all its trainings and those that are no trials; what has trials alone, since others are
    fine-tuned from it, is left out."""
    for setting, arrangement in dict.fromkeys((m["setting"], m["arrangement"]) for m in models):
        every = [m for m in models if (m["setting"], m["arrangement"]) == (setting, arrangement)]
        if taken := [m for m in every if not m["trial"]]:
            yield setting, arrangement, every, taken


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, scores as lists again.

    Raises:
        ValueError: the file is no such record.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is {found.get('format')!r}")
        for row in found["rows"]:
            if "scores" in row:
                row["scores"] = unpacked(row["scores"])
        if "baselines" in found:
            found["baselines"] = [_each_score(row, unpacked) for row in found["baselines"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results that mosaics wrote ({error}); remove it or make it anew") from None
    return found


def by_predictor(row: dict[str, Any]) -> dict[str, float | None]:
    """What simple predictors reach at a point, by name: of an entry of `baselines`."""
    return {name: y for name, y in row.items() if name not in ("setting", "evaluation", "x", "scores", "groups")}


def _each_score(row: dict[str, Any], changed: Callable[[Any], Any]) -> dict[str, Any]:
    """An entry of `baselines` with the scores of each predictor changed, if they were kept."""
    return row | {"scores": {name: changed(s) for name, s in row["scores"].items()}} if "scores" in row else row


def write_lines(path: Path, values: dict[str, Any]) -> None:
    """Write JSON with a line for each entry, and for each of an entry's parts where it is a list."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    parts = []
    for key, value in values.items():
        listed = isinstance(value, list) and value
        parts.append(f"{text(key)}: " + ("[\n" + ",\n".join(map(text, value)) + "\n]" if listed else text(value)))
    write_json(path, None, "{\n" + ",\n".join(parts) + "\n}\n")


def packed(scores: list[float]) -> str | list[float]:
    """Right and wrong as bits: the number, a colon, and the bits in base 64; other scores rounded."""
    array = np.asarray(scores, dtype=float)
    if not np.isin(array, (0, 1)).all():
        return [round(float(s), 4) for s in scores]
    return f"{len(array)}:{base64.b64encode(np.packbits(array.astype(bool)).tobytes()).decode()}"


def unpacked(scores: str | list[float]) -> list[float]:
    """The contrary of `packed`."""
    if not isinstance(scores, str):
        return scores
    count, _, bits = scores.partition(":")
    found = np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8), count=int(count))
    return found.astype(float).tolist()


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with `+` where it has changed since; None elsewhere."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if git("status", "--porcelain", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The processor's name, and what it can do that matters to speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    about = {key.strip(): value.strip() for key, value in about.items()}
    flags = set(about.get("flags", about.get("Features", "")).split())
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd") if name in flags]
    return f"{about.get('model name', platform.machine())} ({', '.join(known) or 'no vectors known'})"


def _thinned(curve: list[Any]) -> list[Any]:
    every = max(1, -(-len(curve) // _POINTS))
    return curve[::every]
