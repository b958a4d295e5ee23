"""Three moons: what maps made by hand can forecast, and what is said of trained ones."""

import json

import numpy as np
import pytest
import torch

from mosaics.experiments import three_moons
from mosaics.experiments.reproduce import CLAIMS, reproduce
from mosaics.experiments.three_moons import (
    MAPS,
    MoonMemory,
    Moons,
    errors,
    isolation,
    moment,
    periods_in_positions,
    positions,
    spacing,
    triples,
    whole,
)


def by_hand(heads, key=None):
    """A memory whose keys are thrice the moons, or `key` times them; what it stores and says is the moons alone."""
    model, moons = MoonMemory(heads), torch.eye(3, dtype=torch.complex64)
    for name, matrix in zip(MAPS, (3 * moons if key is None else key, moons, moons), strict=True):
        getattr(model, name).data.copy_(torch.view_as_real(matrix))
    return model


def test_triples_are_those_that_come_back_soonest():
    found = triples()
    assert len(set(found)) == 9 and found[0] == (0.5, 1.0, 2.0) and found[-1] == (1.0, 1.5, 2.0)
    assert [whole(one) for one in found] == [2, 3, 3, 3, 3, 5, 6, 6, 6]
    assert periods_in_positions() == (89, 267)


def test_positions_come_back_after_the_period_of_the_whole_system():
    for periods in triples():
        # The period is no whole number of positions, but 9 times it is.
        count = round(9 * whole(periods) / spacing())
        here, later = positions(periods, 17, 10), positions(periods, 17 + count, 10)
        torch.testing.assert_close(here, later, atol=1e-4, rtol=0)
        assert not torch.allclose(here, positions(periods, 17 + count // 18, 10), atol=0.1)
        assert here.abs().sub(1).abs().max() < 1e-5


def test_forecasts_are_right_after_one_period_of_what_a_head_sees(monkeypatch):
    monkeypatch.setattr(three_moons, "EVERY", 25)
    monkeypatch.setattr(three_moons, "FORECASTS", 2)
    slowest, together = periods_in_positions()
    one, three = (moment(errors(by_hand(heads), seed=0)) for heads in (1, 3))
    assert 0.75 * slowest < three <= slowest + 25
    assert 0.75 * together < one <= together + 25


@pytest.mark.parametrize("heads", [1, 3])
def test_moon_memory_reads_the_past_alone(heads):
    torch.manual_seed(0)
    model, z = MoonMemory(heads), positions(triples()[0], 5, 60)[None].clone()
    before = model(z)
    assert before[0, 0].abs().max() == 0  # nothing to read
    torch.testing.assert_close(model(z, last=True), before[:, -1:])
    z[:, 40:] *= -1
    torch.testing.assert_close(model(z)[:, :40], before[:, :40])
    assert not torch.allclose(model(z)[:, 41:], before[:, 41:])


@pytest.mark.parametrize("heads", [1, 3])
def test_moon_memory_is_complex_linear(heads):
    """Turning all moons by an angle turns the forecasts by it."""
    torch.manual_seed(0)
    model, z, turn = MoonMemory(heads), positions(triples()[2], 5, 60)[None], np.exp(0.7j)
    torch.testing.assert_close(model(z * turn), model(z) * turn, atol=1e-4, rtol=1e-4)


def test_three_heads_see_what_is_their_own():
    mixed = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.complex64)
    turned = torch.tensor([[0, 2j, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.complex64)
    shown = [isolation({"key": by_hand(3, key).map("key").abs().tolist()}) for key in (None, turned, mixed)]
    assert shown == pytest.approx([100, 100, 50])
    assert isolation({"key": [[1, 0, 0], [1, 0, 0], [0, 0, 1]]}) == 0


def test_moment_is_where_all_longer_contexts_are_right():
    assert moment([(5, 0.05), (10, 0.33), (15, 0.31), (20, 0.02)]) == 15
    assert moment([(5, 0.05), (10, 0.33)]) is None


def test_reproduce_three_moons_trains_once_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(three_moons, "EVERY", 250)
    changes = {"training.steps": 10, "training.batch_size": 2, "training.starts": 2}
    arguments = (CLAIMS["three-moons"], {}, (0,), tmp_path / "report", tmp_path / "cache", 1, changes)
    found = reproduce(*arguments)
    assert [m["arrangement"] for m in found["models"]] == ["one head", "three heads"]
    for model in found["models"]:
        assert model["curve"][-1][1] < model["curve"][0][1]
        assert len(set(model["losses"])) == 2 and model["loss"] == min(model["losses"])
    assert found["verdict"]["verdict"] == "does not hold" and len(found["verdict"]["checks"]) == 4
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "does not hold" in page
    assert (tmp_path / "report" / "error.png").is_file() and (tmp_path / "report" / "maps.png").is_file()
    assert json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))["rows"] == found["rows"]

    monkeypatch.setattr(three_moons, "MoonMemory", None)  # nothing is trained again
    assert reproduce(*arguments)["rows"] == found["rows"]


def test_three_moons_refuses_what_it_can_not_change():
    assert Moons.changed({"training.steps": 3}).steps == 3
    with pytest.raises(ValueError, match="it takes --training.steps, --training.batch_size, --training.l"):
        Moons.changed({"model.hidden_size": 3})
    with pytest.raises(ValueError, match="give a number above 0"):
        Moons.changed({"training.steps": 0})
    with pytest.raises(ValueError, match="steps"):
        Moons.changed({"training.steps": 1.5})
