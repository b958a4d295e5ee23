"""How far a Memory Mosaic v1 is from the authors' own: `python benchmarks/parity_v1.py FOLDER`, of reference outputs.

For each `memory_mosaics_v1_*.safetensors` in the folder (weights `param/...`, `input_ids`, `logits`, and where there
are any `loss` and `grad/...`, all in float64) it prints the largest absolute differences in float64 and float32.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from mosaics.models.convert_v1 import from_memory_mosaics_v1


def compare(path: Path, dtype: torch.dtype) -> dict[str, float]:
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    model, ids = from_memory_mosaics_v1(part("param/"), settings).to(dtype), tensors["input_ids"]
    logits = model(ids).logits
    found = {"logits": (logits - tensors["logits"]).abs().max().item()}
    if gradients := part("grad/"):
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())  # of the same position, as their call has it
        loss.backward()
        expected = dict(from_memory_mosaics_v1(gradients, settings, key_clamp=5.0).named_parameters())
        found["loss"] = (loss - tensors["loss"]).abs().item()
        found["gradients"] = max((p.grad - expected[name]).abs().max().item() for name, p in model.named_parameters())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for path in sorted(parser.parse_args().folder.glob("memory_mosaics_v1_*.safetensors")):
        for dtype in (torch.float64, torch.float32):
            figures = ", ".join(f"{name} {value:.1e}" for name, value in compare(path, dtype).items())
            print(f"{path.stem} {str(dtype).removeprefix('torch.')}: {figures}")


if __name__ == "__main__":
    main()
