"""The page of a run, and what is logged for it."""

import csv
import html
import re
from types import SimpleNamespace

import pytest
import torch

from mosaics.data import PackedDataset
from mosaics.models.loading import load_exported
from mosaics.training.insight import memory_statistics, pairs_read
from mosaics.training.metrics import read_metrics
from mosaics.training.run_page import _minutes, _minutes_at, write_run_page


def text_of(page) -> str:
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.S)).split())


def test_run_page_has_the_numbers_of_the_log(run, tmp_path):
    text = text_of(write_run_page(run, tmp_path / "page" / "run.html"))
    lines = read_metrics(run / "metrics.jsonl")
    validated = [line for line in lines if "validation_bits_per_byte" in line]
    assert "6 of 6 steps, which is all; 1,152 tokens in" in text
    assert f"Held-out text takes {validated[-1]['validation_bits_per_byte']:.3f} bits per byte at step 6" in text
    table = (tmp_path / "page" / "tables" / "validation.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == ["0", "3", "6"]
    assert [float(line.split(",")[2]) for line in table[1:]] == [line["validation_bits_per_byte"] for line in validated]
    before, end = (line["validation_bits_per_byte"] for line in validated[-2:])
    assert end < before and f"over the last 3 steps it fell by {100 * (1 - end / before):.1f} %" in text
    known = csv.DictReader((tmp_path / "page" / "tables" / "memories.csv").read_text().splitlines())
    memories = {(one["memory"], one["number"]): one for one in known}
    for column, line in (("at the start", validated[0]), ("now", validated[-1])):
        for one in line["memories"]:
            assert float(memories[f"{one['memory']}, layer {one['layer']}", one["number"]][column]) == one["mean"]
    clipped = sum(line["gradient_norm"] > 1 for line in lines if "loss" in line)
    assert f"(above 1) in {100 * clipped / 6:.0f} % of the logged steps" in text
    for words in ("Loss by tokens", "Loss by time", "Learning rate", "Gradient norm", "Speed of training"):
        assert words in text
    assert "tokens in a document" in text and "recipe.yaml" in text and "pairs read" in text
    assert "layer 0" in text and "layer 2" not in text


def test_run_page_warns_of_a_held_out_loss_that_rises_and_of_skipped_steps(run, tmp_path):
    best = min(line.get("validation_bits_per_byte", 99) for line in read_metrics(run / "metrics.jsonl"))
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "error": "the loss is nan", "skipped": true}\n')
        log.write(f'{{"step": 8, "validation_bits_per_byte": {1.02 * best}, "validation_nats_per_token": 9.0}}\n')
    text = text_of(write_run_page(run, tmp_path / "run.html"))
    assert f"{1.02 * best:.3f} bits per byte" in text and "has risen since" in text
    assert "1 steps had a loss or gradient that was not finite: the loss is nan" in text


def test_run_page_has_the_time_of_validations_between_logged_steps():
    steps = [{"step": n, "tokens": 60 * n, "tokens_per_second": 1.0} for n in (10, 20)]
    assert _minutes(steps) == [10.0, 20.0] and _minutes_at([0, 15, 20], steps, [10.0, 20.0]) == [0.0, 15.0, 20.0]


def test_run_page_refuses_what_is_no_run(run, tmp_path):
    with pytest.raises(ValueError, match="is no run"):
        write_run_page(tmp_path, tmp_path / "run.html")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has logged nothing yet"):
        write_run_page(run, tmp_path / "run.html")


def test_memory_statistics_are_logged_with_every_validation(run):
    validated = [line for line in read_metrics(run / "metrics.jsonl") if "validation_bits_per_byte" in line]
    for line in validated:
        found = {(one["layer"], one["memory"]): one for one in line["memories"] if one["number"] == "pairs read"}
        assert set(found) == {(layer, name) for layer in (0, 1) for name in ("short_term", "long_term")}
        for (_, name), one in found.items():
            assert 1 <= one["low"] <= one["high"] <= (7 if name == "short_term" else 48)


def test_memory_statistics_change_neither_model_nor_draws(run, prepared):
    model, _ = load_exported(run)
    model.train()
    before = torch.get_rng_state()
    data = PackedDataset(prepared, "validation", 48)
    assert memory_statistics(model, data) == memory_statistics(model, data)
    assert model.training and torch.equal(before, torch.get_rng_state())


def test_memory_statistics_take_what_memories_show(prepared):
    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, context, **inputs):
            shown = {"layer_index": 3, "memory": "m"}
            context.reads.append(SimpleNamespace(**shown, weights=None, traces={"decay": torch.linspace(0, 1, 11)}))
            context.reads.append(SimpleNamespace(**shown, weights=torch.full((1, 2, 4, 8), 0.125)))

    found = memory_statistics(Model(), PackedDataset(prepared, "validation", 48))
    numbers = [[one["number"], one["mean"], one["low"], one["high"]] for one in found]
    assert [line[0] for line in numbers] == ["decay", "pairs read"]
    assert numbers[0][1:] == pytest.approx([0.5, 0.1, 0.9]) and numbers[1][1:] == pytest.approx([8, 8, 8])
    assert {(one["layer"], one["memory"]) for one in found} == {(3, "m")}


def test_pairs_read_counts_an_even_spread():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])[None, None]
    found = pairs_read(weights)[0, 0]
    assert found[:3].tolist() == pytest.approx([4, 1, 2]) and found[3].isnan()
