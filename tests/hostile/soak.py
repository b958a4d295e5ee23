"""The breaking tests at length, and a table of what they found: `make soak`, or `make soak MINUTES=5`."""

import argparse
import contextlib
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from . import damage, inputs, kills, large, made, targets  # noqa: F401  (registers the targets)


@dataclass
class Soak:
    """The table, and what went wrong."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def row(self, what: str, tried: object, result: str) -> None:
        self.rows.append((what, f"{tried:,}" if isinstance(tried, int) else str(tried), result))
        print(f"  {what}: {self.rows[-1][1]}, {result}", file=sys.stderr, flush=True)

    def fail(self, where: str, text: str) -> None:
        self.failures.append(f"{where}: {text}")
        print(f"FAILED {self.failures[-1]}", file=sys.stderr, flush=True)

    def table(self) -> str:
        rows = [("what", "tried", "result"), *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"| {a:<{widths[0]}} | {b:>{widths[1]}} | {c:<{widths[2]}} |" for a, b, c in rows]
        lines.insert(1, f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 2)}|")
        return "\n".join(lines)


def kill_all(soak: Soak, draw: random.Random, seconds: float) -> None:
    """Kills of training, of preparing and of evaluating: most of the time goes to the first."""
    for name, kill, share in (
        ("training", kills.kill_training, 0.8),
        ("preparing", kills.kill_preparing, 0.1),
        ("evaluating", kills.kill_evaluating, 0.1),
    ):
        found = kill(10**9, draw, time.monotonic() + seconds * share)
        bad = len(found.failures)
        text = f"{found.done - bad} survived, {found.runs} times brought to the end"
        if name == "training":
            text += (
                f"; {found.inside_a_save} inside a save; at most {found.lost} steps lost, the interval is "
                f"{kills.INTERVAL}; bits lost: {found.bits}"
            )
            if found.bits:
                soak.fail("kills while training", f"{found.bits} bits differ from the run that was never killed")
        soak.row(f"kill -9 while {name}", found.done, text)
        for failure in found.failures:
            soak.fail(f"kills while {name}", failure)


def damage_all(soak: Soak, draw: random.Random, seconds: float) -> None:
    """Damages to everything that has a hash."""
    for kind in damage.KINDS:
        end = time.monotonic() + seconds / len(damage.KINDS)
        found = damage.damage(kind, draw, 10**6, lambda end=end: time.monotonic() < end)
        soak.row(f"damaged files: {kind}", found.done, f"{found.found} found")
        for missed in found.missed:
            soak.fail("damage not found", missed)


def feed(soak: Soak, draw: random.Random, seconds: float) -> None:
    """Drawn inputs to every target, a round after the other."""
    tried, failed = dict.fromkeys(inputs.TARGETS, 0), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name in tried:
            if time.monotonic() > end:
                break
            try:
                tried[name] += inputs.attempts(name, 20, draw.getrandbits(32))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                soak.fail(name, "".join(traceback.format_exception_only(error))[-3000:])
    kinds = sum(count > 0 for count in tried.values())
    text = f"{failed} neither right nor refused in a sentence" if failed else "all right, or refused in a sentence"
    soak.row(f"inputs of {kinds} kinds (of {len(tried)})", sum(tried.values()), text)
    for name, count in tried.items():
        print(f"    {name}: {count:,}", file=sys.stderr)


def sizes(soak: Soak, megabytes: int, documents: int) -> None:
    """Corpora of a strange size."""
    with tempfile.TemporaryDirectory() as folder:
        for what, tried, call in (
            (f"one line of {megabytes} MB", 1, lambda: large.endless_line(Path(folder), megabytes)),
            ("empty documents in a corpus", documents, lambda: large.empty_documents(Path(folder), documents)),
        ):
            wrong = call()
            soak.row(what, tried, wrong or f"prepared whole; {large.peak_megabytes()} MB of memory at most so far")
            if wrong:
                soak.fail(what, wrong)


def where() -> str:
    """The commit and the machine."""
    root = Path(__file__).parents[2]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True).stdout
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return (
        f"commit {commit.strip() or 'unknown'}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{os.cpu_count()} x {processor}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25, help="time for all parts together, at most 30")
    parser.add_argument("--seed", type=int, default=None, help="of all draws; printed, so that a run can be repeated")
    given = parser.parse_args()
    if not 0 < given.minutes <= 30:
        parser.error(f"--minutes is {given.minutes}; give a number above 0 and at most 30")
    seed = random.SystemRandom().getrandbits(32) if given.seed is None else given.seed
    limit = 16 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # what takes it all is a failure here, not of the machine
    soak, draw, began = Soak(), random.Random(seed), time.monotonic()
    seconds = 60 * given.minutes
    whole = given.minutes >= 15

    def part(call: Callable[[], None], name: str) -> None:
        try:
            call()
        except Exception:
            soak.fail(name, traceback.format_exc()[-3000:])

    part(lambda: kill_all(soak, draw, 0.55 * seconds), "kills")
    part(lambda: damage_all(soak, draw, 0.1 * seconds), "damage")
    part(lambda: sizes(soak, *((200, 10**6) if whole else (8, 10**4))), "sizes")
    part(lambda: feed(soak, draw, max(seconds - (time.monotonic() - began), 0.1 * seconds)), "inputs")
    print(f"\n{soak.table()}\n\n{where()}; {(time.monotonic() - began) / 60:.1f} minutes, seed {seed}")
    for failure in soak.failures:
        print(f"\nFAILED {failure}")
    print(f"\n{'nothing broke' if not soak.failures else f'{len(soak.failures)} failures'}")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    made.folder()
    sys.exit(main())
