"""`benchmarks/gpu.sh` refuses what it can't do before it starts anything, and every CUDA test is one that it runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"

pytestmark = pytest.mark.skipif(
    not SCRIPT.is_file() or shutil.which("bash") is None, reason="a checkout and bash are needed"
)


def gpu_script(*words) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=20)


def test_gpu_script_help_names_every_option_and_part():
    found = gpu_script("--help")
    assert found.returncode == 0 and not found.stderr
    parts = re.search(r'PARTS="(.*)"', SCRIPT.read_text(encoding="utf-8"))[1].split()
    for word in ("--out", "--device", "--sizes", "--parts", *parts):
        assert word in found.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--out FOLDER"),
        (["--sizes", "small"], "--sizes is small; give full or tiny"),
        (["--device", "gpu"], "--device is gpu; give cuda or cpu"),
        (["--parts", "tests,trainings"], "--parts has trainings; choose some of tests, data, training"),
        (["--out"], "--out has no value"),
        (["--quick"], "there is no option --quick"),
    ],
)
def test_gpu_script_refuses_in_one_sentence(words, said):
    found = gpu_script(*words)
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1 and not found.stdout


def test_gpu_script_leaves_a_folder_with_files_alone(tmp_path):
    (tmp_path / "summary.md").write_text("of before")
    found = gpu_script("--out", tmp_path, "--device", "cpu", "--sizes", "tiny")
    assert found.returncode == 2 and "is not empty" in found.stderr
    assert (tmp_path / "summary.md").read_text() == "of before"


def test_gpu_script_runs_every_test_that_is_skipped_without_a_gpu():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        alone = len(re.findall(r"^@pytest\.mark\.skipif\(not torch\.cuda\.is_available\(\)", text, re.M))
        assert len(re.findall(r"^@pytest\.mark\.cuda$", text, re.M)) == alone, path
