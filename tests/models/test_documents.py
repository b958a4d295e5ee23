"""Whatever says where documents begin gives what they give alone: logits, loss and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from helpers import relative_error, tiny_model, tokens
from mosaics.models.documents import documents_of

LENGTHS = [7, 1, 12, 2, 9]
V1 = dict(preset="memory-mosaics-v1-tiny")


def packed(lengths=LENGTHS):
    """Ids of documents in one row, and all that says where each begins."""
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    lens = torch.tensor([0, *lengths]).cumsum(0)
    return ids, {
        "document_ids": dict(document_ids=numbers),
        "seq_idx": dict(seq_idx=numbers.int()),
        "position_ids": dict(position_ids=positions),
        "one row of positions": dict(position_ids=positions[0]),
        "from 1": dict(position_ids=positions + 1),
        "cu_seq_lens_q": dict(cu_seq_lens_q=lens.int()),
        "cu_seq_lens_k": dict(cu_seq_lens_k=lens.int()),
        "all of them": dict(
            document_ids=numbers, position_ids=positions, cu_seq_lens_q=lens, cu_seq_lens_k=lens, max_length_q=12
        ),
    }


WAYS = list(packed()[1])


@pytest.mark.parametrize("variant", [{}, V1, dict(preset="transformer-tiny")], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_packed_documents_equal_separate_ones(way, variant):
    model = tiny_model(**variant).train()
    ids, ways = packed()
    labels = ids.clone()
    borders = torch.tensor(LENGTHS).cumsum(0)[:-1]
    labels[0, borders] = -100  # as collators set them
    whole = model(ids, labels=labels, draw=0.5, **ways[way])
    whole.loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = ids[0].split(LENGTHS)
    alone = [model(part[None], labels=part[None], draw=0.5) for part in parts]
    assert relative_error(whole.logits, torch.cat([a.logits for a in alone], dim=1)) < 1e-9
    counted = [len(part) - 1 for part in parts]
    expected = sum(a.loss * n for a, n in zip(alone, counted, strict=True)) / sum(counted)
    assert relative_error(whole.loss, expected) < 1e-9
    expected.backward()
    for p, g in zip(model.parameters(), found, strict=True):
        assert relative_error(g, p.grad if p.grad is not None else torch.zeros_like(p)) < 1e-9


@pytest.mark.parametrize("way", ["position_ids", "cu_seq_lens_q", "document_ids"])
def test_targets_across_borders_are_not_counted(way):
    """Trainer counts them; here a target in another document than its position counts for nothing."""
    model = tiny_model()
    ids, ways = packed()
    labels = ids.clone()
    labels[0, torch.tensor(LENGTHS).cumsum(0)[:-1]] = -100
    assert torch.equal(model(ids, labels=ids, **ways[way]).loss, model(ids, labels=labels, **ways[way]).loss)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
def test_batches_of_transformers_flattening_collator_equal_padded_ones(flash, sequences):
    model = tiny_model()
    rows = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in LENGTHS]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=sequences)(rows)
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows], dim=1)
    output = model(**batch)
    assert relative_error(output.logits, alone) < 1e-9 and torch.isfinite(output.loss)


def test_positions_that_never_restart_change_nothing():
    model, ids = tiny_model(), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    expected = model(ids, mask).logits
    for positions in (
        torch.arange(12),
        torch.arange(12)[None],
        (mask.cumsum(1) - 1).clamp(min=0),  # as generate makes them, with left padding
        (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
        torch.arange(12)[None] * 3 + 5,  # gaps begin nothing
    ):
        assert torch.equal(model(ids, mask, position_ids=positions).logits, expected)


def test_positions_at_padding_say_nothing():
    model, ids = tiny_model(), tokens(1, 10)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 1, 9, 2, 0, 7, 0, 1, 2, 0]])
    expected = model(ids, mask, document_ids=torch.tensor([[0] * 6 + [1] * 4])).logits
    assert torch.equal(model(ids, mask, position_ids=positions).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[31], [7, 24], [6, 2, 23], [3, 5, 12, 11], [1] * 31])
@pytest.mark.parametrize("way", ["position_ids", "document_ids"])
def test_documents_go_on_over_cached_calls(pieces, way):
    """A call goes on with the open document unless its first position is 0."""
    model = tiny_model()
    ids, ways = packed()
    whole = model(ids, use_cache=False, **ways["document_ids"]).logits
    [(name, numbers)] = ways[way].items()
    cache, begin, found = None, 0, []
    for piece in pieces:
        part = slice(begin, begin + piece)
        output = model(ids[:, part], past_key_values=cache, use_cache=True, **{name: numbers[:, part]})
        cache, begin = output.past_key_values, begin + piece
        found.append(output.logits)
    assert relative_error(torch.cat(found, dim=1), whole) < 1e-9


@torch.no_grad()
def test_a_cached_call_without_a_word_goes_on():
    model, (ids, ways) = tiny_model(), packed([7, 12])
    cache = model(ids, use_cache=True, **ways["position_ids"]).past_key_values
    more = tokens(1, 5, seed=1)
    expected = model(torch.cat([ids[:, 7:], more], dim=1)).logits[:, 12:]
    assert relative_error(model(more, past_key_values=cache).logits, expected) < 1e-9


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_documents_of_equals_a_loop(data):
    batch, time = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    mask = torch.rand(batch, time, generator=draw) < data.draw(st.sampled_from([0.5, 1.1]))
    positions = torch.randint(0, 4, (batch, time), generator=draw)
    cached, opened = data.draw(st.booleans()), torch.randint(0, 5, (batch,), generator=draw)
    found = documents_of(
        (batch, time), mask, position_ids=positions, open_document=opened if cached else None, cached=cached
    )
    borders = []
    for row in range(batch):
        last = None
        for t in range(time):
            if mask[row, t]:
                begins = (positions[row, t] == 0 and cached) if last is None else positions[row, t] <= last
                if begins:
                    borders.append((row, t))
                last = positions[row, t]
    if not borders:
        assert found is None
        return
    for row in range(batch):
        before = opened[row].item() if cached else 0
        for t in range(time):
            assert found[row, t].item() == before + sum(r == row and b <= t for r, b in borders)


def test_documents_that_disagree_are_refused():
    model, (ids, ways) = tiny_model(), packed()
    _, others = packed([7, 2, 11, 2, 9])
    for a, b in (
        ("position_ids", "document_ids"),
        ("cu_seq_lens_q", "position_ids"),
        ("document_ids", "cu_seq_lens_q"),
    ):
        with pytest.raises(ValueError, match="disagree about where documents begin"):
            model(ids, **ways[a], **others[b])
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k disagree"):
        model(ids, **ways["cu_seq_lens_q"], **others["cu_seq_lens_k"])
    with pytest.raises(ValueError, match="give one of them"):
        model(ids, **ways["seq_idx"], **ways["document_ids"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(position_ids=torch.arange(30)), "position_ids has shape"),
        (dict(position_ids=torch.zeros(2, 31, dtype=torch.long)), "position_ids has shape"),
        (dict(cu_seq_lens_q=torch.tensor([0, 5])), "from 0 to its length"),
        (dict(cu_seq_lens_q=torch.tensor([1, 31])), "from 0 to its length"),
        (dict(cu_seq_lens_q=torch.tensor([0, 9, 3, 31])), "from 0 to its length"),
        (dict(seq_idx=torch.zeros(1, 30)), "document_ids has shape|give one number"),
    ],
    ids=str,
)
def test_documents_of_wrong_shapes_are_refused(wrong, said):
    model, (ids, _) = tiny_model(), packed()
    with pytest.raises(ValueError, match=said):
        model(ids, **wrong)


def test_cumulative_lengths_of_several_rows_are_refused():
    with pytest.raises(ValueError, match="give one row"):
        tiny_model()(tokens(2, 8), cu_seq_lens_q=torch.tensor([0, 3, 8]))


@torch.no_grad()
def test_generate_drops_positions_and_refuses_those_that_restart():
    model, ids = tiny_model(torch.float32), tokens(2, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=mask)
    expected = model.generate(ids, **options)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model.generate(ids, position_ids=positions, **options), expected)
    with pytest.raises(ValueError, match="no positions that restart"):
        model.generate(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2), **options)
