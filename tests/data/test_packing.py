import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.conftest import TEXTS, memory_corpus
from data.test_tokenizer import other_tokenizer
from mosaics.data import PackedDataset, PreparedCorpus, prepare
from mosaics.data.packing import best_fit_rows

lengths = st.lists(st.integers(3, 40), min_size=1, max_size=25)
many = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces_of(batch) -> list[list[int]]:
    """The tokens of each document in each row, in order; padding left out."""
    found = []
    used = batch["attention_mask"] if batch["attention_mask"] is not None else torch.ones_like(batch["input_ids"])
    for ids, documents, mask in zip(batch["input_ids"], batch["document_ids"], used.bool(), strict=True):
        for number in documents[mask].unique():
            found.append(ids[mask & (documents == number)].tolist())
    return found


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)
    )


@many
@given(lengths, st.integers(2, 50), st.integers(0, 3), st.booleans())
def test_packed_dataset_split_uses_every_token_once_an_epoch(write_prepared, sizes, context, epoch, begin):
    data = PackedDataset(write_prepared(sizes, begin=begin), "train", context, seed=3)
    batch = data.batch(epoch * len(data), len(data))
    pieces = pieces_of(batch)
    assert sorted(token for piece in pieces for token in piece) == list(range(3, 3 + sum(sizes)))
    assert data.tokens == sum(sizes)
    starts = np.cumsum([3, *sizes])
    expected = [
        list(range(at, min(at + context, stop)))
        for start, stop in zip(starts[:-1], starts[1:], strict=True)
        for at in range(start, stop, context)
    ]
    assert sorted(pieces) == sorted(expected)  # none is cut that fits, and none runs into another


@many
@given(lengths, st.integers(2, 50))
def test_packed_dataset_truncate_uses_the_first_tokens_of_every_document(write_prepared, sizes, context):
    data = PackedDataset(write_prepared(sizes), "train", context, long_documents="truncate")
    starts = np.cumsum([3, *sizes])[:-1]
    expected = [list(range(at, at + min(size, context))) for at, size in zip(starts, sizes, strict=True)]
    assert sorted(pieces_of(data.batch(0, len(data)))) == sorted(expected)
    assert data.tokens == sum(map(len, expected))


@many
@given(lengths, st.integers(2, 50))
def test_packed_dataset_rows_are_well_formed(write_prepared, sizes, context):
    data = PackedDataset(write_prepared(sizes), "train", context)
    batch = data.batch(0, len(data))
    shape = (len(data), context)
    for name in ("input_ids", "document_ids", "labels"):
        assert batch[name].shape == shape and batch[name].dtype == torch.int64
    used = torch.ones(shape, dtype=torch.int64) if batch["attention_mask"] is None else batch["attention_mask"]
    assert (batch["attention_mask"] is None) == (data.tokens == math.prod(shape))
    assert (used[:, 1:] <= used[:, :-1]).all()  # padding at the end
    documents = batch["document_ids"]
    assert (documents[:, 0] == 0).all()
    assert ((documents[:, 1:] - documents[:, :-1] == 0) | (documents[:, 1:] - documents[:, :-1] == 1)).all()
    assert not (used[:, 1:] < used[:, :-1])[documents[:, 1:] == documents[:, :-1]].any()  # padding has its own id
    assert torch.equal(batch["labels"], batch["input_ids"].where(used.bool(), torch.tensor(-100)))
    assert (batch["input_ids"][used == 0] == 2).all()


@many
@given(lengths, st.integers(2, 50), st.integers(0, 100), st.integers(1, 60), st.data())
def test_packed_dataset_random_access_equals_sequential(write_prepared, sizes, context, first, count, data):
    packed = PackedDataset(write_prepared(sizes), "train", context, seed=7)
    whole = packed.batch(0, first + count)
    part = packed.batch(first, count)
    other = PackedDataset(packed.prepared.folder, "train", context, seed=7)  # a fresh one, as after resuming
    cut = data.draw(st.integers(0, count - 1))
    pieces = [other.batch(first + cut, count - cut)] + ([other.batch(first, cut)] if cut else [])
    for name in ("input_ids", "document_ids", "labels", "text_targets", "end_targets", "text_bytes"):
        assert torch.equal(whole[name][first:], part[name])
        assert torch.equal(torch.cat([piece[name] for piece in pieces[::-1]]), part[name])


def test_packed_dataset_order_depends_on_seed_and_epoch_alone(write_prepared):
    folder = write_prepared([20] * 40)
    orders = {}
    for seed in (0, 1):
        data = PackedDataset(folder, "train", 20, seed=seed)
        orders |= {(seed, epoch): data.batch(epoch * 40, 40)["input_ids"][:, 0].tolist() for epoch in (2, 0, 1)}
        again = PackedDataset(folder, "train", 20, seed=seed)
        assert again.batch(40, 40)["input_ids"][:, 0].tolist() == orders[seed, 1]
    assert len({tuple(order) for order in orders.values()}) == 6
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1


def test_packed_dataset_batch_may_lie_in_several_epochs(write_prepared):
    data = PackedDataset(write_prepared([20] * 5), "train", 20)
    rows = data.batch(3, 15)["input_ids"]
    assert torch.equal(rows, torch.cat([data.batch(n, 1)["input_ids"] for n in range(3, 18)]))


@many
@given(lengths, st.integers(2, 50), st.integers(1, 9))
def test_packed_dataset_batches_give_all_once_for_any_seed_and_size(write_prepared, sizes, context, count):
    folder = write_prepared([3], sizes)
    data = PackedDataset(folder, "validation", context, seed=0)
    batches = list(data.batches(count))
    assert [len(batch["input_ids"]) for batch in batches[:-1]] == [count] * (len(batches) - 1)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(data)
    tokens = [token for batch in batches for piece in pieces_of(batch) for token in piece]
    assert sorted(tokens) == list(range(3, 3 + sum(sizes)))
    (whole,) = PackedDataset(folder, "validation", context, seed=9).batches(len(data))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), whole["input_ids"])


@many
@given(lengths, st.integers(2, 50), st.sampled_from(["split", "truncate"]), st.booleans())
def test_packed_dataset_targets_and_bytes_are_those_of_predicted_text(write_prepared, sizes, context, long, begin):
    data = PackedDataset(write_prepared([3], sizes, begin=begin), "validation", context, long_documents=long)
    starts = np.cumsum([3, *sizes])
    begins, ends = set(starts[:-1]) if begin else set(), set(starts[1:] - 1)
    (batch,) = data.batches(len(data))
    documents, ids = batch["document_ids"], batch["input_ids"]
    predicted = torch.zeros_like(ids, dtype=torch.bool)
    predicted[:, 1:] = (documents[:, 1:] == documents[:, :-1]) & (batch["labels"][:, 1:] != -100)
    is_end = torch.tensor([[token in ends for token in row] for row in ids.tolist()])
    is_begin = torch.tensor([[token in begins for token in row] for row in ids.tolist()])
    assert torch.equal(batch["end_targets"], predicted & is_end)
    assert torch.equal(batch["text_targets"], predicted & ~is_end & ~is_begin)
    assert torch.equal(batch["text_bytes"], (ids % 7 * batch["text_targets"]).sum(1))


@many
@given(lengths)
def test_packed_dataset_bytes_by_document_are_exact_for_whole_documents(write_prepared, sizes):
    data = PackedDataset(write_prepared([3], sizes, exact=False), "validation", max(sizes))
    expected = data.prepared.split("validation").text_bytes.sum()
    assert sum(int(batch["text_bytes"].sum()) for batch in data.batches(2)) == expected


def test_packed_dataset_bytes_by_document_of_pieces_take_the_average(write_prepared):
    data = PackedDataset(write_prepared([3], [1000, 37], exact=False), "validation", 16)
    total = data.prepared.split("validation").text_bytes.sum()
    batches = list(data.batches(4))
    share = sum(int(batch["text_targets"].sum()) for batch in batches) / (1000 + 37 - 4)
    assert sum(int(batch["text_bytes"].sum()) for batch in batches) == pytest.approx(share * total, rel=0.01)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_dataset_bytes_of_real_text_are_exact(prepared_folder, split):
    data = PackedDataset(prepared_folder, split, 64)
    tokenizer, table = data.prepared.tokenizer(), data.prepared.token_bytes
    counted = 0
    for batch in data.batches(5):
        for row in range(len(batch["input_ids"])):
            predicted = batch["input_ids"][row][batch["text_targets"][row]]
            assert int(batch["text_bytes"][row]) == int(table[predicted.numpy()].sum())
            counted += int(batch["text_bytes"][row])
    whole = PackedDataset(prepared_folder, split, 10**5)
    names = {name for row in whole.document_names(0, len(whole)) for name in row}
    assert sum(int(batch["text_bytes"].sum()) for batch in whole.batches(1)) == sum(
        len(TEXTS[name].encode()) for name in names
    )
    first_tokens = sum(len(piece) > 0 for batch in data.batches(1) for piece in pieces_of(batch))
    assert 0 < sum(whole.prepared.split(split).text_bytes) - counted < 20 * first_tokens
    assert tokenizer.decode(predicted)


def test_packed_dataset_bytes_of_other_tokenizers_are_exact_by_document(tmp_path):
    prepare(memory_corpus(TEXTS), tmp_path / "p", tokenizer=other_tokenizer(eos_token="[EOS]"), validation=0.3)
    data = PackedDataset(tmp_path / "p", "train", 10**5)
    prepared = PreparedCorpus(tmp_path / "p").split("train")
    tokens = np.diff(prepared.offsets) - 1
    unpredicted = prepared.text_bytes // np.maximum(tokens, 1)  # the first token's share: there is no begin-of-text
    expected = (prepared.text_bytes - unpredicted).sum()
    assert sum(int(batch["text_bytes"].sum()) for batch in data.batches(1)) == expected


def test_packed_dataset_document_names_follow_the_ids(write_prepared):
    data = PackedDataset(write_prepared([8, 3, 5, 20, 4]), "train", 8)
    starts = dict(zip(np.cumsum([3, 8, 3, 5, 20]).tolist(), range(5), strict=True))
    batch, names = data.batch(1, len(data)), data.document_names(1, len(data))
    for row, found in enumerate(names):
        for number, name in enumerate(found):
            token = int(batch["input_ids"][row][batch["document_ids"][row] == number][0])
            assert name == f"document {max(n for start, n in starts.items() if start <= token)}"
    assert sorted({name for row in names for name in row}) == [f"document {number}" for number in range(5)]


@many
@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
@example((9, [5, 5, 2, 2]))  # both small ones belong beside the same large one
def test_best_fit_rows_equals_best_fit_one_by_one(case):
    capacity, sizes = case
    rows = best_fit_rows(np.array(sizes, dtype=np.int64), capacity)
    used = np.bincount(rows, weights=sizes) if sizes else np.zeros(0)
    assert (used <= capacity).all() and (used > 0).all()
    free = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in free if space >= size]
        space = min(fitting, default=capacity)
        if fitting:
            free.remove(space)
        free.append(space - size)
    assert sorted(capacity - used) == sorted(free)


def test_best_fit_rows_a_million_pieces_take_seconds():
    sizes = np.random.default_rng(0).integers(1, 4097, 10**6)
    rows = best_fit_rows(sizes, 4096)
    assert sizes.sum() / (rows.max() + 1) / 4096 > 0.99


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context_length": 1}, "context of 1 tokens"),
        ({"long_documents": "cut"}, "'cut'; choose split or truncate"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"split": "test"}, "no documents in split 'test'; it has: train"),
        ({"split": "validation"}, "no documents in split 'validation'; it has: train"),
    ],
)
def test_packed_dataset_impossible_settings_are_refused(write_prepared, options, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(write_prepared([5]), **{"split": "train", "context_length": 8, **options})


def test_packed_dataset_positions_out_of_range_are_refused(write_prepared):
    data = PackedDataset(write_prepared([5]), "train", 8)
    for first, count in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"{count} rows from {first} are out of range"):
            data.batch(first, count)


def test_packed_dataset_verifies_unless_told_not_to(write_prepared):
    folder = write_prepared([5])
    path = folder / "train" / "tokens-00000.bin"
    path.write_bytes(bytes([4]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="damaged"):
        PackedDataset(folder, "train", 8)
    assert PackedDataset(folder, "train", 8, verify=False).batch(0, 1)["input_ids"][0, 0] == 4
