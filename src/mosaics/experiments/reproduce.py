"""`reproduce`: does a claim of the papers hold in miniature, for every seed?"""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mosaics.experiments import claims, claims_v1, three_moons
from mosaics.experiments.claims import Check, Claim, Term, study_of
from mosaics.experiments.report import shown, write_report
from mosaics.experiments.run import run_study
from mosaics.experiments.study import Setting

CLAIMS = claims.CLAIMS | claims_v1.CLAIMS
GROUPS = {"all": tuple(claims.CLAIMS), "v1": tuple(claims_v1.CLAIMS)}
OWN = {three_moons.NAME: three_moons}  # experiments that are no study of language models


def find_claims(name: str) -> list[Claim]:
    """A claim by its name, or a group of them: `all` of Memory Mosaics v2, or those of `v1`.

    Raises:
        ValueError: there is none; the nearest name is in the message.
    """
    if name not in CLAIMS and name not in GROUPS:
        near = get_close_matches(name, [*CLAIMS, *GROUPS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join([*CLAIMS, *GROUPS])}"
        raise ValueError(f"there is no claim {name!r}; {hint}")
    return [CLAIMS[one] for one in GROUPS.get(name, (name,))]


def reproduce(
    claim: Claim,
    known: dict[str, Setting],
    seeds: Sequence[int],
    output: Path,
    cache: Path,
    jobs: int = 1,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train what a claim is about, unless the cache has it, ask, and judge.

    Args:
        claim: one of `CLAIMS`.
        known: settings by name, as `claims.settings` and `claims_v1.settings` give them.
        seeds: of the trainings.
        output: a folder for report.html, plots and results.json.
        cache: of trained models and answers; claims share it.
        jobs: processes that train side by side.
        changes: values by dotted key for an experiment that is no study; the settings have them already.

    Returns:
        The results of the study with the `verdict` (see `judge`).
    """
    title = f"{claim.name}: {claim.paper}"
    if own := OWN.get(claim.name):
        results, write = own.run(seeds, changes, cache, jobs), own.write_report
    else:
        results, write = run_study(study_of((claim,), known, tuple(seeds), title), cache, jobs), write_report
    results["study"]["title"] = title
    results["verdict"] = judge(claim, results)
    write(results, output, _head(claim, results["verdict"]))
    return results


def judge(claim: Claim, results: dict[str, Any]) -> dict[str, Any]:
    """`holds` (whether every check holds for every seed) and `checks`: what it says, `holds`, and for each seed both
    sides; a side is None where the training diverged."""
    checks = []
    for check in claim.checks:
        sides = [
            {"seed": seed, "left": _number(check.left, results, seed), "right": _right(check, results, seed)}
            for seed in results["study"]["seeds"]
        ]
        checks.append(
            {"says": check.says, "relation": check.relation, "holds": all(map(_holds(check), sides)), "seeds": sides}
        )
    return {"claim": claim.name, "holds": all(check["holds"] for check in checks), "checks": checks}


def _holds(check: Check):
    def holds(sides: dict[str, Any]) -> bool:
        left, right = sides["left"], sides["right"]
        if left is None or right is None:
            return False
        return left >= right if check.relation == ">=" else left <= right

    return holds


def _right(check: Check, results: dict[str, Any], seed: int) -> float | None:
    """The number that the left side is held against, margin included."""
    if check.right is None:
        return check.margin
    value = _number(check.right, results, seed)
    return None if value is None else value + check.margin


def _number(term: Term, results: dict[str, Any], seed: int) -> float | None:
    wanted = (term.arrangement, term.setting, term.evaluation, seed)
    keys = ("arrangement", "setting", "evaluation", "seed")
    points = {row["x"]: row["y"] for row in results["rows"] if tuple(row[key] for key in keys) == wanted}
    values = [points[x] for x in sorted(points)]
    if not values:
        return None
    if term.measure == "value":
        return values[term.at]
    if term.measure == "spread":
        values = values[term.at :]
        return statistics.pstdev(values) / statistics.fmean(values)
    sign = 1 if term.measure == "fall" else -1
    return max((sign * (a - b) for i, a in enumerate(values) for b in values[i + 1 :]), default=0.0)


def verdict_text(verdict: dict[str, Any]) -> str:
    """The verdict in lines."""
    lines = [f"{verdict['claim']}: {_word(verdict['holds'])}"]
    for check in verdict["checks"]:
        sides = "; ".join(
            f"seed {side['seed']}: {shown(side['left'])} {check['relation']} {shown(side['right'])}"
            for side in check["seeds"]
        )
        lines.append(f"  {'yes' if check['holds'] else 'no '}  {check['says']} ({sides})")
    return "\n".join(lines)


def write_summary(output: Path) -> Path:
    """Write summary.md: a line for every claim that has results under the folder."""
    lines = ["| claim | in miniature | verdict | checks | seeds |", "|---|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        path = output / name / "results.json"
        if not path.is_file():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        checks = "; ".join(
            f"{'yes' if check['holds'] else '**no**'}: {check['says']} ("
            + ", ".join(f"{shown(side['left'])} {check['relation']} {shown(side['right'])}" for side in check["seeds"])
            + ")"
            for check in results["verdict"]["checks"]
        )
        seeds = ", ".join(map(str, results["study"]["seeds"]))
        lines.append(f"| {name} | {claim.here} | {_word(results['verdict']['holds'])} | {checks} | {seeds} |")
    path = output / "summary.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _word(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _head(claim: Claim, verdict: dict[str, Any]) -> str:
    lines = "".join(f"<li>{html.escape(line.strip())}</li>" for line in verdict_text(verdict).splitlines()[1:])
    style = "holds" if verdict["holds"] else "fails"
    return (
        f"<p>In miniature: {html.escape(claim.here)}</p>"
        f'<p>It <strong class="{style}">{_word(verdict["holds"])}</strong> at this scale.</p>'
        f'<ul>{lines}</ul><p class="faint">At full scale: {html.escape(claim.full_scale)}</p>'
    )
