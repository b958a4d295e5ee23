"""Counted n-grams, against nltk and against what probabilities are."""

import numpy as np
import pytest

from mosaics.evaluation.kneser_ney import KneserNey


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("vocabulary", [2, 5, 30])
def test_kneser_ney_forecasts_are_probabilities(order, vocabulary):
    draw = np.random.default_rng(order)
    model = KneserNey(draw.integers(0, vocabulary, 400), order, vocabulary)
    for _ in range(20):
        before = draw.integers(0, vocabulary, order)
        after = [np.exp(-model.nats([*before, token])[-1]) for token in range(vocabulary)]
        assert min(after) > 0 and sum(after) == pytest.approx(1)


def test_kneser_ney_by_hand():
    """a b a b a c: bigrams ab 2, ba 2, ac 1; D = 1 / (1 + 2 * 2) = 0.2. Before a, b and c stands one token each: D = 1
    there, as none is counted twice, so that single tokens are uniform."""
    model = KneserNey([0, 1, 0, 1, 0, 2], 2, 3)
    expected = {(0, 1): (1.8 + 0.2 * 2 / 3) / 3, (0, 2): (0.8 + 0.2 * 2 / 3) / 3, (1, 0): (1.8 + 0.2 / 3) / 2}
    for pair, probability in expected.items():
        assert np.exp(-model.nats(pair)[0]) == pytest.approx(probability)
    assert np.exp(-model.nats([2, 0])[0]) == pytest.approx(1 / 3)  # nothing ever followed c


def test_kneser_ney_is_that_of_nltk_but_for_its_fixed_discount():
    """nltk smooths with a given discount, and single tokens without one."""
    from nltk.lm import KneserNeyInterpolated  # here: it takes seconds
    from nltk.util import everygrams, pad_sequence

    words = np.random.default_rng(3).integers(0, 6, 3000)
    ours = KneserNey(words, 2, 6)
    theirs = KneserNeyInterpolated(2, discount=ours._levels[0].discount)
    text = [str(w) for w in words]
    theirs.fit([everygrams(list(pad_sequence(text, 2)), max_len=2)], text)
    ours._levels[1].discount = 0.0
    asked = np.random.default_rng(4).integers(0, 6, 200)
    expected = [-np.log(theirs.score(str(w), [str(v)])) for v, w in zip(asked, asked[1:], strict=False)]
    assert ours.nats(asked) == pytest.approx(expected, rel=2e-3)


def test_kneser_ney_of_longer_histories_is_better_where_they_matter():
    text = np.tile([0, 1, 2, 0, 2, 1], 200)
    text = np.concatenate([text, np.random.default_rng(0).integers(0, 3, 100)])
    losses = [KneserNey(text, order, 3).nats(text).mean() for order in (1, 2, 3)]
    assert losses[0] > losses[1] > 1.5 * losses[2]


@pytest.mark.parametrize(("order", "vocabulary"), [(0, 5), (3, 0), (4, 2**20)])
def test_kneser_ney_refuses_what_can_not_be_counted(order, vocabulary):
    with pytest.raises(ValueError, match="can't be counted"):
        KneserNey([0, 0, 0], order, vocabulary)
