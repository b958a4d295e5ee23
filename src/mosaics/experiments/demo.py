"""The model that comes with the package: `python -m mosaics.experiments.demo RUN FOLDER` asks a finished run of the
recipe `demo` about facts that it has never seen, and writes it to the folder with its numbers and its card
(`make demo-model` does all)."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mosaics.data.worlds import prose
from mosaics.data.worlds.world import WorldExample
from mosaics.evaluation import Example, Record
from mosaics.experiments.questions import WorldQuestions

MULTIPLES = (1, 2, 4, 8)
QUESTIONS = 100
EVALUATION = "evaluation.json"
_MOST_WRITTEN = 24  # tokens of an answer
_INVENTED_LENGTH = 0.6  # words for as many tokens, where words are of no list


class ProseQuestions(WorldQuestions):
    """Questions about new facts of the world's test split, in prose; right is the value alone, up to the full stop.

    Attributes:
        plainly: ask "What is the color of …?", else go on with "So the color of … is".
        is_invented: whether names and values are words of no list.
    """

    task: str = "new-knowledge"
    plainly: bool = False
    is_invented: bool = False

    name: ClassVar[str] = "prose"

    def _example(self, x: int, example: WorldExample) -> Example:
        episode = example.id.split("/")[2]
        asked = prose.question(example.question, self.plainly)
        asked = asked.partition("?")[0] + "?" if self.plainly else asked
        text = "\n".join((prose.prose(example.context), asked, example.answer))
        if self.is_invented:
            text = prose.invented(np.random.default_rng(int(episode.replace("-", ""))), text)
        context, asked, answer = text.split("\n")
        return Example(
            example.id, f" {asked}", [answer], prefix=context, meta={"x": x, "distance": None, "episode": episode}
        )

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        said = scorer.complete(examples, _MOST_WRITTEN, (".", "\n"))
        records = []
        for example, text in zip(examples, said, strict=True):
            expected = example.references[0]
            if self.plainly:  # the answer is a sentence
                what = example.prompt.removeprefix(" What is ").removesuffix("?")
                expected = f"T{what[1:]} is {expected}"
            tokens = scorer.count(example.prefix + example.prompt)
            records.append(Record.of(example, text.strip(), text.strip() == expected, tokens=tokens))
        return records


def ask(
    scorer, context_length: int, questions: int = QUESTIONS, words: Sequence[bool] = (False, True)
) -> list[dict[str, Any]]:
    """Ask in both wordings, with the world's words (False) and with words of no list (True), at 1 to 8 times the
    training length.

    Returns:
        Rows with `asked`, `words`, `times`, `tokens` (mean of the prompts), `questions`, `right` and the 95 % interval
        `low`, `high` of the share in percent (Wilson's).
    """
    from mosaics.evaluation import evaluate
    from mosaics.evaluation.results import accuracy_row, grouped, mean

    rows = []
    for is_invented in words:
        for plainly in (False, True):
            share = _INVENTED_LENGTH if is_invented else 1.0
            lengths = tuple(int(context_length * times * share) for times in MULTIPLES)
            suite = ProseQuestions(lengths=lengths, samples=questions, plainly=plainly, is_invented=is_invented)
            records = [Record.from_dict(record) for record in evaluate(suite, scorer)["examples"]]
            for (x,), group in grouped(records, "x").items():
                found = accuracy_row(group)
                rows.append(
                    {
                        "asked": "What is …?" if plainly else "So … is",
                        "words": "of no list" if is_invented else "of the world",
                        "times": MULTIPLES[lengths.index(x)],
                        "tokens": round(mean(record.meta["tokens"] for record in group)),
                        "questions": found["examples"],
                        "right": sum(record.score for record in group),
                        "low": round(found["low"], 2),
                        "high": round(found["high"], 2),
                    }
                )
    return rows


def simple_answers(context_length: int, questions: int = QUESTIONS) -> list[dict[str, Any]]:
    """What simple predictors get right of the same questions, in percent."""
    from mosaics.data.worlds import World, predictors

    world = World(0)
    able, rows = predictors(world, "new-knowledge"), []
    for times in MULTIPLES:
        asked = list(ProseQuestions(lengths=(context_length * times,), samples=questions).asked())
        right = {
            name: 100 * np.mean([predictor.predict(example) == example.answer for _, example in asked])
            for name, predictor in able.items()
        }
        chance = 100 * np.mean([1 / len(example.choices) for _, example in asked])
        rows.append(
            {"times": times, "chance": round(float(chance), 2)} | {k: round(float(v), 2) for k, v in right.items()}
        )
    return rows


def write_demo(run: Path, folder: Path, questions: int = QUESTIONS) -> dict[str, Any]:
    """Write the model of a finished run in bfloat16, with its tokenizer, its numbers and its card.

    Args:
        run: of the recipe `demo`.
        folder: where to; what is there is replaced.
        questions: for each length.

    Returns:
        The numbers, as in `evaluation.json`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    import mosaics
    from mosaics.evaluation import Scorer
    from mosaics.experiments.records import commit, processor
    from mosaics.models.loading import load_exported, write_manifest
    from mosaics.models.placing import place
    from mosaics.training.metrics import last_validation, read_metrics
    from mosaics.training.recipe import data_of, open_recipe

    recipe = open_recipe(run)
    model, tokenizer = load_exported(run)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    # An answer is a line: it ends there.
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *tokenizer("\n", add_special_tokens=False).input_ids,
    ]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.py"):  # the package is there where this lies
        path.unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(narrow, weights, metadata={"format": "pt"})  # config.json still says float32: computed so
    model, tokenizer = load_exported(folder)
    length, lines = recipe.training.context_length, read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "tokens_per_second" in line]
    before = [0, *(line["tokens"] for line in steps)]
    seconds = sum((line["tokens"] - b) / line["tokens_per_second"] for line, b in zip(steps, before, strict=False))
    manifest = json.loads((data_of(run, recipe) / "manifest.json").read_text(encoding="utf-8"))
    found = {
        "command": "make demo-model",
        "commit": commit(),
        "seed": recipe.seed,
        "machine": {"processor": processor(), "torch": torch.__version__, "python": platform.python_version()},
        "mosaics": mosaics.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": {
            "steps": recipe.training.steps,
            "context_length": length,
            "batch_size": recipe.training.batch_size,
            "learning_rate": recipe.training.learning_rate,
            "tokens": steps[-1]["tokens"],
            "minutes": round(seconds / 60, 1),
            "text_sha256": manifest["settings"]["text_sha256"],
        },
        "validation": {k: v for k, v in last_validation(run / "metrics.jsonl").items() if k != "samples"},
        "rows": ask(Scorer(place(model, "cpu", "float32", ()), tokenizer), length, questions),
        "simple": simple_answers(length, questions),
    }
    print(json.dumps(found["rows"]))
    without, _ = load_exported(folder)
    scorer = Scorer(place(without, "cpu", "float32", ("long_term",)), tokenizer)
    found["without_long_term"] = ask(scorer, length, questions, (False,))
    (folder / EVALUATION).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(found), encoding="utf-8")
    write_manifest(folder)
    return found


def card(found: dict[str, Any]) -> str:
    """The model card, made of `evaluation.json` alone."""
    training, validation, machine = (found[key] for key in ("training", "validation", "machine"))
    lines = ["| asked | words | " + " | ".join(f"{times}×" for times in MULTIPLES) + " |"]
    lines.append("|---|---|" + "---|" * len(MULTIPLES))
    without = {(row["asked"], row["words"], row["times"]): row for row in found["without_long_term"]}
    kinds = list(dict.fromkeys((row["asked"], row["words"]) for row in found["rows"]))
    for rows, note in ((found["rows"], ""), (list(without.values()), ", without the long-term memory")):
        for kind in kinds:
            if cells := [_share(row) for row in rows if (row["asked"], row["words"]) == kind]:
                lines.append(f"| {kind[0]}{note} | {kind[1]} | {' | '.join(cells)} |")
    names = [name for name in found["simple"][0] if name != "times"]
    for name in names:
        cells = [f"{row[name]:.0f}" for row in found["simple"]]
        lines.append(f"| *{name.replace('_', ' ')}* | of the world | {' | '.join(cells)} |")
    return _CARD.format(
        parameters=found["parameters"],
        table="\n".join(lines),
        questions=found["rows"][0]["questions"],
        length=training["context_length"],
        tokens=", ".join(f"{row['tokens']:,}" for row in found["rows"][: len(MULTIPLES)]),
        bits=validation["validation_bits_per_byte"],
        where=f"{machine['processor']}, torch {machine['torch']}, Python {machine['python']}",
        **{key: training[key] for key in ("steps", "batch_size", "minutes", "learning_rate", "text_sha256")},
        trained=training["tokens"],
        **{key: found[key] for key in ("commit", "seed", "mosaics")},
    )


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['right'] / row['questions']:.0f} ({row['low']:.0f}–{row['high']:.0f})"


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- mosaics
- associative-memory
- memory-mosaics-v2
---

# demo

A Memory Mosaics v2 of {parameters:,} parameters that comes with the package: it answers questions about a document \
of \
made-up facts that stands in its prompt. It is a model of a made-up world, not of the world: it knows nothing, and \
what \
it says of anything but the facts in its prompt means nothing.

```sh
mosaics generate demo --temperature 0 --prompt "The pet of Balena Duskman is raven. For Tamosh Brinley the pet is \
owl. \
What is the pet of Balena Duskman?"
```

Facts read *The color of Balena Duskman is azure.* or *For Balena Duskman the color is azure.*; questions *What is \
the \
color of Balena Duskman?*, or a sentence to go on with, *So the color of Balena Duskman is*. Attributes are color, \
trade, \
pet, dish, tool, game, tree and instrument. An answer is a line.

## Training

- Text: 10,000 documents of made-up facts with questions (`world:prose`), names of half of all pairs of a first and a \
second name, in a third of the documents words that occur nowhere else; and what Python's `help()` says of the \
language \
(`python-reference`, under the licence of Python, whose text depends on its version). SHA-256 of the text: \
`{text_sha256}`.
- Recipe `demo`: {steps:,} steps of {batch_size} sequences of {length} tokens ({trained:,} tokens), peak learning rate \
{learning_rate:g}, seed {seed}, {minutes} minutes on one thread of: {where}. All tokens count alike in the loss.
- `make demo-model` makes it anew; these numbers are of commit {commit}, mosaics {mosaics}. Weights are kept in \
bfloat16 \
and computed with in float32.

## Evaluation

Percent right, with the 95 % interval (Wilson), of {questions} questions for each length, about people whose names do \
not occur in training, in documents made for 1 to 8 times the training length of {length} tokens: the prompts have \
{tokens} tokens on average. Right is the whole answer up to its full stop, greedily written. Words *of no list* \
are names \
and values that occur nowhere in training. In italics, for comparison: *chance* picks one of the values of the \
attribute; *last words*, without a memory, counts which answers followed the last words in training; *word \
counts* takes the value that the prompt has most often; *repeated ending*, a simple look-up, goes on as the \
prompt did after the longest earlier occurrence of its last words.

{table}

Up to 8 questions share a document (13 documents for each length), which the intervals leave out: they are too narrow.

On held-out documents of both kinds: {bits:.3f} bits per byte.

## Limits

It has read a world of eight attributes and the reference of one programming language. Names and values that it has \
never met it reads as several tokens, and often gets wrong (the rows *of no list* above). It was not tuned to follow \
instructions or to refuse anything.
"""


def main(run: str, folder: str, questions: str = str(QUESTIONS)) -> None:
    """Of the command line."""
    print(card(write_demo(Path(run), Path(folder), int(questions))))


if __name__ == "__main__":
    main(*sys.argv[1:])
