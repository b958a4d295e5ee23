"""The page and its numbers, without a browser."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch

from helpers import tiny_model, tokens
from mosaics.inspection import page as pages
from mosaics.inspection.page import gains, page, summary
from mosaics.inspection.text import pieces

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\N{RIGHT-TO-LEFT OVERRIDE}",
    "&lt;",
    "é\n",
]
TIME = 30


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def unpacked(data, name):
    one = data["arrays"][name]
    return np.frombuffer(gzip.decompress(base64.b64decode(one["data"])), f"<{one['kind']}")


@pytest.fixture(scope="module")
def found():
    return tiny_model(torch.float32).inspect(tokens(1, TIME), top=6)


@pytest.fixture(scope="module")
def texts():
    return (HOSTILE * TIME)[:TIME]


def word(token):
    return f"<b>{token}</b>"


def test_page_has_the_numbers_of_the_inspection(found, texts):
    data = data_of(page(found, texts, word, "a <model>"))
    assert data["pieces"] == texts and data["ids"] == found.ids.tolist()
    assert data["words"][str(int(found.forecasts.tokens[3, 0]))] == word(int(found.forecasts.tokens[3, 0]))
    for number, (shown, read) in enumerate(zip(data["reads"], found.reads, strict=True)):
        assert (shown["memory"], shown["layer"], shown["top"]) == (read.memory, read.layer_index, 4)
        back = unpacked(data, f"found{number}").reshape(read.found[..., :4].shape).astype(int) - 1
        there = read.found[..., :4].numpy() >= 0
        assert ((back >= 0) == there).all()
        assert ((np.arange(TIME)[None, :, None] - back)[there] == read.found[..., :4].numpy()[there]).all()
        weight = unpacked(data, f"weight{number}").reshape(back.shape) / 10000
        assert np.abs(weight - read.weights[..., :4].numpy()).max() <= 0.51e-4
        effect = unpacked(data, f"effect{number}").reshape(back.shape)
        assert (effect[:, -1] == -32768).all()
        assert np.abs(effect[:, :-1] / 1000 - read.effects[:, :-1, :4].numpy()).max() <= 0.51e-3
        for name, line in (("effective", read.effective), ("near", read.near), ("effect", read.head_effects)):
            drawn = unpacked(data, f"line:{name}{number}").reshape(len(read.numbers), data["points"])
            assert np.allclose(drawn, line.numpy(), rtol=1e-6, equal_nan=True)
    for number, (shown, average) in enumerate(zip(data["averages"], found.averages, strict=True)):
        assert (shown["memory"], shown["layer"]) == (average.memory, average.layer_index)
        back = unpacked(data, f"held{number}").reshape(average.found.shape).astype(int) - 1
        expected = np.where(average.found.numpy() >= 0, np.arange(TIME)[None, :, None] - average.found.numpy(), -1)
        assert (back == expected).all() and (back > 0).any()
        share = unpacked(data, f"share{number}").reshape(back.shape) / 200
        assert np.abs(share - average.shares.numpy()).max() <= 0.0026
    for name, forecasts in {"": found.forecasts, **found.without}.items():
        assert np.allclose(unpacked(data, f"next:{name}"), forecasts.of_next.numpy(), equal_nan=True)
        expected = forecasts.log_probs.exp().numpy().flatten()
        assert np.abs(unpacked(data, f"p:{name}") / 65535 - expected).max() < 1e-5


def test_page_holds_no_text_as_markup(found, texts):
    plain, hostile = (page(found, own, word, name) for own, name in ((["a"] * TIME, "m"), (texts, "<script>m")))
    for mark in ("<script", "</script", "<img", "<b>"):
        assert hostile.count(mark) == plain.count(mark)
    assert not re.search(r"\b(src|href)=(?![\"']?data:)", plain)
    assert not re.search(r"https?:(?!//www.w3.org/2000/svg)", plain)


def test_page_leaves_out_what_does_not_fit_and_says_so(found, texts, monkeypatch):
    whole = page(found, texts, word, "m")
    sizes = [
        sum(
            len(one["data"])
            for name, one in data_of(whole)["arrays"].items()
            if not re.match(r"(found|weight|effect)\d", name)
        )
    ]
    pairs = sum(len(one["data"]) for one in data_of(whole)["arrays"].values()) - sizes[0]
    monkeypatch.setattr(pages, "LARGEST", 2_000_000 + sizes[0] + int(0.8 * pairs))
    fewer = data_of(page(found, texts, word, "m"))
    assert {read["top"] for read in fewer["reads"]} < {1, 2, 3} and "largest weights of each head" in fewer["about"]
    monkeypatch.setattr(pages, "LARGEST", 2_000_000 + sizes[0] + int(0.2 * pairs))
    least = data_of(page(found, texts, word, "m"))
    assert 0 in {read["top"] for read in least["reads"]} and "did not find room" in least["about"]
    worth = [float(read.head_effects.nan_to_num(0.0).abs().sum()) for read in found.reads]
    assert least["reads"][worth.index(max(worth))]["top"] > 0


def test_summary_names_the_word_that_the_far_memory_gave_most(found, texts):
    gain = found.gain("long_term")[:-1]
    token, featured, said = summary(found, texts)
    assert featured == "long_term" and token == int(gain.argmax()) + 1
    assert said.startswith("The long-term memory gave") and f"{gain.max():.1f} nats" in said


def test_gains_say_the_surprise_with_and_without_each_memory(found):
    said = gains(found)
    assert f"by {-found.forecasts.of_next[:-1].mean():.2f} nats" in said
    for name, forecasts in found.without.items():
        assert f"without the {name.replace('_', '-')} memory {-forecasts.of_next[:-1].mean():.2f}" in said


def test_binned_is_the_mean_of_what_is_a_number():
    values = torch.tensor([[1.0, 3.0, torch.nan, 5.0, torch.nan, torch.nan]])
    assert np.array_equal(pages.binned(values, 3), np.array([[2.0, 5.0, np.nan]]), equal_nan=True)


def test_page_of_a_model_of_one_kind_and_of_one_token():
    model = tiny_model(torch.float32, preset="transformer-tiny")
    model.remove_memories("feed_forward")
    for count in (1, 2):
        found = model.inspect(tokens(1, count))
        data = data_of(page(found, ["a"] * count, word, "m"))
        assert data["without"] == [] and "one kind of memory" in data["lead"]


class Tokenizer:
    """Bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_give_a_character_to_its_first_token():
    text = "a é \N{GRINNING FACE}\N{ARABIC LETTER AIN}"
    ids = list(text.encode())
    found = pieces(Tokenizer(), ids)
    assert "".join(found) == text and len(found) == len(ids)
    assert found[5] == "\N{GRINNING FACE}" and found[6:9] == ["", "", ""]
    assert "".join(pieces(Tokenizer(), [97, 0xF0, 0x9F, 98, 99])) == Tokenizer().decode([97, 0xF0, 0x9F, 98, 99])
    assert pieces(Tokenizer(), [-1, 97]) == ["?", "a"]
