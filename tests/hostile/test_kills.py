"""A few of the kills of the soak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mosaics


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_train_prepare_and_evaluate_survive_kills_at_drawn_moments():
    # A process of its own: what is forked there has not computed anything before.
    places = [str(Path(mosaics.__file__).parents[1]), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hostile.kills", "2", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["done"] >= (2 if name == "training" else 1) and found["runs"] >= 1, name
        assert not found["failures"] and not found["bits"], (name, found)
