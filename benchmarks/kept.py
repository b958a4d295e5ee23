"""What a kept memory saves: seconds to read a text, to save what is remembered of it and to take that up again, and the
bytes of text and files.

python benchmarks/kept.py MODEL [--lengths 1024 4096 16384 65536]      # an exported model; about four minutes

The text is source code of Python's standard library. All dtypes of the state take part in every round; medians.
"""

import argparse
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mosaics.experiments.records import commit, processor
from mosaics.models.loading import load_exported
from mosaics.models.memory_file import load_memory, read_context, save_memory

DTYPES = (None, "bfloat16", "int8")


def text_tokens(tokenizer, count: int) -> tuple[torch.Tensor, int]:
    """So many tokens `(1, count)`, and the bytes of their text."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).input_ids
        if len(ids) >= count:
            break
    return torch.tensor([ids[:count]]), len(tokenizer.decode(ids[:count]).encode())


def timed(function, *arguments) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="in tokens")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    models = {dtype: load_exported(given.model, dtype) for dtype in DTYPES}
    plain, tokenizer = models[None]
    print(f"commit {commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    print(f"{plain.num_parameters():,} parameters in {plain.dtype}\n")
    print("| tokens | bytes of text | state | read (s) | save (s) | take up (s) | bytes of the file |\n|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "memory"
        for model, _ in models.values():
            save_memory(path, model, read_context(model, torch.zeros(1, 64, dtype=torch.long)), torch.zeros(1, 64))
        for length in sorted(given.lengths):
            ids, size = text_tokens(tokenizer, length)
            found: dict[str | None, list[tuple[float, ...]]] = {dtype: [] for dtype in DTYPES}
            for _ in range(given.rounds):
                for dtype, (model, _) in models.items():
                    read, cache = timed(read_context, model, ids)
                    save, written = timed(save_memory, path, model, cache, ids)
                    del cache
                    load, _ = timed(load_memory, path, model)
                    found[dtype].append((read, save, load, written))
            for dtype, samples in found.items():
                read, save, load, written = map(statistics.median, zip(*samples, strict=True))
                seconds = f"{read:.2f} | {save:.2f} | {load:.2f}"
                print(f"| {ids.shape[1]:,} | {size:,} | {dtype or 'float32'} | {seconds} | {written:,} |", flush=True)


if __name__ == "__main__":
    main()
