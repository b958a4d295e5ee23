import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.conftest import TEXTS
from mosaics.data import load_tokenizer, train_tokenizer
from mosaics.data.tokenizer import encode_pieces, split_text, token_bytes


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS.values(), 400)


def other_tokenizer(**special) -> PreTrainedTokenizerFast:
    """Words of lower-case letters, as an example of a tokenizer that is not byte-level."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["[UNK]", *special.values()]
    backend.train_from_iterator(TEXTS.values(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=names))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def test_train_tokenizer_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == 400
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|pad|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer("key").input_ids == [0, *tokenizer("key", add_special_tokens=False).input_ids]
    assert len(train_tokenizer(["too little text"], 4096)) < 300


@settings(deadline=None)
@given(st.text())
def test_tokenizer_decode_of_encode_is_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == "<|begin_of_text|>" + text


def test_tokenizer_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert [loaded(text).input_ids for text in TEXTS.values()] == [tokenizer(t).input_ids for t in TEXTS.values()]
        assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (1, 2, "left")
        assert loaded.decode(loaded("a , b ' s .").input_ids, skip_special_tokens=True) == "a , b ' s ."


@pytest.mark.slow
def test_train_tokenizer_in_another_process_is_the_same(tokenizer):
    code = (
        "import sys; sys.argv[0] = 'mosaics';"  # imports no models
        "from data.conftest import TEXTS; from mosaics.data import train_tokenizer;"
        "print(train_tokenizer(TEXTS.values(), 400).backend_tokenizer.to_str())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert run.stdout.decode().strip() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("size", [258, 0, -1, 10**7])
def test_train_tokenizer_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match=f"{size} entries is out of range; choose from 259 to 1000000"):
        train_tokenizer([], size)


@settings(deadline=None)
@given(st.text() | st.sampled_from(list(TEXTS.values())))
def test_token_bytes_sum_to_the_bytes_of_any_text(tokenizer, text):
    assert token_bytes(tokenizer)[encode_pieces(tokenizer, [text])[0]].sum() == len(text.encode())


def test_token_bytes_of_an_added_word_are_its_own():
    tokenizer = train_tokenizer(TEXTS.values(), 300)
    tokenizer.add_tokens(["世界key"])
    (ids,) = encode_pieces(tokenizer, ["the 世界key"])
    assert ids[-1] == len(tokenizer) - 1 and token_bytes(tokenizer)[ids].sum() == len("the 世界key".encode())


def test_token_bytes_only_for_byte_level_without_changes_to_the_text():
    assert token_bytes(other_tokenizer(eos_token="[EOS]")) is None
    prefixed = train_tokenizer(TEXTS.values(), 300)
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert token_bytes(prefixed) is None


def test_encode_pieces_special_names_in_a_text_are_text(tokenizer):
    text = "a<|end_of_text|>b<|pad|>"
    ids = encode_pieces(tokenizer, [text])[0]
    assert ids.min() > 2 and tokenizer.decode(ids) == text
    assert not tokenizer.backend_tokenizer.encode_special_tokens  # the tokenizer is left as it was
    assert 1 in tokenizer(text).input_ids


def test_encode_pieces_ignores_truncation_and_template():
    tokenizer = train_tokenizer(TEXTS.values(), 300)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>", special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)]
    )
    assert tokenizer.decode(encode_pieces(tokenizer, ["a long enough text"])[0]) == "a long enough text"


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab1é世.'\n\t  ", max_size=60) | st.text(max_size=60), st.integers(1, 20))
def test_split_text_pieces_make_up_the_text(text, characters):
    pieces = list(split_text(text, characters))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= characters for piece in pieces) or pieces == [""]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["key", "1234", "..", "\n", "  ", "é", "don't", "世界"]), min_size=1, max_size=30))
def test_split_text_at_spaces_leaves_the_tokens_as_they_are(tokenizer, words):
    text = " ".join(words)
    pieces = list(split_text(text, 12))
    assume(all(re.match(r" \S", piece) for piece in pieces[1:]))  # else a run was too long, and was cut inside
    whole = encode_pieces(tokenizer, [text])[0]
    assert np.array_equal(np.concatenate(encode_pieces(tokenizer, pieces)), whole)


def test_split_text_long_runs_take_linear_time():
    for text in ("a" * 10**7, " " * 10**7, "\n" * 10**7, "a " * 10**7):
        assert sum(map(len, split_text(text))) == len(text)


def test_load_tokenizer_without_end_of_text_is_refused(tmp_path):
    other_tokenizer(bos_token="[BOS]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-text token.*set its eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda path: None, FileNotFoundError, "no tokenizer folder"),
        (lambda path: path.mkdir(), ValueError, "could be loaded in that folder"),
        (lambda path: path.write_text("{}"), ValueError, "is a file; give the folder"),
        (lambda path: (path.mkdir(), (path / "tokenizer.json").write_text("{")), ValueError, "in that folder"),
    ],
)
def test_load_tokenizer_missing_or_damaged_is_one_sentence(tmp_path, make, error, message):
    make(tmp_path / "tokenizer here")
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(tmp_path / "tokenizer here")
    assert "\n" not in str(caught.value)


def test_load_tokenizer_unknown_on_the_hub_is_one_sentence():
    with pytest.raises(ValueError, match="no tokenizer 'no-such/tokenizer' could be loaded here or on the"):
        load_tokenizer("no-such/tokenizer")
