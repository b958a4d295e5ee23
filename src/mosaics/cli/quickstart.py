"""`mosaics quickstart`: the whole way from text to sample, and a comparison, in minutes on two cores."""

import os
from pathlib import Path
from typing import Annotated

from typer import Context, Option

EXAMPLE = "mosaics quickstart --corpus 'books/*.txt' --run runs/books"
OPTIONS = "--corpus --run --prompt --compare --no-compare --jobs --help"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def quickstart(
    context: Context,
    corpus: Annotated[str | None, Option(help="Your text: a path, a glob or a data set id.")] = None,
    run: Annotated[Path, Option(metavar="FOLDER", help="The run's folder.")] = Path("runs/quickstart"),
    prompt: Annotated[str | None, Option(help="What the sample goes on from.")] = None,
    comparison: Annotated[
        bool, Option("--compare/--no-compare", help="Whether a Transformer of equal size is trained beside it.")
    ] = True,
    jobs: Annotated[
        int | None, Option(help="Processes of the comparison; by default one for each core, up to 4.")
    ] = None,
) -> None:
    """Prepare text, train a small Memory Mosaics v2, export it, load it back and print a sample; compare it with a
    Transformer.

    The text is the source of Python's standard library, which every machine has. The Transformer sees the same
    text in the same order; both are also trained to answer questions about made-up facts of the context, and asked
    at 1 to 8 times the training length. What was interrupted goes on. Keys of the recipe can be given as dotted
    options, as in train; those of model and training hold for the world of made-up facts too.
    """
    from mosaics.training.recipe import load_recipe, parse_overrides

    overrides, words = parse_overrides(context.args, OPTIONS.split())
    if words:
        raise ValueError(f"quickstart takes options only, not {words[0]!r}")
    if corpus is not None:
        overrides["data.corpus"] = corpus
    changes = {key: value for key, value in overrides.items() if key.split(".")[0] in ("model", "training")}
    recipe = load_recipe("quickstart", overrides)
    if prompt is None:
        prompt = "class " if recipe.data.corpus == "python-stdlib" else ""
    from mosaics.cli.generate import stream
    from mosaics.models.loading import load_exported
    from mosaics.training import train
    from mosaics.training.metrics import read_metrics

    outcome = train(recipe, run)
    if not outcome.finished:
        return
    key = "validation_bits_per_byte"
    curve = [(line["step"], line[key]) for line in read_metrics(run / "metrics.jsonl") if key in line]
    falling = " -> ".join(f"{bits:.3f}" for _, bits in curve)
    print(f"validation bits per byte, steps {curve[0][0]} to {curve[-1][0]}: {falling} ({run / 'curves.png'})")
    model, tokenizer = load_exported(run)
    print(f"a sample of {run / 'export'}, loaded with AutoModelForCausalLM:\n")
    stream(model, tokenizer, prompt, max_new_tokens=120, temperature=0.7, top_p=0.95, seed=recipe.seed)
    print(f"\nmore: mosaics generate {run} --prompt 'import '")
    if not comparison:
        return
    from mosaics.experiments.quickstart import compare_run, in_words, some_questions

    print("\nnow a Transformer with as many parameters on the same text, and both on questions about made-up facts")
    results = compare_run(recipe, run, changes, jobs or min(4, os.cpu_count() or 1))
    folder = run / "comparison"
    print(f"\n{in_words(results)}\nreport: {folder / 'report.html'}")
    print(f"\nthree of the questions, and what both said:\n{some_questions(results, folder / 'cache')}")
