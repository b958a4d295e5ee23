"""`mosaics quickstart`: the whole way from text to sample, in minutes on two cores."""

from pathlib import Path
from typing import Annotated

from typer import Context, Option

EXAMPLE = "mosaics quickstart --corpus 'books/*.txt' --run runs/books"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def quickstart(
    context: Context,
    corpus: Annotated[str | None, Option(help="Your text: a path, a glob or a data set id.")] = None,
    run: Annotated[Path, Option(metavar="FOLDER", help="The run's folder.")] = Path("runs/quickstart"),
    prompt: Annotated[str | None, Option(help="What the sample goes on from.")] = None,
) -> None:
    """Prepare text, train a small Memory Mosaics v2, export it, load it back and print a sample.

    The text is the source of Python's standard library, which every machine has. Keys of the recipe can be
    given as dotted options, as in train.
    """
    from mosaics.training.recipe import load_recipe, parse_overrides

    overrides, words = parse_overrides(context.args, ("--corpus", "--run", "--prompt", "--help"))
    if words:
        raise ValueError(f"quickstart takes options only, not {words[0]!r}")
    if corpus is not None:
        overrides["data.corpus"] = corpus
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
