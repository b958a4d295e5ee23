"""What is measured is measured in turn."""

import torch

from mosaics.experiments.measuring import paired


def test_paired_takes_turns():
    calls = []
    samples = paired({name: lambda name=name: calls.append(name) for name in "AB"}, 2, torch.device("cpu"), calls=1)
    assert "".join(calls[-4:]) == "ABAB" and {name: len(times) for name, times in samples.items()} == {"A": 2, "B": 2}
