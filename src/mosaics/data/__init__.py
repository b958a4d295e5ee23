"""Data: corpora, tokenizers, tokenised shards and packing. Knows no model."""

from mosaics.data.corpus import Corpus, Document, open_corpus
from mosaics.data.packing import PackedDataset
from mosaics.data.preparation import Report, prepare
from mosaics.data.shards import PreparedCorpus
from mosaics.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "Document",
    "PackedDataset",
    "PreparedCorpus",
    "Report",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "train_tokenizer",
]
