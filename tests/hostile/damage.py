"""One bit flipped, an end cut off, a file taken away: in every file that has a hash, and found again."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import made

HOW = ("flipped bit", "cut", "removed")


@dataclass
class Damages:
    """How many files were damaged, how many of these were found, and which were not."""

    done: int = 0
    found: int = 0
    missed: list[str] = field(default_factory=list)


def _checkpoint() -> Path:
    return max(path for path in (made.run() / "checkpoints").iterdir() if path.name.startswith("step-"))


def _check_checkpoint(folder: Path) -> None:
    from mosaics.training.checkpoint import verify_checkpoint

    verify_checkpoint(folder)


def _check_prepared(folder: Path) -> None:
    from mosaics.data import PreparedCorpus

    PreparedCorpus(folder).verify()


def _check_exported(folder: Path) -> None:
    from mosaics.models.loading import load_exported

    load_exported(folder)


def _check_memory(folder: Path) -> None:
    from mosaics.models.loading import load_model
    from mosaics.models.memory_file import load_memory

    load_memory(folder / "text.safetensors", load_model(made.exported()))


_EDITABLE = {("README.md", how) for how in HOW} | {("manifest.json", "removed")}
# What is damaged, what needs not be noticed, and who has to notice the rest. Of an exported model the card is there to
# be edited, and who means to change another file takes the hashes away.
KINDS: dict[str, tuple[Callable[[], Path], set[tuple[str, str]], Callable[[Path], None]]] = {
    "checkpoint": (_checkpoint, set(), _check_checkpoint),
    "prepared corpus": (made.prepared, set(), _check_prepared),
    "memory of a context": (made.memory, set(), _check_memory),
    "exported model": (
        made.exported,
        _EDITABLE,
        _check_exported,
    ),
}


def damage(kind: str, draw: random.Random, rounds: int = 1, more: Callable[[], bool] = lambda: True) -> Damages:
    """Damages every file of a kind in every way, one at a time, and looks whether it is noticed by an error that
    names the file or the folder; afterwards the folder has to be accepted again.

    Args:
        kind: of `KINDS`.
        draw: of the bit and of where a file is cut.
        rounds: how often.
        more: whether to go on after the first time.
    """
    source, without, check = KINDS[kind]
    result, folder = Damages(), made.folder() / "damaged"
    shutil.copytree(source(), folder)
    try:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for number, name in ((number, name) for number in range(rounds) for name in names):
            for how in HOW:
                if number and not more():
                    return result
                if (name, how) in without:
                    continue
                _damage(folder / name, how, draw)
                result.done += 1
                try:
                    check(folder)
                    result.missed.append(f"{kind}: {name}, {how}")
                except Exception as error:
                    if isinstance(error, ValueError | OSError) and str(folder) in str(error):
                        result.found += 1
                    else:
                        result.missed.append(f"{kind}: {name}, {how}, {error!r}")
                finally:
                    shutil.copy(source() / name, folder / name)
        check(folder)
        return result
    finally:
        shutil.rmtree(folder)


def _damage(path: Path, how: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
