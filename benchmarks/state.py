"""What it costs to keep the pairs of the context in fewer bits: recall and bits per byte in each `state_dtype`.

python benchmarks/state.py [MODEL --text FILE]      # about two minutes on one core, and two more with a MODEL

Recall is that of `benchmarks/recall.py` (its model, trained here), with the first half of a row read in chunks into the
cache and the second half asked. MODEL is an exported model, whose bits per byte are those of `mosaics evaluate --suite
perplexity` on the text, within and beyond its training length: all columns are about the same tokens. In brackets the
difference from float32, with its standard error over rows of questions or stretches of text.
"""

import argparse
import math
import statistics

import torch
from recall import LENGTH, PAIRS, STEPS, rows, train

from mosaics import MosaicForCausalLM
from mosaics.experiments.records import commit, processor
from mosaics.models.memory_file import read_context

DTYPES = (None, "bfloat16", "int8")
Columns = dict[str, dict[str | None, list[float]]]  # of each dtype, a value for each row or stretch


def with_state(model: MosaicForCausalLM, dtype: str | None) -> MosaicForCausalLM:
    """The same model with another `state_dtype`."""
    config = type(model.config).from_dict(model.config.to_dict() | {"state_dtype": dtype})
    other = MosaicForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def recalled(model: MosaicForCausalLM, length: int, pairs: int, count: int) -> list[float]:
    """The accuracy of each of `count` rows, what is asked read through the cache."""
    ids, labels = rows(count, length, pairs, torch.Generator().manual_seed(1))
    predicted = []
    for row in ids.split(8):
        cache = read_context(model, row[:, : length // 2], chunk=64)
        logits = model(row[:, length // 2 :], past_key_values=cache).logits[:, :-1]
        predicted.append(logits.argmax(-1))
    asked = labels[:, length // 2 + 1 :]
    right = (torch.cat(predicted) == asked) & (asked != -100)
    return (right.sum(1) / (asked != -100).sum(1)).tolist()


def bits_per_byte(folder: str, dtype: str | None, **settings) -> dict[int, list[float]]:
    """Bits per byte of every stretch of the text, by context."""
    from mosaics.evaluation import Scorer
    from mosaics.evaluation.perplexity import Perplexity
    from mosaics.models.loading import load_exported

    scorer = Scorer(*load_exported(folder, dtype))
    suite = Perplexity(**settings)
    found: dict[int, list[float]] = {}
    for record in suite.answer(scorer, suite.examples(scorer)):
        bits = record.meta["nats"] / math.log(2) / record.meta["text_bytes"]
        found.setdefault(record.meta["length"], []).append(bits)
    return found


def shown(values: list[float], plain: list[float], scale: float, digits: int) -> str:
    """Mean, and the difference from `plain` with its standard error."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if values is plain:
        return mean
    differences = [scale * (a - b) for a, b in zip(values, plain, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    return f"{mean} ({statistics.mean(differences):+.{digits}f} ± {error:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="an exported model")
    parser.add_argument("--text", help="a text file, or whatever --data of mosaics evaluate takes")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 8, 32], help="of the training length")
    parser.add_argument("--samples", type=int, default=4, help="stretches of text")
    parser.add_argument("--rows", type=int, default=32, help="rows of questions")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, fewer for a trial")
    given = parser.parse_args()
    if (given.model is None) != (given.text is None):
        parser.error("give MODEL and --text together")
    print(f"commit {commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    trained = train(0, torch.Generator().manual_seed(0), given.steps).eval()
    columns: Columns = {}
    for length, pairs in ((LENGTH, PAIRS), (8 * LENGTH, PAIRS), (8 * LENGTH, 90)):
        columns[f"recall of {pairs} pairs at {length} (%)"] = {
            dtype: recalled(with_state(trained, dtype), length, pairs, given.rows) for dtype in DTYPES
        }
    show(columns, 100, 2)
    if given.model is not None:
        settings = {"data": given.text, "multiples": tuple(given.multiples), "samples": given.samples}
        found = {dtype: bits_per_byte(given.model, dtype, **settings) for dtype in DTYPES}
        names = {length: f"bits per byte at {length}" for length in found[None]}
        show({name: {dtype: found[dtype][length] for dtype in DTYPES} for length, name in names.items()}, 1, 5)


def show(columns: Columns, scale: float, digits: int) -> None:
    """Print a table."""
    print("| state | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for dtype in DTYPES:
        cells = [shown(values[dtype], values[None], scale, digits) for values in columns.values()]
        print(f"| {dtype or 'float32'} | " + " | ".join(cells) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
