"""The registry finds memories of the package and of others, and refuses names that are taken."""

import dataclasses
import sys
from importlib.metadata import EntryPoint

import pytest
from transformers import PreTrainedConfig

from mosaics import MosaicConfig
from mosaics.memories import REGISTRY, Memory, register
from mosaics.memories.contract import memory_class, registry

STRANGE = """
import dataclasses
from mosaics.memories import Memory, register

@register("strange")
class Strange(Memory):
    @dataclasses.dataclass(frozen=True)
    class Options:
        size: int = 3
"""
POINTS = {"strange": "strangers", "lie": "liars"}


def options(**fields):
    return dataclasses.make_dataclass("Options", [(name, type(value), value) for name, value in fields.items()])


@pytest.fixture
def unchanged(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(REGISTRY))


def test_model_settings_are_those_of_the_config():
    own = {f.name for f in dataclasses.fields(MosaicConfig)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    assert own <= registry.MODEL_SETTINGS


@pytest.mark.parametrize("name", ["dropout", "rotary_base", "name"])
def test_register_refuses_an_option_of_the_models(name, unchanged):
    with pytest.raises(ValueError, match=f"option {name!r} of 'mine' is a setting of the whole model"):
        register("mine")(type("Mine", (Memory,), {"Options": options(**{name: 1})}))


def test_register_refuses_a_name_that_is_taken(unchanged):
    other = type("Other", (Memory,), {"Options": options(size=1)})
    with pytest.raises(ValueError, match="has registered a memory of type 'long_term'; take another name"):
        register("long_term")(other)
    register("long_term")(REGISTRY["long_term"])  # the same again, as when a module is loaded anew


def test_memory_class_finds_those_of_other_packages(tmp_path, monkeypatch, unchanged):
    (tmp_path / "strangers.py").write_text(STRANGE)
    (tmp_path / "liars.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint(name, module, registry.ENTRY_POINTS) for name, module in POINTS.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    assert memory_class("strange").__name__ == "Strange" and "strangers" in sys.modules
    assert memory_class("strange") is registry.REGISTRY["strange"]
    with pytest.raises(ValueError, match="liars does not register a memory of type 'lie'"):
        memory_class("lie")
    with pytest.raises(ValueError, match="did you mean 'strange'"):
        memory_class("strangest")
