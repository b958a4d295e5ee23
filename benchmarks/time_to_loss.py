"""How long a mosaic trains until it is as good as a Llama of equal size becomes in a fixed number of steps.

python benchmarks/time_to_loss.py [--steps 150] [--seeds 0,1,2] [--learning-rates 1e-3,2e-3,4e-3] [--folder FOLDER]
    [--device cuda] [--dtype bfloat16] [--context 512] [--batch 8] [--set hidden_size=512 ...]

Both see the same rows of the source of Python's standard library, in turn (A B A B) in one process; only training
counts, not the validation between. Each learning rate is tried for both with the first seed, and each takes its best on
held-out text into the other seeds. The mosaic's time is interpolated between two validations.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import yaml

from mosaics import MosaicConfig
from mosaics.data import open_corpus, prepare
from mosaics.data.packing import PackedDataset
from mosaics.experiments.bench import Bench
from mosaics.training.optimizer import learning_rate
from mosaics.training.recipe import TrainingSection
from mosaics.training.setup import autocast

EVERY = 10  # steps between validations
HELD_OUT = 32  # rows


# Those of the quickstart.
SIZES = dict(
    vocab_size=2048,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    window=64,
    delay=16,
    train_delay=[16, 64],
)


def optimizer_of(model) -> torch.optim.AdamW:
    """AdamW as in training: weight decay on matrices only."""
    groups = [[], []]
    for parameter in model.parameters():
        groups[parameter.dim() < 2].append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )


@torch.no_grad()
def held_out_loss(settings: Bench, model, data: PackedDataset) -> float:
    """Nats a token."""
    rows = data.batch(0, min(HELD_OUT, len(data)))
    model.eval()
    with autocast(settings.torch_device, settings.torch_dtype):
        losses = [
            model(input_ids=ids, labels=labels, use_cache=False).loss.item()
            for ids, labels in zip(*(split(settings, rows, key) for key in ("input_ids", "labels")), strict=True)
        ]
    model.train()
    return sum(losses) / len(losses)


def split(settings: Bench, rows: dict[str, torch.Tensor], key: str) -> tuple[torch.Tensor, ...]:
    return rows[key].to(settings.torch_device).split(8)


def backward(settings: Bench, model, name: str, rows: dict[str, torch.Tensor]) -> None:
    """Gradients of the loss of some rows."""
    ids, labels = (rows[key].to(settings.torch_device) for key in ("input_ids", "labels"))
    own = {"loss_only": True} if name == "mosaic" else {}
    with autocast(settings.torch_device, settings.torch_dtype):
        loss = model(input_ids=ids, labels=labels, use_cache=False, **own).loss
    loss.backward()


def clock(settings: Bench) -> float:
    """Seconds, when the device is done."""
    if settings.torch_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(settings: Bench, data: dict[str, PackedDataset], rates: dict[str, float], steps: int, seed: int, batch: int):
    """Curves `{name: [(seconds, loss), ...]}`, a point every `EVERY` steps. What is compiled is compiled before."""
    models = {}
    for name in rates:
        models[name] = settings.build(name, seed).train()
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    for name, model in models.items():
        backward(settings, model, name, data["train"].batch(0, batch))
        model.zero_grad()
    seconds, curves = dict.fromkeys(rates, 0.0), {name: [] for name in rates}
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        rows = data["train"].batch((seed * steps + step - 1) * batch, batch)
        for name, model in models.items():
            schedule = TrainingSection(steps=steps, learning_rate=rates[name], warmup_steps=steps // 5)
            began = clock(settings)
            backward(settings, model, name, rows)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizers[name].param_groups:
                group["lr"] = learning_rate(step, schedule)
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name] += clock(settings) - began
            if step % EVERY == 0 or step == steps:
                curves[name].append((seconds[name], held_out_loss(settings, model, data["validation"])))
        if step % EVERY == 0:
            print(f"step {step}: " + ", ".join(f"{n} {c[-1][1]:.3f} in {c[-1][0]:.1f} s" for n, c in curves.items()))
    return curves


def reached(curve: list[tuple[float, float]], loss: float) -> float | None:
    """Seconds until the curve first comes down to a loss, between two points by a straight line."""
    before = None
    for seconds, found in curve:
        if found <= loss:
            if before is None or before[1] == found:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - found)
        before = (seconds, found)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--learning-rates", default="1e-3,2e-3,4e-3")
    parser.add_argument("--folder", type=Path, help="for the prepared text; a temporary one by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the model")
    given = parser.parse_args()
    changes = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in given.set)}
    seeds, rates = map(int, given.seeds.split(",")), [float(x) for x in given.learning_rates.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch) / "text"
        if not folder.exists():
            prepare(open_corpus("python-stdlib"), folder, vocab_size=2048, validation=0.05, show_progress=False)
        data = {name: PackedDataset(folder, name, given.context) for name in ("train", "validation")}
        config = MosaicConfig.from_preset("memory-mosaics-v2-tiny", **SIZES | changes)
        settings, best, rows = Bench(config, device=given.device, dtype=given.dtype), {}, []
        for seed in seeds:
            trials = [best] if best else [{"llama": rate, "mosaic": rate} for rate in rates]
            curves = {}
            for trial in trials:
                print(f"seed {seed}, learning rates {trial}", flush=True)
                for name, curve in train(settings, data, trial, given.steps, seed, given.batch).items():
                    if name not in curves or curve[-1][1] < curves[name][-1][1]:
                        curves[name], best[name] = curve, trial[name]
            seconds, loss = curves["llama"][-1]
            found = reached(curves["mosaic"], loss)
            rows.append((seed, loss, seconds, curves["mosaic"][-1][1], curves["mosaic"][-1][0], found))
    print(f"\nlearning rates: {best}; {given.steps} steps of {given.batch} x {given.context} tokens\n")
    print("| seed | Llama's loss | in | the mosaic's | in | the mosaic is down to Llama's after | ratio |")
    print("|---|---|---|---|---|---|---|")
    for seed, loss, seconds, own, own_seconds, found in rows:
        last = "never | -" if found is None else f"{found:.1f} s | {found / seconds:.2f}"
        print(f"| {seed} | {loss:.3f} | {seconds:.1f} s | {own:.3f} | {own_seconds:.1f} s | {last} |")


if __name__ == "__main__":
    main()
