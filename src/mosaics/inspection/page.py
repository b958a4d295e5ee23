"""What an inspection found, as one page for a browser: nothing is fetched, and no text becomes markup."""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mosaics.inspection.inspection import Average, Inspection, MemoryReads

LARGEST = 15_000_000  # bytes of a page
POINTS = 1000  # of a line over the text
SHOWN = 20_000  # tokens, up to which the context before the text is shown with it
AROUND = 4  # tokens shown around a pair


def page(inspection: Inspection, texts: list[str], word: Callable[[int], str], name: str) -> str:
    """The page as HTML.

    It has the four largest weights of each head and token, fewer if the inspection has fewer or if it would be larger
    than 15 MB, and then says so.

    Args:
        inspection: of a text.
        texts: the pieces of text of all tokens, those of the context first.
        word: the text of one token.
        name: of the model.
    """
    i, before = inspection, len(inspection.context_ids)
    arrays = _Arrays()
    models = {"": i.forecasts, **i.without}
    for of, forecasts in models.items():
        arrays.add(f"next:{of}", forecasts.of_next.float().numpy(), "f4")
        arrays.add(f"likely:{of}", forecasts.tokens.numpy(), "u4")
        arrays.add(f"p:{of}", forecasts.log_probs.exp().numpy() * 65535, "u2")
    points = min(len(i.ids), POINTS)
    reads = [_lines(arrays, number, read, points) for number, read in enumerate(i.reads)]
    shown = [_shown(arrays, number, one, points) for number, one in enumerate(i.shown)]
    averages = [_held(arrays, number, one, before) for number, one in enumerate(i.averages)]
    left_out = _pairs(arrays, i.reads, reads, before)
    used = sorted({int(token) for forecasts in models.values() for token in forecasts.tokens.unique()})
    first, featured, lead = summary(i, texts[before:])
    whole = before + len(i.ids) <= SHOWN
    data = {
        "title": f"{name}: what was remembered",
        "lead": lead,
        "summary": gains(i),
        "about": " ".join(filter(None, [_about(i, name), left_out])),
        "time": len(i.ids),
        "before": before,
        "context_shown": whole,
        "pieces": texts[before:],
        "context": dict(enumerate(texts[:before])) if whole else _around(i, texts, before),
        "ids": i.ids.tolist(),
        "words": {token: word(token) for token in used},
        "near": i.near,
        "likeliest": i.forecasts.tokens.shape[1],
        "points": points,
        "memories": list(dict.fromkeys([*(read.memory for read in i.reads), *i.without])),
        "without": list(i.without),
        "reads": reads,
        "shown": shown,
        "averages": averages,
        "featured": featured,
        "first": first,
        "arrays": arrays.packed,
    }
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # what could end the block, or begin another
        text = text.replace(character, f"\\u{ord(character):04x}")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    before_data, after_data = template.split("@DATA@")
    before_data = before_data.replace("<title>What was remembered", f"<title>{html.escape(data['title'])}")
    return before_data + text + after_data


def label(name: str) -> str:
    """What a memory is called in a sentence."""
    return f"{name.replace('_', '-')} memory"


def summary(inspection: Inspection, texts: list[str]) -> tuple[int, str | None, str]:
    """The token to begin with, the memory whose worth is shown first, and what to say of both: where the memory that
    reads farthest gave a word most, or else any memory did."""
    i = inspection
    farthest: dict[str, float] = {}
    for read in i.reads:
        back = [numbers.distance for numbers in read.numbers if not math.isnan(numbers.distance)]
        if read.contextual and back and read.memory in i.without:
            farthest[read.memory] = max(max(back), farthest.get(read.memory, 0.0))
    candidates = [max(farthest, key=farthest.__getitem__)] if farthest else list(i.without)
    best: tuple[float, int, str] | None = None
    for name in candidates if len(i.ids) > 1 else ():
        gain, at = i.gain(name)[:-1].max(0)
        if best is None or gain > best[0]:
            best = float(gain), int(at) + 1, name
    if best is None:
        return min(1, len(i.ids)), None, "The model has one kind of memory, so none could be left out."
    gain, token, name = best
    if gain <= 0.05:
        return token, name, f"The {label(name)} gave no word of this text more than {max(gain, 0.0):.2f} nats."
    with_it, without = (math.exp(of_next[token - 1]) for of_next in (i.forecasts.of_next, i.without[name].of_next))
    word = texts[token].strip() or repr(texts[token])
    said = f"The {label(name)} gave the word “{word}” {gain:.1f} nats: "
    return (
        token,
        name,
        f"{said}the model expected it with a probability of {_percent(with_it)}, {_percent(without)} without.",
    )


def gains(inspection: Inspection) -> str:
    """What each memory gave a word on average."""
    if len(inspection.ids) < 2:
        return ""
    surprise = -float(inspection.forecasts.of_next[:-1].mean())
    said = f"A word of this text surprised the model by {surprise:.2f} nats on average"
    each = [
        f"without the {label(name)} {surprise + float(inspection.gain(name)[:-1].mean()):.2f}"
        for name in inspection.without
    ]
    return f"{said}, {', '.join(each)}." if each else f"{said}."


def _percent(p: float) -> str:
    return f"{100 * p:.0f} %" if p >= 0.1 else f"{100 * p:.2g} %" if p >= 0.0005 else "under 0.05 %"


def _about(inspection: Inspection, name: str) -> str:
    before = len(inspection.context_ids)
    after = f", after {before:,} tokens that were read before" if before else ""
    return f"{len(inspection.ids):,} tokens{after}, read by {name}."


def _plain(value: Any) -> Any:
    """With None for what is no number."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Arrays:
    """Arrays by name, each packed by gzip, and how many characters they take together."""

    def __init__(self) -> None:
        self.packed: dict[str, dict[str, str]] = {}
        self.size = 0

    def add(self, name: str, values: np.ndarray, kind: str) -> None:
        one = packed(values, kind)
        self.packed[name] = one
        self.size += len(one["data"])


def packed(values: np.ndarray, kind: str) -> dict[str, str]:
    """An array as `kind` (as numpy names it), rounded and limited to what that holds, by gzip and in base64."""
    kind_of = np.dtype(f"<{kind}")
    if kind_of.kind != "f":
        limits = np.iinfo(kind_of)
        values = np.clip(np.rint(values), limits.min, limits.max)
    data = gzip.compress(np.ascontiguousarray(values, kind_of).tobytes(), 6, mtime=0)
    return {"kind": kind, "data": base64.b64encode(data).decode()}


def binned(values: Tensor, points: int) -> np.ndarray:
    """`(heads, time)` as means `(heads, points)` of what is a number in each part of the time."""
    time = values.shape[1]
    index = torch.arange(time) * points // time
    there = ~values.isnan()
    sums = values.new_zeros(values.shape[0], points).index_add(1, index, values.nan_to_num(0.0))
    count = values.new_zeros(values.shape[0], points).index_add(1, index, there.to(values.dtype))
    return torch.where(count > 0, sums / count, math.nan).float().numpy()


def _lines(arrays: _Arrays, number: int, read: MemoryReads, points: int) -> dict[str, Any]:
    """What is drawn over time, and what the page says of a memory's heads."""
    lines = {"effective": read.effective, "near": read.near, "total": read.total, "effect": read.head_effects}
    if read.residual is not None:
        lines["residual"] = read.residual
    if bool(((read.total - 1).abs() < 1e-3).logical_or(read.total == 0).all()):
        del lines["total"]
    lines = {name: line for name, line in lines.items() if not bool(line.isnan().all())}
    for name, line in lines.items():
        arrays.add(f"line:{name}{number}", binned(line, points), "f4")
    return {
        "memory": read.memory,
        "layer": read.layer_index,
        "contextual": read.contextual,
        "heads": len(read.numbers),
        "top": 0,
        "numbers": [numbers._asdict() for numbers in read.numbers],
        "lines": list(lines),
    }


def _shown(arrays: _Arrays, number: int, shown: Any, points: int) -> dict[str, Any]:
    for place, trace in enumerate(shown.traces.values()):
        arrays.add(f"trace{number}.{place}", binned(trace, points), "f4")
    for place, shares in enumerate(shown.maps.values()):
        arrays.add(f"map{number}.{place}", binned(shares.T, points), "f4")
    return {
        "memory": shown.memory,
        "layer": shown.layer_index,
        "heads": max((trace.shape[0] for trace in shown.traces.values()), default=0),
        "traces": list(shown.traces),
        "maps": list(shown.maps),
        "columns": [shares.shape[1] for shares in shown.maps.values()],
    }


def _held(arrays: _Arrays, number: int, average: Average, before: int) -> dict[str, Any]:
    """How far back the tokens of an average lie, counted from 1, 0 for none; shares in steps of 0.005."""
    own = before + torch.arange(average.found.shape[1])[None, :, None]
    back = torch.where(average.found >= 0, own - average.found + 1, 0)
    arrays.add(f"held{number}", back.numpy(), "u1" if int(back.max()) < 256 else "u2")
    arrays.add(f"share{number}", average.shares.numpy() * 200, "u1")
    return {"memory": average.memory, "layer": average.layer_index, "top": average.found.shape[-1]}


def _pairs(arrays: _Arrays, found: list[MemoryReads], reads: list[dict[str, Any]], before: int) -> str:
    """Adds the pairs of every head, as many as there is room for, and returns what to say of those left out."""
    room = LARGEST - arrays.size - 2_000_000  # for the text and what it takes to show it
    most = max((read.found.shape[-1] for read in found), default=0)
    for top in range(min(4, most), 0, -1):
        parts = [_packed_pairs(read, top, before) for read in found]
        sizes = [sum(len(one["data"]) for one in part.values()) for part in parts]
        if sum(sizes) <= room or top == 1:
            break
    said = []
    if found and top < min(4, most):
        said.append(f"To keep the page small it has the {top or 1} largest weights of each head and token.")
    worth = [float(read.head_effects.nan_to_num(0.0).abs().sum()) for read in found]
    kept: list[int] = []
    for number in sorted(range(len(found)), key=lambda n: -worth[n]):
        if sum(sizes[n] for n in kept) + sizes[number] <= room:
            kept.append(number)
    if len(kept) < len(found):
        gone = ", ".join(
            f"{found[n].memory} of layer {found[n].layer_index}" for n in range(len(found)) if n not in kept
        )
        said.append(f"What was read by {gone} did not find room on it.")
    for number in kept:
        reads[number]["top"] = min(top, found[number].found.shape[-1])
        for name, one in parts[number].items():
            arrays.packed[f"{name}{number}"] = one
    if said:
        said.append("--data has the rest.")
    return " ".join(said)


def _packed_pairs(read: MemoryReads, top: int, before: int) -> dict[str, dict[str, str]]:
    """How far back pairs lie (or which learned ones they are) counted from 1, 0 for none; weights in steps of 0.0001,
    effects in steps of 0.001."""
    pairs = read.found[..., :top]
    if read.contextual:
        own = before + torch.arange(pairs.shape[1])[None, :, None]
        pairs = torch.where(pairs >= 0, own - pairs, -1)
    effects = read.effects[..., :top]
    thousandths = torch.where(effects.isnan(), -32768, (1000 * effects.nan_to_num(0.0)).clamp(-32767, 32767))
    return {
        "found": packed(pairs.numpy() + 1, "u2" if int(pairs.max()) < 65535 else "u4"),
        "weight": packed(read.weights[..., :top].numpy() * 10000, "i2"),
        "effect": packed(thousandths.numpy(), "i2"),
    }


def _around(inspection: Inspection, texts: list[str], before: int) -> dict[int, str]:
    """The pieces of a long context around what was read of it."""
    near: set[int] = set()
    for read in inspection.reads:
        if read.contextual:
            for place in read.found[..., :4].unique().tolist():
                if 0 <= place < before:
                    near.update(range(max(0, place - AROUND), min(before, place + AROUND)))
    return {place: texts[place] for place in sorted(near)}
