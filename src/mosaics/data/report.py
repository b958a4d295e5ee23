"""What `prepare` found in a corpus: counts, and how long its documents are."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class SplitCounts:
    """Documents (empty ones left out), tokens with begin- and end-of-text, UTF-8 bytes of the text, and how
    long the documents are: `lengths[i]` of them have 2^i to 2^(i+1) - 1 tokens, `length_tokens[i]` in all."""

    documents: int
    tokens: int
    text_bytes: int
    lengths: list[int]
    length_tokens: list[int]

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens if self.tokens else float("nan")


@dataclass(frozen=True)
class Report:
    """What `prepare` made: where, from what, and its counts. `str(report)` is a table with the distribution
    of document lengths (paper Fig. 10); `lengths.png` in the folder shows the same."""

    folder: Path
    corpus: str
    vocab_size: int
    empty_documents: int
    splits: dict[str, SplitCounts]
    reused: bool

    def to_dict(self) -> dict:
        """Everything as JSON values."""
        splits = {
            name: {**vars(counts), "bytes_per_token": counts.bytes_per_token if counts.tokens else None}
            for name, counts in self.splits.items()
        }
        return {**vars(self), "folder": str(self.folder), "splits": splits}

    def __str__(self) -> str:
        lines = [
            f"{self.corpus} in {self.folder}: vocabulary of {self.vocab_size:,}, "
            f"{self.empty_documents:,} empty documents left out",
            f"{'split':<12}{'documents':>12}{'tokens':>16}{'bytes':>16}{'bytes/token':>13}",
        ]
        for name, counts in self.splits.items():
            per_token = f"{counts.bytes_per_token:.3f}" if counts.tokens else "-"
            numbers = f"{counts.documents:>12,}{counts.tokens:>16,}{counts.text_bytes:>16,}{per_token:>13}"
            lines.append(f"{name:<12}{numbers}")
        documents, tokens = self._lengths()
        lines += ["", f"{'tokens in a document':<24}{'documents':>12}{'of documents':>14}{'of tokens':>11}"]
        for index in np.flatnonzero(documents):
            share = documents[index] / documents.sum()
            numbers = f"{documents[index]:>12,}{share:>14.1%}{tokens[index] / tokens.sum():>11.1%}"
            lines.append(f"{_range(index):<24}{numbers}  {'#' * round(40 * share)}".rstrip())
        return "\n".join(lines)

    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        size = max(len(counts.lengths) for counts in self.splits.values())
        documents, tokens = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for counts in self.splits.values():
            documents[: len(counts.lengths)] += np.asarray(counts.lengths, np.int64)
            tokens[: len(counts.lengths)] += np.asarray(counts.length_tokens, np.int64)
        return documents, tokens

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the distribution of document lengths (paper Fig. 10) to an image file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        documents, tokens = self._lengths()
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        first = int(np.flatnonzero(documents)[0])
        places = np.arange(first, len(documents))
        axes.bar(places - 0.2, 100 * documents[first:] / documents.sum(), 0.4, label="of the documents")
        axes.bar(places + 0.2, 100 * tokens[first:] / tokens.sum(), 0.4, label="of the tokens")
        axes.set_xticks(places, [f"$2^{{{place}}}$" for place in places])
        axes.set(xlabel="tokens in a document, from", ylabel="share (%)")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=120)


def _range(power: int) -> str:
    return f"{2**power:,} to {2 ** (power + 1) - 1:,}"
