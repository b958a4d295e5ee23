"""Model FLOPs utilisation (MFU) of a training step: a mosaic of 302 M parameters beside the Llama of `mosaics bench`.

python benchmarks/utilisation.py [--context 4096] [--batch 4] [--rounds 5] [--dtype bfloat16] [--set KEY=VALUE ...]

Counted is what the arrangement needs (backward twice forward, nothing recomputed), by the clock, and compared with the
maker's figure for matrix products in bfloat16 (of the GPUs that `mosaics train --gpu` knows) and with what a large
matrix product reaches here. Peak memory is what torch's allocator held at most in the first step, of this model.
"""

import argparse
import statistics

import torch
import yaml

from mosaics import MosaicConfig
from mosaics.experiments.bench import Bench, _Figures, training_step
from mosaics.experiments.measuring import limits, paired
from mosaics.training.plan import GPUS

SIZES = dict(
    vocab_size=32768,
    hidden_size=1024,
    num_hidden_layers=18,
    num_attention_heads=16,
    intermediate_size=2176,
    window=256,
    delay=64,
    train_delay=[64, 256],
)


def data_sheet(settings: Bench) -> float | None:
    """Operations a second by the maker's figure; None for other devices and dtypes."""
    if settings.torch_device.type != "cuda" or settings.torch_dtype != torch.bfloat16:
        return None
    device = torch.cuda.get_device_name().lower()
    return next((gpu.flops for name, gpu in GPUS.items() if name in device), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the model")
    given = parser.parse_args()
    changes = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in given.set)}
    config = MosaicConfig.from_preset("memory-mosaics-v2-tiny", **SIZES | changes)
    settings = Bench(config, device=given.device, dtype=given.dtype, peers=("llama",))
    device, dtype = settings.torch_device, settings.torch_dtype
    reached, known = limits(device, dtype)["flops_per_second"], data_sheet(settings)
    runs, peaks = {}, {}
    for name in ("mosaic", "llama"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        runs[name] = training_step(settings, name, settings.build(name), given.context, given.batch)
        runs[name]()
        peaks[name] = ""
        if device.type == "cuda":
            peaks[name] = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.1f} GiB"
    samples = paired(runs, given.rounds, device)
    print(f"{device.type}, {str(dtype).removeprefix('torch.')}, steps of {given.batch} x {given.context} tokens")
    sheet = "unknown" if known is None else f"{known / 1e12:,.0f} TFLOP/s"
    print(f"matrix products: {reached / 1e12:,.3g} TFLOP/s measured, by the data sheet {sheet}\n")
    print("| | parameters | ms a step | tokens/s | TFLOP/s | MFU | of the measured | peak |\n" + "|---" * 8 + "|")
    tokens = given.batch * given.context
    for name, contestant in (("mosaic", config), ("llama", settings.peer)):
        figures, seconds = _Figures(contestant, dtype), statistics.median(samples[name])
        speed = figures.flops_per_token(given.context, True) * tokens / seconds
        row = [name, f"{figures.summary()['parameters']:,}", f"{1000 * seconds:.1f}", f"{tokens / seconds:,.0f}"]
        row += [f"{speed / 1e12:,.3g}", "" if known is None else f"{speed / known:.1%}", f"{speed / reached:.1%}"]
        print(f"| {' | '.join([*row, peaks[name]])} |")
    ratios = sorted(a / b for a, b in zip(samples["mosaic"], samples["llama"], strict=True))
    print(f"\nratio of the times: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
