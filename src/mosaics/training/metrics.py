"""What a run measures: `metrics.jsonl`, TensorBoard and trackers if wished, and the plot of both curves."""

import json
import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mosaics.extras import how_to_install
from mosaics.training.recipe import LoggingSection, Recipe


class Metrics:
    """The log of a run: one JSON object per line, each with its `step`.

    Args:
        path: `metrics.jsonl`. Lines after `step` are dropped first (a continued run writes them again), and
            so is a last line that a killed process left unfinished.
        step: the step from which the run goes on.
        recipe: says whether TensorBoard (in the folder of `path`) and a tracker get the lines, too; None: neither does.

    Raises:
        ValueError: what is asked for is not installed, or does not start.
    """

    def __init__(self, path: Path, step: int = 0, recipe: Recipe | None = None):
        logging = LoggingSection() if recipe is None else recipe.logging
        check_tools(logging)

        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        temporary = path.with_name(f".{path.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(path.parent / "tensorboard", step) if logging.tensorboard else None
        self._tracker = _start_tracker(recipe, path.parent) if logging.tracker else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers and samples go to TensorBoard and the tracker too."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        texts = {"samples": "\n\n".join(values["samples"])} if values.get("samples") else {}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            for name, value in texts.items():
                self._board.add_text(name, value, step)
        self._track("log", numbers | texts, step=step)

    def sync(self) -> None:
        """Make the lines so far outlast a loss of power, as the checkpoint that follows them does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board:
            self._board.close()
        self._track("finish")

    def _track(self, what: str, *given: Any, **more: Any) -> None:
        """Have the tracker do something; a run does not end because somebody else's server does."""
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, what)(*given, **more)
        except Exception as error:
            print(f"warning: the tracker gets nothing more: {_first_line(error)}", file=sys.stderr, flush=True)
            self._tracker = None


def check_tools(logging: LoggingSection) -> None:
    """Refuse what is asked for and not installed.

    Raises:
        ValueError: it is so.
    """
    if logging.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ValueError(f"logging.tensorboard needs TensorBoard: {how_to_install('tensorboard')}") from error
    if logging.tracker is None:
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType
    except ImportError as error:
        raise ValueError(f"logging.tracker needs accelerate: {how_to_install('trackers')}") from error
    name, built_in = logging.tracker, {str(kind) for kind in LoggerType}
    if name not in LOGGER_TYPE_TO_CLASS:
        near = get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
        raise ValueError(f"logging.tracker is {name!r}, which accelerate has not; {hint}")
    if name in built_in and name not in map(str, get_available_trackers()):
        raise ValueError(f"logging.tracker is {name}, which is not installed; python -m pip install {name}")


def _open_tensorboard(folder: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _start_tracker(recipe: Recipe, run: Path):
    """The recipe's tracker, which is told the recipe."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    name = recipe.logging.tracker
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = [str(run / name)] if kind.requires_logging_directory else []
    values = {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in recipe.flat().items()}
    try:
        tracker = kind(run.resolve().name, *place, **recipe.logging.tracker_options)
        tracker.start()
        tracker.store_init_configuration(values)
    except Exception as error:  # whatever a service may raise
        raise ValueError(
            f"logging.tracker: {name} does not start ({_first_line(error)}); mend that and run the same command again"
        ) from error
    return tracker


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


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
