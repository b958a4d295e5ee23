"""What the answers of a study say about a claim: numbers with intervals, and a verdict that can be "can't be told"."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from mosaics.evaluation.results import wilson
from mosaics.experiments.claims import Check, Claim, Term
from mosaics.experiments.records import by_predictor

RESAMPLES = 2000
HOLDS, FAILS, OPEN, LEFT_OUT = "holds", "does not hold", "can't be told", "left out"


class Answers:
    """The numbers of one arrangement in one evaluation.

    Attributes:
        xs: points, sorted.
        seeds: of the trainings.
        values: `(seeds, points)`.
        scores: for each point `(seeds, examples)`, or nothing where single examples were not kept.
        groups: for each point the group of each example: questions about one context, stretches of one document.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.xs = sorted({row["x"] for row in rows})
        self.seeds = sorted({row["seed"] for row in rows})
        at = {(row["seed"], row["x"]): row for row in rows}
        values = [[at[seed, x]["y"] for x in self.xs] for seed in self.seeds]
        self.values = np.array([[np.inf if y is None else y for y in line] for line in values], dtype=float)  # never
        self.scores, self.groups = [], []
        if all("scores" in row for row in rows):
            for x in self.xs:
                self.scores.append(np.array([at[seed, x]["scores"] for seed in self.seeds], dtype=float))
                sizes = at[self.seeds[0], x].get("groups") or [1] * self.scores[-1].shape[1]
                self.groups.append(np.repeat(np.arange(len(sizes)), sizes))

    @cached_property
    def by_group(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each point the sums of scores of each group, `(seeds, groups)`, and the groups' sizes."""
        pairs = zip(self.scores, self.groups, strict=True)
        return [(np.array([np.bincount(group, line) for line in s]), np.bincount(group)) for s, group in pairs]

    @cached_property
    def are_shares(self) -> bool:
        """Whether examples are right or wrong."""
        return bool(self.scores) and all(np.isin(s, (0, 1)).all() for s in self.scores)

    @property
    def can_be_drawn_anew(self) -> bool:
        """Whether something says how far the numbers may be off: several seeds or groups, or shares."""
        groups = min((int(group[-1]) + 1 for group in self.groups), default=1)
        return len(self.seeds) > 1 or groups > 1 or self.are_shares

    @property
    def unit(self) -> float:
        """What scores are multiplied by to be values: shares are given in percent."""
        return 100.0 if self.are_shares else 1.0


def collect(rows: list[dict[str, Any]], arrangement: str, setting: str, evaluation: str) -> Answers | None:
    """The answers of an arrangement to what it was asked in a setting; None without any."""
    wanted = (arrangement, setting, evaluation)
    found = [row for row in rows if (row["arrangement"], row["setting"], row["evaluation"]) == wanted]
    return Answers(found) if found else None


def measured(term: Term, values: np.ndarray) -> np.ndarray:
    """A term's measure of `values` `(..., points)`."""
    if term.measure == "value":
        return values[..., term.at]
    if term.measure == "spread":
        values = values[..., term.at % values.shape[-1] :]
        return values.std(-1) / values.mean(-1)
    sign = 1 if term.measure == "fall" else -1
    best = np.zeros(values.shape[:-1])
    for i in range(values.shape[-1] - 1):
        best = np.maximum(best, (sign * (values[..., i : i + 1] - values[..., i + 1 :])).max(-1))
    return best


def difference(check: Check, rows: list[dict[str, Any]], seed: int = 0) -> dict[str, Any] | None:
    """How far both sides of a check are apart, positive where it says so.

    Seeds are drawn anew with replacement, and so are the groups of examples, the same for both sides; the interval
    holds 95 % of the means. Where both sides are shares, it is at least as wide as Newcombe's of two shares (or
    Wilson's of one): a hundred of a hundred is not certainty.

    Returns:
        `left`, `right` (means over seeds; the right one with factor and margin), `estimate`, `low`, `high`, `by_seed`
        (the differences); None where a side is missing.
    """
    sides = [None if term is None else _side(term, rows) for term in (check.left, check.right)]
    if sides[0] is None or (check.right is not None and sides[1] is None):
        return None
    sign = 1 if check.relation == ">=" else -1

    def apart(values: list[np.ndarray | None]) -> np.ndarray:
        left = measured(check.left, values[0])
        right = 0.0 if check.right is None else check.factor * measured(check.right, values[1])
        return sign * (left - right - check.margin)

    by_seed = apart([None if side is None else side.values for side in sides])
    generator = np.random.default_rng([seed, 17])
    drawn = np.array(
        [apart([_redrawn(side, generator_of) for side in sides]) for generator_of in _draws(sides, generator)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    estimate = float(by_seed.mean())
    if wider := _of_shares(check, sides):
        low, high = min(low, estimate - wider[0]), max(high, estimate + wider[1])
    left = float(measured(check.left, sides[0].values).mean())
    right = check.margin
    if check.right is not None:
        right += check.factor * float(measured(check.right, sides[1].values).mean())
    by_seed = {str(s): round(float(d), 4) for s, d in zip(sides[0].seeds, by_seed, strict=True)}
    return {
        "left": left,
        "right": right,
        "estimate": estimate,
        "low": float(low),
        "high": float(high),
        "by_seed": by_seed,
    }


def intervals(answers: Answers, seed: int = 0) -> list[tuple[float, float] | None]:
    """The 95 % interval of the mean over seeds at each point: seeds and groups of examples drawn anew, for shares at
    least Wilson's; None where neither seeds nor examples say how far it goes."""
    if not answers.can_be_drawn_anew:
        return [None] * len(answers.xs)
    found: list[tuple[float, float] | None] = []
    for place, values in enumerate(answers.values.T):
        generator, count = np.random.default_rng([seed, 17, place]), len(values)
        seeds = generator.multinomial(count, [1 / count] * count, RESAMPLES) / count
        if not answers.scores:
            ends = np.quantile(seeds @ values, [0.025, 0.975]) if np.isfinite(values).all() else None
            found.append(None if ends is None else (float(ends[0]), float(ends[1])))
            continue
        scores, group = answers.scores[place], answers.groups[place]
        groups = group[-1] + 1
        weights = generator.multinomial(groups, [1 / groups] * groups, RESAMPLES)[:, group]
        means = (seeds * (weights @ scores.T)).sum(1) / weights.sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        if answers.are_shares:
            least = wilson(float(scores.mean()), scores.size)
            low, high = min(low, least[0]), max(high, least[1])
        found.append((answers.unit * float(low), answers.unit * float(high)))
    return found


def _side(term: Term, rows: list[dict[str, Any]]) -> Answers | None:
    return collect(rows, term.arrangement, term.setting, term.evaluation)


def _draws(sides: list[Answers | None], generator: np.random.Generator):
    """For each resample, which seeds, and for every number of groups which of them."""
    seeds = len(sides[0].seeds)
    for _ in range(RESAMPLES):
        known: dict[int, np.ndarray] = {}

        def groups(count: int, known=known) -> np.ndarray:
            if count not in known:
                known[count] = np.bincount(generator.integers(0, count, count), minlength=count)
            return known[count]

        yield generator.integers(0, seeds, seeds), groups


def _redrawn(side: Answers | None, draw: tuple[np.ndarray, Callable[[int], np.ndarray]]) -> np.ndarray | None:
    """The mean over drawn seeds of a side's values, of drawn examples: `(points,)`."""
    if side is None:
        return None
    seeds, groups = draw
    if not side.scores:
        return side.values[seeds % len(side.seeds)].mean(0)
    found = []
    for sums, sizes in side.by_group:
        weights = groups(len(sizes))
        found.append((sums[seeds % len(side.seeds)] @ weights).sum() / (sizes @ weights * len(seeds)))
    return side.unit * np.array(found)


def _of_shares(check: Check, sides: list[Answers | None]) -> tuple[float, float] | None:
    """How far below and above the estimate the interval of shares reaches; None where they are no shares."""
    terms = [(term, side) for term, side in zip((check.left, check.right), sides, strict=True) if term is not None]
    if not all(side.are_shares and term.measure == "value" for term, side in terms):
        return None
    below = above = 0.0
    for number, (term, side) in enumerate(terms):
        scores = side.scores[term.at]
        low, high = wilson(float(scores.mean()), scores.size)
        under, over = float(scores.mean()) - low, high - float(scores.mean())
        if (number == 1) != (check.relation == "<="):  # where this side stands with a minus
            under, over = over, under
        factor = check.factor if number else 1.0
        below, above = math.hypot(below, 100 * factor * under), math.hypot(above, 100 * factor * over)
    return below, above


def judge(claim: Claim, results: dict[str, Any]) -> dict[str, Any]:
    """What the answers say of a claim.

    A check holds where the interval of its difference is at or above 0, and does not where it is below; in between it
    can't be told. A claim can't be told either where a premise is not met, or where all that would decide is left out.

    Returns:
        `claim`, `verdict`, `why` (the checks that decided) and `checks`: `says`, `kind`, `relation`, `verdict` and what
        `difference` gives.
    """
    checks, rows = [], results["rows"] + _baseline_rows(results)
    for check in claim.checks:
        found, said = _judged(check, rows, results)
        if check.given is not None and _judged(check.given, rows, results)[1] != HOLDS:
            said = LEFT_OUT
        about = {"says": check.says, "kind": check.kind, "relation": check.relation, "verdict": said}
        checks.append(about | (found or {"left": None, "right": None}))
    premises = [c for c in checks if c["kind"] == "premise" and c["verdict"] != HOLDS]
    deciding = [c for c in checks if c["kind"] == "claim" and c["verdict"] != LEFT_OUT]
    if premises:
        verdict, why = OPEN, premises
    elif failing := [c for c in deciding if c["verdict"] == FAILS]:
        verdict, why = FAILS, failing
    elif unclear := [c for c in deciding if c["verdict"] == OPEN]:
        verdict, why = OPEN, unclear
    else:
        verdict, why = HOLDS if deciding else OPEN, []
    return {"claim": claim.name, "verdict": verdict, "why": [c["says"] for c in why], "checks": checks}


def _judged(check: Check, rows: list[dict[str, Any]], results: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    found = difference(check, rows) if check.left.measure != "steps" else _steps(check, results)
    if found is None:
        return None, OPEN
    return found, HOLDS if found["low"] >= 0 else FAILS if found["high"] < 0 else OPEN


def _baseline_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Simple predictors as arrangements, `baseline: NAME`, the same for every seed."""
    return [
        {key: row[key] for key in ("setting", "evaluation", "x")}
        | {"arrangement": f"baseline: {name}", "seed": seed, "y": y}
        | ({"scores": row["scores"][name], "groups": row["groups"]} if name in row.get("scores", ()) else {})
        for row in results.get("baselines", [])
        for name, y in by_predictor(row).items()
        for seed in results["study"]["seeds"]
    ]


def _steps(check: Check, results: dict[str, Any]) -> dict[str, Any] | None:
    """Steps until enough was learnt; who never did is counted with the steps that it was given."""

    def of(term: Term) -> dict[int, float]:
        wanted = (term.arrangement, term.setting)
        found = [m for m in results["models"] if (m["arrangement"], m["setting"]) == wanted and not m["trial"]]
        return {m["seed"]: float(m["enough_at"] or m["steps"]) for m in found}

    left, right = of(check.left), {} if check.right is None else of(check.right)
    if not left or (check.right is not None and left.keys() != right.keys()):
        return None
    sign = 1 if check.relation == ">=" else -1
    by_seed = {s: sign * (left[s] - check.margin - check.factor * right.get(s, 0.0)) for s in left}
    values = np.array(list(by_seed.values()))
    generator = np.random.default_rng(17)
    drawn = values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "left": float(np.mean(list(left.values()))),
        "right": check.margin + check.factor * float(np.mean(list(right.values()) or [0.0])),
        "estimate": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "by_seed": {str(s): d for s, d in by_seed.items()},
    }
