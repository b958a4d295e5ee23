"""`mosaics prepare`: a corpus as tokenised shards."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "mosaics prepare --corpus python-stdlib --out data/python --vocab-size 4096"


def prepare(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new, or hold the same.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="python-stdlib, a file, a folder, a quoted pattern, a Hugging Face dataset, or - for standard input "
            "(repeatable). [python-stdlib]"
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option("--field", help="Field of .jsonl records or column of a dataset.")
    ] = "text",
    encoding: Annotated[str, typer.Option(help="Encoding of files.")] = "utf-8",
    dataset_split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a tokenizer. Default: train a byte-level BPE on the corpus."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries of a tokenizer that is trained here.")] = 4096,
    validation: Annotated[float, typer.Option(help="Share of the documents to hold out.")] = 0.05,
    validation_corpus: Annotated[
        str | None, typer.Option(help="Hold out this corpus instead of a share (same forms as --corpus).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which documents are held out.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tokenise a corpus into shards, and report documents, tokens, bytes per token and document lengths."""
    from mosaics.data import open_corpus
    from mosaics.data import prepare as prepare_corpus
    from mosaics.data.corpus import join_corpora

    given = corpus or ["python-stdlib"]
    if validation_corpus in given:
        raise ValueError(
            f"--validation-corpus is {validation_corpus}, which is trained on; give other documents, or --validation"
        )

    def opened(spec: str):
        return open_corpus(spec, field=text_field, encoding=encoding, split=dataset_split)

    report = prepare_corpus(
        join_corpora([opened(spec) for spec in given]),
        out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation=opened(validation_corpus) if validation_corpus is not None else validation,
        seed=seed,
        show_progress=sys.stderr.isatty(),
    )
    if report.reused:
        print(f"{out} already holds this corpus, prepared in this way; its files are intact", file=sys.stderr)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
