"""What each memory costs in the place of v2's: a training step, decoding, and the state, beside v2 and a Llama of as
many parameters, in turn and in one process.

python benchmarks/systems.py --results results     # every `-tiny` preset; some minutes each, on a quiet machine

Written to FOLDER/systems.json after every case, beside what is there of others, and shown by `mosaics report FOLDER`
with the league. A case whose step takes more than a minute, or more memory than there is, is left out and said to be.
"""

import argparse
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.experiments.bench import Bench, decoding, training_step
from mosaics.experiments.league import systems
from mosaics.experiments.measuring import paired
from mosaics.experiments.records import commit, read_record, write_record
from mosaics.experiments.studies import machine
from mosaics.models.matching import matched

FIRST, PEER, LIMIT = "memory-mosaics-v2-tiny", "llama", 60.0
TRAINING, DECODING = 2048, (1024, 16384)


def runs_of(settings: Bench, models: dict[str, Any], part: str, context: int) -> tuple[dict[str, Any], float]:
    """A function for each model, called once, and the seconds of the longest call."""
    make, runs, longest = training_step if part == "training" else decoding, {}, 0.0
    for name, model in models.items():
        runs[name] = make(settings, "llama" if name == PEER else "mosaic", model, context, 1)
        began = time.perf_counter()
        runs[name]()
        longest = max(longest, time.perf_counter() - began)
    return runs, longest


def seconds_to_read(settings: Bench, model: Any) -> float:
    """Of a prompt of 1,024 tokens."""
    model.eval().to(settings.torch_dtype)
    ids = torch.zeros(1, DECODING[0], dtype=torch.long)
    began = time.perf_counter()
    with torch.inference_mode():
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


def measure(preset: str, dtype: str, rounds: int, part: str, context: int) -> dict[str, Any]:
    """One case of one system, beside v2 and the Llama in the same rounds."""
    first = MosaicConfig.from_preset(FIRST, max_position_embeddings=DECODING[-1])
    config = matched(MosaicConfig.from_preset(preset, max_position_embeddings=DECODING[-1]), first)
    settings, own = Bench(first, rounds=rounds, dtype=dtype), Bench(config, rounds=rounds, dtype=dtype)
    models = {FIRST: settings.build("mosaic"), PEER: settings.build(PEER), preset: own.build("mosaic")}
    if part == "decoding" and seconds_to_read(own, models[preset]) * context / DECODING[0] > 2 * LIMIT:
        return {"left_out": "reading the prompt takes too long"}
    runs, longest = runs_of(settings, models, part, context)
    if longest > LIMIT:
        return {"left_out": f"a step takes {longest:.0f} s"}
    samples, case = paired(runs, rounds, settings.torch_device, 16 if part == "decoding" else None), {}
    for name, key in ((FIRST, "to_v2"), (PEER, "to_llama")):
        ratios = [a / b for a, b in zip(samples[preset], samples[name], strict=True)]
        case[key] = [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]
    return case | {"seconds": round(statistics.median(samples[preset]), 6)}


def measured(preset: str, dtype: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The cases of one system, each in a process of its own, which it may kill."""
    config = MosaicConfig.from_preset(preset, max_position_embeddings=DECODING[-1])
    figures = MosaicForCausalLM(matched(config, MosaicConfig.from_preset(FIRST)))
    for part, context in (("training", TRAINING), *(("decoding", n) for n in DECODING)):
        case = {"system": preset.removesuffix("-tiny"), "part": part, "context": context, "batch_size": 1}
        case |= {"parameters": figures.num_parameters(), "state_bytes": figures.describe(context)["state_bytes"]}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                yield case | pool.submit(measure, preset, dtype, rounds, part, context).result()
            except RuntimeError as error:  # that of a process that was killed is one, too
                if not isinstance(error, BrokenProcessPool) and "allocate memory" not in str(error):
                    raise
                yield case | {"left_out": "more memory than there is"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="all")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    try:
        asked = systems(given.systems.split(","))
    except ValueError as error:
        parser.error(str(error))
    path = given.results / "systems.json"
    again = {preset.removesuffix("-tiny") for preset in asked}
    before = read_record(path)["rows"] if path.is_file() else []
    cases = [case for case in before if case["system"] not in again]
    about = {"machine": machine() | {"threads": torch.get_num_threads()}, "models": [], "rows": cases}
    for preset in asked:
        for dtype in given.dtypes.split(","):
            for case in measured(preset, dtype, given.rounds):
                print(case, flush=True)
                cases.append(case | {"dtype": dtype, "commit": commit()})
                write_record(path, "systems", about, shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
