"""`mosaics reproduce` from the command line."""

import json

import pytest
from tests.experiments.conftest import OPTIONS

from mosaics.experiments.reproduce import CLAIMS


@pytest.mark.slow
def test_reproduce_says_whether_a_claim_holds(mosaics, tmp_path):
    words = ["--seeds", "0", "--samples", "2", "--output", tmp_path]
    code, output, _ = mosaics("reproduce", "table12", *words, *OPTIONS, "--results", tmp_path / "results")
    assert code == 0 and "95 % interval" in output
    for path in ("table12/results.json", "results/table12.json"):
        verdict = json.loads((tmp_path / path).read_text(encoding="utf-8"))["verdict"]["verdict"]
        assert output.startswith(f"table12: {verdict}")


@pytest.mark.slow
def test_reproduce_plans_without_doing_anything(mosaics, tmp_path):
    code, output, _ = mosaics("reproduce", "all", "--plan", "--tune", "--output", tmp_path / "out", *OPTIONS)
    assert code == 0 and output.count("\n") == 15 + 2 and not (tmp_path / "out").exists()


def test_reproduce_lists_the_claims_with_their_full_scale(mosaics):
    code, output, _ = mosaics("reproduce", "--list")
    assert code == 0 and output.count("at full scale: ") == len(CLAIMS)


def test_reproduce_refuses_in_one_sentence(refused):
    assert "did you mean table3" in refused("reproduce", "tabel3")
    assert "given none" in refused("reproduce")
    assert "no setting 'num_pairs'" in refused("reproduce", "table3", "--model.num_pairs", "9")
    assert "give them as --data NAME=PATH" in refused("reproduce", "real-tasks")
    assert "there is no file" in refused("reproduce", "real-tasks", "--data", "squad=none.json")
    assert "--automata is 'many'" in refused("reproduce", "regbench", "--automata", "many")
    assert "three-moons can change" in refused("reproduce", "three-moons", "--model.window", "3")
    assert "given table3, table4" in refused("reproduce", "table3", "table4")
