"""Running a suite: what is on disk, and going on after an interruption."""

import json
from typing import ClassVar

import pytest

from mosaics.evaluation import Example, Record, Suite, evaluate
from mosaics.evaluation.results import wilson


class Sums(Suite):
    """Sums of small numbers."""

    count: int = 5
    name: ClassVar[str] = "sums"
    block: ClassVar[int] = 2

    def examples(self, scorer):
        return [Example(f"{i}", f"{i}+1=", [str(i + 1)], meta={"even": i % 2 == 0}) for i in range(self.count)]

    def answer(self, scorer, examples):
        said = scorer.complete(examples, 4)
        return [Record.of(e, text, text == e.references[0]) for e, text in zip(examples, said, strict=True)]

    def summarise(self, records):
        right = sum(record.score for record in records)
        curves = [{"label": "all", "x": [1, 2], "y": [right, right], "low": [0, 0], "high": [1, 1]}]
        return {
            "tables": {"all": [{"right": right, "of": len(records)}]},
            "plot": {"x": "x", "y": "y", "curves": curves},
        }


def add(prompt, example):
    return str(int(prompt[0]) + 1)


def test_evaluate_writes_every_example_a_table_and_a_plot(known, tmp_path):
    result = evaluate(Sums(), known(add), tmp_path / "out", model="adder")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored == result
    assert stored["summary"]["tables"]["all"] == [{"right": 5, "of": 5}]
    assert stored["examples"][3] == {
        "id": "3", "prompt_digest": Example("3", "3+1=", []).digest, "prediction": "4", "references": ["4"],
        "score": 1.0, "meta": {"even": False},
    }  # fmt: skip
    assert "right  of" in (tmp_path / "out" / "table.txt").read_text()
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "examples.jsonl", "plot.png", "results.json", "table.txt",
    ]  # fmt: skip


def test_evaluate_goes_on_after_an_interruption(known, tmp_path):
    whole = evaluate(Sums(), known(add), tmp_path / "whole")

    def breaks(prompt, example):
        if example.id == "4":
            raise KeyboardInterrupt
        return add(prompt, example)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Sums(), known(breaks), tmp_path / "cut")
    assert not (tmp_path / "cut" / "results.json").exists()
    with open(tmp_path / "cut" / "examples.jsonl", "a") as log:
        log.write('{"id": "4", "prompt_di')  # as when the machine went down while writing
    model = known(add)
    assert evaluate(Sums(), model, tmp_path / "cut") == whole
    assert [example.id for example in model.asked] == ["4"]
    asked_again = known(add)
    assert evaluate(Sums(), asked_again, tmp_path / "cut") == whole
    assert not asked_again.asked


def test_evaluate_refuses_a_folder_of_another_evaluation(known, tmp_path):
    evaluate(Sums(), known(add), tmp_path)
    with pytest.raises(ValueError, match="with count 5 instead of 4; name another --output"):
        evaluate(Sums(count=4), known(add), tmp_path)
    with pytest.raises(ValueError, match="with without None instead of"):
        evaluate(Sums(), known(add), tmp_path, more_settings={"without": ["long_term"]})


def test_wilson_equals_the_textbook():
    # Newcombe 1998, Table I: 81 of 263, and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 20)[1] == 1


@pytest.mark.parametrize("change", [{"(": None}, {"more": 1}, {"id": 3}, {"score": float("nan")}, {"meta": []}])
def test_record_from_dict_refuses_what_to_dict_never_gives(change):
    values = Record("a", "0", "x", ["y"], 1.0, {}).to_dict()
    assert Record.from_dict(values).to_dict() == values
    for wrong in (values | change, {name: x for name, x in values.items() if name not in (*change, "id")}, [], None):
        with pytest.raises(TypeError, match="of an answer is|score of a is|an answer has id, .* and nothing else"):
            Record.from_dict(wrong)
