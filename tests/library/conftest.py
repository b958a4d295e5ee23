"""A random tiny model with a tokenizer, and libraries of a few texts that it read."""

from pathlib import Path

import pytest
import torch

from helpers import tiny_model
from mosaics.data.tokenizer import train_tokenizer
from mosaics.library import Library

TEXTS = {
    "beavers.txt": "A beaver is a rodent. It builds dams of wood!\nBeavers swim well, and they eat bark.\n",
    "comets.txt": "Halley's comet comes back every 76 years; E. Halley said so in 1705. Ελλάδα saw it.\n\nIt is ice.",
    "heaps.txt": "A heap is a tree. Its root is the smallest: 3.14 is below 4.\n" * 3,
}


@pytest.fixture(scope="session")
def reader():
    """The model, in float64, and its tokenizer."""
    tokenizer = train_tokenizer(TEXTS.values(), 280)
    model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
        setattr(model.config, name, getattr(tokenizer, name))
    return model, tokenizer


@pytest.fixture(scope="session")
def exported(reader, tmp_path_factory) -> Path:
    """The same as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in reader:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def made(reader, tmp_path):
    """Makes a library of some of the texts, in a folder of a name."""

    def make(folder: str = "library", names=TEXTS) -> Library:
        library = Library.at(tmp_path / folder, *reader)
        list(library.add({name: TEXTS[name] for name in names}))
        return library

    return make


@pytest.fixture
def asked(reader):
    """The logits after a question of documents of a library."""

    def ask(library: Library, *names: str, **options) -> torch.Tensor:
        model, tokenizer = reader
        ids = tokenizer("What is a heap, and who swims?", return_tensors="pt").input_ids
        with torch.no_grad():
            return model(ids, past_key_values=library.memory(names or None, **options)).logits

    return ask


@pytest.fixture
def narrow(reader):
    """The same model with pairs in fewer bits."""

    def make(dtype: str):
        model = reader[0]
        config = type(model.config).from_dict(model.config.to_dict() | {"state_dtype": dtype})
        other = type(model)(config).double().eval()
        other.load_state_dict(model.state_dict())
        return other

    return make
