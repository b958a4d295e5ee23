"""A conversation in the cache is that of its whole text, and every token of it is read once."""

import copy

import pytest
import torch

from mosaics.models.memory_file import load_memory
from mosaics.serving.answer import Sampling
from mosaics.serving.conversation import Conversation

HOW = Sampling(9, 0.0)


@pytest.fixture
def talk(loaded):
    """Makes a conversation, with the chat template or without; and the number of tokens that its model reads."""
    model, tokenizer = loaded
    handles, read = [], []

    def make(template=True, memory=None, text=None):
        own = copy.deepcopy(tokenizer)
        own.chat_template = (text or own.chat_template) if template else None
        made = Conversation(model, own, memory)
        count = lambda _, args, kwargs: read.append((args or (kwargs["input_ids"],))[0].shape[1])  # noqa: E731
        handles.append(model.register_forward_pre_hook(count, with_kwargs=True))
        return made, read

    yield make
    for handle in handles:
        handle.remove()


def ask(conversation, said, how=HOW):
    return "".join(conversation.ask(said, how))


def encoded(tokenizer, *texts):
    """Each text made into tokens by itself, after begin-of-text; lists of tokens as they are."""
    parts = [text if isinstance(text, list) else tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [tokenizer.bos_token_id, *(token for part in parts for token in part)]


def test_conversation_equals_generate_after_all_that_was_said_and_reads_it_once(talk, loaded, greedy):
    tokenizer = loaded[1]
    conversation, read = talk()
    texts = []
    for turn, said in enumerate(["hi", "import  os ", "and then?"]):
        begin = "" if turn == 0 else "\n"
        texts.append(f"{begin}[user] {said.strip()}\n[assistant] ")
        expected = greedy(encoded(tokenizer, *texts), 9)
        read.clear()
        answer = ask(conversation, said)
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)
        new = len(encoded(tokenizer, texts[-1]))  # with begin-of-text, or the last token of the answer before
        assert sum(read) == new + len(expected) - 1
        texts.append(expected)


def test_conversation_without_a_template_goes_on_from_the_text(talk, loaded, greedy):
    tokenizer = loaded[1]
    conversation, _ = talk(template=False)
    first = greedy(encoded(tokenizer, "def f"), 9)
    assert ask(conversation, "def f") == tokenizer.decode(first)
    second = greedy(encoded(tokenizer, "def f", first, "\nclass"), 9)
    assert ask(conversation, "class") == tokenizer.decode(second)


def test_conversation_goes_on_after_an_answer_that_was_stopped(talk, loaded, greedy):
    tokenizer = loaded[1]
    conversation, _ = talk()
    expected = greedy(encoded(tokenizer, "[user] hi\n[assistant] "), 9)
    answer = conversation.ask("hi", HOW)
    while len(conversation._unread + conversation._read) < len(encoded(tokenizer, "[user] hi\n[assistant] ")) + 4:
        next(answer)
    answer.close()
    written = (conversation._read + conversation._unread)[len(encoded(tokenizer, "[user] hi\n[assistant] ")) :]
    assert 4 <= len(written) < 9 and written == expected[: len(written)]
    texts = ["[user] hi\n[assistant] ", written, "\n[user] more\n[assistant] "]
    assert ask(conversation, "more") == tokenizer.decode(greedy(encoded(tokenizer, *texts), 9))


def test_conversation_stopped_while_it_reads_reads_on(talk, loaded, greedy, monkeypatch):
    monkeypatch.setattr("mosaics.serving.conversation.CHUNK", 4)
    tokenizer = loaded[1]
    conversation, _ = talk()
    answer = conversation.ask("a long question", HOW)
    assert next(answer) == ""
    answer.close()
    assert len(conversation._read) == 4
    texts = ["[user] a long question\n[assistant] ", "\n[user] more\n[assistant] "]
    assert ask(conversation, "more") == tokenizer.decode(greedy(encoded(tokenizer, *texts), 9))


def test_conversation_does_not_keep_the_token_that_ends_an_answer(talk, loaded, greedy):
    tokenizer = loaded[1]
    conversation, _ = talk()
    expected = greedy(encoded(tokenizer, "[user] hi\n[assistant] "), 9)
    end = next(i for i, token in enumerate(expected) if i >= 3 and token not in expected[:i])
    conversation._end = frozenset({expected[end]})
    assert ask(conversation, "hi") == tokenizer.decode(expected[:end])
    assert (conversation._read + conversation._unread)[-end:] == expected[:end]


@pytest.mark.parametrize("template", [True, False])
def test_conversation_saved_is_taken_up_again(talk, loaded, tmp_path, template):
    conversation, _ = talk(template)
    ask(conversation, "hi")
    for name in ("first", "again"):  # to save is not to say
        conversation.save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    kept = load_memory(tmp_path / "first", loaded[0])[1][0].tolist()
    assert kept == conversation._read
    if template:
        assert loaded[1].decode(kept).endswith("\n")  # the template's end of an answer
    other, read = talk(template, tmp_path / "first")
    read.clear()
    there = ask(other, "more")
    assert sum(read) < 60
    if template:  # without one, a conversation that goes on puts a new line between
        assert there == ask(conversation, "more")
    other.reset()
    assert other._read == kept and ask(other, "more") == there


def test_conversation_reset_begins_again(talk):
    conversation, _ = talk()
    first = ask(conversation, "hi")
    second = ask(conversation, "hi")
    conversation.reset()
    assert ask(conversation, "hi") == first != second


def test_conversation_refuses_what_cannot_be_saved_or_shown(talk, tmp_path):
    conversation, _ = talk()
    with pytest.raises(ValueError, match="nothing was said"):
        conversation.save(tmp_path / "none")
    forgetful, _ = talk(text="{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    ask(forgetful, "hi")
    with pytest.raises(ValueError, match="leaves out what was answered"):
        ask(forgetful, "more")


def test_conversation_draws_by_seed(talk):
    answers = []
    for seed in (1, 1, 2):
        conversation, _ = talk()
        answers.append(ask(conversation, "hi", Sampling(9, 1.0, 0.9, seed)))
    assert answers[0] == answers[1] != answers[2]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
