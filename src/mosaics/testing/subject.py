"""What is held to the contract: a memory with its options, and the models that it is tried in."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from mosaics.memories import Around, Common, Memory, Stack
from mosaics.memories.contract import build, memory_class
from mosaics.models.configuration_mosaic import MosaicConfig
from mosaics.models.modeling_mosaic import MosaicForCausalLM

WIDTH, VOCABULARY = 16, 17


class Nonconforming(AssertionError):
    """A memory that does not keep the contract: which check, and what was found."""


@dataclasses.dataclass
class Subject:
    """A memory with its options, and the models that it is tried in."""

    type: str
    options: dict[str, Any]

    @property
    def around(self) -> bool:
        """Whether it stands around the blocks."""
        return issubclass(memory_class(self.type), Around)

    def spec(self) -> dict[str, Any]:
        """As a config has it."""
        return {"type": self.type, "options": dict(self.options)}

    def arrangement(self, kind: str = "alone") -> list[list[dict[str, Any]]]:
        """The steps of a block: `alone` with a feed-forward network, `beside` the memories of v2, `twice`."""
        own = self.spec()
        inner = {"type": "feed_forward", "options": {"intermediate_size": 12}}
        short = {"type": "short_term", "name": "near", "options": {"num_attention_heads": 2, "window": 4}}
        long = {"num_attention_heads": 2, "delay": 2, "train_delay": [2, 4]}
        far = {"type": "long_term", "name": "far", "options": long}
        if self.around:
            attention = {"type": "attention", "options": {"num_attention_heads": 2}}
            return [[short, far] if kind == "beside" else [attention], [{**inner, "name": "inner"}]]
        return {
            "alone": [[own], [{**inner, "name": "inner"}]],
            "beside": [[short, {**own, "name": "tried"}, far], [{**inner, "name": "inner"}]],
            "twice": [[{**own, "name": "one"}], [{**own, "name": "two"}]],
        }[kind]

    def config(self, kind: str = "alone", layers: int = 2, **more: Any) -> MosaicConfig:
        blocks = [{"repeat": layers, "steps": self.arrangement(kind)}]
        sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "max_position_embeddings": 64}
        if self.around:
            sizes["around"] = {**self.spec(), "name": "tried"}
        return MosaicConfig(blocks=blocks, **sizes | more)

    def model(self, kind: str = "alone", dtype: torch.dtype = torch.float64, **more: Any) -> MosaicForCausalLM:
        """A random model at evaluation, with weights so large that the memory matters to the logits."""
        torch.manual_seed(3)
        model = MosaicForCausalLM(self.config(kind, **more)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2.0)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def memory(self, layer_index: int = 0, common: Common | None = None) -> Memory:
        """The memory alone, initialised; one that stands around blocks with a stack of one."""
        torch.manual_seed(4)
        common = common or Common(WIDTH, num_layers=2)
        if self.around:
            made = Stack([self.arrangement()], nn.RMSNorm, common, self.spec())
        else:
            made = build(self.type, dict(self.options), common, layer_index)
        with torch.no_grad():
            for one in made.memories() if self.around else [made]:
                one.reset_parameters(layer_index)
        return made
