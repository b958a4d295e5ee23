"""Whatever comes from outside is taken rightly or refused in one sentence."""

import errno
import os

import pytest

from mosaics import MosaicConfig
from mosaics.models.configuration_mosaic import _TRANSFORMERS_KEYS
from mosaics.training.setup import build_model

from . import inputs, targets
from .inputs import NotRefusedInOneSentence, attempts, result_or_sentence
from .large import empty_documents, endless_line

PRESET = "memory-mosaics-v2-tiny"
EXAMPLES = {
    "corpus_texts": 5,
    "corpus_files": 6,
    "corpus_that_changes": 5,
    "exported_by_stranger": 8,
    "exported_folder": 8,
    "checkpoint_folder": 8,
    "checkpoint_by_stranger": 8,
    "run_folder": 5,
    "memory_by_stranger": 8,
    # Ten draws of a large space find little; these take a fiftieth of a second each.
    "preset_overrides": 150,
    "score_calls": 150,
    "generate_calls": 100,
    "loss_calls": 100,
    "question_files": 80,
    "tokenizer_files": 60,
    "result_files": 60,
}


@pytest.mark.parametrize("name", inputs.TARGETS)
def test_every_target_is_right_or_refused_in_one_sentence(name):
    assert attempts(name, EXAMPLES.get(name, 10)) >= 5


@pytest.mark.slow
def test_every_key_of_a_config_takes_every_odd_value_or_refuses_it_in_one_sentence():
    built = set()
    for key in targets.config_keys():
        for value in inputs.ODD:
            if (key, type(value)) not in built or not isinstance(value, int | float | str):
                built.add((key, type(value)))
                targets.odd_config(**{key: value})
            else:
                result_or_sentence(lambda key=key, value=value: MosaicConfig.from_preset(PRESET, **{key: value}))


@pytest.mark.parametrize("key", sorted(_TRANSFORMERS_KEYS | {"_attn_implementation"}))
def test_every_key_of_transformers_takes_every_odd_value_or_refuses_it_in_one_sentence(key):
    values = MosaicConfig.from_preset(PRESET, num_hidden_layers=1).to_diff_dict()
    for value in inputs.ODD:
        config = result_or_sentence(lambda value=value: MosaicConfig(**values | {key: value}))
        if config is not None:
            result_or_sentence(lambda config=config: build_model(config, meta=True))


def test_prepare_takes_a_line_without_end_whole(tmp_path):
    assert endless_line(tmp_path, 1) is None


def test_prepare_counts_empty_documents_and_leaves_them_out(tmp_path):
    assert empty_documents(tmp_path, 5000) is None


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TypeError("x"),
        ValueError("invalid literal for x"),
        ValueError("it does not name what is wrong"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"),
    ],
)
def test_result_or_sentence_lets_nothing_through_but_sentences(error):
    with pytest.raises(NotRefusedInOneSentence):
        result_or_sentence(lambda: _raise(error), "x")
    assert result_or_sentence(lambda: _raise(OSError(errno.ENOENT, os.strerror(errno.ENOENT), "x")), "x") is None
    assert result_or_sentence(lambda: 3) == 3


def test_attempts_shows_an_input_that_fails(monkeypatch):
    monkeypatch.setitem(inputs.TARGETS, "broken", lambda folder, draw: 1 // draw(targets.st.integers(0, 3)))
    with pytest.raises(ZeroDivisionError):
        attempts("broken", 50)
