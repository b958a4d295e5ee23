import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from data.conftest import TEXTS, memory_corpus
from data.test_tokenizer import other_tokenizer
from mosaics.data import Corpus, Document, PreparedCorpus, prepare, train_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    prepared, found = PreparedCorpus(folder), {}
    for name, counts in prepared.manifest["splits"].items():
        if counts["documents"]:
            split = prepared.split(name)
            ids = split.names(list(range(len(split))))
            borders = zip(split.offsets[:-1], split.offsets[1:], strict=True)
            found[name] = {key: split.read(*border) for key, border in zip(ids, borders, strict=True)}
    return found


def test_prepare_keeps_every_text_between_begin_and_end(prepared_folder):
    prepared = PreparedCorpus(prepared_folder)
    tokenizer, found = prepared.tokenizer(), documents_of(prepared_folder)
    texts = {}
    for split in found.values():
        for name, ids in split.items():
            assert (ids[0], ids[-1]) == (prepared.bos_token_id, prepared.eos_token_id)
            texts[name] = tokenizer.decode(ids[1:-1])
            assert prepared.token_bytes[ids].sum() == len(texts[name].encode())
    assert texts == {name: text for name, text in TEXTS.items() if text}
    assert not found["train"].keys() & found["validation"].keys()


def test_prepare_text_in_pieces_and_shards_is_the_same(prepared_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mosaics.data.preparation._BATCH_CHARACTERS", 50)
    tokenizer = PreparedCorpus(prepared_folder).tokenizer()
    prepare(memory_corpus(TEXTS), tmp_path / "new", tokenizer=tokenizer, validation=0.3, seed=1, shard_tokens=100)
    assert PreparedCorpus(tmp_path / "new").manifest["splits"]["train"]["shards"] > 10
    before, after = documents_of(prepared_folder), documents_of(tmp_path / "new")
    for split in before:
        assert list(before[split]) == list(after[split])
        assert all(np.array_equal(before[split][name], after[split][name]) for name in before[split])


def test_prepare_report_counts_and_shows_lengths(prepared_folder):
    report = prepare(memory_corpus(TEXTS), prepared_folder, vocab_size=400, validation=0.3, seed=1)
    found = documents_of(prepared_folder)
    assert report.empty_documents == 1
    for name, split in found.items():
        counts, sizes = report.splits[name], [len(ids) for ids in split.values()]
        assert (counts.documents, counts.tokens) == (len(sizes), sum(sizes))
        assert counts.text_bytes == sum(len(TEXTS[key].encode()) for key in split)
        assert counts.bytes_per_token == counts.text_bytes / counts.tokens
        for power, count in enumerate(counts.lengths):
            inside = [size for size in sizes if 2**power <= size < 2 ** (power + 1)]
            assert (count, counts.length_tokens[power]) == (len(inside), sum(inside))
        assert sum(counts.lengths) == len(sizes)
    total = sum(counts.tokens for counts in report.splits.values())
    assert f"{report.splits['train'].tokens:,}" in str(report) and "tokens in a document" in str(report)
    assert sum(report._lengths()[1]) == total
    assert json.loads(json.dumps(report.to_dict()))["splits"]["train"]["tokens"] == report.splits["train"].tokens
    assert (prepared_folder / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_prepare_manifest_names_every_file_with_its_sum(prepared_folder):
    files = PreparedCorpus(prepared_folder).manifest["files"]
    found = contents(prepared_folder)
    del found["manifest.json"]
    assert {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in found.items()} == {
        name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()
    }


def test_prepare_twice_is_the_same_and_another_seed_is_not(tmp_path):
    splits = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(memory_corpus(TEXTS), tmp_path / name, vocab_size=300, validation=0.3, seed=seed)
        splits.append({split: list(ids) for split, ids in documents_of(tmp_path / name).items()})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert splits[0] == splits[1] != splits[2]


def test_prepare_tokenizer_never_sees_the_validation_text(tmp_path):
    texts = {letter: f"only in this one: {letter}q{letter}x " * 50 for letter in "abcdef"}
    prepare(memory_corpus(texts), tmp_path / "p", vocab_size=2000, validation=0.01)
    (held_out,) = documents_of(tmp_path / "p")["validation"]
    alone = train_tokenizer([text for name, text in texts.items() if name != held_out], 2000)
    assert PreparedCorpus(tmp_path / "p").tokenizer().get_vocab() == alone.get_vocab()


@pytest.mark.parametrize("count, share, expected", [(2, 0.01, 1), (2, 0.5, 1), (20, 0.05, 1), (31, 0.1, 3), (9, 0, 0)])
def test_prepare_holds_out_the_share_of_documents(tmp_path, count, share, expected):
    texts = {f"{number}": f"text {number}" for number in range(count)} | {"empty": ""}
    report = prepare(memory_corpus(texts), tmp_path / "p", vocab_size=259, validation=share)
    assert report.splits["validation"].documents == expected
    assert report.splits["train"].documents == count - expected


def test_prepare_single_document_holds_out_its_end(tmp_path):
    text = "".join(f"line {number}\n" for number in range(100))
    prepare(memory_corpus({"one": text}), tmp_path / "p", vocab_size=259, validation=0.2)
    tokenizer, found = PreparedCorpus(tmp_path / "p").tokenizer(), documents_of(tmp_path / "p")
    parts = [tokenizer.decode(ids[1:-1]) for split in ("train", "validation") for ids in found[split].values()]
    assert "".join(parts) == text and parts[0].endswith("\n") and len(parts[1]) == pytest.approx(0.2 * len(text), abs=9)


def test_prepare_validation_corpus_is_held_out_whole(tmp_path):
    texts, others = {"a": "training", "b": "more"}, {"a": "validation"}
    prepare(memory_corpus(texts), tmp_path / "p", vocab_size=259, validation=memory_corpus(others))
    tokenizer, found = PreparedCorpus(tmp_path / "p").tokenizer(), documents_of(tmp_path / "p")
    decoded = {split: {key: tokenizer.decode(ids[1:-1]) for key, ids in ids.items()} for split, ids in found.items()}
    assert decoded == {"train": texts, "validation": others}


def test_prepare_tokenizer_text_is_drawn_from_all_over(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mosaics.data.preparation.train_tokenizer",
        lambda texts, size: train_tokenizer([seen.append(text) or text for text in texts], size),
    )
    texts = {f"{number:03}": f"{number:03} " * 25 for number in range(400)} | {"long": "long " * 30_000}
    prepare(memory_corpus(texts), tmp_path / "p", vocab_size=300, tokenizer_text_bytes=70_000, validation=0)
    assert 30_000 < sum(map(len, seen)) <= 70_000
    assert 80 < len({text[:3] for text in seen}) < 280
    prepare(memory_corpus({"a": "x y " * 500}), tmp_path / "q", vocab_size=300, tokenizer_text_bytes=1, validation=0)
    assert seen[-1] == "x"


def test_prepare_tokenizer_by_path_and_not_byte_level(tmp_path):
    tokenizer = other_tokenizer(eos_token="[EOS]")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    report = prepare(memory_corpus(TEXTS), tmp_path / "p", tokenizer=tmp_path / "tokenizer", validation=0.3)
    prepared = PreparedCorpus(tmp_path / "p")
    assert prepared.bos_token_id is None and prepared.pad_token_id == prepared.eos_token_id == tokenizer.eos_token_id
    assert prepared.token_bytes is None and not (tmp_path / "p" / "token_bytes.npy").exists()
    assert sum(counts.text_bytes for counts in report.splits.values()) == sum(len(t.encode()) for t in TEXTS.values())
    ids = {**documents_of(tmp_path / "p")["train"], **documents_of(tmp_path / "p")["validation"]}["code.py"]
    expected = tokenizer(TEXTS["code.py"], add_special_tokens=False).input_ids
    assert ids.tolist() == [*expected, tokenizer.eos_token_id]


def test_prepare_tokenizer_that_changes_some_texts_counts_bytes_by_document(tmp_path):
    from tokenizers import normalizers

    tokenizer = train_tokenizer(TEXTS.values(), 300)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ﬁ", "fi")  # no text of the corpus but one has it
    prepare(memory_corpus({"a": "plain", "b": "still"}), tmp_path / "exact", tokenizer=tokenizer)
    prepare(memory_corpus({"a": "plain", "b": "ﬁne"}), tmp_path / "changed", tokenizer=tokenizer)
    assert PreparedCorpus(tmp_path / "exact").token_bytes is not None
    prepared = PreparedCorpus(tmp_path / "changed")
    assert prepared.token_bytes is None
    assert sorted(prepared.split(name).text_bytes.tolist() for name in ("train", "validation")) == [[5], [5]]


def test_prepare_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizer = other_tokenizer(bos_token="[BOS]")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for given in (tokenizer, tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
        with pytest.raises(ValueError, match="has no end-of-text token"):
            prepare(memory_corpus(TEXTS), tmp_path / "p", tokenizer=given)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 100}, "vocabulary of 100 entries"),
        ({"validation": -0.1}, "validation share of -0.1"),
        ({"validation": 0.6}, "choose from 0 to 0.5"),
        ({"validation": float("nan")}, "validation share of nan"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"shard_tokens": 0}, "choose 1 or more"),
    ],
)
def test_prepare_impossible_settings_are_refused_before_reading(tmp_path, options, message):
    def unread():
        raise AssertionError("read")

    with pytest.raises(ValueError, match=message):
        prepare(Corpus("c", unread), tmp_path / "p", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [{}, {"a": "", "b": ""}])
def test_prepare_corpus_without_text_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="'texts' holds no text"):
        prepare(memory_corpus(texts), tmp_path / "p")
    with pytest.raises(ValueError, match="too short to hold out"):
        prepare(memory_corpus({"a": "x"}), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_prepare_same_settings_use_the_folder_and_others_name_the_difference(tmp_path):
    folder, options = tmp_path / "p", {"vocab_size": 300, "validation": 0.3}
    first = prepare(memory_corpus(TEXTS), folder, **options)
    before = contents(folder)
    again = prepare(memory_corpus(TEXTS), folder, **options)
    assert (first.reused, again.reused) == (False, True)
    assert {**first.to_dict(), "reused": True} == again.to_dict()
    changed = memory_corpus({**TEXTS, "short.txt": "b"})
    tokenizer = PreparedCorpus(folder).tokenizer()
    for corpus, other, message in (
        (memory_corpus(TEXTS), {"vocab_size": 301}, r"another way \(vocab_size 300 instead of 301\)"),
        (memory_corpus(TEXTS), {"seed": 5}, "seed 0 instead of 5"),
        (memory_corpus(TEXTS), {"validation": 0.2}, r"validation 0\.3 instead of 0\.2"),
        (memory_corpus(TEXTS), {"tokenizer": tokenizer}, "vocab_size 300 instead of none"),
        (changed, {}, "text_sha256"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*choose another folder or remove it"):
            prepare(corpus, folder, **{**options, **other})
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["p"]


def test_prepare_damaged_folder_is_refused_and_left(tmp_path):
    folder = tmp_path / "p"
    prepare(memory_corpus(TEXTS), folder, vocab_size=300)
    shard = folder / "train" / "tokens-00000.bin"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin is damaged"):
        prepare(memory_corpus(TEXTS), folder, vocab_size=300)
    assert shard.read_bytes() == data


def test_prepare_foreign_folder_is_refused_and_an_empty_one_used(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("foreign", "file"):
        with pytest.raises(ValueError, match=f"{name} exists and is not a prepared corpus; choose another folder"):
            prepare(memory_corpus(TEXTS), tmp_path / name)
    assert (tmp_path / "foreign" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    prepare(memory_corpus(TEXTS), tmp_path / "empty", vocab_size=300)
    PreparedCorpus(tmp_path / "empty").verify()


def test_prepare_that_lost_the_race_uses_what_the_other_made(tmp_path, monkeypatch):
    prepare(memory_corpus(TEXTS), tmp_path / "other", vocab_size=300)
    rename = os.rename

    def faster(source, target):
        rename(tmp_path / "other", target)
        rename(source, target)

    monkeypatch.setattr("mosaics.data.preparation.os.rename", faster)
    prepare(memory_corpus(TEXTS), tmp_path / "p", vocab_size=300)
    PreparedCorpus(tmp_path / "p").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("what", ["mosaics.data.shards.np.save", "mosaics.data.preparation.write_manifest"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("40 requested and 3 written")]
)
def test_prepare_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, what, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(what, full)
    with pytest.raises(OSError, match=r"no room to write .*p \(.*\); make room or choose another disk"):
        prepare(memory_corpus(TEXTS), tmp_path / "p", vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_prepare_full_disk_met_by_the_tokenizer_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    tokenizer = train_tokenizer(TEXTS.values(), 300)
    monkeypatch.setattr(tokenizer, "save_pretrained", full, raising=False)
    with pytest.raises(OSError, match="no room to write"):
        prepare(memory_corpus(TEXTS), tmp_path / "p", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_prepare_interrupted_leaves_nothing(tmp_path, stop):
    passes = []

    def documents():
        passes.append(1)
        for number in range(4):
            if len(passes) == 3 and number == 2:
                raise stop
            yield Document(f"{number}", "text")

    with pytest.raises(stop):
        prepare(Corpus("c", documents), tmp_path / "p", vocab_size=259)
    assert list(tmp_path.iterdir()) == []


def test_prepare_corpus_that_changes_between_passes_is_refused(tmp_path):
    passes = []

    def documents():
        passes.append(1)
        yield Document("a", "text")
        yield Document("b", f"text {len(passes)}")

    with pytest.raises(ValueError, match="'c' changed while it was read; run again"):
        prepare(Corpus("c", documents), tmp_path / "p", vocab_size=259)
    assert list(tmp_path.iterdir()) == []


def test_prepare_many_empty_documents_take_little_time_and_memory(tmp_path):
    def documents():
        for number in range(100_000):
            yield Document(f"{number}", "" if number % 50_000 else "some text")

    report = prepare(Corpus("c", documents), tmp_path / "p", vocab_size=259)
    assert report.empty_documents == 99_998 and report.splits["train"].documents == 1


def test_prepare_removes_what_a_killed_process_left_and_nothing_of_a_living_one(tmp_path):
    dead, living = (tmp_path / f".data.{name}.partial" for name in ("dead", "living"))
    for folder in (dead, living):
        folder.mkdir()
        (folder / "manifest.json").write_text("half")
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    prepare(memory_corpus(TEXTS), tmp_path / "data", vocab_size=300)
    os.close(held)
    assert not dead.exists() and living.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data", ".data.living.partial"}
