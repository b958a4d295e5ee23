"""What a run measures: `metrics.jsonl`, TensorBoard if wished, and the plot of both curves."""

import json
import os
from pathlib import Path
from typing import Any


class Metrics:
    """The log of a run: one JSON object per line, each with its `step`.

    Args:
        path: `metrics.jsonl`. Lines after `step` are dropped first (a continued run writes them again), and
            so is a last line that a killed process left unfinished.
        step: the step from which the run goes on.
        tensorboard: a folder for TensorBoard's event files, or None.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: Path | None = None):
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        temporary = path.with_name(f".{path.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(tensorboard, step) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers go to TensorBoard too."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Make the lines so far outlast a loss of power, as the checkpoint that follows them does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board:
            self._board.close()


def _open_tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "logging.tensorboard needs the package tensorboard; pip install 'mosaics[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; an unfinished last line is left out, a missing file has none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def is_number(value: Any) -> bool:
    """Whether a value of a line is one that can be drawn and printed; the file may have been edited."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def last_validation(path: Path, step: int | None = None) -> dict[str, Any]:
    """The newest validation figures in a `metrics.jsonl`, not after `step`; empty when there are none."""
    found = [line for line in read_metrics(path) if is_number(line.get("validation_bits_per_byte"))]
    found = [line for line in found if step is None or line["step"] <= step]
    return found[-1] if found else {}


def plot_curves(metrics: Path, picture: Path) -> None:
    """Plot training loss (nats per token) and validation bits per byte against the step, into a PNG file."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, title, unit in zip(
        figure.subplots(1, 2),
        ("loss", "validation_bits_per_byte"),
        ("Training loss", "Held-out text"),
        ("nats per token", "bits per byte"),
        strict=True,
    ):
        points = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
        axes.plot(
            *zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3
        ) if points else None
        axes.set(title=title, xlabel="optimisation step", ylabel=unit)
        axes.grid(alpha=0.3)
    temporary = picture.with_name(f".{picture.name}.new")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, picture)
