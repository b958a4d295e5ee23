"""`mosaics bench`: time and memory beside a Llama of equal size."""

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

EXAMPLE = "mosaics bench --parts training,decoding --contexts 1024,4096 --model.hidden_size 512"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
OPTIONS = (
    "--preset --parts --contexts --batch-sizes --rounds --device --dtype --peers --compile --memory --no-memory --json "
    "--results --help"
)
UNITS = {"training": "a step", "prefill": "a prompt", "decoding": "a token"}


def bench(
    context: Context,
    preset: Annotated[str, Option(help="The mosaic.")] = "memory-mosaics-v2-tiny",
    parts: Annotated[str, Option(help="Some of training, prefill and decoding.")] = "training,prefill,decoding",
    contexts: Annotated[
        str | None, Option(help="In tokens, for every part; by default 1024 to 4096 in training, to 16384 otherwise.")
    ] = None,
    batch_sizes: Annotated[str, Option(help="Sequences that are decoded at once.")] = "1,8",
    rounds: Annotated[int, Option(help="Samples of each model, in turn.")] = 5,
    device: Annotated[str, Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, Option(help="auto (what training takes here), float32 or bfloat16.")] = "auto",
    peers: Annotated[
        str, Option(help="Llamas, of which the fastest counts: llama, llama-eager, llama-static (its cache).")
    ] = "llama,llama-static",
    compiled: Annotated[bool, Option("--compile", help="Let all take part under torch.compile, too.")] = False,
    memory: Annotated[
        bool, Option("--memory/--no-memory", help="Peak memory, in a process for every part and model.")
    ] = True,
    as_json: Annotated[bool, Option("--json", help="Print JSON, with every sample.")] = False,
    kept: Annotated[
        Path | None, Option("--results", metavar="FILE", help="Write JSON with every sample there, beside the tables.")
    ] = None,
) -> None:
    """Measure a mosaic beside transformers' LlamaForCausalLM with as many parameters, in turn and in one process.

    Sizes are dotted options, as in train: --model.hidden_size 512. Ctrl-C prints what is measured already.
    docs/performance.md says what the figures mean.
    """
    from mosaics import MosaicConfig
    from mosaics.cli.compare import numbers
    from mosaics.cli.compare import parts as words_of
    from mosaics.experiments.bench import Bench
    from mosaics.experiments.bench import bench as measure
    from mosaics.training.recipe import parse_overrides

    changes, words = parse_overrides(context.args, OPTIONS.split())
    foreign = [*words, *(f"--{key}" for key in changes if not key.startswith("model."))]
    if foreign:
        raise ValueError(f"bench takes no {foreign[0]}; sizes are options such as --model.hidden_size 512")
    settings = Bench(
        MosaicConfig.from_preset(preset, **{key.removeprefix("model."): value for key, value in changes.items()}),
        parts=tuple(words_of(parts)),
        contexts=tuple(numbers("--contexts", contexts, int)) if contexts is not None else (),
        batch_sizes=tuple(numbers("--batch-sizes", batch_sizes, int)),
        rounds=rounds,
        device=device,
        dtype=dtype,
        peers=tuple(words_of(peers)),
        compiled=compiled,
        memory=memory,
    )
    if kept is not None and not kept.absolute().parent.is_dir():
        raise ValueError(f"--results names {kept}, but there is no folder {kept.parent}; make it first")
    results: dict[str, Any] = {}
    try:
        measure(settings, results)
    finally:  # what is measured is printed, whatever ended it
        if results.get("cases"):
            if kept is not None:
                kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(results, indent=1) if as_json else tables(results), flush=True)


def tables(results: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    from mosaics.cli.tables import size

    machine, settings, limits = results["machine"], results["settings"], results["limits"]
    ours, theirs = results["models"]["mosaic"], results["models"]["llama"]
    said = [
        f"commit {results['commit'] or 'unknown'}, mosaics {machine['mosaics']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {settings['device']} ({machine['processor']}, {machine['threads']} "
        f"of {machine['cores']} cores), {settings['dtype']}",
        f"parameters: mosaic {ours['parameters']:,}, llama {theirs['parameters']:,}; decoding state per token of "
        f"context: {size(ours['state_bytes_per_token'])}, {size(theirs['state_bytes_per_token'])}",
        f"the machine's limits, measured: matrix products {limits['flops_per_second'] / 1e9:,.4g} GFLOP/s, copies "
        f"{limits['bytes_per_second'] / 1e9:,.3g} GB/s",
    ]
    for part in dict.fromkeys(case["part"] for case in results["cases"]):
        said += ["", *_table(part, [case for case in results["cases"] if case["part"] == part], results["exponents"])]
    if any(_is_loud(case) for case in results["cases"]):
        said += ["", "* other processes used more than a tenth of a core meanwhile: measure again on a quiet machine"]
    return "\n".join(said)


def _table(part: str, cases: list[dict[str, Any]], exponents: list[dict[str, Any]]) -> list[str]:
    from mosaics.cli.tables import size

    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    rows = [
        ["context", "batch", *names, "ratio (lowest to highest)", *(f"{name}, of the limit" for name in names)]
        + [f"{name}, peak" for name in names]
    ]
    for case in cases:
        found, ratio = [case["contestants"].get(name, {}) for name in names], case["ratio"]
        rows.append(
            [f"{case['context']}{'*' if _is_loud(case) else ''}", str(case["batch_size"])]
            + [_duration(one["seconds"]) if one else "" for one in found]
            + [f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}) {ratio['peer']}"]
            + [f"{one['share']:.0%}" if one else "" for one in found]
            + [size(one["peak_bytes"]) if one.get("peak_bytes") is not None else "" for one in found]
        )
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    lines = ["| " + " | ".join(f"{row[column]:<{widths[column]}}" for column in used) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (widths[column] + 2) for column in used) + "|")
    grow = [
        f"{one['contestant']} {one['exponent']:.2f}{f' (batch {b})' if (b := one['batch_size']) > 1 else ''}"
        for one in exponents
        if one["part"] == part
    ]
    return [
        f"{part}, time of {UNITS[part]}",
        "",
        *lines,
        *(["", f"exponent of the context: {', '.join(grow)}"] if grow else []),
    ]


def _is_loud(case: dict[str, Any]) -> bool:
    from mosaics.experiments.measuring import LOUD

    return (case["others"] or 0) > LOUD


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
