"""How well the summaries of a library choose documents: `python benchmarks/choosing.py MODEL`.

Documents are the beginnings of modules of Python's standard library, all of one length; questions are what follows
there. What summaries say of the shares of the weight is held against the shares when all pairs are read.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch

from mosaics.library import reading
from mosaics.library.library import Shares
from mosaics.memories import Context
from mosaics.models.united import read_stores, united_cache
from mosaics.training.sources import open_source


def ranks(x: torch.Tensor) -> torch.Tensor:
    return x.argsort().argsort().double()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=600, help="of a document")
    parser.add_argument("--question", type=int, default=48, help="tokens of a question")
    parser.add_argument("--documents", type=int, default=32, help="at most")
    parser.add_argument("--top", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = open_source(options.model)
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
