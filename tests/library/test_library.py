"""Libraries: what is kept of documents, what is read of them, and what is left when they go."""

import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from transformers.cache_utils import StaticCache

from helpers import relative_error, tiny_model
from hostile.kills import attempt
from mosaics.library import Library, folder, reading
from mosaics.library.folder import MANIFEST, PARTS, LibraryFolder
from mosaics.library.reading import read_document
from mosaics.models.united import read_stores, united_cache

from .conftest import TEXTS

A, B, C = TEXTS


def test_library_memory_is_that_of_the_documents(made, asked, reader):
    library, (model, tokenizer) = made(), reader
    assert list(library.documents) == sorted(TEXTS, key=lambda name: library.documents[name].sha256)
    for names in ([B], [C, A], list(TEXTS)):
        stores = []
        for name in library.folder.names(names):
            ids = tokenizer(TEXTS[name]).input_ids + [tokenizer.eos_token_id]
            stores.append(read_stores(model, torch.tensor([ids])))
            assert library.pairs(name) == len(ids) - 1 == next(iter(stores[-1].values())).keys.shape[2]
        question = tokenizer("What is a heap, and who swims?", return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(question, past_key_values=united_cache(model, stores)).logits
        assert torch.equal(asked(library, *names), expected)
        assert torch.equal(asked(library, *reversed(names)), expected)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert relative_error(asked(library, cache=cache), asked(library)) < 1e-9


def test_library_keeps_text_tokens_and_passages(made, reader):
    library = made()
    for name, text in TEXTS.items():
        assert library.text(name) == text
        passages = library.passages(name)
        assert [p.text for p in passages] == [text[p.begin : p.end] for p in passages]
        tokens = library.documents[name].tokens
        borders = [p.tokens for p in passages]
        assert borders[0][0] == 0 and borders[-1][1] == tokens
        assert all(a[1] == b[0] for a, b in zip(borders, borders[1:], strict=False))
        known, parts = read_document(*reader, text)
        assert known["tokens"] == tokens and len(parts["text"]["offsets"]) == tokens
    assert "It is ice." in [p.text.strip() for p in library.passages(B)]


def test_library_passages_are_never_long(reader):
    _, parts = read_document(*reader, "a " * 200)
    begins = parts["text"]["passages"].tolist()
    assert len(begins) > 2 and max(b - a for a, b in zip(begins, begins[1:], strict=False)) <= reading.LONGEST_PASSAGE


def test_library_add_reads_what_is_new_or_changed(made, asked, reader):
    library = made(names=[A])
    before = asked(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaics.library.library.read_document", None)  # nothing is read
        assert [added.how for added in library.add({A: TEXTS[A]})] == ["there"]
    assert torch.equal(asked(library), before)
    hows = {added.name: added.how for added in library.add({A: TEXTS[B], C: TEXTS[C]})}
    assert hows == {A: "changed", C: "read"}
    assert torch.equal(asked(library), asked(made("other", [B, C])))
    assert sum(path.suffix == ".safetensors" for path in library.folder.path.iterdir()) == 2
    again = Library(library.folder.path, *reader)
    assert torch.equal(asked(again), asked(library)) and again.verify() == {}


@pytest.mark.parametrize("compacted", ["never", "before", "after"])
def test_library_remove_is_as_if_the_document_never_was(made, asked, compacted):
    library = made("one", [A, B, C])
    with_all, text = asked(library), TEXTS[B].encode()
    if compacted == "before":
        library.compact()
        assert len(library.folder.files) == 1
    entry, tensors = library.documents[B], {part: library.folder.read(B, part) for part in PARTS}
    library.remove(B)
    if compacted == "after":
        library.compact()
        assert len(library.folder.files) == 1
    other = made("two", [C, A])
    assert torch.equal(asked(library), asked(other)) and not torch.equal(asked(library), with_all)
    assert library.verify() == {} and list(library.documents) == list(other.documents)
    gone = [text, text[10:30], B.encode(), entry.sha256.encode(), bytes.fromhex(entry.sha256), entry.file.encode()]
    gone += [digest.encode() for digest in entry.digests.values()]
    gone += [x.numpy().tobytes()[:64] for own in tensors.values() for x in own.values() if x.nbytes >= 64]
    gone += [x.numpy().tobytes()[-64:] for own in tensors.values() for x in own.values() if x.nbytes >= 64]
    left, fresh = ([p.read_bytes() for p in one.folder.path.iterdir()] for one in (library, other))
    gone = [what for what in gone if not any(what in data for data in fresh)]  # every document has the same first pair
    assert len(gone) > 20 and all(any(what in data for data in left) for what in (A.encode(), TEXTS[A].encode()))
    assert not [what for what in gone if any(what in data for data in left)]
    with pytest.raises(ValueError, match="there is no document"):
        library.remove(B)


def test_library_compact_changes_no_answer(made, asked, reader):
    library = made()
    before = asked(library)
    library.compact()
    assert torch.equal(asked(library), before)
    assert torch.equal(asked(Library(library.folder.path, *reader)), before)
    files = set(library.folder.files)
    library.compact()
    assert set(library.folder.files) == files  # nothing to do
    with library.folder.writing():
        library.folder.compact(file_bytes=1)
    assert len(library.folder.files) == 3 and torch.equal(asked(library), before) and library.verify() == {}


@pytest.mark.parametrize("compacted", [False, True])
def test_library_finds_every_flipped_bit(made, compacted):
    library = made(names=[A, B])
    if compacted:
        library.compact()
    place, draws = library.folder.path, random.Random(1)
    for path in sorted(place.iterdir()):
        data = path.read_bytes()
        positions = range(len(data))
        if path.name != MANIFEST:
            positions = [*positions[:400:9], *draws.sample(positions, min(60, len(data)))]
        for position in positions:
            bit = 1 << draws.randrange(8)
            path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            try:
                wrong = Library(place).verify()
            except ValueError as error:
                wrong = {"": str(error)}
            assert wrong, (path.name, position, bit)
        path.write_bytes(data)
    assert Library(place).verify() == {}


def test_library_finds_what_has_changed_when_it_is_read(made, asked, reader):
    library = made()
    entry = library.documents[B]
    path = library.folder.path / entry.file
    data = path.read_bytes()
    pairs = next(iter(library.folder.read(B, "pairs").values())).numpy().tobytes()
    position = data.index(pairs) + len(pairs) // 2
    path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
    again = Library(library.folder.path, *reader)
    assert torch.equal(asked(again, A, C), asked(library, A, C))  # others can be asked
    for ask in (lambda: asked(again), lambda: asked(again, B)):
        with pytest.raises(ValueError, match="has changed since it was written.*then add it again"):
            ask()
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        asked(Library(library.folder.path, *reader))
    again.remove(B)
    list(again.add({B: TEXTS[B]}))
    assert torch.equal(asked(again), asked(library))


@pytest.mark.slow
def test_library_survives_a_kill_before_any_operation(made, reader, tmp_path, asked):
    expected = asked(made("whole"))
    entries, written = made("whole").documents, {text: read_document(*reader, text) for text in TEXTS.values()}

    def work(place):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mosaics.library.library.read_document", lambda *given: written[given[2]])
            library = Library.at(place, *reader)
            for added in library.add({A: TEXTS[A], B: TEXTS[B]}):
                print("+", added.name)
            library.compact()
            print("removes")
            library.remove(A)
            print("-", A)
            for added in library.add({C: TEXTS[C]}):
                print("+", added.name)

    killed = 0
    for operation in range(1, 200):
        place = tmp_path / f"killed-{operation}" / "library"
        place.parent.mkdir()
        what, _ = attempt(lambda place=place: work(place), under=place, operation=operation)
        said = (place.parent / "library.log").read_text().splitlines()
        if what == "done":
            break
        assert what == "killed", what
        killed += 1
        if (place / MANIFEST).is_file():
            there = Library(place, *reader)
            assert there.verify() == {}, operation
            stays = {line[2:] for line in said if line[0] == "+"} - ({A} if "removes" in said else set())
            assert stays <= there.documents.keys() and (f"- {A}" not in said or A not in there.documents)
        library = Library.at(place, *reader)
        list(library.add(TEXTS))
        assert library.verify() == {} and len(list(place.glob("*.safetensors"))) == len(library.folder.files)
        assert {name: e.sha256 for name, e in library.documents.items()} == {n: e.sha256 for n, e in entries.items()}
        shutil.rmtree(place.parent) if operation % 10 else None
        if not operation % 10:
            assert torch.equal(asked(library), expected)
    assert what == "done" and killed > 15


def test_library_has_one_writer_and_any_readers(made, asked, reader):
    library = made()
    before = asked(library)
    with library.folder.writing():
        other = Library(library.folder.path, *reader)
        assert torch.equal(asked(other), before)
        for change in (lambda: other.remove(A), lambda: list(other.add({"d": "d"})), other.compact):
            with pytest.raises(ValueError, match="another process writes"):
                change()
    fresh = Library(library.folder.path, *reader)
    library.compact()  # moves what the other has not read yet
    assert torch.equal(asked(fresh), before)


def test_library_loses_nothing_to_a_full_disk(made, asked, monkeypatch):
    library = made(names=[A])
    before, save = asked(library), folder.save_file

    def full(tensors, path, metadata):
        save(tensors, path, metadata)
        os.truncate(path, 100)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        list(library.add({B: TEXTS[B]}))
    monkeypatch.setattr(folder, "save_file", save)
    replaced = os.replace

    def no_room(source, target):
        if str(target).endswith(MANIFEST):
            raise OSError(28, "No space left on device", str(target))
        replaced(source, target)

    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(OSError, match="No space left on device"):
        list(library.add({B: TEXTS[B]}))
    monkeypatch.undo()
    assert list(library.documents) == [A] and torch.equal(asked(library), before) and library.verify() == {}
    assert len(list(library.folder.path.iterdir())) == 3
    assert [added.how for added in library.add({B: TEXTS[B]})] == ["read"]


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a\\b", "a,b", "a\nb", " a", "x" * 201, "\ud800"])
def test_library_refuses_names(made, name):
    library = made(names=[A])
    with pytest.raises(ValueError, match="no name for a document"):
        list(library.add({name: "text"}))
    assert list(library.documents) == [A]


def test_library_refuses_what_is_no_text(made):
    library = made(names=[A])
    for text, said in (("", "is empty"), ("a\ud800", "no text")):
        with pytest.raises(ValueError, match=said):
            list(library.add({"x": text}))


def test_library_refuses_what_does_not_belong_to_it(made, reader, narrow, tmp_path):
    library, (model, tokenizer) = made(), reader
    other = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2, delay=5)
    with pytest.raises(ValueError, match="another model"):
        Library(library.folder.path, other, tokenizer)
    with pytest.raises(ValueError, match="can't be united"):
        Library.at(tmp_path / "new", tiny_model(preset="transformer-tiny", vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(ValueError, match="keeps its pairs as they are computed"):
        list(Library(library.folder.path, narrow("int8"), tokenizer).add({"x": "x"}))
    with pytest.raises(ValueError, match="there is no document 'x'"):
        library.memory(["x"])
    with pytest.raises(ValueError, match="without a model"):
        Library(library.folder.path).memory()
    with pytest.raises(FileNotFoundError, match="there is no library"):
        Library(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="not empty"):
        Library.at(tmp_path / "full", model, tokenizer)
    path = library.folder.path / MANIFEST
    path.write_text(path.read_text().replace(folder.FORMAT, "mosaics-library-9"))
    with pytest.raises(ValueError, match="another version"):
        Library(library.folder.path)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_library_keeps_pairs_in_fewer_bits(reader, narrow, tmp_path, dtype, made, asked):
    library = Library.at(tmp_path / "narrow", narrow(dtype), reader[1])
    list(library.add(TEXTS))
    found = library.folder.read(A, "pairs")
    assert {str(x.dtype) for n, x in found.items() if n.endswith(("keys", "values"))} == {f"torch.{dtype}"}
    wide, same = made(), Library(tmp_path / "narrow", *reader)  # the model is the same, whatever it keeps its own in
    assert 1e-6 < relative_error(asked(same), asked(wide)) < 0.3
    assert sum(x.nbytes for x in found.values()) < sum(x.nbytes for x in wide.folder.read(A, "pairs").values()) / 2


def test_library_choose_is_exact_where_a_summary_is(made, reader, monkeypatch):
    monkeypatch.setattr(reading, "GROUP", 1)
    library, (model, tokenizer) = made(), reader
    ids = tokenizer("What is a heap, and who swims?", return_tensors="pt").input_ids
    from mosaics.library.library import Shares
    from mosaics.memories import Context

    names = library.folder.names()
    shares = Shares([library.pairs(name) for name in names])
    with torch.no_grad():
        model(ids, past_key_values=library.memory(), context=Context(reads=shares))
    mean = dict(zip(names, shares.mean().mean(0).tolist(), strict=True))
    for top in (1, 2):
        assert library.choose(ids, top) == sorted(names, key=mean.get, reverse=True)[:top]
    assert library.choose(ids, 1, [A]) == [A] and set(library.choose(ids, 9)) == set(TEXTS)
    with pytest.raises(ValueError, match="top is 0"):
        library.choose(ids, 0)


def test_library_summaries_are_centres_within_a_document(made):
    library = made()
    for name in TEXTS:
        pairs, summary = (library.folder.read(name, part) for part in ("pairs", "summary"))
        sizes = summary["0.1.sizes"]
        assert sizes.sum() == library.pairs(name) and sizes[:-1].eq(reading.GROUP).all()
        for field in ("0.1.keys", "1.1.values"):
            groups = pairs[field].split(sizes.tolist(), dim=2)
            centres = torch.stack([group.mean(2) for group in groups], dim=2)
            assert relative_error(summary[field], centres) < 1e-9
            if field.endswith("keys"):
                spreads = [(g - g.mean(2, keepdim=True)).square().sum(-1).mean(2).sqrt() for g in groups]
                offsets = summary[field.replace("keys", "offsets")][..., 0]
                assert relative_error(offsets, reading.SPREAD * torch.stack(spreads, dim=2)) < 1e-9


@pytest.mark.slow
def test_library_add_in_several_processes_is_the_same(reader, exported, made, asked, tmp_path):
    from functools import partial

    from mosaics.training.sources import open_source

    library = Library.at(tmp_path / "many", *reader)
    found = list(library.add(TEXTS, processes=2, open_reader=partial(open_source, str(exported))))
    assert [added.name for added in found] == list(TEXTS) and library.verify() == {}
    assert relative_error(asked(library), asked(made())) < 1e-9
    assert replace(found[0].entry, file="") and json.loads((library.folder.path / MANIFEST).read_text())["documents"]


@pytest.mark.parametrize("change", ["slots", "passages", "missing"])
def test_library_refuses_documents_that_were_made_up(made, reader, asked, change):
    library = made(names=[A])
    known, parts = read_document(*reader, TEXTS[B])
    if change == "slots":
        parts["pairs"] = {name: x[:, :, 1:] for name, x in parts["pairs"].items()}
    elif change == "passages":
        parts["text"]["passages"] = parts["text"]["passages"].flip(0)
    else:
        parts["pairs"].pop("0.1.values")
    with library.folder.writing():
        library.folder.put({B: folder.write_documents(library.folder.path, [(known, parts)])})
    with pytest.raises(ValueError, match="no such thing"):
        library.passages(B) if change == "passages" else asked(library)


def test_library_takes_no_file_of_another_folder(made):
    library = made()
    path = library.folder.path / MANIFEST
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    name = next(iter(manifest["documents"]))
    manifest["documents"][name]["file"] = "../x.safetensors"
    manifest["files"]["../x.safetensors"] = {"bytes": 1, "sha256": ""}
    folder._write_manifest(library.folder.path, manifest)
    with pytest.raises(ValueError, match="damaged"):
        LibraryFolder(library.folder.path)


def test_library_memory_within_a_tolerance_fetches_what_can_matter(made, asked, reader):
    small = {"x.txt": "x", "y.txt": "76", "z.txt": "4."}
    library, other = made("one"), made("two", [C, A])
    for one in (library, other):
        list(one.add(small if one is library else {name: small[name] for name in ("x.txt", "z.txt")}))
    whole, fetched = asked(library), []
    assert torch.equal(asked(library, within=0.0), whole)
    near = asked(Library(library.folder.path, *reader), within=0.9, fetched=fetched.append)
    layers = 2
    assert 0 < len(fetched) < layers * 6 and 0 < relative_error(near, whole) < 0.2
    library.remove(B, "y.txt")
    for _ in range(2):  # without a trace, with documents left out
        assert torch.equal(asked(library, within=0.9), asked(other, within=0.9))
        assert not torch.equal(asked(library, within=0.9), asked(library))
        library.compact()
    with pytest.raises(ValueError, match="give a number from 0"):
        library.memory(within=1.0)
