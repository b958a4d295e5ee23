"""From text to tokenised shards: split, tokenizer, tokens, report."""

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mosaics.data.corpus import Corpus, Document, open_corpus
from mosaics.data.holding_out import TRAIN, VALIDATION, Plan
from mosaics.data.report import Report, SplitCounts
from mosaics.data.shards import MANIFEST, PreparedCorpus, SplitWriter, write_manifest
from mosaics.data.tokenizer import (
    check_tokenizer,
    check_vocab_size,
    encode_pieces,
    load_tokenizer,
    split_text,
    token_bytes,
    train_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 1 << 20
_BATCH_PIECES = 4096


def prepare(
    corpus: Corpus | str,
    folder: str | os.PathLike,
    *,
    tokenizer: "str | os.PathLike | PreTrainedTokenizerBase | None" = None,
    vocab_size: int = 4096,
    validation: float | Corpus = 0.05,
    seed: int = 0,
    tokenizer_text_bytes: int = 1 << 25,
    shard_tokens: int = 1 << 27,
    show_progress: bool = False,
) -> Report:
    """Tokenises a corpus into a folder (layout: `mosaics.data.shards`), in bounded memory.

    Documents are held out whole: which ones depends on the seed and their names alone. A corpus of one
    document gives the end of its text. Everything is written beside the folder and renamed when it is
    complete. A folder that holds the same text prepared in the same way is verified and used as it is.

    Args:
        corpus: a corpus, or what `open_corpus` takes.
        folder: where to write.
        tokenizer: a Hugging Face tokenizer, its folder or its name on the hub; None trains a byte-level BPE
            on the training documents.
        vocab_size: entries of a tokenizer trained here.
        validation: the share of documents to hold out (at least one; 0 for none), or a corpus of its own.
        seed: decides which documents are held out, and which of a large corpus the tokenizer is trained on.
        tokenizer_text_bytes: the tokenizer is trained on at most about this much text.
        shard_tokens: most tokens in a file.
        show_progress: draws progress on stderr.

    Returns:
        The counts.

    Raises:
        ValueError: no text, impossible settings, a folder with something else in it, a corpus that changes
            meanwhile, a tokenizer without end-of-text; and whatever reading the corpus raises.
        OSError: the folder can't be written (nothing is left behind).
    """
    folder = Path(folder)
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    held_out = validation if isinstance(validation, Corpus) else None
    share = 0.0 if held_out else float(validation)
    if not 0 <= share <= 0.5:
        raise ValueError(f"a validation share of {share} is out of range; choose from 0 to 0.5, such as 0.05")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; choose 0 or more")
    if shard_tokens < 1 or tokenizer_text_bytes < 1:
        raise ValueError("shards and the tokenizer's text must not be empty; choose 1 or more")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    elif isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    else:
        check_tokenizer(tokenizer, tokenizer.name_or_path or type(tokenizer).__name__)
    if folder.exists() and not (folder / MANIFEST).exists() and not (folder.is_dir() and _is_empty(folder)):
        raise ValueError(f"{folder} exists and is not a prepared corpus; choose another folder")

    with _progress(show_progress) as progress:
        plan = Plan(corpus, held_out, share, seed)
        plan.survey(progress)
        settings = {
            "text_sha256": plan.digest,
            "validation": "corpus" if held_out else share,
            "seed": seed,
            "shard_tokens": shard_tokens,
        }
        if tokenizer is None:
            settings |= {"vocab_size": vocab_size, "tokenizer_text_bytes": tokenizer_text_bytes}
        else:
            settings |= {"tokenizer_sha256": _fingerprint(tokenizer)}
        if (folder / MANIFEST).exists():
            return _reuse(folder, settings)

        target = folder.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial, held = _partial_folder(target)
        try:
            if tokenizer is None:
                tokenizer = train_tokenizer(plan.sample(tokenizer_text_bytes, progress), vocab_size)
            report = _write(plan, tokenizer, partial, folder, settings, shard_tokens, progress)
            _rename(partial, target, settings)
        except OSError as error:
            # Some libraries report a short write without its number.
            unnumbered = error.errno is None and type(error) is OSError
            if unnumbered or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                reason = error.strerror or error
                raise OSError(f"no room to write {folder} ({reason}); make room or choose another disk") from None
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(held)
    return report


def _partial_folder(target: Path) -> tuple[Path, int]:
    """A new folder beside the target to write in, and the descriptor that holds its lock as long as this process
    lives; what killed processes left there is removed."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError):  # in use, or just gone
            os.close(_locked(stale))
            shutil.rmtree(stale, ignore_errors=True)
    while True:
        partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
        partial.mkdir()
        with contextlib.suppress(BlockingIOError):  # another process has just taken it for a stale one
            held = _locked(partial)
            if partial.exists():
                return partial, held
            os.close(held)


def _locked(folder: Path) -> int:
    """A descriptor of the folder that holds its lock; the system drops the lock when the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write(plan, tokenizer, partial: Path, folder: Path, settings: dict, shard_tokens: int, progress) -> Report:
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    table = token_bytes(tokenizer)
    exact = table is not None
    writers = {
        split: SplitWriter(partial / split, np.dtype(dtype).newbyteorder("<"), shard_tokens)
        for split in (TRAIN, VALIDATION)
    }
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    begin, end = np.asarray(begin, np.int64), np.asarray([tokenizer.eos_token_id], np.int64)
    task = progress.add_task("tokenising", total=plan.text_bytes)
    counted = encoded_bytes = 0
    for batch in _batches(_pieces(plan.assigned(), cut=table is not None)):
        encoded = encode_pieces(tokenizer, [piece for _, _, piece, _, _ in batch])
        for (split, document, piece, first, last), ids in zip(batch, encoded, strict=True):
            writer = writers[split]
            if first:
                writer.write(begin)
                counted = 0
            writer.write(ids)
            if table is not None:
                counted += int(table[ids].sum())
            if last:
                writer.write(end)
                size = len(document.text.encode())
                writer.end_document(document.id, size)
                exact = exact and counted == size
            encoded_bytes += len(piece.encode())
        progress.update(task, completed=encoded_bytes)
    splits = {split: writer.close() for split, writer in writers.items()}
    if exact:
        np.save(partial / "token_bytes.npy", table)
    try:
        tokenizer.save_pretrained(partial / "tokenizer")
    except Exception as error:  # the library's own errors have no type
        raise error if isinstance(error, OSError | ValueError) else OSError(str(error)) from None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    counts = {split: _count(partial / split, values) for split, values in splits.items()}
    report = Report(folder, plan.corpus.name, len(tokenizer), plan.empty, counts, reused=False)
    report.plot(partial / "lengths.png")
    content = report.to_dict()
    del content["folder"], content["reused"]
    write_manifest(
        partial,
        {
            "settings": settings,
            "tokenizer": {
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": pad,
            },
            "dtype": dtype,
            "shard_tokens": shard_tokens,
            "text_bytes": "token" if exact else "document",
            "splits": splits,
            "report": content,
        },
    )
    return report


def _pieces(assigned: Iterable[tuple[str, Document]], cut: bool) -> Iterator[tuple]:
    for split, document in assigned:
        pieces = list(split_text(document.text)) if cut else [document.text]
        for index, piece in enumerate(pieces):
            yield split, document, piece, index == 0, index == len(pieces) - 1


def _batches(pieces: Iterable[tuple]) -> Iterator[list[tuple]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[2])
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _count(folder: Path, values: dict) -> SplitCounts:
    lengths = np.diff(np.load(folder / "offsets.npy"))
    powers = np.frexp(lengths)[1] - 1
    return SplitCounts(
        values["documents"],
        values["tokens"],
        values["text_bytes"],
        np.bincount(powers).tolist(),
        np.bincount(powers, weights=lengths).astype(np.int64).tolist(),
    )


def _fingerprint(tokenizer) -> str:
    """SHA-256 of what decides the tokens."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hashlib.sha256(f"{content}{roles}".encode()).hexdigest()


def _reuse(folder: Path, settings: dict) -> Report:
    prepared = PreparedCorpus(folder)
    before = prepared.manifest.get("settings", {})
    if before != settings:
        differences = [
            f"{name} {_short(before.get(name))} instead of {_short(settings.get(name))}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        raise ValueError(
            f"{folder} was prepared in another way ({', '.join(differences)}); choose another folder or remove it"
        )
    prepared.verify()
    content = dict(prepared.manifest["report"])
    splits = {
        name: SplitCounts(**{key: value for key, value in counts.items() if key != "bytes_per_token"})
        for name, counts in content.pop("splits").items()
    }
    return Report(folder=folder, splits=splits, reused=True, **content)


def _short(value) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 16 else text[:12] + "..."


def _rename(partial: Path, folder: Path, settings: dict) -> None:
    try:
        os.rename(partial, folder)  # takes the place of an empty folder, of nothing else
    except OSError:
        if not (folder / MANIFEST).exists():
            raise
        _reuse(folder, settings)  # another process was faster
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def _progress(show: bool) -> Progress:
    columns = TextColumn("{task.description:<22}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show)
