"""Tokenizers: byte-level BPE trained on a corpus, or any of Hugging Face's that marks the end of a text."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mosaics.data.hub import where_to_look

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN_OF_TEXT, END_OF_TEXT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
_SPECIAL = [BEGIN_OF_TEXT, END_OF_TEXT, PAD]
SMALLEST_VOCABULARY = 256 + len(_SPECIAL)
LARGEST_VOCABULARY = 1_000_000
# Words, numbers, signs and white space. Every run has a greatest length: training and encoding take time
# that grows faster than the length of a run, and a text may be one run.
_PATTERN = "|".join(
    [
        r"'(?:[sdmt]|ll|ve|re)",
        r" ?[\p{L}\p{M}]{1,64}",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]{1,64}",
        r"\s{1,64}(?!\S)",
        r"\s{1,64}",
    ]
)
# Longest piece of a text that is encoded at once; the library needs some hundred bytes for each character.
_PIECE_CHARACTERS = 1 << 18


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE tokenizer: any text can be encoded, and decoding gives it back exactly.

    Encoding with special tokens (the default) puts begin-of-text first; end-of-text is added by whoever knows
    that the text ends. The same texts in the same order give the same tokenizer.

    Args:
        texts: the texts, read once.
        vocab_size: entries wanted, the three special ones and the 256 bytes included. A small corpus may
            give fewer: `len(tokenizer)` tells.

    Returns:
        The tokenizer, with `<|begin_of_text|>` 0, `<|end_of_text|>` 1 and `<|pad|>` 2; pads on the left.

    Raises:
        ValueError: a vocabulary smaller than 259 or larger than a million entries.
    """
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in split_text(text)), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A",
        pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT} $B",
        special_tokens=[(BEGIN_OF_TEXT, 0)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raises `ValueError` for a vocabulary that `train_tokenizer` can't make."""
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"a vocabulary of {vocab_size} entries is out of range; "
            f"choose from {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}"
        )


def load_tokenizer(name: str | os.PathLike) -> "PreTrainedTokenizerBase":
    """Loads a tokenizer from a folder or by its name on the Hugging Face hub.

    Raises:
        FileNotFoundError: neither a folder nor a name on the hub.
        ValueError: it can't be loaded, or has no end-of-text token to put between documents.
    """
    from transformers import AutoTokenizer

    name = os.fspath(name)
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; give the folder that holds tokenizer.json and tokenizer_config.json")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no tokenizer folder {name!r}; give one that exists or a name on the hub")
    try:
        options = {} if Path(name).is_dir() else where_to_look()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # whatever a damaged file, the hub or the network may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = "in that folder" if Path(name).is_dir() else "here or on the Hugging Face hub"
        raise ValueError(f"no tokenizer {name!r} could be loaded {where} ({reason}); name another") from error
    return check_tokenizer(tokenizer, name)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer if it can mark where a document ends.

    Raises:
        ValueError: it has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {name!r} has no end-of-text token, which is needed between documents; "
            "set its eos_token and save it again"
        )
    return tokenizer


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray | None:
    """UTF-8 bytes that each token of a byte-level tokenizer stands for; a token may end inside a character.

    Returns:
        int32 of shape (len(tokenizer),), 0 for special tokens; None for a tokenizer whose tokens have no
        fixed number of bytes (white space put in front, normalised text, unknown tokens).
    """
    if not tokenizer.is_fast:
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    table = np.zeros(len(tokenizer), dtype=np.int32)
    for token, index in tokenizer.get_vocab().items():
        if index >= len(table):
            return None
        if index in added:
            table[index] = 0 if added[index].special else len(added[index].content.encode())
        elif alphabet.issuperset(token):
            table[index] = len(token)
        else:
            return None
    probe = "\u00e9 probe  \u4e16\n"
    ids = encode_pieces(tokenizer, [probe])[0]
    return table if table[ids].sum() == len(probe.encode()) else None


def encode_pieces(tokenizer: "PreTrainedTokenizerBase", pieces: list[str]) -> list[np.ndarray]:
    """Encodes texts without adding special tokens; their names inside a text are text, not borders.

    Returns:
        one int64 array of token ids for each text.
    """
    if not tokenizer.is_fast:
        encoded = (
            tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
            for piece in pieces
        )
        return [np.asarray(ids, dtype=np.int64) for ids in encoded]
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        encodings = backend.encode_batch_fast(pieces, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]


def split_text(text: str, characters: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cuts a long text, where it can before a space: byte-level tokenizers split there anyway, so that the
    tokens stay the same. Only a text with no space in thousands of characters is cut inside a word."""
    start = 0
    while len(text) - start > characters:
        end = start + characters
        lowest = max(start + 1, end - 4096)
        spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text[lowest - 1 : end + 1])]
        cut = lowest - 1 + spaces[-1] if spaces else end
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]
