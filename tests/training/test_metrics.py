"""metrics.jsonl, TensorBoard and the curves."""

import builtins
import json

import pytest

from mosaics.training import train
from mosaics.training.metrics import Metrics, check_tools, last_validation, plot_curves, read_metrics
from mosaics.training.recipe import make_recipe


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


def _logging(**values):
    return make_recipe({"logging": values})


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_metrics_write_numbers_and_samples_to_tensorboard_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path / "metrics.jsonl", recipe=_logging(tensorboard=True))
    metrics.write(1, {"loss": 1.0, "delay": None, "samples": ["one", "two"]})
    metrics.close()
    found = _events(tmp_path / "tensorboard")
    assert found.Tags()["scalars"] == ["loss"] and [event.value for event in found.Scalars("loss")] == [1.0]
    [text] = found.Tensors("samples/text_summary")
    assert text.tensor_proto.string_val[0] == b"one\n\ntwo" and text.step == 1


@pytest.fixture
def tracker(monkeypatch):
    """A tracker that accelerate knows, and what it was told."""
    tracking = pytest.importorskip("accelerate.tracking")
    told = []

    class Told(tracking.GeneralTracker):
        name, requires_logging_directory = "told", True

        def __init__(self, run, folder, **options):
            self.tracker = told
            told.append((run, folder, options))

        def start(self):
            told.append("start")

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None):
            if "bad" in values:
                raise ConnectionError("no server")
            told.append((step, values))

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "told", Told)
    return told


def test_metrics_tell_a_tracker_the_recipe_and_every_line(tmp_path, tracker):
    recipe = _logging(tracker="told", tracker_options={"mode": "x"})
    (tmp_path / "run").mkdir()
    metrics = Metrics(tmp_path / "run" / "metrics.jsonl", recipe=recipe)
    metrics.write(3, {"loss": 2.5, "samples": ["a", "b"], "documents": [["c"]]})
    metrics.close()
    assert tracker[:2] == [("run", str(tmp_path / "run" / "told"), {"mode": "x"}), "start"]
    assert tracker[2]["training.steps"] == 1000 and tracker[2]["model.preset"] == "memory-mosaics-v2-tiny"
    assert all(isinstance(value, bool | int | float | str) for value in tracker[2].values())
    assert tracker[3:] == [(3, {"loss": 2.5, "samples": "a\n\nb"}), "finish"]


def test_metrics_go_on_when_a_tracker_breaks(tmp_path, tracker, capsys):
    metrics = Metrics(tmp_path / "metrics.jsonl", recipe=_logging(tracker="told"))
    metrics.write(1, {"bad": 1})
    metrics.write(2, {"loss": 1})
    metrics.close()
    assert tracker[-1] != "finish" and len(tracker) == 3
    assert capsys.readouterr().err == "warning: the tracker gets nothing more: no server\n"
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_metrics_say_in_a_sentence_that_a_tracker_does_not_start(tmp_path):
    with pytest.raises(
        ValueError, match=r"tensorboard does not start \(.*nonsense.*\); mend that and run the same command again"
    ):
        recipe = _logging(tracker="tensorboard", tracker_options={"nonsense": 1})
        Metrics(tmp_path / "metrics.jsonl", recipe=recipe)


@pytest.mark.parametrize(
    ("logging", "missing", "said"),
    [
        ({"tensorboard": True}, "tensorboard", r"'\.\[tensorboard\]' in a checkout of mosaics, or 'mosaics\[tens"),
        ({"tracker": "wandb"}, "accelerate", r"needs accelerate: python -m pip install '\.\[trackers\]'"),
        ({"tracker": "wandb"}, "wandb", "tracker is wandb, which is not installed; python -m pip install wandb"),
        ({"tracker": "wndb"}, "", "did you mean wandb?"),
        ({"tracker": "nothing"}, "", "choose one of aim, clearml"),
    ],
)  # fmt: skip
def test_check_tools_says_how_to_get_what_is_missing(monkeypatch, logging, missing, said):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if missing and missing in name:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    pytest.importorskip("accelerate")
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=said):
        check_tools(_logging(**logging).logging)


def test_train_checks_its_tools_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ValueError, match="logging.tracker is 'wndb'"):
        train(tiny({"logging.tracker": "wndb"}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_train_tells_tensorboard_through_accelerate(tiny, tmp_path):
    """One tracker of accelerate's own, as a run meets it."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("accelerate")
    assert train(tiny({"logging.tracker": "tensorboard", "training.steps": 2}), tmp_path / "run").finished
    found = _events(tmp_path / "run" / "tensorboard" / "run")
    assert [event.step for event in found.Scalars("loss")] == [1, 2]


def test_metrics_that_were_edited_are_left_out(path, tmp_path):
    with path.open("a") as file:
        file.write('{"step": 5, "loss": "low", "validation_bits_per_byte": null}\n{"step": 5, "loss": [1]}\n')
    assert last_validation(path)["validation_bits_per_byte"] == 1.0
    plot_curves(path, tmp_path / "curves.png")
