"""`mosaics train`: start or continue a run."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

EXAMPLE = "mosaics train quickstart --run runs/first --training.steps 200"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: Context,
    recipe: Annotated[str, Argument(metavar="RECIPE", help="A file, or a recipe that comes with mosaics.")],
    run: Annotated[Path | None, Option(metavar="FOLDER", help="The run: new, or one to continue.")] = None,
    resume: Annotated[bool, Option("--resume", help="Insist that there is something to continue.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print tokens, steps and memory; do nothing.")] = False,
) -> None:
    """Train by a recipe, or continue the run in the folder.

    Every key of the recipe can be given as a dotted option: --training.steps 100, --model.hidden_size 256,
    --data.corpus 'books/*.txt'. A folder that holds a run of the same recipe is continued; any other is
    refused. Ctrl-C lets the step end, saves and leaves.
    """
    from mosaics.training.recipe import load_recipe, parse_overrides

    overrides, words = parse_overrides([recipe, *context.args], ("--run", "--resume", "--dry-run", "--help"))
    if len(words) != 1:
        given = f"{len(words)} ({', '.join(words)})" if words else "none"
        raise ValueError(f"train takes one recipe and was given {given}")
    loaded = load_recipe(words[0], overrides)
    if dry_run:
        show_plan(loaded)
        return
    if run is None:
        raise ValueError("name the run's folder, for example --run runs/first (--dry-run needs none)")
    from mosaics.training import train as start

    start(loaded, run, resume=resume)


def show_plan(recipe) -> None:
    """Print what a recipe would cost."""
    from mosaics.cli.tables import amount, show_table, size
    from mosaics.training.plan import plan

    planned = plan(recipe)
    memory = planned["memory_bytes"]
    show_table(
        f"Plan of {recipe.model.preset}",
        [
            ("steps", f"{planned['steps']:,}"),
            ("sequences a step", f"{planned['batch_size']:,} x {planned['context_length']:,} tokens"),
            ("micro-batches a step", f"{planned['micro_batches']:,}"),
            ("tokens a step", f"{planned['tokens_per_step']:,}"),
            ("tokens", f"{planned['tokens']:,} ({amount(planned['tokens'])})"),
            ("parameters", f"{planned['parameters']:,} ({amount(planned['parameters'])})"),
            ("vocabulary", f"{planned['vocabulary']:,}"),
            ("work", f"{planned['training_flops']:.3g} FLOPs"),
            *((f"memory: {kind}", size(value)) for kind, value in memory.items()),
        ],
    )
    print("Memory is that of one device that holds the whole model, in GiB (2^30 bytes). Assumed:")
    for assumption in planned["assumptions"]:
        print(f"- {assumption}")
