"""`mosaics compare`: arrangements on equal terms."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Context, Option

EXAMPLE = "mosaics compare --output runs/compare --text 'books/*.txt' --learning-rates 1e-3,2e-3,4e-3"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
OPTIONS = (
    "--output --arrangements --systems --worlds --automata --text --field --seeds --learning-rates --tune --match "
    "--samples --cache --jobs --results --help"
)


def compare(
    context: Context,
    output: Annotated[Path, Option(metavar="FOLDER", help="Where report.html, plots and results.json go.")],
    arrangements: Annotated[
        str, Option(help="Presets, separated by commas; the others are matched to the first.")
    ] = "memory-mosaics-v2-tiny,transformer-tiny",
    systems: Annotated[
        str | None,
        Option(
            help="A league instead: these presets (all: every tiny one without learned positions), a task for all "
            "before the next."
        ),
    ] = None,
    worlds: Annotated[
        str, Option(help="Synthetic worlds, a training each: those named here, persistent-knowledge, mixed, or none.")
    ] = "recall,new-knowledge,in-context-learning",
    automata: Annotated[
        int | None, Option(min=1, help="Of a league: train on RegBench too, on so many automata.")
    ] = None,
    text: Annotated[str, Option(help="Your text: a path, a glob or a data set id; or none.")] = "python-stdlib",
    field: Annotated[str, Option(help="The field of a .jsonl record that holds the text.")] = "text",
    seeds: Annotated[str, Option(help="Seeds of the trainings.")] = "0,1,2",
    learning_rates: Annotated[
        str | None, Option(help="Tuning trials of every arrangement (first seed); the best on held-out rows is taken.")
    ] = None,
    tune: Annotated[
        bool,
        Option("--tune", help="Try learning rates until the best is not at the edge, initial values, rotary bases."),
    ] = False,
    match: Annotated[str, Option(help="Equal parameters, flops, or both: parameters,flops.")] = "parameters",
    samples: Annotated[int, Option(min=1, help="Questions for each length or number of shots.")] = 200,
    cache: Annotated[
        Path | None, Option(metavar="FOLDER", help="Trained models and answers; may be shared. [OUTPUT/cache]")
    ] = None,
    jobs: Annotated[int, Option(min=1, help="Processes that train side by side.")] = 1,
    results: Annotated[
        Path | None, Option(metavar="FOLDER", help="Of a league: where league.json is kept, after every system anew.")
    ] = None,
) -> None:
    """Train arrangements on the same data, in the same order, with the same budget; ask them all the same.

    An interrupted comparison goes on where it was. Keys of a recipe's model, training and data sections can be
    given as dotted options (--training.steps 500); they hold for all trainings.
    """
    from mosaics.experiments.compare import study
    from mosaics.experiments.report import write_report
    from mosaics.experiments.studies import run_study
    from mosaics.training.recipe import parse_overrides

    changes, words = parse_overrides(context.args, OPTIONS.split())
    if words:
        raise ValueError(f"compare takes options only, not {words[0]!r}")
    common = {
        "field": field,
        "seeds": numbers("--seeds", seeds, int),
        "learning_rates": numbers("--learning-rates", learning_rates, float) if learning_rates else (),
        "tune": tune,
        "samples": samples,
        "changes": changes,
    }
    tasks = () if worlds == "none" else parts(worlds)
    corpus, where = None if text == "none" else text, cache or output / "cache"
    command = shlex.join(["mosaics", *sys.argv[1:]])
    if systems is None:
        if automata is not None or results is not None:
            raise ValueError("--automata and --results are of a league; name its --systems")
        planned = study(parts(arrangements), tasks, corpus, match=parts(match), **common)
        print(f"report: {write_report(run_study(planned, where, jobs), output, command=command)}")
        return
    for name in ("arrangements", "match"):
        if context.get_parameter_source(name).name == "COMMANDLINE":
            raise ValueError(f"--{name} says nothing beside --systems, which are matched by parameters; leave it out")
    from mosaics.experiments.league import NAME, league, run_league
    from mosaics.experiments.league import systems as find
    from mosaics.experiments.records import write_record

    planned = league(find(parts(systems)), tasks, corpus, automata=automata, **common)

    def keep(found) -> None:
        if results is not None:
            write_record(results / f"{NAME}.json", NAME, found, command, costs=found["costs"])

    print(f"report: {write_report(run_league(planned, where, jobs, keep), output, command=command)}")


def parts(text: str) -> list[str]:
    """Words between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str, kind: type) -> list:
    """Numbers between commas.

    Raises:
        ValueError: there are none, or something else.
    """
    try:
        found = [kind(part) for part in parts(text)]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise ValueError(f"{option} is {text!r}; give numbers separated by commas")
    return found
