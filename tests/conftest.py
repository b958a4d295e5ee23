"""Every test starts from the same random state, with uninitialised memory full of NaN, and sees the same fixtures."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


# Tests of a folder or file share runs, servers and models that are made once.
BY_FOLDER = {"cli", "data", "evaluation", "experiments", "integrations", "library", "training"}
BY_FILE = {"clients", "inspection", "models", "serving", "test_sanitized.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Send tests that share something to one process, which others would make anew; the rest goes wherever there is
    room. (The marks of `--dist loadgroup` have no effect: xdist 3.8 writes them where pytest 9 does not look.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            _, *folders, name = file.split("/")
            if BY_FOLDER.intersection(folders):
                return folders[0]
            return file if BY_FILE.intersection([*folders, name]) else nodeid

    return Sharing(config, log) if config.option.dist == "loadgroup" else None


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
