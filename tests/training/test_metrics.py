"""metrics.jsonl, TensorBoard and the curves."""

import builtins
import json

import pytest

from mosaics.training.metrics import Metrics, last_validation, plot_curves, read_metrics


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, 6):
        metrics.write(step, {"loss": 1 / step})
    metrics.write(4, {"validation_bits_per_byte": 2.0})
    metrics.write(5, {"validation_bits_per_byte": 1.0})
    metrics.close()
    return path


def test_metrics_of_a_continued_run_drop_what_came_after_the_checkpoint(path):
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    Metrics(path, 3).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_metrics_of_a_new_run_start_empty(path):
    Metrics(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("garbage", ["{", "3", '{"loss": 1}', '{"step": "x"}', "\x00"])
def test_read_metrics_stops_at_what_is_no_line(path, garbage):
    path.write_text(json.dumps({"step": 1}) + f"\n{garbage}\n" + json.dumps({"step": 2}) + "\n")
    assert read_metrics(path) == [{"step": 1}]


def test_last_validation_is_the_newest_not_after_the_step(path, tmp_path):
    assert last_validation(path)["validation_bits_per_byte"] == 1.0
    assert last_validation(path, 4)["validation_bits_per_byte"] == 2.0
    assert last_validation(path, 3) == {} == last_validation(tmp_path / "nothing")


def test_plot_curves_writes_a_picture(path, tmp_path):
    plot_curves(path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}


def test_metrics_write_tensorboard_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "board")
    metrics.write(1, {"loss": 1.0, "delay": None})
    metrics.close()
    assert any(path.name.startswith("events.") for path in (tmp_path / "board").iterdir())


def test_metrics_say_how_to_get_tensorboard(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if "tensorboard" in name:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install 'mosaics\[tensorboard\]'"):
        Metrics(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "board")


def test_metrics_that_were_edited_are_left_out(path, tmp_path):
    with path.open("a") as file:
        file.write('{"step": 5, "loss": "low", "validation_bits_per_byte": null}\n{"step": 5, "loss": [1]}\n')
    assert last_validation(path)["validation_bits_per_byte"] == 1.0
    plot_curves(path, tmp_path / "curves.png")
