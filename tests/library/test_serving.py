"""Libraries behind a server and in a conversation: what is answered is what they are asked for."""

from types import SimpleNamespace

import pytest
import torch

from helpers import relative_error
from mosaics.library import ask
from mosaics.library.serving import take_up_libraries
from mosaics.models.cache import join_caches
from mosaics.serving.answer import Sampling
from mosaics.serving.conversation import Conversation
from mosaics.serving.memories import Memories

QUESTION = "What is a heap, and who swims?"


@torch.no_grad()
def test_a_library_is_a_memory_of_a_server(made, reader):
    library, (model, tokenizer) = made(), reader
    desk = SimpleNamespace(model=model, tokenizer=tokenizer, memories=Memories(2, 1 << 30))
    take_up_libraries(desk, {"books": library.folder.path})
    kept = desk.memories.get("books")
    ids = tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    whole = tokenizer(QUESTION, return_tensors="pt").input_ids
    assert kept.given and kept.tokens == whole.shape[1] - ids.shape[1] == 1
    expected = model(whole, past_key_values=library.memory()).logits[:, 1:]
    for _ in range(2):  # the memory itself stays as it is
        assert (
            relative_error(model(ids, past_key_values=join_caches([kept.cache], model.model.stack)).logits, expected)
            < 1e-9
        )
    desk.memories = Memories(2, 10)
    with pytest.raises(ValueError, match="--library books: .*--memory-bytes"):
        take_up_libraries(desk, {"books": library.folder.path})


def test_a_conversation_asks_a_library(made, reader, tmp_path):
    library, how = made(), Sampling(6, temperature=0.0)
    conversation = Conversation(*reader, begin=library.memory)
    first = "".join(conversation.ask(QUESTION, how))
    assert first == ask(library, QUESTION, sampling=how, cite=False).text
    conversation.reset()
    assert "".join(conversation.ask(QUESTION, how)) == first
    with pytest.raises(ValueError, match="documents of a library"):
        conversation.save(tmp_path / "x.memory")
