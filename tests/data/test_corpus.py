import gzip
import json
import lzma
import os
import sysconfig
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mosaics.data import Document, open_corpus


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_open_corpus_standard_library_is_sorted_repeatable_and_without_tests():
    corpus = open_corpus()
    names = [document.id for document in corpus]
    assert names == sorted(names) == [document.id for document in corpus]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any(set(Path(name).parts) & {"test", "tests", "site-packages", "encodings"} for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    texts = {document.id: document.text for document in corpus}
    assert texts["argparse.py"] == (root / "argparse.py").read_text("utf-8")
    assert 4e6 < sum(map(len, texts.values())) < 3e7


def test_open_corpus_text_files_one_document_each_verbatim(tmp_path):
    texts = {"b.txt": "two\r\nlines\r\n", "a.txt": "nul \0 and 🧩", "deep/c.txt": "", "d.md": "# d"}
    for name, text in texts.items():
        write(tmp_path / name, text)
    write(tmp_path / "e.txt.gz", gzip.compress(b"packed"))
    write(tmp_path / "f.txt.xz", lzma.compress(b"packed too"))
    write(tmp_path / "ignored.bin", b"\xff")
    expected = {**texts, "e.txt.gz": "packed", "f.txt.xz": "packed too"}
    assert list(open_corpus(tmp_path)) == [Document(name, expected[name]) for name in sorted(expected)]
    assert [document.id for document in open_corpus(f"{tmp_path}/*.txt")] == ["a.txt", "b.txt"]
    assert [document.id for document in open_corpus(f"{tmp_path}/**/*.txt")] == ["a.txt", "b.txt", "deep/c.txt"]
    assert list(open_corpus(tmp_path / "b.txt")) == [Document("b.txt", texts["b.txt"])]


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_open_corpus_jsonl_one_document_a_line(tmp_path, suffix, pack):
    lines = [{"text": "one"}, {"text": "", "more": 1}, {"text": "tw\no 世"}]
    data = "\ufeff" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    path = write(tmp_path / f"some.jsonl{suffix}", pack(data.encode()))
    expected = [Document(f"some.jsonl{suffix}:{n}", line["text"]) for n, line in enumerate(lines, 1)]
    assert list(open_corpus(path)) == expected


def test_open_corpus_named_field_and_encoding(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "é"}'.encode("latin-1"))
    assert [document.text for document in open_corpus(path, field="body", encoding="latin-1")] == ["é"]


def test_open_corpus_byte_order_mark_is_dropped_once(tmp_path):
    path = write(tmp_path / "a.txt", "\ufefftext \ufeff")
    assert [document.text for document in open_corpus(path)] == ["text \ufeff"]


def test_open_corpus_dataset_folder_by_prefix(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "set" / "train.jsonl", '{"body": "one", "n": 1}\n{"body": "two", "n": 2}\n')
    corpus = open_corpus(f"hf:{tmp_path / 'set'}", field="body")
    assert list(corpus) == list(corpus) == [Document("train:0", "one"), Document("train:1", "two")]
    with pytest.raises(ValueError, match="no column 'text'; its columns are: body, n"):
        open_corpus(f"hf:{tmp_path / 'set'}")


def test_open_corpus_dataset_on_the_hub_by_name_and_configuration(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [document.text for document in open_corpus("owner/name:small", split="test")] == ["a", "b"]
    open_corpus("owner/name")
    open_corpus("hf:name")
    assert asked == [("owner/name", "small", "test"), ("owner/name", None, "train"), ("name", None, "train")]


def test_open_corpus_dataset_that_cannot_be_loaded_is_one_sentence():
    with pytest.raises(ValueError, match="^'no-such-owner/no-such-set' is no file here, and no Hugging Face dataset"):
        open_corpus("no-such-owner/no-such-set")


def test_open_corpus_dataset_says_at_once_that_the_hub_is_out_of_reach(monkeypatch):
    import socket

    import datasets
    from huggingface_hub import constants

    def nobody(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(ValueError, match="no-such-owner/no-such-set"):
        open_corpus("no-such-owner/no-such-set")
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_open_corpus_refuses_standard_input_that_is_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ValueError, match="nothing is piped into it"):
        open_corpus("-")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("missing/*.txt", r"no file in 'missing/\*\.txt'"),
        ("missing.txt", "no file, folder or pattern 'missing.txt'"),
        ("missing/some.txt", "no file, folder or pattern 'missing/some.txt'"),
        ("missing/some.jsonl.gz", "no file, folder or pattern"),
        ("python-stdlb", "'python-stdlib'"),
        (".", "no .txt, .md or .jsonl file"),
    ],
)
def test_open_corpus_missing_names_what_was_asked_for(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        open_corpus(spec)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"good \xff bad", r"a\.txt is not utf-8: byte 5 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\x80"}\n', r"a\.jsonl is not utf-8: byte 24 \(0x80\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not a JSON record"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl, line 1 is not a JSON record"),
        ("a.jsonl", b'{"n": ' + b"1" * 10_000 + b"}", r"a\.jsonl, line 1 is not a JSON record"),
        ("a.jsonl", b"[1, 2]", r"a\.jsonl, line 1 holds a list"),
        ("a.jsonl", b'{"body": "x", "title": "y"}', r"line 1 has no field 'text'; its fields are: body, title"),
        ("a.jsonl", b"{}", r"no field 'text'; its fields are: none"),
        ("a.jsonl", b'{"text": null}', r"field 'text' of .*line 1 holds a NoneType, not text"),
        ("a.jsonl", b'{"text": "ab\\ud800"}', r"half a surrogate pair at character 2"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz is a damaged archive"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], r"a\.txt\.gz is a damaged archive"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-9], r"a\.txt\.xz is a damaged archive"),
    ],
)
def test_corpus_bad_content_names_the_place(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=message):
        list(open_corpus(path))


def test_open_corpus_unknown_encoding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown encoding 'utf-9'"):
        open_corpus(write(tmp_path / "a.txt", "a"), encoding="utf-9")


def test_corpus_file_that_changes_while_read_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 3)
    documents = iter(open_corpus(path))
    next(documents)
    with open(path, "a") as stream:
        stream.write('{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"):
        list(documents)


def test_corpus_document_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaics.data.corpus.MAX_DOCUMENT_BYTES", 100)
    assert len(list(open_corpus(write(tmp_path / "a.txt", "x" * 100)))) == 1
    for path in (write(tmp_path / "b.txt", "x" * 101), write(tmp_path / "b.txt.gz", gzip.compress(b"x" * 101))):
        with pytest.raises(ValueError, match="a document of more than 100 bytes"):
            list(open_corpus(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_open_corpus_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    write(tmp_path / "real.txt", "x")
    outcome = []

    def read():
        outcome.append([document.id for document in open_corpus(tmp_path)])
        with pytest.raises(ValueError, match="not a regular file"):
            open_corpus(tmp_path / "pipe.txt")
        outcome.append("refused")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert outcome == [["real.txt"], "refused"]
