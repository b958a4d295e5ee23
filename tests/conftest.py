"""Every test starts from the same random state, with uninitialised memory full of NaN, and sees the same fixtures."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Tests that share what is made once, in a file or folder, go to one process, which else would make it anew."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        found = [definitions[-1] for definitions in item._fixtureinfo.name2fixturedefs.values()]
        shared = [made.baseid for made in found if made.scope in ("session", "module") and made.baseid.count("/")]
        if shared and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(min(shared, key=len)))


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and other people's reference outputs, where they are at hand; elsewhere the test is skipped."""
    folder = Path(os.environ.get("MOSAICS_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("no shared data here; set MOSAICS_SHARED to a folder that holds it")
    return folder
