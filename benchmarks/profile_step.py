"""Where the time of a training step goes, by kind of operation: a mosaic beside the Llama of `mosaics bench`.

python benchmarks/profile_step.py --context 2048 [--preset NAME] [--dtype bfloat16] [--set hidden_size=512 ...]

Torch's profiler adds a little to every operation, so many small ones seem dearer than they are. On CUDA the time is
that of kernels, by the operation that launched them; what they leave of a step measured without the profiler is the
GPU's idle time, and the dearest kernels follow by name.
"""

import argparse
import statistics
from dataclasses import dataclass

import torch
import yaml
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mosaics import MosaicConfig
from mosaics.experiments.bench import Bench, training_step
from mosaics.experiments.measuring import paired

STEPS = 2
GROUPS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mkldnn_linear", "_addmm_activation"),
    "fused attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_flash_attention_forward",
        "_flash_attention_backward",
        "_efficient_attention_forward",
        "_efficient_attention_backward",
        "_cudnn_attention_forward",
        "_cudnn_attention_backward",
    ),
    "kernels of our own, in C++ or Triton": ("_Compiled", "_CompiledBackward"),
    "compiled by torch (FlexAttention)": (),
    "exponentials and softmax": ("exp", "exp_", "_softmax", "_softmax_backward_data", "_log_softmax", "log")
    + ("_log_softmax_backward_data", "logsumexp", "sigmoid", "silu", "silu_backward", "sigmoid_backward"),
    "copies, casts and fills": (
        "copy_",
        "cat",
        "clone",
        "fill_",
        "zero_",
        "constant_pad_nd",
        "gather",
        "scatter_",
        "index_select",
        "index_add_",
        "embedding_dense_backward",
    ),
    "sums, norms and maxima": (
        "sum",
        "mean",
        "linalg_vector_norm",
        "amax",
        "cummax",
        "cumsum",
        "max",
        "cummaxmin_backward",
    )
    + ("_foreach_norm", "rsqrt", "pow"),
    "arithmetic by element": (
        "add",
        "add_",
        "mul",
        "mul_",
        "sub",
        "sub_",
        "div",
        "div_",
        "neg",
        "lerp",
        "clamp",
        "where",
    )
    + ("reciprocal", "masked_fill", "masked_fill_", "addcmul_", "tril_", "abs", "clamp_", "rsub", "_foreach_mul_"),
    "optimizer": ("_fused_adamw_",),
}

REST = "views, and what is left"
OURS, COMPILED = list(GROUPS)[2:4]
COMPILED_NAMES = ("triton_", "CompiledFunction", "CompiledFxGraph", "Torch-Compiled Region")
KERNELS = 12


@dataclass
class Profile:
    """Milliseconds of a step: by the clock without the profiler, by group, by operation among those of no group, and
    (on CUDA) by kernel."""

    step: float
    groups: dict[str, float]
    rest: dict[str, float]
    kernels: dict[str, float]


def group_of(key: str) -> str:
    """The group of an operation as the profiler names it."""
    if key.startswith(("mosaics::", "GeneratedBackwardFor_mosaics_")):
        return OURS
    if any(name in key for name in COMPILED_NAMES):
        return COMPILED
    return next((group for group, ops in GROUPS.items() if key.removeprefix("aten::") in ops), REST)


def measure(settings: Bench, name: str, context: int) -> Profile:
    """A training step of a contestant of `mosaics bench`."""
    run = training_step(settings, name, settings.build(name), context, 1)
    run()
    step = statistics.median(paired({name: run}, 3, settings.torch_device)[name])
    cuda = settings.torch_device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(STEPS):
            run()
        if cuda:
            torch.cuda.synchronize()
    result = Profile(1000 * step, dict.fromkeys([*GROUPS, REST], 0.0), {}, {})
    for event in found.key_averages():
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / STEPS
        if cuda and event.device_type == DeviceType.CUDA:
            if not event.is_user_annotation:  # spans, not kernels
                result.kernels[event.key] = spent
            continue
        group = group_of(event.key)
        result.groups[group] += spent
        if group == REST:
            result.rest[event.key] = spent
    return result


def dearest(times: dict[str, float], count: int) -> list[str]:
    return sorted(times, key=times.get, reverse=True)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--preset", default="memory-mosaics-v2-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the model")
    given = parser.parse_args()
    sizes = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in given.set)}
    settings = Bench(MosaicConfig.from_preset(given.preset, **sizes), device=given.device, dtype=given.dtype)
    found = {name: measure(settings, name, given.context) for name in ("mosaic", "llama")}
    ours, theirs = found.values()
    device, dtype = settings.torch_device.type, str(settings.torch_dtype).removeprefix("torch.")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {dtype}, context {given.context}\n")
    print("| ms a step | mosaic | llama |\n|---|---|---|")
    for group in [*GROUPS, REST]:
        print(f"| {group} | {ours.groups[group]:.1f} | {theirs.groups[group]:.1f} |")
    print(f"| all | {sum(ours.groups.values()):.1f} | {sum(theirs.groups.values()):.1f} |")
    if ours.kernels:
        print(f"| all kernels | {sum(ours.kernels.values()):.1f} | {sum(theirs.kernels.values()):.1f} |")
    print(f"| by the clock, without the profiler | {ours.step:.1f} | {theirs.step:.1f} |")
    for name, one in found.items():
        print(f"\n{REST}, {name}: {', '.join(f'{op} {one.rest[op]:.1f}' for op in dearest(one.rest, 6))}")
    for name, one in found.items():
        if one.kernels:
            print(f"\n| kernels, {name} | ms a step |\n|---|---|")
            for kernel in dearest(one.kernels, KERNELS):
                print(f"| {kernel[:100]} | {one.kernels[kernel]:.2f} |")


if __name__ == "__main__":
    main()
