"""Three moons: what several heads are for (Memory Mosaics v1, section 3).

Three moons turn around, each with a period of its own; a position is three complex numbers of size 1. One contextual
memory with complex-linear maps forecasts the next position, once with one head of 6 dimensions and once with three
heads of 2. One head can look up nothing but a moment at which all three moons stood as they do now, which takes a
period of the whole system. Three heads can learn to look up each moon alone, and then the slowest moon's period is
enough.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mosaics._version import __version__
from mosaics.experiments.report import provenance
from mosaics.experiments.studies import machine, run_each
from mosaics.experiments.study import Part, digest
from mosaics.experiments.trainings import say, write_json
from mosaics.ops.kernel_regression import Bandwidth, Reach, kernel_regression
from mosaics.reporting import Lead, Section, Table, draw, embedded, write_page

NAME = "three-moons"
ONE, THREE = "one head", "three heads"
HEADS = {ONE: 1, THREE: 3}
MAPS = ("key", "value", "output")
TRIPLES = 9  # of 35: those that come back soonest; the last is held out
SAMPLES, BLOCK, BLOCK_PERIODS = 10_000, 800, 3
PHASE, BANDWIDTH, CLIP = 0.3, 50.0, 0.5
FORECASTS, EVERY, AHEAD = 16, 5, 25
LAST = 20  # steps whose mean is the training loss
RIGHT = 1 / math.pi  # mean absolute error of right forecasts, at most: half of what the middle itself would have


class Moons(Part):
    """What is trained and for how long. The paper's are one start of 500 steps of 64, with a learning rate of 0.01.

    Attributes:
        steps: of optimisation.
        batch_size: stretches of 800 positions in a step.
        learning_rate: of the first step; it falls to next to nothing in a line.
        starts: trainings from different initial values; the one with the lowest training loss is taken.
    """

    steps: int = 250
    batch_size: int = 4
    learning_rate: float = 2e-2
    starts: int = 4

    @classmethod
    def changed(cls, changes: dict[str, Any] | None) -> Moons:
        """With values by dotted key, as `training.steps`.

        Raises:
            ValueError: there is no such key, or its value is out of range.
        """
        known = {f"training.{key}": key for key in cls.model_fields}
        for dotted, value in (changes or {}).items():
            if dotted not in known:
                raise ValueError(f"--{dotted} is nothing that three-moons can change; it takes --{', --'.join(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"--{dotted} is {value!r}; give a number above 0")
        return cls(**{known[dotted]: value for dotted, value in (changes or {}).items()})


def triples() -> list[tuple[float, ...]]:
    """Periods of the moons, the held-out ones last, ordered by the period of the whole system."""
    half = sorted(combinations(range(1, 8), 3), key=lambda triple: math.lcm(*triple))
    return [tuple(period / 2 for period in triple) for triple in half[:TRIPLES]]


def whole(periods: tuple[float, ...]) -> float:
    """The period after which all moons stand as before."""
    return math.lcm(*(round(2 * period) for period in periods)) / 2


def spacing() -> float:
    """Time between two positions: a block has at least three periods of any system."""
    return BLOCK_PERIODS * max(map(whole, triples())) / BLOCK


def periods_in_positions() -> tuple[int, int]:
    """Of the held-out moons: the slowest one's period, and that of all together."""
    return round(max(triples()[-1]) / spacing()), round(whole(triples()[-1]) / spacing())


def positions(periods: tuple[float, ...], start: int, count: int) -> Tensor:
    """Where the moons stand: complex64 `(count, 3)`."""
    times = spacing() * np.arange(start, start + count)[:, None]
    return torch.from_numpy(np.exp(1j * (2 * np.pi * times / np.array(periods) + PHASE))).to(torch.complex64)


class MoonMemory(nn.Module):
    """One contextual memory: k_t = W_key z_t, v_t = W_value z_(t+1), and the next position is W_output times what is
    read at t, with bandwidth 50, from the pairs before. The maps are complex 3 × 3 matrices."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in MAPS:  # a matrix of uniform numbers up to 1/sqrt(6), made complex by averaging
            drawn = torch.empty(2, 3, 3, 2).uniform_(-(6**-0.5), 6**-0.5).mean(0)
            self.register_parameter(name, nn.Parameter(drawn))

    def map(self, name: str) -> Tensor:
        """The complex matrix."""
        return torch.view_as_complex(getattr(self, name))

    def forward(self, z: Tensor, last: bool = False) -> Tensor:
        """What comes next after each position of `z`, complex `(batch, time, 3)`; `last`: after the last one only."""
        keys, values = (self._split(z @ self.map(name).T) for name in ("key", "value"))
        values = nn.functional.pad(values[:, :, 1:], (0, 0, 0, 1))  # the last one is not known yet, and not read
        queries = keys[:, :, -1:] if last else keys
        bandwidth = Bandwidth(torch.full((self.heads,), BANDWIDTH))
        read = kernel_regression(queries, keys, values, bandwidth, Reach(1))
        read = torch.view_as_complex(read.transpose(1, 2).unflatten(-1, (-1, 2)).flatten(2, 3).contiguous())
        return read @ self.map("output").T

    def _split(self, z: Tensor) -> Tensor:
        """`(batch, time, 3)`, complex, to `(batch, heads, time, 6 / heads)`, real."""
        return torch.view_as_real(z).flatten(2).unflatten(2, (self.heads, -1)).transpose(1, 2).contiguous()


def train(moons: Moons, arrangement: str, seed: int, cache: Path) -> str:
    """Train one model and forecast with it, unless the cache has it; says which."""
    path = _path(moons, arrangement, seed, cache)
    name = f"three moons · {arrangement} · seed {seed}"
    if path.is_file():
        return name
    began = time.monotonic()
    # Weights of far pairs are as good as 0, and slow by a factor of five if they are not quite.
    torch.set_flush_denormal(True)
    found = []
    for start in range(moons.starts):
        found.append(_train(moons, arrangement, seed, start))
        say(f"{name}: start {start + 1} of {moons.starts}, loss {found[-1][0]:.5f}")
    loss, model, curve = min(found, key=lambda one: one[0])
    seconds = time.monotonic() - began
    result = {"loss": loss, "losses": [one[0] for one in found], "maps": {n: model.map(n).abs().tolist() for n in MAPS}}
    result |= {
        "errors": errors(model, seed),
        "curve": curve[:: max(1, len(curve) // 200)],
        "seconds": round(seconds, 1),
    }
    torch.set_flush_denormal(False)
    write_json(path, result)
    return name


def _train(moons: Moons, arrangement: str, seed: int, start: int) -> tuple[float, MoonMemory, list[list[float]]]:
    """The training loss, the model, and the curve."""
    torch.manual_seed(1000 * seed + start)
    rng = np.random.default_rng([seed, 1, start])
    model = MoonMemory(HEADS[arrangement])
    optimizer = torch.optim.AdamW(model.parameters(), lr=moons.learning_rate, weight_decay=0.0)
    training = triples()[:-1]
    curve = []
    for step in range(moons.steps):
        # The authors' optimizer (MLX) does not correct the bias of its running means, so that early steps are longer.
        uncorrected = (1 - 0.9 ** (step + 1)) / math.sqrt(1 - 0.999 ** (step + 1))
        for group in optimizer.param_groups:
            group["lr"] = moons.learning_rate * uncorrected * (1 - (1 - 5e-4) * step / moons.steps)
        size = moons.batch_size
        chosen = rng.integers(len(training), size=size), rng.integers(SAMPLES - 2 * BLOCK, size=size)
        z = torch.stack([positions(training[which], at, BLOCK + 1) for which, at in zip(*chosen, strict=True)])
        error = torch.view_as_real(model(z[:, :-1]) - z[:, 1:]).clamp(-CLIP, CLIP)
        loss = error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append([step + 1, loss.item()])
    last = [loss for _, loss in curve[-LAST:]]
    return sum(last) / len(last), model.eval(), curve


def _path(moons: Moons, arrangement: str, seed: int, cache: Path) -> Path:
    decides = [moons.model_dump(mode="json"), arrangement, seed, __version__]
    return cache / NAME / f"{digest(decides)}.json"


@torch.no_grad()
def errors(model: nn.Module, seed: int) -> list[tuple[int, float]]:
    """For contexts of the held-out moons: their length, and the mean absolute error of the 25 positions after it, each
    forecast from the ones before, over several starts."""
    rng = np.random.default_rng([seed, 2])
    starts = rng.integers(SAMPLES - 2 * BLOCK, size=FORECASTS).tolist()
    truth = torch.stack([positions(triples()[-1], start, BLOCK) for start in starts])
    found = []
    for length in range(EVERY, BLOCK - AHEAD + 1, EVERY):
        z = truth[:, :length]
        for _ in range(AHEAD):
            z = torch.cat([z, model(z, last=True)], dim=1)
        missed = torch.view_as_real(z[:, length:] - truth[:, length : length + AHEAD])
        found.append((length, missed.abs().mean().item()))
    return found


def moment(found: list[tuple[int, float]]) -> int | None:
    """The context length from which on all forecasts are right; None if those of the longest are not."""
    right = None
    for length, error in reversed(found):
        if error > RIGHT:
            break
        right = length
    return right


def isolation(maps: dict[str, list[list[float]]]) -> float:
    """How far three heads see one moon each, in percent: of a key's square, what comes from the moon that is the head's
    own, in the head where that is least; moons are given to heads as well as can be."""
    square = np.array(maps["key"]) ** 2
    shares = square / square.sum(1, keepdims=True)
    return 100 * max(float(min(shares[range(3), list(own)])) for own in permutations(range(3)))


def run(seeds: Sequence[int], changes: dict[str, Any] | None, cache: Path, jobs: int = 1) -> dict[str, Any]:
    """Train both arrangements with every seed, forecast, and collect.

    Args:
        seeds: of the trainings.
        changes: values by dotted key, see `Moons`.
        cache: of what is done; an interrupted experiment goes on after the last finished training.
        jobs: processes that train side by side.

    Returns:
        `study` (settings, seeds), `models` (loss, time, size of every number of the maps), `rows` (as of a study:
        `error` by context length, `moment` in positions, `isolation` in percent) and `machine`.

    Raises:
        ValueError: there is nothing of that name to change.
    """
    moons = Moons.changed(changes)
    tasks = [(moons, arrangement, seed, cache) for seed in seeds for arrangement in HEADS]
    run_each(train, tasks, jobs, "model")
    models, rows = [], []
    for moons, arrangement, seed, cache in tasks:
        found = json.loads(_path(moons, arrangement, seed, cache).read_text(encoding="utf-8"))
        labels = {"setting": NAME, "arrangement": arrangement, "seed": seed}
        models.append(labels | {key: found[key] for key in ("loss", "losses", "seconds", "maps", "curve")})
        errors = found["errors"]
        answers = [("error", length, error) for length, error in errors] + [("moment", 0, moment(errors))]
        if HEADS[arrangement] == 3:
            answers.append(("isolation", 0, isolation(found["maps"])))
        rows += [labels | {"evaluation": name, "x": x, "y": y} for name, x, y in answers]
    study = {"seeds": list(seeds), "settings": [moons.model_dump(mode="json") | {"name": NAME}]}
    return {"study": study, "models": models, "rows": rows, "machine": machine()}


def write_report(
    results: dict[str, Any], folder: Path, verdict: Sequence[Section | Lead] = (), command: str = ""
) -> Path:
    """Write results.json, plots as PNG and report.html; its path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    (setting,) = results["study"]["settings"]
    slowest, together = periods_in_positions()
    curves = []
    for model in results["models"]:
        wanted = {key: model[key] for key in ("arrangement", "seed")} | {"evaluation": "error"}
        mine = [(row["x"], row["y"]) for row in results["rows"] if wanted.items() <= row.items()]
        curves.append((model["arrangement"], model["seed"], *zip(*mine, strict=True)))
    plot = {
        "title": f"Forecasts of {AHEAD} positions, moons not trained on",
        "x": "positions before",
        "y": "mean absolute error",
        "log_x": False,
        "curves": curves,
        "marks": [("slowest moon's period", slowest), ("period of the whole system", together)],
    }
    numbers = {(r["arrangement"], r["seed"], r["evaluation"]): r["y"] for r in results["rows"]}
    figures = [
        [m["arrangement"], m["seed"], numbers[m["arrangement"], m["seed"], "moment"]]
        + [numbers.get((m["arrangement"], m["seed"], "isolation")), m["loss"], m["seconds"] / 60]
        for m in results["models"]
    ]
    about = (
        f"Trained on {TRIPLES - 1} systems: {setting['steps']} steps of {setting['batch_size']} × {BLOCK} positions, "
        f"the best of {setting['starts']} starts by training loss. Forecast: moons of periods "
        f"{', '.join(map(str, triples()[-1]))}, which take {slowest} positions (the slowest) and {together} (all "
        "together)."
    )
    note = f"Right: from that many positions on, the error is at most {RIGHT:.2f}, half of what the middle has as a "
    columns = ["model", "seed", "right from (positions)", "one moon a head (%)", "training loss", "minutes"]
    asked = Section(
        "Forecasts",
        about,
        figures=[draw(plot, folder / "error.png"), _maps(results["models"], folder / "maps.png")],
        tables=[Table("forecasts", columns, figures, note + "forecast.")],
    )
    leads = [part for part in verdict if isinstance(part, Lead)]
    sections = [part for part in verdict if isinstance(part, Section)]
    title = results["study"]["title"]
    return write_page(folder / "report.html", title, leads, [*sections, asked, provenance(results, command)])


def _maps(models: Sequence[dict[str, Any]], png: Path) -> str:
    """The learned matrices: the size of every complex number, a row of pictures for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.9 * len(models)), layout="constrained")
    for row, (line, model) in enumerate(zip(figure.subplots(len(models), 3, squeeze=False), models, strict=True)):
        for axes, name in zip(line, MAPS, strict=True):
            axes.imshow(model["maps"][name], cmap="viridis", vmin=0)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(name if row == 0 else "", fontsize="medium")
        line[0].set_ylabel(f"{model['arrangement']}\nseed {model['seed']}")
    return embedded(
        figure, "Learned maps: sizes of their complex numbers, from moons (across) to dimensions (down)", png
    )
