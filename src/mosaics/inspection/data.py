"""What an inspection found, as tables for an analysis of one's own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mosaics.inspection.inspection import Inspection

FORMAT = "mosaics-inspection-1"
NAMES = ("tokens", "forecasts", "effects", "heads", "reads", "pairs", "traces", "maps", "averages")


class Part(NamedTuple):
    """Rows of a table: `about`, what all of them have in common, and the other columns."""

    table: str
    about: dict[str, Any]
    columns: dict[str, np.ndarray]


def tables(inspection: Inspection, texts: list[str] | None = None) -> Iterator[Part]:
    """All tables, part by part.

    Positions count from the beginning of the context, if one was read before, else of the text. A row about reading
    bears the position of the token that was read last; what it forecasts comes one later.

    Args:
        inspection: of a text.
        texts: the pieces of text of all tokens, those of the context first.
    """
    i, before = inspection, len(inspection.context_ids)
    time = len(i.ids)
    positions = np.arange(before, before + time)
    models = {"": i.forecasts, **i.without}
    tokens = {"position": np.arange(before + time), "id": np.concatenate([i.context_ids.numpy(), i.ids.numpy()])}
    if texts is not None:
        tokens["text"] = np.array(texts, dtype=object)
    for name, forecasts in models.items():
        column = np.full(before + time, np.nan)
        column[before + 1 :] = forecasts.of_next[:-1].numpy()
        tokens[f"log_prob without {name}" if name else "log_prob"] = column
    yield Part("tokens", {}, tokens)
    for name, forecasts in models.items():
        count = forecasts.tokens.shape[1]
        columns = {
            "position": np.repeat(positions + 1, count),
            "rank": np.tile(np.arange(1, count + 1), time),
            "id": forecasts.tokens.flatten().numpy(),
            "probability": forecasts.log_probs.exp().flatten().numpy(),
        }
        yield Part("forecasts", {"without": name}, columns)
    for (layer, memory), effect in i.effects.items():
        yield Part("effects", {"memory": memory, "layer": layer}, {"position": positions, "effect": effect.numpy()})
    for read in i.reads:
        about = {"memory": read.memory, "layer": read.layer_index, "contextual": read.contextual}
        for head, numbers in enumerate(read.numbers):
            own = about | {"head": head}
            yield Part("heads", own, {name: np.array([value]) for name, value in numbers._asdict().items()})
            over_time = {
                "position": positions,
                "pairs": read.pairs.numpy(),
                "share": read.total[head].numpy(),
                "near": read.near[head].numpy(),
                "effective_pairs": read.effective[head].numpy(),
                "effect": read.head_effects[head].numpy(),
            }
            if read.residual is not None:
                over_time["residual"] = read.residual[head].numpy()
            yield Part("reads", own, over_time)
            there = read.found[head] >= 0
            pairs = {
                "position": np.repeat(positions, there.sum(-1).numpy()),
                "found": read.found[head][there].numpy(),
                "weight": read.weights[head][there].numpy(),
                "effect": read.effects[head][there].numpy(),
            }
            yield Part("pairs", own, pairs)
    for average in i.averages:
        for head, found in enumerate(average.found):
            own = {"memory": average.memory, "layer": average.layer_index, "head": head}
            there = found >= 0
            columns = {"position": np.repeat(positions, there.sum(-1).numpy()), "found": found[there].numpy()}
            yield Part("averages", own, columns | {"share": average.shares[head][there].numpy()})
    for shown in i.shown:
        about = {"memory": shown.memory, "layer": shown.layer_index}
        for name, trace in shown.traces.items():
            for head, values in enumerate(trace):
                own = about | {"head": head, "name": name}
                yield Part("traces", own, {"position": positions, "value": values.numpy()})
        for name, shares in shown.maps.items():
            for column, values in enumerate(shares.T):
                own = about | {"name": name, "column": column}
                yield Part("maps", own, {"position": positions, "value": values.numpy()})


def check_data(path: Path) -> None:
    """Raises `ValueError` if a file for data is not called `.json` or `.parquet`."""
    if path.suffix not in (".json", ".parquet"):
        raise ValueError(f"{path} is neither .json nor .parquet; give the data one of these endings")


def write_data(path: str | Path, inspection: Inspection, texts: list[str] | None = None) -> None:
    """Write the tables as `.json` or `.parquet`.

    JSON is `{"tables": {name: [part, ...]}}`; a part has lists of equal lengths, and single values that belong to all
    its rows. Parquet is one table whose column `table` says of which a row is; columns that belong to others are empty.

    Args:
        path: the file.
        inspection: of a text.
        texts: as for `tables`.

    Raises:
        ValueError: the file is called otherwise.
        OSError: it can't be written.
    """
    path = Path(path)
    check_data(path)
    (_write_json if path.suffix == ".json" else _write_parquet)(path, inspection, texts)


def _write_json(path: Path, inspection: Inspection, texts: list[str] | None) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({"format": FORMAT, "near": inspection.near})[:-1] + ', "tables": {')
        for number, name in enumerate(NAMES):
            stream.write(f"{', ' if number else ''}{json.dumps(name)}: [")
            parts = (part for part in tables(inspection, texts) if part.table == name)
            for place, part in enumerate(parts):
                stream.write(", {" if place else "{")
                columns = ((name, json.dumps(value)) for name, value in part.about.items())
                lists = ((name, _json(values)) for name, values in part.columns.items())  # made one by one
                for column, (name_of, text) in enumerate(itertools.chain(columns, lists)):
                    stream.write(f"{', ' if column else ''}{json.dumps(name_of)}: {text}")
                stream.write("}")
            stream.write("]")
        stream.write("}}\n")


def _json(values: np.ndarray) -> str:
    """A column as JSON: numbers with seven digits, null for what is no number."""
    if values.dtype.kind != "f":
        return json.dumps(values.tolist())
    values = values.astype(np.float64)
    there = np.isfinite(values)
    digits = 6 - np.floor(np.log10(np.abs(np.where(there & (values != 0), values, 1.0))))
    scale = 10.0 ** np.clip(digits, -300, 300)
    rounded = np.where(there, np.rint(np.where(there, values, 0.0) * scale) / scale, 0.0).tolist()
    return json.dumps(
        rounded if there.all() else [x if known else None for x, known in zip(rounded, there, strict=True)]
    )


def _write_parquet(path: Path, inspection: Inspection, texts: list[str] | None) -> None:
    import pyarrow
    from pyarrow import parquet

    of_arrays = {"f": pyarrow.float32(), "i": pyarrow.int64(), "b": pyarrow.bool_()}
    of_values = {bool: pyarrow.bool_(), int: pyarrow.int64()}
    kinds: dict[str, Any] = {"table": pyarrow.string()}
    for part in tables(inspection, texts):
        for name, value in part.about.items():
            if value is not None:
                kinds[name] = of_values.get(type(value), pyarrow.string())
        for name, values in part.columns.items():
            kinds[name] = of_arrays.get(values.dtype.kind, pyarrow.string())
    schema = pyarrow.schema(list(kinds.items()))
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in tables(inspection, texts):
            size, about = len(next(iter(part.columns.values()))), part.about | {"table": part.table}
            columns = []
            for name, kind in kinds.items():
                if name in part.columns:
                    columns.append(pyarrow.array(part.columns[name], kind, from_pandas=True))
                elif about.get(name) is not None:
                    columns.append(pyarrow.repeat(pyarrow.scalar(about[name], kind), size))
                else:
                    columns.append(pyarrow.nulls(size, kind))
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
