"""`mosaics reproduce`: a claim of the papers in miniature."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

EXAMPLE = "mosaics reproduce table3 --text 'books/*.txt' --output runs/reproduce"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
OPTIONS = (
    "--output --text --held-out --test --field --data --seeds --learning-rates --tune --samples --automata --cache "
    "--jobs --results --plan --list --help"
)


def reproduce(
    context: Context,
    name: Annotated[
        str | None,
        Argument(
            metavar="NAME",
            help="A claim, such as table3 or regbench; all of v2, v1, proof or everything. --list names them.",
        ),
    ] = None,
    output: Annotated[
        Path, Option(metavar="FOLDER", help="A folder for each claim is made in it: report.html, plots, results.json.")
    ] = Path("runs/reproduce"),
    text: Annotated[str, Option(help="Your text: a path, a glob or a data set id.")] = "python-stdlib",
    held_out: Annotated[
        str | None, Option(help="Text for tuning, by other authors. [a share of the documents of --text]")
    ] = None,
    test: Annotated[str | None, Option(help="Text that is asked about, by others again. [that for tuning]")] = None,
    field: Annotated[str, Option(help="The field of a .jsonl record that holds the text.")] = "text",
    data: Annotated[
        list[str] | None,
        Option(metavar="NAME=PATH", help="Of real-tasks: data files, named as evaluate takes them (repeatable)."),
    ] = None,
    seeds: Annotated[str, Option(help="Seeds of the trainings; a claim must hold for each.")] = "0,1,2",
    learning_rates: Annotated[
        str | None, Option(help="Tuning trials of every arrangement (first seed); the best on held-out rows is taken.")
    ] = None,
    tune: Annotated[
        bool,
        Option("--tune", help="Try learning rates until the best is not at the edge, rotary bases, starts, warm-up."),
    ] = False,
    samples: Annotated[int, Option(min=1, help="Questions for each length or number of shots; test automata.")] = 500,
    automata: Annotated[str, Option(help="Of regbench: automata to learn from, a training each.")] = "100,500,2500",
    cache: Annotated[
        Path | None, Option(metavar="FOLDER", help="Trained models and answers, shared by claims. [OUTPUT/cache]")
    ] = None,
    jobs: Annotated[int, Option(min=1, help="Processes that train side by side.")] = 1,
    results: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where results are kept as compact JSON, a file for each claim.")
    ] = None,
    planned: Annotated[
        bool, Option("--plan", help="Say what would be trained and how long it takes, and end.")
    ] = False,
    listed: Annotated[bool, Option("--list", help="Print the claims with their recipes at full scale.")] = False,
) -> None:
    """Say whether a claim of the Memory Mosaics papers holds in miniature, with the numbers of every seed.

    Claims share trained models; what was interrupted goes on where it was. Keys of a recipe's model, training and
    data sections can be given as dotted options; they hold for all trainings.
    """
    from mosaics.experiments import claims, claims_v1
    from mosaics.experiments import reproduce as of
    from mosaics.experiments.compare import BEYOND, TUNING, check_changes

    if listed:
        for claim in of.CLAIMS.values():
            print(f"{claim.name}: {claim.paper}\n  in miniature: {claim.here}\n  at full scale: {claim.full_scale}\n")
        return
    from mosaics.cli.compare import numbers
    from mosaics.cli.evaluate import named_files
    from mosaics.training.recipe import parse_overrides

    words = ([] if name is None else [name]) + context.args
    changes, words = parse_overrides(words, OPTIONS.split())
    if len(words) != 1:
        raise ValueError(
            f"reproduce takes one claim or group, and was given {', '.join(words) or 'none'}; --list names them"
        )
    chosen = of.find_claims(words[0])
    rates = tuple(numbers("--learning-rates", learning_rates, float)) if learning_rates else ()
    tuning = {"training.learning_rate": rates} if rates else {}
    common = {
        "field": field,
        "held_out": held_out,
        "test": test,
        "samples": samples,
        "changes": changes,
        "tuning": TUNING | tuning if tune else tuning,
        "beyond": BEYOND if tune else 0,
    }
    known = claims.settings(text, files=named_files(data or []), **common)
    known |= claims_v1.settings(text, automata=tuple(numbers("--automata", automata, int)), **common)
    labels = {label for claim in chosen if claim.asks for label in claim.arrangements}
    check_changes(changes, [claims.ARRANGEMENTS[label] for label in sorted(labels)])
    seeds, where = numbers("--seeds", seeds, int), cache or output / "cache"
    if planned:
        print(of.plan_text(chosen, known, seeds, where))
        return
    command = shlex.join(["mosaics", "reproduce", *sys.argv[2:]])
    for claim in chosen:
        record = None if results is None else (results / f"{claim.name}.json", command)
        found = of.reproduce(claim, known, seeds, output / claim.name, where, jobs, changes, record, command)
        print(of.verdict_text(found["verdict"]), flush=True)
        print(f"  report: {output / claim.name / 'report.html'}", flush=True)
        of.write_summary(output)
