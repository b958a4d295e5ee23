"""`mosaics evaluate`: a dimension of a model, as numbers."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

EXAMPLE = "mosaics evaluate runs/first --suite recall --lengths 128,256 --pairs 4 --samples 5 --output results/recall"


def evaluate(
    model: Annotated[str, Argument(metavar="MODEL", help="An exported model, a run's folder, a hub id, or demo.")],
    suite: Annotated[
        str,
        Option(help="persistent-knowledge, new-knowledge, in-context-learning, recall, perplexity or lm-eval."),
    ],
    output: Annotated[Path | None, Option(metavar="FOLDER", help="Where the results go; continued if begun.")] = None,
    data: Annotated[
        list[str] | None,
        Option(metavar="[NAME=]PATH", help="Data files: text for perplexity, else NAME=PATH (repeatable)."),
    ] = None,
    tasks: Annotated[
        str | None, Option(help="Tasks of the suite, separated by commas; of lm-eval: names or task files (.yaml).")
    ] = None,
    lengths: Annotated[str | None, Option(help="Prompt lengths in tokens, as 256,4096.")] = None,
    samples: Annotated[int | None, Option(help="Examples for each setting.")] = None,
    seed: Annotated[int | None, Option(help="Seed of every draw of the questions.")] = None,
    max_length: Annotated[
        int | None, Option(help="Refuse prompts that need more tokens (going beyond the training length is allowed).")
    ] = None,
    without: Annotated[
        list[str] | None,
        Option(metavar="MEMORY", help="Also evaluate without it, side by side, as long_term (repeatable)."),
    ] = None,
    batch_size: Annotated[int, Option(help="Rows in a pass at most; changes no score.")] = 16,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps ...; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    state_dtype: Annotated[
        str | None, Option(help="How a mosaic keeps the pairs of the context: bfloat16 or int8; else as --dtype.")
    ] = None,
    construction: Annotated[
        str | None, Option(help="new-knowledge: per-sample (gold at a drawn place) or published (as RULER does).")
    ] = None,
    max_new_tokens: Annotated[int | None, Option(help="new-knowledge: tokens of an answer at most.")] = None,
    fewshot: Annotated[
        int | None, Option(help="persistent-knowledge (from files), lm-eval: solved questions in front.")
    ] = None,
    allow_code: Annotated[
        bool, Option("--allow-code", help="persistent-knowledge, lm-eval: let tasks run what the model writes, here.")
    ] = False,
    shots: Annotated[
        str | None, Option(help="in-context-learning: numbers of shots (one example of every class each), as 1,4,16.")
    ] = None,
    labels: Annotated[
        str | None, Option(help="in-context-learning: semantic, anonymous, or semantic,anonymous for both.")
    ] = None,
    strategies: Annotated[
        str | None, Option(help="in-context-learning: newline, newline-shuffled, space, space-shuffled.")
    ] = None,
    scoring: Annotated[str | None, Option(help="in-context-learning: likelihood or generation.")] = None,
    classes: Annotated[int | None, Option(help="in-context-learning: classes of the synthetic task.")] = None,
    noise: Annotated[
        float | None, Option(help="in-context-learning: share of words that tell nothing, in the synthetic task.")
    ] = None,
    pairs: Annotated[str | None, Option(help="recall: numbers of pairs, as 4,16.")] = None,
    multiples: Annotated[str | None, Option(help="perplexity: multiples of the training length, as 1,2,4,8.")] = None,
    training_length: Annotated[int | None, Option(help="perplexity: tokens; the model's own if not given.")] = None,
    field: Annotated[str | None, Option(help="perplexity: field of .jsonl records.")] = None,
    split: Annotated[str | None, Option(help="perplexity: split of a prepared folder.")] = None,
) -> None:
    """Ask a model the questions of a suite; print tables, and write report.html, results.json, table.txt, plot.png."""
    given = {
        "tasks": _parts(tasks),
        "lengths": _numbers("--lengths", lengths),
        "samples": samples,
        "seed": seed,
        "construction": construction,
        "max_new_tokens": max_new_tokens,
        "fewshot": fewshot,
        "allow_code": allow_code or None,
        "shots": _numbers("--shots", shots),
        "labels": _parts(labels),
        "strategies": _parts(strategies),
        "scoring": scoring,
        "classes": classes,
        "noise": noise,
        "pairs": _numbers("--pairs", pairs),
        "multiples": _numbers("--multiples", multiples),
        "training_length": training_length,
        "field": field,
        "split": split,
    }
    asked = make_suite(suite, data or [], {key: value for key, value in given.items() if value is not None})
    from mosaics.evaluation import Scorer
    from mosaics.evaluation import evaluate as run
    from mosaics.evaluation.page import write_evaluation_page
    from mosaics.evaluation.results import save, side_by_side, tables_text
    from mosaics.inspection.text import pieces
    from mosaics.models.placing import check_memories, place
    from mosaics.training.sources import open_source

    loaded, tokenizer = open_source(model, state_dtype)
    check_memories(loaded, without or ())
    variants = {"whole": ()} | ({f"without {' and '.join(without)}": tuple(without)} if without else {})
    results = {}
    for variant, removed in variants.items():
        loaded = place(loaded, device, dtype, removed)
        scorer = Scorer(loaded, tokenizer, batch_size=batch_size, limit=max_length)
        folder = output / variant.replace(" ", "-") if output is not None and without else output
        more = {"dtype": dtype} | ({"state_dtype": state_dtype} if state_dtype else {})
        more |= {"without": list(removed)} if removed else {}
        results[variant] = run(asked, scorer, folder, model=model, show_progress=True, more_settings=more)
    result = results["whole"]
    if without:
        result = side_by_side(results)
        if output is not None:
            save(result, output)
    print(tables_text(result), end="")
    if output is not None:
        command = shlex.join(["mosaics", *sys.argv[1:]])
        page = write_evaluation_page(
            output, result, results, asked.examples(scorer), command, lambda token: pieces(tokenizer, [token])[0]
        )
        print(f"\nresults: {output / 'results.json'}\nreport: {page}")


def make_suite(name: str, data: list[str], options: dict[str, Any]):
    """A suite by name, with its settings.

    Raises:
        ValueError: there is no such suite, it does not take an option, or a value is out of range.
    """
    from difflib import get_close_matches

    from pydantic import ValidationError

    from mosaics.evaluation import SUITES

    if name not in SUITES:
        near = get_close_matches(name, SUITES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SUITES)}"
        raise ValueError(f"there is no suite {name!r}; {hint}")
    fields = SUITES[name].model_fields
    if data:
        options = options | {"data": _data(data, name, fields)}
    for key in options:
        if key not in fields:
            takers = [other for other, suite in SUITES.items() if key in suite.model_fields]
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"{flag} is not for the suite {name}; it is for {', '.join(takers)}")
    missing = [key for key, field in fields.items() if field.is_required() and key not in options]
    if missing:
        raise ValueError(f"the suite {name} needs --{missing[0].replace('_', '-')}; --help says what it is")
    try:
        return SUITES[name](**options)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else name
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{flag} is {first['input']!r}: {message[:1].lower() + message[1:]}") from None


def _data(words: list[str], name: str, fields: dict) -> str | dict[str, str]:
    if fields.get("data") is not None and fields["data"].annotation is str:
        if len(words) > 1:
            raise ValueError(f"the suite {name} takes one --data, not {len(words)}")
        return words[0]
    return named_files(words)


def named_files(words: list[str]) -> dict[str, str]:
    """The paths by the names of NAME=PATH.

    Raises:
        ValueError: a word is of another form.
    """
    named = {}
    for word in words:
        key, equals, path = word.partition("=")
        if not equals or not path:
            raise ValueError(f"--data {word} names no data set; write --data NAME=PATH")
        named[key] = path
    return named


def _parts(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    try:
        numbers = None if text is None else tuple(int(part) for part in _parts(text))
    except ValueError:
        numbers = ()
    if numbers is not None and (not numbers or min(numbers) < 1):
        raise ValueError(f"{option} is {text!r}; give whole numbers from 1 up, as 1,2,4")
    return numbers
