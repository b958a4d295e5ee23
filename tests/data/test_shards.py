import json

import numpy as np
import pytest

from mosaics.data import PreparedCorpus, shards


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    change(manifest)
    path.write_text(json.dumps(manifest | {"digest": shards._digest(manifest)}))


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 100])
def test_prepared_split_reads_any_range_across_shards(write_prepared, shard_tokens):
    prepared = PreparedCorpus(write_prepared([10, 2, 30], shard_tokens=shard_tokens))
    split = prepared.split("train")
    assert len(list((prepared.folder / "train").glob("*.bin"))) == -(-42 // shard_tokens)
    for start in range(0, 42, 5):
        for stop in range(start, 43, 3):
            assert np.array_equal(split.read(start, stop), np.arange(start, stop) + 3)
    assert split.names([2, 0, 0]) == ["document 2", "document 0", "document 0"]


def test_prepared_corpus_every_flipped_bit_is_found(write_prepared):
    folder = write_prepared([5, 9], [6])
    for name in PreparedCorpus(folder).manifest["files"]:
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 4]) + data[1:])
        with pytest.raises(ValueError, match="damaged"):
            PreparedCorpus(folder).verify()
        path.write_bytes(data)
    PreparedCorpus(folder).verify()


def test_prepared_corpus_verify_of_one_split_leaves_the_other(write_prepared):
    folder = write_prepared([5, 9], [6])
    path = folder / "validation" / "ids.jsonl"
    path.write_bytes(path.read_bytes().swapcase())
    PreparedCorpus(folder).verify("train")
    with pytest.raises(ValueError, match="ids.jsonl is damaged"):
        PreparedCorpus(folder).verify("validation")


def test_prepared_corpus_missing_or_cut_file_is_named(write_prepared):
    folder = write_prepared([5, 9], [6])
    path = folder / "train" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tokens-00000\.bin has 55 bytes instead of 56"):
        PreparedCorpus(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokens-00000\.bin is missing"):
        PreparedCorpus(folder)


def test_prepared_corpus_link_to_another_file_is_refused(write_prepared, tmp_path):
    folder = write_prepared([5, 9], [6])
    path = folder / "train" / "ids.jsonl"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a file outside the folder, 'train/ids.jsonl'"):
        PreparedCorpus(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format="other"), "is not that of a prepared corpus"),
        (lambda m: m.update(version=99), "format version 99 instead of 2"),
        (lambda m: m.pop("tokenizer"), "is damaged"),
        (lambda m: m.update(dtype="object"), "is damaged"),
        (lambda m: m["splits"]["train"].pop("shards"), "is damaged"),
        (lambda m: m["splits"]["train"].update(tokens=3), "do not fit together"),
        (lambda m: m.update(files=[]), "is damaged"),
        (lambda m: m["files"].update({"../x": {"bytes": 1}}), r"a file outside the folder, '\.\./x'"),
        (lambda m: m["files"].update({"/etc/hostname": {"bytes": 1}}), "a file outside the folder"),
    ],
)
def test_prepared_corpus_foreign_manifest_is_refused(write_prepared, change, message):
    folder = write_prepared([5, 9], [6])
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        PreparedCorpus(folder).split("train")


def test_prepared_corpus_every_changed_value_of_the_manifest_is_found(write_prepared):
    folder = write_prepared([5, 9], [6])
    path = folder / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError):
            PreparedCorpus(folder)
    manifest = json.loads(content)
    manifest.pop("digest")
    path.write_text(json.dumps(manifest | {"version": 1}))  # as older versions wrote it
    PreparedCorpus(folder).verify()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "null"])
def test_prepared_corpus_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is"):
        PreparedCorpus(tmp_path)


def test_prepared_corpus_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared corpus in .*; make one with `mosaics prepare --out"):
        PreparedCorpus(tmp_path / "missing")


def test_prepared_corpus_array_with_a_damaged_header_is_named(write_prepared):
    folder = write_prepared([5, 9], [6])
    path = folder / "token_bytes.npy"
    data = path.read_bytes()
    for changed in (data.replace(b"{'descr", b"k'descr"), data.replace(b"}", b"("), b"", data[:20]):
        path.write_bytes(changed)
        edit(folder, lambda m: m["files"]["token_bytes.npy"].update(bytes=path.stat().st_size))
        with pytest.raises(ValueError, match=r"token_bytes\.npy is damaged"):
            PreparedCorpus(folder)


def test_prepared_corpus_pickled_arrays_are_never_loaded(write_prepared):
    folder = write_prepared([5, 9], [6])
    path = folder / "train" / "offsets.npy"
    np.save(path, np.array([{}, {}], dtype=object), allow_pickle=True)
    edit(folder, lambda m: m["files"]["train/offsets.npy"].update(bytes=path.stat().st_size))
    with pytest.raises(ValueError):
        PreparedCorpus(folder).split("train")
