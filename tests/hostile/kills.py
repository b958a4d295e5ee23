"""Processes killed at every kind of moment, and what is left when they are started again.

A server process has imported everything and forks a child for each attempt, so that an attempt costs no import. A child
dies by SIGKILL, either after a drawn time, or right before its n-th operation on a file (`sys.addaudithook`): so saves
are hit at every step of theirs, however short they are. SIGKILL leaves the system's file cache whole; what a power
failure does is not tried here.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from . import made

_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
_ERROR = 3  # exit code of a child that raised


@dataclass
class Kills:
    """What kills left. `lost` is in steps, `bits` counts differing bits of the final parameters."""

    done: int = 0
    inside_a_save: int = 0
    runs: int = 0
    lost: int = 0
    bits: int = 0
    failures: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Kills") -> "Kills":
        self.done += other.done
        self.inside_a_save += other.inside_a_save
        self.runs += other.runs
        self.lost = max(self.lost, other.lost)
        self.bits += other.bits
        self.failures += other.failures
        return self


def attempt(
    work: Callable, *, under: Path, after: float | None = None, operation: int | None = None
) -> tuple[str, bool]:
    """Does `work` in a forked child that dies after a time, or before its n-th operation on a file below a folder.

    Args:
        work: what to do.
        under: the folder whose files count.
        after: seconds.
        operation: from 1.

    Returns:
        `killed`, `done`, or what the child said when it failed; and whether a save was under way.
    """
    log = under.parent / f"{under.name}.log"
    child = os.fork()
    if child == 0:
        code = _ERROR
        try:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
            torch.set_num_threads(1)  # no pool of threads to be missing after the fork
            seen = _die_before(operation, under)
            work()
            log.with_suffix(".count").write_text("\n".join(seen))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    timer = threading.Timer(after, _kill, [child]) if after is not None else None
    if timer:
        timer.start()
    status = os.waitpid(child, 0)[1]
    if timer:
        timer.cancel()
        timer.join()
    saving = any(path.name.startswith(".") for path in _checkpoints(under).glob(".*"))
    if os.WIFSIGNALED(status):
        return ("killed" if os.WTERMSIG(status) == signal.SIGKILL else f"died of signal {os.WTERMSIG(status)}"), saving
    return ("done" if os.WEXITSTATUS(status) == 0 else log.read_text(errors="replace")[-3000:]), saving


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _checkpoints(run: Path) -> Path:
    return run / "checkpoints"


def _die_before(operation: int | None, under: Path) -> list[str]:
    """Watches operations on files below a folder, and kills this process before one of them; the paths so far."""
    seen, root = [], str(under)

    def watch(event: str, arguments: tuple) -> None:
        if event in _OPERATIONS and str(arguments[0]).startswith(root):
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            seen.append(str(arguments[0]))
            if len(seen) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return seen


def operations(work: Callable, under: Path) -> list[str]:
    """The paths of the operations on files below a folder that `work` takes when nobody kills it."""
    status, _ = attempt(work, under=under)
    assert status == "done", status
    shutil.rmtree(under)
    return _counted(under)


def _counted(under: Path) -> list[str]:
    return (under.parent / f"{under.name}.count").read_text().splitlines()


# Training


@functools.cache
def reference() -> tuple[Path, object, float, list[str]]:
    """A run that was never killed, its recipe, the seconds that it took and its operations on files."""
    from mosaics.training import train

    recipe, folder = _recipe(), made.folder() / "uninterrupted"
    began = time.monotonic()
    status, _ = attempt(partial(train, recipe, folder), under=folder)
    assert status == "done", status
    return folder, recipe, time.monotonic() - began, _counted(folder)


STEPS, INTERVAL = 12, 3


def _recipe():
    from mosaics.training.recipe import make_recipe

    values = made.values(steps=STEPS, batch_size=2, micro_batch_size=2)
    values["checkpoint"] = {"every": INTERVAL, "keep": 2}
    values["validation"] = {"every": 6, "sequences": 2}
    return make_recipe(values)


def _steps(run: Path) -> int:
    """The last step whose line is in the log: it was done."""
    from mosaics.training.metrics import read_metrics

    return max((line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line), default=0)


def _saved(run: Path) -> int:
    """The step of the newest whole checkpoint."""
    from mosaics.training.checkpoint import newest_checkpoint

    newest, damaged = newest_checkpoint(_checkpoints(run))
    assert not damaged, damaged
    return int(newest.name.removeprefix("step-")) if newest else 0


def kill_training(kills: int, draw: random.Random, until: float = float("inf")) -> Kills:
    """Kills runs over and over until each is finished, and compares it with one that was never killed.

    A third of the kills come after a drawn time, a third right before a drawn operation on a file, a third right before
    one of a save.

    Args:
        kills: how many at least (the last run is brought to its end).
        draw: of the moments.
        until: `time.monotonic()` after which no further run is begun, if there have been three kills.
    """
    from mosaics.training import train

    whole, recipe, lasts, paths = reference()
    found, root = Kills(), made.folder() / "killed"
    root.mkdir(exist_ok=True)
    saves = [number for number, path in enumerate(paths, 1) if "step-" in path]
    while found.done < kills and (found.done < 3 or time.monotonic() < until):
        run = root / f"run-{found.runs}"
        fruitless = 0
        while True:
            # A run that does not come further between kills is let go in the end.
            number = draw.randint(1, len(paths))
            moment = draw.choice(
                [{"after": draw.uniform(0, lasts)}, {"operation": number}, {"operation": draw.choice(saves)}]
            )
            before = _steps(run)
            status, saving = attempt(partial(train, recipe, run), under=run, **({} if fruitless > 20 else moment))
            if status == "done":
                break
            if status != "killed":
                found.failures.append(status)
                break
            found.done += 1
            found.inside_a_save += saving
            try:
                saved, done = _saved(run), _steps(run)
            except Exception as error:  # no whole checkpoint is left: the worst that can happen
                found.failures.append(repr(error))
                break
            fruitless = fruitless + 1 if done <= before else 0
            found.lost = max(found.lost, done - saved)
        found.runs += 1
        if status == "done":
            found.bits += different_bits(whole, run)
            if _log(whole) != _log(run):
                found.failures.append(f"the log of {run.name} differs")
            left = [path.name for path in _checkpoints(run).glob(".*")] + [path.name for path in run.glob(".*.new")]
            if left:
                found.failures.append(f"{run.name} is finished and has {left[0]}")
        shutil.rmtree(run, ignore_errors=True)
    if found.lost > INTERVAL:
        found.failures.append(f"{found.lost} steps were lost, and the interval is {INTERVAL}")
    return found


def different_bits(one: Path, other: Path) -> int:
    """Bits that differ between the last checkpoints' and exports' tensors of two runs; a missing file counts whole."""
    import numpy as np

    def tensors(run: Path) -> dict[str, Path]:
        newest = max(path for path in _checkpoints(run).iterdir() if path.name.startswith("step-"))
        files = [*newest.glob("*.safetensors"), *(run / "export").glob("*.safetensors")]
        return {f"{path.parent.name}/{path.name}": path for path in files}

    mine, theirs, bits = tensors(one), tensors(other), 0
    assert mine
    for name in mine.keys() | theirs.keys():
        a, b = (side[name].read_bytes() if name in side else b"" for side in (mine, theirs))
        length = min(len(a), len(b))
        differ = np.frombuffer(a[:length], np.uint8) ^ np.frombuffer(b[:length], np.uint8)
        bits += int(np.unpackbits(differ).sum()) + 8 * abs(len(a) - len(b))
    return bits


def _log(run: Path) -> list[dict]:
    from mosaics.training.metrics import read_metrics

    timed = {"tokens_per_second"}
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run / "metrics.jsonl")]


# Preparing, and evaluating


def _contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill_preparing(kills: int, draw: random.Random, until: float = float("inf")) -> Kills:
    """Kills `prepare`, and runs it again: the same files, and nothing left over."""
    from mosaics.data import prepare

    place = made.folder() / "preparing"
    place.mkdir(exist_ok=True)
    found, right = Kills(), _contents(made.prepared())

    def work() -> None:
        prepare(str(made.corpus()), place / "data", vocab_size=300, validation=0.2)

    paths = operations(work, place)
    for _ in range(kills):
        if found.done >= 3 and time.monotonic() > until:
            break
        place.mkdir()
        status, _ = attempt(work, operation=draw.randint(1, len(paths)), under=place)
        if status != "killed":
            found.failures.append(status)
            continue
        found.done += 1
        if (place / "data").exists() and _contents(place / "data") != right:
            found.failures.append("a killed prepare left a folder that is not whole")
        status, _ = attempt(work, under=place)
        found.runs += 1
        left = sorted(path.name for path in place.iterdir())
        if status != "done" or left != ["data"] or _contents(place / "data") != right:
            found.failures.append(f"after a killed prepare: {status}, {left}")
        shutil.rmtree(place)
    return found


def kill_evaluating(kills: int, draw: random.Random, until: float = float("inf")) -> Kills:
    """Kills an evaluation, and lets it go on: the result of one that was never killed."""
    from mosaics.evaluation import Recall, Scorer, evaluate

    model = reference()[0] / "export"
    found, place = Kills(), made.folder() / "evaluating"

    def work() -> None:
        evaluate(Recall(lengths=(48,), pairs=(2,), samples=20), Scorer.load(model), place)

    attempt(work, under=place)
    right = _contents(place)
    paths = _counted(place)
    for _ in range(kills):
        if found.done >= 3 and time.monotonic() > until:
            break
        shutil.rmtree(place, ignore_errors=True)
        status, _ = attempt(work, operation=draw.randint(1, len(paths)), under=place)
        if status != "killed":
            found.failures.append(status)
            continue
        found.done += 1
        status, _ = attempt(work, under=place)
        found.runs += 1
        left = {name: digest for name, digest in _contents(place).items() if not name.startswith(".")}
        if status != "done" or left != right:
            found.failures.append(f"after a killed evaluation: {status}, {sorted(left)}")
    return found


def main() -> None:
    """Prints what a number of kills of training, and one each of preparing and evaluating, left, as JSON."""
    draw = random.Random(int(sys.argv[2]))
    parts = {"training": kill_training, "preparing": kill_preparing, "evaluating": kill_evaluating}
    print(json.dumps({n: asdict(kill(int(sys.argv[1]) if n == "training" else 1, draw)) for n, kill in parts.items()}))


if __name__ == "__main__":
    main()
