"""Where models go, and the forms that run there. No test here needs a GPU, and none has run on a Mac."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import VOCABULARY, tiny_model
from mosaics import system
from mosaics.models.placing import place
from mosaics.ops import compiling
from mosaics.ops.leaky_average import chunked
from mosaics.training.recipe import TrainingSection
from mosaics.training.setup import pick_device, pick_precision


class OnMps(torch.Tensor):
    """A tensor that says it is on a Mac's GPU."""

    @property
    def device(self):
        return torch.device("mps")


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return monkeypatch


def test_default_device_is_the_gpu_of_a_mac(mac):
    auto = TrainingSection(device="auto")
    assert system.default_device() == "mps" and pick_device(auto) == torch.device("mps")
    assert pick_precision(auto, torch.device("mps")) == torch.float32
    with pytest.raises(ValueError, match="'mps' can't be used"):  # the model is sent there, and it is none
        place(tiny_model(), "auto", "float32")
    mac.setenv("LOCAL_RANK", "1")
    assert pick_device(auto) == torch.device("cpu")
    mac.setattr(torch.cuda, "is_available", lambda: True)
    assert system.default_device() == "cuda" and pick_device(auto) == torch.device("cuda", 1)


def test_devices_that_are_not_there_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert system.default_device() == "cpu" and pick_device(TrainingSection(device="auto")) == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"training.device is {name}, but torch sees no .*; use auto or cpu"):
            pick_device(TrainingSection(device=name))


def test_forms_on_mps_are_named(mac):
    assert system.used_forms("mps", lambda x: x.as_subclass(OnMps)) == {
        "kernel_regression": {"training, window": "blockwise", "training, delay": "shifted", "one token": "naive"},
        "leaky_average": {"training": "chunked", "one token": "naive"},
        "unit_values": {"training": "in_place", "one token": "in_place"},
    }
    described = system.describe()
    assert described["devices"]["mps"]["there"] and described["default_device"] == "mps"
    assert described["forms"]["mps"]["unit_values"]["training"].startswith("none: ")  # this torch has no such device


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(found)), function
        return found


def test_model_needs_no_float64_on_mps(monkeypatch):
    monkeypatch.setenv("MOSAICS_COMPILE", "0")
    compiling.library.cache_clear()
    assert chunked.widest(torch.zeros(1).as_subclass(OnMps)) == torch.float32
    monkeypatch.setattr(chunked, "widest", lambda x: torch.float32)
    model, ids = tiny_model().float(), torch.randint(VOCABULARY, (1, 90))
    try:
        with NoFloat64():
            model.train()(ids, labels=ids).loss.backward()
            model.eval().generate(ids, max_new_tokens=3, do_sample=False)
    finally:
        compiling.library.cache_clear()


def test_keys_from_logarithms_in_float32_are_near(monkeypatch):
    x, gate, decay = torch.randn(1, 2, 900, 8), torch.randn(1, 2, 900), -torch.rand(1, 2, 900)
    exact = chunked.leaky_average(x.double(), gate, decay)[0]
    monkeypatch.setattr(chunked, "widest", lambda x: torch.float32)
    keys = chunked.leaky_average(x, gate, decay)[0]
    assert 0 < (keys - exact).abs().max() < 2e-5
