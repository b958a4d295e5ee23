"""How well documents that were read apart answer together: facts of a world spread over 1 to 64 documents.

python benchmarks/united.py [demo] [--questions 100] [--words 1024]    # demo: with the package

One text of made-up facts, with sentences about nothing between them, is cut at its full stops into so many documents.
Asked is for one fact: of all documents united, of the text as one context, of the document with the fact alone, of all
documents but that one, and of all with a further one that says something else. Right is the whole answer, greedily
written. Shares in percent with 95 % intervals (Wilson).
"""

import argparse
import re
import time
from collections import defaultdict

import torch
from torch import Tensor

from mosaics.data.worlds import World, prose
from mosaics.evaluation.results import wilson
from mosaics.experiments.bench import _commit, _processor
from mosaics.models.kept import read_context
from mosaics.models.united import read_stores, united_cache
from mosaics.training.sources import open_source


def documents_of(text: str, count: int) -> list[str]:
    """The text in so many parts of about as many sentences, in their order."""
    sentences = re.findall(r"[^.]+\.", text)
    cuts = [round(i * len(sentences) / count) for i in range(count + 1)]
    return ["".join(sentences[a:b]).strip() for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


def holds(document: str, question: str, answer: str) -> bool:
    """Whether a sentence of the document says what is asked for."""
    wanted = {*question.split(), answer} - {"So", "is", "the", "for", "of"}
    return any(wanted <= set(re.findall(r"\w+", sentence)) for sentence in document.split("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--words", type=int, default=1024, help="of the text")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 4, 16, 64])
    given = parser.parse_args()
    model, tokenizer = open_source(given.model)
    end = [tokenizer.eos_token_id]
    print(f"commit {_commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {_processor()}\n")

    def ids(text: str, special: bool = True) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=special, verbose=False).input_ids])

    def answers(cache, prompt: Tensor, answer: str) -> bool:
        """Whether the answer is what is written after the prompt."""
        wanted = ids(f" {answer}.", special=False)
        logits = model(torch.cat([prompt, wanted[:, :-1]], dim=1), past_key_values=cache).logits
        return torch.equal(logits[:, -wanted.shape[1] :].argmax(-1), wanted)

    right: dict[tuple[int, str], list[bool]] = defaultdict(list)
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    examples = World(0).examples("new-knowledge", given.questions, given.words, questions=4)
    with torch.inference_mode():
        for example in examples:
            text, question = prose.prose(example.context), prose.question(example.question)
            other = next(choice for choice in example.choices if choice != example.answer)
            asked = ids(question)
            for count in given.documents:
                began = time.perf_counter()
                parts = documents_of(text, count)
                stores = [read_stores(model, torch.cat([ids(part), torch.tensor([end])], dim=1)) for part in parts]
                seconds[count, "read"] += time.perf_counter() - began
                own = [holds(part, question, example.answer) for part in parts]
                assert any(own), (question, example.answer)
                began = time.perf_counter()
                right[count, "united"].append(answers(united_cache(model, stores), asked, example.answer))
                seconds[count, "asked"] += time.perf_counter() - began
                alone = [store for store, mine in zip(stores, own, strict=True) if mine]
                right[count, "alone"].append(answers(united_cache(model, alone), asked, example.answer))
                others = [store for store, mine in zip(stores, own, strict=True) if not mine]
                right[count, "forgotten"].append(answers(united_cache(model, others), asked, example.answer))
                lie = f"{question.removeprefix('So ')} {other}."
                lie = lie[0].upper() + lie[1:]
                lie = read_stores(model, torch.cat([ids(lie), torch.tensor([end])], dim=1))
                for name, value in (("conflict, the first", example.answer), ("conflict, the other", other)):
                    right[count, name].append(answers(united_cache(model, [*stores, lie]), asked, value))
            cache = read_context(model, ids(text))
            right[0, "together"].append(answers(cache, ids(" " + question, special=False), example.answer))

    def share(found: list[bool]) -> str:
        low, high = wilson(sum(found) / len(found), len(found))
        return f"{100 * sum(found) / len(found):.0f} ({100 * low:.0f}–{100 * high:.0f})"

    print(f"{given.questions} questions, texts of {given.words} words; as one context: {share(right[0, 'together'])}\n")
    names = ("united", "alone", "forgotten", "conflict, the first", "conflict, the other")
    print("| documents | " + " | ".join(names) + " | read (s) | asked (s) |\n|" + "---|" * (len(names) + 3))
    for count in given.documents:
        times = " | ".join(f"{seconds[count, what] / given.questions:.2f}" for what in ("read", "asked"))
        print(f"| {count} | " + " | ".join(share(right[count, name]) for name in names) + f" | {times} |")


if __name__ == "__main__":
    main()
