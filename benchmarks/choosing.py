"""How well the summaries of a library choose documents: `python benchmarks/choosing.py MODEL`. How many a
bound can leave out: `python benchmarks/choosing.py MODEL --bounds [--results FILE]`; of a kept file: `--show FILE`.

Documents are the beginnings of modules of Python's standard library, all of one length; questions are what follows
there. What summaries say of the shares of the weight is held against the shares when all pairs are read.

For the bounds, documents are texts of made-up facts (which `demo` was trained on), and questions are about them. A
document is left out by one head at one token, by a memory at one token (all heads), by a memory for a whole question,
or by the whole model, so that its pairs need not be there: by what is proved by the sketch of the keys in 8 bits that a
library keeps, by the centre of each 8 keys and the largest distance from it, and by the weights themselves.
"""

from __future__ import annotations

import argparse
import itertools
import sysconfig
from pathlib import Path
from unittest.mock import patch

import torch

from mosaics.data.worlds import World, prose
from mosaics.experiments.records import FORMAT, commit, processor, read_record, write_lines
from mosaics.library import reading
from mosaics.library.choosing import sketch_of_store
from mosaics.library.library import Shares
from mosaics.memories import Context
from mosaics.memories.contract import Store
from mosaics.models.united import read_stores, united_cache
from mosaics.ops.kernel_regression import Bandwidth, kernel_regression
from mosaics.ops.kernel_regression.choosing import largest_shares, needed
from mosaics.ops.kernel_regression.united import bandwidth_at
from mosaics.training.sources import open_source


def ranks(x: torch.Tensor) -> torch.Tensor:
    return x.argsort().argsort().double()


EPSILONS = (0.5, 0.1, 0.01, 0.001)
BOUNDS = {"perfect": "a perfect bound", "sketch": "the sketch", "groups": "groups of 8"}
LEVELS = {
    "head": "one head at one token",
    "token": "a memory at one token",
    "question": "a memory for a question",
    "model": "the model for a question",
}


def by_groups(beta: torch.Tensor, queries: torch.Tensor, keys: list[torch.Tensor], total: torch.Tensor) -> torch.Tensor:
    """The largest share of each document `(heads, time, documents)` in the sum of all weights, whose logarithm is
    `total`, from the centre of each 8 keys and the largest distance from it."""
    found = []
    for own in keys:
        parts = own.split(8, dim=1)
        centres = torch.stack([part.mean(1) for part in parts], dim=1)
        radius = torch.stack([(part - part.mean(1, keepdim=True)).norm(dim=-1).amax(1) for part in parts], dim=1)
        sizes = torch.tensor([part.shape[1] for part in parts]).double()
        logits = queries @ centres.mT + queries.norm(dim=-1, keepdim=True) * radius[:, None]
        found.append((beta[..., None] * logits + sizes.log()).logsumexp(-1))
    return (torch.stack(found, dim=-1) - total[..., None]).exp()


def bounds(model, tokenizer, number: int, words: int, questions: int) -> list[dict]:
    """Rows: the share of documents left out, by bound, level and error; and over how many documents heads spread."""
    examples = list(World(0).examples("new-knowledge", number, words, questions=1))
    documents = []
    for example in examples:
        ids = [*tokenizer(prose.prose(example.context)).input_ids, tokenizer.eos_token_id]
        documents.append(read_stores(model, torch.tensor([ids])))
    sizes = torch.tensor([next(iter(document.values())).keys.shape[2] for document in documents])
    read, met = Store.read_beside, []

    def watched(store, *given, **options):
        met.append(given[:5])
        return read(store, *given, **options)

    out = {(bound, level, epsilon): [] for bound in BOUNDS for level in LEVELS for epsilon in EPSILONS}
    spread: dict[str, list] = {place: [] for place in documents[0]}
    for example in examples[:: number // questions][:questions]:
        met.clear()
        with patch.object(Store, "read_beside", watched):
            ids = torch.tensor([tokenizer(prose.question(example.question)).input_ids])
            model(ids, past_key_values=united_cache(model, documents))
        kept = {(bound, epsilon): set() for bound in BOUNDS for epsilon in EPSILONS}
        for place, (queries, keys, values, bandwidth, reach) in zip(documents[0], met, strict=True):
            stores = [document[place] for document in documents]
            sketches = [sketch_of_store(store, model.dtype) for store in stores]
            parts = [torch.cat([sketch[name] for sketch in sketches], dim=2) for name in ("data", "scale", "radius")]
            heads, time = queries.shape[1:3]
            beta = bandwidth_at(queries, keys, int(sizes.sum()), bandwidth, reach).expand(1, heads, time).double()
            asked, beta = queries[0].double(), beta[0]
            once = Bandwidth(beta.new_ones(heads))
            own = kernel_regression(
                beta[..., None] * asked[None], keys.double(), values.double(), once, reach, log_sum=True
            )
            all_keys = [store.keys[0].double() for store in stores]
            logs = torch.stack([(beta[..., None] * (asked @ k.mT)).logsumexp(-1) for k in all_keys], dim=-1)
            total = torch.logaddexp(logs.logsumexp(-1), own[1][0])
            exact = (logs - total[..., None]).exp()
            sketched = largest_shares(queries, keys, values, *parts, sizes, bandwidth, reach)
            assert (sketched.unflatten(0, (heads, time)) >= exact).all()
            shares = {"perfect": exact, "groups": by_groups(beta, asked, all_keys, total)}
            shares["sketch"] = sketched.unflatten(0, (heads, time))
            most = exact.sort(-1, descending=True).values
            within = (most.cumsum(-1) < 0.99 * most.sum(-1, keepdim=True)).sum(-1) + 1.0  # documents with 99 %
            spread[place].append((beta[:, -1], within[:, 1:].mean(1)))
            for (bound, epsilon), wanted in kept.items():
                x = shares[bound]
                for h, t in itertools.product(range(heads), range(time)):
                    out[bound, "head", epsilon].append(1 - len(needed(x[h, t, None], epsilon)) / number)
                for t in range(time):
                    out[bound, "token", epsilon].append(1 - len(needed(x[:, t], epsilon)) / number)
                found = needed(x.flatten(0, 1), epsilon)
                out[bound, "question", epsilon].append(1 - len(found) / number)
                wanted.update(found)
        for (bound, epsilon), wanted in kept.items():
            out[bound, "model", epsilon].append(1 - len(wanted) / number)
    rows = [
        {"bound": bound, "level": level, "epsilon": epsilon, "left_out": round(sum(found) / len(found), 5)}
        for (bound, level, epsilon), found in out.items()
    ]
    for place, found in spread.items():
        beta, within = (torch.stack(x).mean(0).tolist() for x in zip(*found, strict=True))
        rows.append({"memory": place, "beta": [round(x, 1) for x in beta], "documents": [round(x, 1) for x in within]})
    return rows


def bound_tables(record: dict) -> str:
    """The kept rows as Markdown."""
    rows = {(r["bound"], r["level"], r["epsilon"]): r["left_out"] for r in record["rows"] if "bound" in r}
    head = ["left out by", "proved by", *(f"ε = {epsilon:g}" for epsilon in EPSILONS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for level, what in LEVELS.items():
        for bound, how in BOUNDS.items():
            cells = [f"{100 * rows[bound, level, epsilon]:.1f}" for epsilon in EPSILONS]
            lines.append("| " + " | ".join([what, how, *cells]) + " |")
    lines += [
        "",
        "| memory | β of its heads | documents with 99 % of what a head reads of documents |",
        "|---|---|---|",
    ]
    for row in record["rows"]:
        if "memory" in row:
            beta, spread = (", ".join(f"{x:.0f}" for x in row[name]) for name in ("beta", "documents"))
            lines.append(f"| {row['memory']} | {beta} | {spread} |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--bounds", action="store_true", help="how many documents a bound can leave out")
    parser.add_argument("--results", type=Path, help="a file to keep what --bounds gives")
    parser.add_argument("--show", type=Path, help="print the tables of such a file")
    parser.add_argument("--tokens", type=int, default=600, help="of a document")
    parser.add_argument("--question", type=int, default=48, help="tokens of a question")
    parser.add_argument("--documents", type=int, default=32, help="at most")
    parser.add_argument("--top", type=int, default=4)
    options = parser.parse_args()
    if options.show is not None:
        print(bound_tables(read_record(options.show)))
        return
    torch.set_num_threads(1)
    model, tokenizer = open_source(options.model)
    if options.bounds:
        number, words, questions = 64, 60, 4
        machine = {"torch": torch.__version__, "threads": 1, "processor": processor()}
        command = f"python benchmarks/choosing.py {options.model} --bounds"
        record = {"format": FORMAT, "name": "choosing", "command": command, "commit": commit(), "machine": machine}
        record |= {"documents": number, "words": words, "questions": questions}
        record["rows"] = bounds(model, tokenizer, number, words, questions)
        if options.results is not None:
            write_lines(options.results, record)
        print(bound_tables(record))
        return
    asked, full = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids = tokenizer(path.read_text(encoding="utf-8")).input_ids
        if len(ids) >= options.tokens + options.question and len(full) < options.documents:
            document = [*ids[: options.tokens], tokenizer.eos_token_id]
            full.append(read_stores(model, torch.tensor([document])))
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            asked.append(torch.tensor([begin + ids[options.tokens :][: options.question]]))

    def shares(documents, question):
        sizes = [next(iter(document.values())).keys.shape[2] for document in documents]
        found = Shares(sizes)
        model(question, past_key_values=united_cache(model, documents), use_cache=True, context=Context(reads=found))
        return found.mean().mean(0)

    exact = [shares(full, question) for question in asked]
    top, number = options.top, len(full)
    print(f"{number} documents of {options.tokens} tokens, as many questions; the {top} largest shares are", end=" ")
    best = sum(e.topk(top).values.sum() / e.sum() for e in exact) / number
    print(f"{best:.3f} of the weight of all, {top} drawn ones {top / number:.3f}\n")
    print("| pairs as one | part of the radius | share of the chosen | largest is chosen | rank correlation |")
    print("|---|---|---|---|---|")
    for group in (4, 8, 16):
        for spread in (0.0, 0.5, 1.0):
            reading.GROUP, reading.SPREAD = group, spread
            summaries = [{p: reading._summary(s, model.dtype) for p, s in document.items()} for document in full]
            held = largest = correlation = 0.0
            for question, e in zip(asked, exact, strict=True):
                estimate = shares(summaries, question)
                chosen = estimate.topk(top).indices
                held += (e[chosen].sum() / e.sum()).item() / number
                largest += (e.argmax() in chosen) / number
                correlation += torch.corrcoef(torch.stack([ranks(e), ranks(estimate)]))[0, 1].item() / number
            print(f"| {group} | {spread} | {held:.3f} | {largest:.2f} | {correlation:.2f} |", flush=True)


if __name__ == "__main__":
    main()
