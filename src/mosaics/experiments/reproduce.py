"""`reproduce`: does a claim of the papers hold in miniature, for every seed?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mosaics.experiments import claims, claims_v1, three_moons, trainings
from mosaics.experiments.claims import Claim, study_of
from mosaics.experiments.evidence import FAILS, HOLDS, LEFT_OUT, OPEN, judge
from mosaics.experiments.records import write_record
from mosaics.experiments.report import write_report
from mosaics.experiments.studies import Plan, run_study
from mosaics.experiments.study import Setting
from mosaics.reporting import Lead, Number, Section, Table, shown

CLAIMS = claims.CLAIMS | claims_v1.CLAIMS | claims.PROOF | claims.REAL
GROUPS = {
    group: tuple(name for name, claim in known.items() if not claim.alone)
    for group, known in (("all", claims.CLAIMS), ("v1", claims_v1.CLAIMS), ("proof", claims.PROOF))
}
# What decides most comes first: learning, length, text, then what the papers claim.
GROUPS["everything"] = tuple(dict.fromkeys((*GROUPS["proof"], *GROUPS["all"], *GROUPS["v1"])))
OWN = {three_moons.NAME: three_moons}  # experiments that are no study of language models


def find_claims(name: str) -> list[Claim]:
    """A claim by its name, or a group of them: `all` of Memory Mosaics v2, those of `v1`, the `proof`, our own, or
    `everything`.

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
    record: tuple[Path, str] | None = None,
    command: str = "",
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
        record: the file in which the results are kept (see `mosaics.experiments.records`), and the command.
        command: that the report names.

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
    write(results, output, verdict_parts(claim, results["verdict"]), command)
    if record is not None:
        write_record(record[0], claim.name, results, record[1], definition=claim.definition)
    return results


def plan_text(chosen: Sequence[Claim], known: dict[str, Setting], seeds: Sequence[int], cache: Path) -> str:
    """What claims would train that the cache does not have, with minutes on one thread, at the pace of what it has;
    trainings that several claims share are counted with the first. Trainings that stop when enough is learnt take
    less."""
    wide = max(len("together"), *(len(claim.name) for claim in chosen))
    lines, counted, total = [f"{'claim':<{wide}}{'trials':>8}{'models':>8}{'minutes':>9}"], set(), 0.0
    pace = trainings.pace(cache)
    for claim in chosen:
        if claim.name in OWN:
            lines.append(f"{claim.name:<{wide}}{'-':>8}{'-':>8}{'?':>9}")
            continue
        plan = Plan(study_of((claim,), known, tuple(seeds), ""), cache)
        trials, jobs = plan.expected()
        new = [job for job in (*trials, *jobs) if job.digest not in counted and job.result(cache) is None]
        counted |= {job.digest for job in new}
        minutes = sum(trainings.seconds_expected(job, pace) for job in new) / 60
        total += minutes
        own = {job.digest for job in jobs}
        models = len({job.digest for job in new} & own)
        lines.append(f"{claim.name:<{wide}}{len(new) - models:>8}{models:>8}{minutes:>9.0f}")
    return "\n".join([*lines, f"{'together':<{wide + 16}}{total:>9.0f}"])


def verdict_text(verdict: dict[str, Any]) -> str:
    """The verdict in lines."""
    why = f", since not: {'; '.join(verdict['why'])}" if verdict["why"] else ""
    return "\n".join([f"{verdict['claim']}: {verdict['verdict']}{why}", *map(_check_text, verdict["checks"])])


def _check_text(check: dict[str, Any]) -> str:
    sign = {HOLDS: "yes", FAILS: "no ", OPEN: "?  ", LEFT_OUT: "-  "}[check["verdict"]]
    kind = "" if check["kind"] == "claim" else f"{check['kind']}: "
    if check["left"] is None:
        return f"  {sign} {kind}{check['says']} (nothing was measured)"
    numbers = f"{shown(check['left'])} {check['relation']} {shown(check['right'])}"
    margin = f"by {shown(check['estimate'])}, 95 % interval {shown(check['low'])} to {shown(check['high'])}"
    return f"  {sign} {kind}{check['says']} ({numbers}: {margin})"


def write_summary(output: Path) -> Path:
    """Write summary.md: a line for every claim that has results under the folder."""
    lines = ["| claim | in miniature | verdict | checks | seeds |", "|---|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        path = output / name / "results.json"
        if not path.is_file():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        checks = "; ".join(_check_text(check).strip() for check in results["verdict"]["checks"])
        seeds = ", ".join(map(str, results["study"]["seeds"]))
        lines.append(f"| {name} | {claim.here} | {results['verdict']['verdict']} | {checks} | {seeds} |")
    path = output / "summary.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def verdict_parts(claim: Claim, verdict: dict[str, Any]) -> list[Lead | Section]:
    """The verdict as the first sentence of a report, and the checks that decided as a part of it."""
    why = f", since not: {'; '.join(verdict['why'])}" if verdict["why"] else ""
    kind = {HOLDS: "good", FAILS: "bad", OPEN: "open"}[verdict["verdict"]]
    lead = Lead(f"{claim.paper} At this scale: {verdict['verdict']}{why}.", kind)
    rows = []
    for check in verdict["checks"]:
        if check["left"] is None:
            rows.append([check["says"], check["kind"], "not measured", None, check["verdict"]])
            continue
        numbers = f"{shown(check['left'])} {'≥' if check['relation'] == '>=' else '≤'} {shown(check['right'])}"
        margin = Number(check["estimate"], check["low"], check["high"])
        rows.append([check["says"], check["kind"], numbers, margin, check["verdict"]])
    columns = ["what must hold", "it is a", "numbers", "by (95 % interval)", "verdict"]
    note = "A claim decides; where a premise is not met, it can't be told; a control is reported beside them. "
    note += "Left out is a comparison with what has not learnt the task at the training length."
    about = f"In miniature: {claim.here} At full scale: {claim.full_scale}"
    return [lead, Section("The verdict", about, tables=[Table("verdict", columns, rows, note)])]
