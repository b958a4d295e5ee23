"""How well documents that were read apart answer together: facts of a world spread over 1 to 256 documents.

python benchmarks/united.py [demo] [--questions 40] [--words 2048] [--results results/united.json]   # demo: comes along
python benchmarks/united.py --why [--questions 16] [--results results/uniting.json]     # what makes it fail, see `why`
python benchmarks/united.py --show results/united.json                                              # the tables again

A text of made-up facts, with sentences about nothing between them, is cut at its full stops into so many documents,
which go into a library. Asked is for one fact: of all of them; of the text as one context; of the document with the
fact alone; of the four that BM25 finds, as one context and united, and of the first of these alone; of the four that
the library's summaries find; of a library from which the document was removed; and of one with a further document that
says something else. Right is the whole answer, greedily written. Shares in percent with 95 % intervals (Wilson);
seconds are those of one thread of the processor.
"""

import argparse
import itertools
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from mosaics.data.worlds import World, prose
from mosaics.evaluation.results import wilson
from mosaics.experiments.records import FORMAT, commit, packed, processor, read_record, unpacked, write_lines
from mosaics.library import Library
from mosaics.models.memory_file import read_context
from mosaics.models.united import read_stores, united_cache
from mosaics.ops.kernel_regression import united
from mosaics.training.sources import open_source

TOP = 4
SHOWN = {  # columns of the table
    "united": "united",
    "alone": "the right one alone",
    "bm25 4 together": "BM25's 4 as one context",
    "bm25 4 united": "BM25's 4 united",
    "bm25 1": "BM25's first alone",
    "summaries 4": "4 by summaries",
    "removed": "the right one removed",
    "conflict, the first": "two say different things: the first's answer",
    "conflict, the other": "the other's",
}
FACT = re.compile(r"[Tt]he (?P<a>\w+) of (?P<n>\w+ \w+) is|[Ff]or (?P<m>\w+ \w+) the (?P<b>\w+) is")
FACTORS = (0, 1 / 16, 1 / 4, 4, 16)


def documents_of(text: str, count: int) -> list[str]:
    """The text in so many parts of about as many sentences, in their order."""
    sentences = re.findall(r"[^.]+\.", text)
    cuts = [round(i * len(sentences) / count) for i in range(count + 1)]
    return ["".join(sentences[a:b]).strip() for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def holds(document: str, question: str, answer: str) -> bool:
    """Whether a sentence of the document says what is asked for."""
    wanted = {*words_of(question), *words_of(answer)} - {"so", "is", "the", "for", "of"}
    return any(wanted <= set(words_of(sentence)) for sentence in document.split("."))


def examples(count: int, words: int, is_invented: bool, each: int = 8):
    """Texts, each with its questions, answers, and something else that could be one."""
    found = World(0).examples("new-knowledge", count, words, questions=each)
    for number, (_, group) in enumerate(itertools.groupby(found, lambda example: example.context)):
        lines = []
        for one in group:
            other = next(choice for choice in one.choices if choice != one.answer)
            lines += [prose.question(one.question), one.answer, other]
            context = one.context
        text = "\n".join((prose.prose(context), *lines))
        text, *lines = (prose.invented(np.random.default_rng(number), text) if is_invented else text).split("\n")
        yield text, [tuple(lines[i : i + 3]) for i in range(0, len(lines), 3)]


class Study:
    """Asks a model."""

    def __init__(self, source: str, counts: list[int]) -> None:
        self.model, self.tokenizer = open_source(source)
        self.counts = counts
        self.scores: dict[tuple[str, int, str], list[bool]] = defaultdict(list)
        self.numbers: dict[tuple[str, int, str], list[float]] = defaultdict(list)

    def ids(self, text: str, special: bool = True) -> Tensor:
        return torch.tensor([self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids])

    def answers(self, cache, prompt: Tensor, answer: str) -> bool:
        """Whether the answer is what is written after the prompt."""
        wanted = self.ids(f" {answer}.", special=False)
        logits = self.model(torch.cat([prompt, wanted[:, :-1]], dim=1), past_key_values=cache).logits
        return torch.equal(logits[:, -wanted.shape[1] :].argmax(-1), wanted)

    def text(self, kind: str, text: str, asked: list[tuple[str, str, str]]) -> None:
        """Ask of one text, cut into each number of documents."""
        for question, answer, _ in asked:
            cache = read_context(self.model, self.ids(text))
            right = self.answers(cache, self.ids(" " + question, special=False), answer)
            self.scores[kind, 0, "together"].append(right)
        for count in self.counts:
            parts = {f"{i:03}": part for i, part in enumerate(documents_of(text, count))}
            assert len(parts) == count, (len(parts), count)
            with tempfile.TemporaryDirectory() as folder:
                library = Library.at(Path(folder) / "library", self.model, self.tokenizer)
                began = time.process_time()
                list(library.add(parts))
                self.numbers[kind, count, "read"].append(time.process_time() - began)
                kept = sum(path.stat().st_size for path in library.folder.path.iterdir())
                self.numbers[kind, count, "bytes"].append(kept)
                for one in asked:
                    self.question(kind, library, parts, *one)

    def question(self, kind: str, library: Library, parts: dict[str, str], question: str, answer: str, other: str):
        """Ask one question in every way."""
        count, asked = len(parts), self.ids(question)

        def ask(name: str, names, prompt: Tensor = asked, cache=None, value: str = answer) -> None:
            began = time.process_time()
            cache = library.memory(names) if cache is None else cache()
            self.scores[kind, count, name].append(self.answers(cache, prompt, value))
            self.numbers[kind, count, name].append(time.process_time() - began)

        own = [name for name, part in parts.items() if holds(part, question, answer)]
        assert own, (question, answer)
        library.memory()  # what is asked is in memory
        ask("united", None)
        ask("alone", own)
        if count > 1:
            found = self.best(parts, question)
            together = self.ids(" ".join(parts[name] for name in sorted(found)))
            behind = self.ids(" " + question, special=False)
            ask("bm25 4 together", None, behind, cache=lambda: read_context(self.model, together))
            ask("bm25 4 united", found)
            ask("bm25 1", found[:1])
            ask("summaries 4", library.choose(asked, TOP))
        if count == max(self.counts):
            for factor in FACTORS:  # the bandwidth of another number of pairs
                total = lambda keys, sizes, total, factor=factor: keys.shape[2] * factor  # noqa: E731
                with patch.object(united, "_total", total):
                    ask(f"n times {factor:g}", None)
        lie = f"{question.removeprefix('So ')} {other}."
        list(library.add({"lie": lie[0].upper() + lie[1:]}))
        for name, value in (("conflict, the first", answer), ("conflict, the other", other)):
            ask(name, None, value=value)
        library.remove("lie", *own)
        ask("removed", None)
        list(library.add({name: parts[name] for name in own}))

    def why(self, kind: str, text: str, asked: list[tuple[str, str, str]]) -> None:
        """Ask of a text in very many documents, of the right one and only some kinds of the others beside it: those
        that state no fact, facts about others, the same attribute of others, other facts of the same person; of all
        with a broader and a sharper kernel."""
        count = max(self.counts)
        parts = documents_of(text, count)
        end = torch.tensor([[self.tokenizer.eos_token_id]])
        stores = [read_stores(self.model, torch.cat([self.ids(part), end], dim=1)) for part in parts]
        facts = [FACT.search(part) for part in parts]
        for question, answer, _ in asked:
            about = FACT.search(question.removeprefix("So ") + " x")
            attribute, person = about["a"] or about["b"], about["n"] or about["m"]
            own = [holds(part, question, answer) for part in parts]
            same = [fact is not None and (fact["a"] or fact["b"]) == attribute for fact in facts]
            theirs = [fact is not None and (fact["n"] or fact["m"]) == person for fact in facts]
            ways = {
                "the right one": [False] * count,
                "and what states no fact": [fact is None for fact in facts],
                "and other attributes of others": [
                    f and not s and not t for f, s, t in zip(facts, same, theirs, strict=True)
                ],
                "and the same attribute of others": [s and not t for s, t in zip(same, theirs, strict=True)],
                "and other attributes of the same": [t and not s for s, t in zip(same, theirs, strict=True)],
                "all": [True] * count,
            }
            for name, others in ways.items():
                chosen = [store for store, *is_in in zip(stores, own, others, strict=True) if any(is_in)]
                cache = united_cache(self.model, chosen)
                self.scores[kind, count, name].append(self.answers(cache, self.ids(question), answer))
                self.numbers[kind, count, name].append(len(chosen))
            for factor in (0.5, 1.5, 2, 4):
                at = united.bandwidth_at
                with patch.object(
                    united, "bandwidth_at", lambda *x, at=at, factor=factor, **more: factor * at(*x, **more)
                ):
                    cache = united_cache(self.model, stores)
                    right = self.answers(cache, self.ids(question), answer)
                self.scores[kind, count, f"all, β times {factor:g}"].append(right)

    @staticmethod
    def best(parts: dict[str, str], question: str) -> list[str]:
        """The documents that BM25 finds, the best first."""
        from rank_bm25 import BM25Plus

        scores = BM25Plus([words_of(part) for part in parts.values()]).get_scores(words_of(question))
        return [list(parts)[i] for i in np.argsort(-scores, kind="stable")[:TOP]]

    def rows(self):
        """As they are kept."""
        for (kind, count, name), scores in self.scores.items():
            seconds = self.numbers[kind, count, name]
            about = {"words": kind, "documents": count, "how": name, "scores": packed([float(s) for s in scores])}
            yield about | ({"mean": round(float(np.mean(seconds)), 4)} if seconds else {})
        for (kind, count, name), values in self.numbers.items():
            if name in ("read", "bytes"):
                yield {"words": kind, "documents": count, "how": name, "mean": round(float(np.mean(values)), 4)}


def share(scores: list[float]) -> str:
    right = sum(scores) / len(scores)
    low, high = wilson(right, len(scores))
    return f"{100 * right:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def tables(record: dict) -> str:
    """The record's tables in Markdown."""
    if record["name"] == "uniting":
        kinds = list(dict.fromkeys(row["words"] for row in record["rows"]))
        lines = [
            "| read | documents | " + " | ".join(f"words {kind}" for kind in kinds) + " |",
            "|---|---|" + "---|" * len(kinds),
        ]
        rows = {(row["how"], row["words"]): row for row in record["rows"]}
        for name in dict.fromkeys(row["how"] for row in record["rows"]):
            found = [rows[name, kind] for kind in kinds]
            number = f"{found[0]['mean']:.0f}" if "mean" in found[0] else ""
            lines.append("| " + " | ".join([name, number, *(share(row["scores"]) for row in found)]) + " |")
        return "\n".join(lines)
    rows = {(row["words"], row["documents"], row["how"]): row for row in record["rows"]}
    counts = sorted({count for _, count, _ in rows if count})
    parts = []
    for kind in dict.fromkeys(row["words"] for row in record["rows"]):
        parts.append(f"Words {kind}; as one context {share(rows[kind, 0, 'together']['scores'])}:\n")
        head = ["documents", *SHOWN.values(), "read (s)", "asked (s)", "kept (MB)"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for count in counts:
            found = [rows.get((kind, count, name)) for name in SHOWN]
            cells = ["" if row is None else share(row["scores"]) for row in found]
            cells.append(f"{rows[kind, count, 'read']['mean']:.2f}")
            cells.append(f"{rows[kind, count, 'united']['mean']:.2f}")
            cells.append(f"{rows[kind, count, 'bytes']['mean'] / 1e6:.1f}")
            lines.append("| " + " | ".join([str(count), *cells]) + " |")
        parts.append("\n".join(lines) + "\n")
    head = ["n of the bandwidth", *(f"words {kind}" for kind in dict.fromkeys(kind for kind, *_ in rows))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    names = {f"n times {factor:g}": f"{factor:g} N" for factor in FACTORS} | {"united": "N"}
    for name in sorted(names, key=lambda name: 1.0 if name == "united" else float(name.rpartition(" ")[2])):
        cells = [share(rows[kind.removeprefix("words "), counts[-1], name]["scores"]) for kind in head[1:]]
        lines.append("| " + " | ".join([names[name], *cells]) + " |")
    parts.append(f"All of {counts[-1]} documents, by the number of pairs that the bandwidth follows:\n")
    return "\n".join([*parts, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--questions", type=int, default=40, help="of either kind of words")
    parser.add_argument("--words", type=int, default=2048, help="of a text")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--results", type=Path, help="a file to keep all in")
    parser.add_argument("--why", action="store_true", help="ask of parts of the documents, to see what makes it fail")
    parser.add_argument("--show", type=Path, help="print the tables of such a file")
    given = parser.parse_args()
    if given.show is not None:
        print(tables(read_record(given.show)))
        return
    torch.set_num_threads(1)
    study, began = Study(given.model, given.documents), time.process_time()
    machine = {"torch": torch.__version__, "threads": 1, "processor": processor()}
    what = f"{given.model} --why" if given.why else given.model
    command = f"python benchmarks/united.py {what} --questions {given.questions} --words {given.words}"
    record = {
        "format": FORMAT,
        "name": "uniting" if given.why else "united",
        "command": command,
        "commit": commit(),
        "machine": machine,
    }
    kinds = {"of the world": False, "of no list": True}
    texts = zip(*(examples(given.questions, given.words, is_invented) for is_invented in kinds.values()), strict=False)
    with torch.inference_mode():
        for pair in texts:
            for kind, (text, asked) in zip(kinds, pair, strict=True):
                (study.why if given.why else study.text)(kind, text, asked)
            record |= {"seconds": round(time.process_time() - began), "rows": list(study.rows())}
            if given.results is not None:
                write_lines(given.results, record)
            print(f"{len(next(iter(study.scores.values())))} questions in {record['seconds']} s", flush=True)
    for row in record["rows"]:
        if "scores" in row:
            row["scores"] = unpacked(row["scores"])
    print(tables(record))


if __name__ == "__main__":
    main()
