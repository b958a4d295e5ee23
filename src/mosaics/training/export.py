"""The exported model: a folder that transformers loads, with its tokenizer and a model card."""

import shutil
from pathlib import Path

from mosaics._version import __version__
from mosaics.training.checkpoint import (
    checkpoint_folder,
    checkpoint_steps,
    newest_checkpoint,
    verify_checkpoint,
)
from mosaics.training.metrics import is_number, last_validation, read_metrics
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
| training context | {context:,} tokens; {longer} |

## Use

{code}

```python
{imported}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER"{trusted})
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER"{trusted})
prompt = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64, do_sample=True)[0]))
```

With mosaics installed also `mosaics generate PATH_OF_THIS_FOLDER --prompt "{prompt}"`. Programs that load models
themselves need to be told to trust the folder's code:

```sh
lm-eval --model hf --model_args pretrained=PATH_OF_THIS_FOLDER,trust_remote_code=True --tasks TASKS
```

## Training

- corpus: `{corpus}`, {share:.2g} of its documents held out; longer ones than the context are {long_documents}
- {step:,} steps of {batch:,} sequences x {context:,} tokens ({tokens:,} positions){beginning}{extended}
- AdamW, peak learning rate {rate:g} after {warmup:,} steps of warm-up, weight decay {decay:g}, gradients clipped at
  {clip:g}; seed {seed}{loss}

## Evaluation

{validation}

## Limits

It says what is likely in text like its corpus, not what is true. It was not tuned to follow instructions or
to refuse anything.
{unlicensed}"""

_PACKAGE = """\
It needs the package `mosaics`, by `import mosaics` or, where a program can't be made to import it, by
`trust_remote_code=True`: the folder's `modeling_mosaic.py` does nothing but import the package."""
_SELF_CONTAINED = """\
The folder brings its code, which PyTorch and transformers {transformers} run: `trust_remote_code=True` lets it. The
code (`*.py`) is a part of mosaics {version}, under Apache-2.0 (`{license}`; not the licence of the weights), and
computes in PyTorch alone. Where `mosaics` is installed, `import mosaics` in its place takes the faster kernels."""


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
        card = model_card(recipe, model, step, run / "metrics.jsonl", run.name, self_contained)
        (temporary / "README.md").write_text(card, encoding="utf-8")
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


def _longer(model) -> str:
    """Whether more than the training context can be read, and what it costs in memory."""
    if model.model.embed_positions is not None:
        return "no more can be read"
    length = model.config.max_position_embeddings
    short, long = (model.describe(times * length)["state_bytes"] for times in (1, 4))
    return "longer ones can be read, " + ("memory grows with the context" if long > short else "in the same memory")


def model_card(recipe: Recipe, model, step: int, metrics: Path, name: str, self_contained: bool = False) -> str:
    """The model card: Markdown with YAML front matter.

    Args:
        recipe: of the run.
        model: what is exported.
        step: of its checkpoint.
        metrics: what the run has measured.
        name: of the model.
        self_contained: whether its code is in the folder.
    """
    import transformers

    from mosaics.models.code import CODE_LICENSE

    config, validation = model.config, last_validation(metrics, step)
    losses = [line for line in read_metrics(metrics) if line["step"] <= step and is_number(line.get("loss"))]
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
        code=_SELF_CONTAINED.format(transformers=transformers.__version__, version=__version__, license=CODE_LICENSE)
        if self_contained
        else _PACKAGE,
        imported="" if self_contained else "import mosaics  # teaches transformers this architecture\n",
        trusted=", trust_remote_code=True" if self_contained else "",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=" and ".join(map(str, config.values_of("num_attention_heads"))) or "none",
        vocabulary=config.vocab_size,
        context=recipe.training.context_length,
        longer=_longer(model),
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
        warmup=recipe.training.warmup_steps,
        clip=recipe.training.gradient_clip,
        loss=f"\n- loss at step {losses[-1]['step']:,}: {losses[-1]['loss']:.4f} nats per token" if losses else "",
        decay=recipe.training.weight_decay,
        seed=recipe.seed,
        validation=figures,
        unlicensed="" if licensed else "\nNo licence was stated for these weights (recipe key `export.license`).\n",
    )
