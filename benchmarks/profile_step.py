"""Where the time of a training step goes, by kind of operation: a mosaic beside the Llama of `mosaics bench`.

python benchmarks/profile_step.py --context 2048 [--preset NAME] [--dtype bfloat16] [--set hidden_size=512 ...]

Torch's profiler adds a little to every operation, so many small ones seem dearer than they are.
"""

import argparse

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from mosaics import MosaicConfig
from mosaics.experiments.bench import Bench, training_step

STEPS = 2
GROUPS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mkldnn_linear", "_addmm_activation"),
    "fused attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "kernels of our own, in C++": ("_Compiled", "_CompiledBackward"),
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


def times(settings: Bench, name: str, context: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a step by group, and by operation among those of no group; on CUDA those of the kernels' ops."""
    run = training_step(settings, name, settings.build(name), context, 1)
    run()
    cuda = settings.torch_device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(STEPS):
            run()
    groups, rest = dict.fromkeys([*GROUPS, REST], 0.0), {}
    for event in found.key_averages():
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / STEPS
        if cuda and not event.key.startswith("aten::"):
            continue
        op = event.key.removeprefix("aten::")
        group = next((group for group, ops in GROUPS.items() if op in ops), REST)
        groups[group] += spent
        if group == REST:
            rest[event.key] = spent
    return groups, rest


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
    found = {name: times(settings, name, given.context) for name in ("mosaic", "llama")}
    device, dtype = settings.torch_device.type, str(settings.torch_dtype).removeprefix("torch.")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {dtype}, context {given.context}\n")
    print("| ms a step | mosaic | llama |\n|---|---|---|")
    for group in [*GROUPS, REST]:
        print(f"| {group} | {found['mosaic'][0][group]:.1f} | {found['llama'][0][group]:.1f} |")
    print(f"| all | {sum(found['mosaic'][0].values()):.1f} | {sum(found['llama'][0].values()):.1f} |")
    for name, (_, rest) in found.items():
        most = sorted(rest, key=rest.get, reverse=True)[:6]
        print(f"\n{REST}, {name}: {', '.join(f'{op} {rest[op]:.1f}' for op in most)}")


if __name__ == "__main__":
    main()
