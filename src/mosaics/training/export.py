"""The exported model: a folder that transformers loads, with its tokenizer and a model card."""

import shutil
from pathlib import Path
from typing import Any

from mosaics._version import __version__
from mosaics.training.checkpoint import (
    checkpoint_folder,
    checkpoint_steps,
    newest_checkpoint,
    verify_checkpoint,
)
from mosaics.training.metrics import is_number, last_validation
from mosaics.training.recipe import Recipe, data_of, open_recipe

_FIGURES = ("bits_per_byte", "nats_per_token", "tokens", "bytes")
_CARD = """\
---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
- mosaics
- associative-memory
- {tag}
---

# {name}

A language model made of associative memories ({arrangement}), trained with
mosaics {version}.

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width, heads | {layers}, {width}, {heads} |
| vocabulary | {vocabulary:,} tokens |
| training context | {context:,} tokens; longer ones can be read, memory grows with the context |

## Use

```python
import mosaics  # teaches transformers this architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
prompt = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64, do_sample=True)[0]))
```

or `mosaics generate PATH_OF_THIS_FOLDER --prompt "{prompt}"`.

## Training

- corpus: `{corpus}`, {share:.2g} of its documents held out; longer ones than the context are {long_documents}
- {step:,} steps of {batch:,} sequences x {context:,} tokens ({tokens:,} positions){beginning}{extended}
- AdamW, peak learning rate {rate:g}, weight decay {decay:g}; seed {seed}

{validation}

## Limits

It says what is likely in text like its corpus, not what is true. It was not tuned to follow instructions or
to refuse anything.
{unlicensed}"""


def export_run(run: Path, output: Path, *, step: int | None = None, self_contained: bool = False) -> Path:
    """Export a checkpoint of a run: weights, config, tokenizer and model card.

    Args:
        run: the run's folder.
        output: the folder to make; it must not exist, or be empty.
        step: whose checkpoint; None takes the newest whole one.
        self_contained: whether all code that the model needs goes with it; else a file that imports this package.

    Returns:
        `output`.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, `output` holds something, or a memory is of another
            package, whose code can't go with the model.
        OSError: it can't be written; no partial folder is left.
    """
    import transformers

    from mosaics.data import PreparedCorpus
    from mosaics.models.code import write_code
    from mosaics.models.loading import write_manifest
    from mosaics.training.sources import checkpoint_model

    recipe = open_recipe(run)
    checkpoint = find_checkpoint(run, step)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already; name a new folder with --output")
    transformers.utils.logging.disable_progress_bar()
    model = checkpoint_model(checkpoint)
    tokenizer = PreparedCorpus(data_of(run, recipe)).tokenizer()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        model.save_pretrained(temporary)
        if self_contained:
            write_code(temporary, self_contained)
        tokenizer.save_pretrained(temporary)
        step = int(checkpoint.name.removeprefix("step-"))
        found = last_validation(run / "metrics.jsonl", step)
        (temporary / "README.md").write_text(model_card(recipe, model, step, found, run.name), encoding="utf-8")
        if output.exists():
            output.rmdir()
        write_manifest(temporary)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """The whole checkpoint of a step of a run, or the newest one.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    root = run / "checkpoints"
    steps = checkpoint_steps(root)
    if step is None:
        newest, _ = newest_checkpoint(root)
        if newest is None:
            raise ValueError(f"{run} has no checkpoint yet; train it first")
        return newest
    if step not in steps:
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    verify_checkpoint(checkpoint_folder(root, step))
    return checkpoint_folder(root, step)


def model_card(recipe: Recipe, model, step: int, validation: dict[str, Any], name: str) -> str:
    """The model card: Markdown with YAML front matter."""
    config = model.config
    if all(is_number(validation.get(f"validation_{name}")) for name in _FIGURES):
        figures = (
            f"On held-out documents of the same corpus, at step {validation['step']:,}: "
            f"{validation['validation_bits_per_byte']:.4f} bits per byte, "
            f"{validation['validation_nats_per_token']:.4f} nats per token "
            f"({validation['validation_tokens']:,} predicted tokens, "
            f"{validation['validation_bytes']:,} bytes; end-of-text not counted)."
        )
    else:
        figures = "Not validated."
    licensed = recipe.export.license != "unknown"
    return _CARD.format(
        license=recipe.export.license,
        tag=recipe.model.preset or "continued-pretraining",
        arrangement=f"`{recipe.model.preset}`" if recipe.model.preset else f"that of `{recipe.training.init_from}`",
        name=name,
        version=__version__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        context=recipe.training.context_length,
        prompt="def " if recipe.data.corpus == "python-stdlib" else "Once",
        corpus=recipe.data.prepared or recipe.data.corpus,
        share=recipe.data.validation,
        long_documents={"split": "split", "truncate": "truncated"}[recipe.data.long_documents],
        step=step,
        batch=recipe.training.batch_size,
        tokens=step * recipe.tokens_per_step,
        beginning=f", begun with the weights of `{recipe.training.init_from}`" if recipe.training.init_from else "",
        extended="".join(f", extended by {e.steps:,} steps ({e.schedule})" for e in recipe.training.extensions),
        rate=recipe.training.learning_rate,
        decay=recipe.training.weight_decay,
        seed=recipe.seed,
        validation=figures,
        unlicensed="" if licensed else "\nNo licence was stated for these weights (recipe key `export.license`).\n",
    )
