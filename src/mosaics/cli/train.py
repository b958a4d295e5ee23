"""`mosaics train`: start or continue a run."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Option

EXAMPLE = "mosaics train quickstart --run runs/first --training.steps 200"
_OPTIONS = "--run --resume --extend --schedule --dry-run --gpu --gpus --utilisation --help".split()
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: Context,
    recipe: Annotated[
        str | None, Argument(metavar="RECIPE", help="A file, or a recipe that comes with mosaics; [that of the run].")
    ] = None,
    run: Annotated[Path | None, Option(metavar="FOLDER", help="The run: new, or one to continue.")] = None,
    resume: Annotated[bool, Option("--resume", help="Insist that there is something to continue.")] = False,
    extend: Annotated[
        int | None, Option(min=1, metavar="STEPS", help="Go on with the finished run for so many steps more.")
    ] = None,
    schedule: Annotated[
        Literal["constant", "rewarm"],
        Option(help="Of --extend: the learning rate stays where it ended, or rises to its peak again and falls."),
    ] = "constant",
    dry_run: Annotated[bool, Option("--dry-run", help="Print tokens, steps, memory and time; do nothing.")] = False,
    gpu: Annotated[str | None, Option(metavar="NAME", help="Plan for it: a100, h100, h200, b200.")] = None,
    gpus: Annotated[int | None, Option(metavar="N", help="Plan a model that is sharded over so many.")] = None,
    utilisation: Annotated[float, Option(help="Share of the GPUs' peak, assumed by the plan.")] = 0.4,
) -> None:
    """Train by a recipe, or continue the run in the folder.

    Every key of the recipe can be given as a dotted option: --training.steps 100, --model.hidden_size 256,
    --data.corpus 'books/*.txt'. A folder that holds a run of the same recipe is continued; any other is
    refused. Without a recipe the run in the folder goes on by its own; --extend STEPS goes on with a finished
    one. Ctrl-C lets the step end, saves and leaves. Under torchrun the processes share the run:
    torchrun --nproc-per-node 8 -m mosaics -- train RECIPE --run FOLDER.
    """
    from mosaics.training.recipe import Extension, load_recipe, open_recipe, parse_overrides

    overrides, words = parse_overrides([*([] if recipe is None else [recipe]), *context.args], _OPTIONS)
    alone = run is not None and not words and not overrides and (run / "recipe.yaml").is_file()
    if extend is not None and not alone:
        raise ValueError(
            "--extend goes on with a finished run by its own recipe: mosaics train --run FOLDER --extend STEPS, with a "
            "run's folder and nothing else"
        )
    if not alone and len(words) != 1:
        given = f"{len(words)} ({', '.join(words)})" if words else "none"
        raise ValueError(f"train takes one recipe and was given {given}; without one, --run names a run to continue")
    loaded = open_recipe(run) if alone else load_recipe(words[0], overrides)
    if dry_run:
        if extend is not None:
            raise ValueError("--dry-run plans a recipe; leave out --extend")
        show_plan(loaded, gpu, gpus, utilisation)
        return
    if gpu is not None or gpus is not None:
        raise ValueError("--gpu and --gpus are for a plan, add --dry-run; torchrun starts a run of several processes")
    if run is None:
        raise ValueError("name the run's folder, for example --run runs/first (--dry-run needs none)")
    from mosaics.training import train as start

    start(loaded, run, resume=resume, extend=None if extend is None else Extension(steps=extend, schedule=schedule))


def show_plan(recipe, gpu: str | None = None, gpus: int | None = None, utilisation: float = 0.4) -> None:
    """Print what a recipe would cost."""
    from mosaics.cli.tables import amount, show_table, size
    from mosaics.training.plan import plan

    planned = plan(recipe, gpu=gpu, gpus=gpus, utilisation=utilisation)
    memory = planned["memory_bytes"]
    rows = [
        ("steps", f"{planned['steps']:,}"),
        ("sequences a step", f"{planned['batch_size']:,} x {planned['context_length']:,} tokens"),
        ("micro-batches a step", f"{planned['micro_batches']:,}"),
        ("tokens a step", f"{planned['tokens_per_step']:,}"),
        ("tokens", f"{planned['tokens']:,} ({amount(planned['tokens'])})"),
        ("parameters", f"{planned['parameters']:,} ({amount(planned['parameters'])})"),
        ("vocabulary", f"{planned['vocabulary']:,}"),
        ("work", f"{planned['training_flops']:.3g} FLOPs"),
        *((f"memory: {kind}", size(value)) for kind, value in memory.items()),
    ]
    if gpu is not None:
        rows += [
            (f"memory of {gpu.upper()}", size(planned["gpu_memory_bytes"])),
            (f"time on {planned['devices']:,} {gpu.upper()}", _duration(planned["seconds"])),
        ]
    show_table(f"Plan of {recipe.model.preset or recipe.training.init_from}", rows)
    if planned["devices"] == 1:
        print("Memory is that of one device that holds the whole model, in GiB (2^30 bytes). Assumed:")
    else:
        print(f"Memory is that of each of {planned['devices']:,} devices, in GiB (2^30 bytes). Assumed:")
    for assumption in planned["assumptions"]:
        print(f"- {assumption}")
    if gpu is not None and memory["total"] > planned["gpu_memory_bytes"]:
        print("It does not fit: more GPUs, a smaller training.micro_batch_size or activation_checkpointing would help.")


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} hours"
