"""`accelerate launch` on an exported mosaic, as on a Llama."""

import json
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

pytestmark = pytest.mark.clients
PROGRAM = Path(__file__).parent / "accelerated.py"


def run(words: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def test_accelerate_launch_of_two_processes_equals_one(folder, texts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [ids for text in texts if len(ids := tokenizer(text, truncation=True, max_length=32).input_ids) == 32][:4]
    words = {n: [str(PROGRAM), str(folder), json.dumps(rows), str(tmp_path / str(n))] for n in (1, 2)}
    # The program itself asks for processors.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--multi_gpu", "--main_process_port", "0"]
    done = subprocess.run([*launch, *words[2]], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    one = multiprocessing.get_context("fork").Process(target=run, args=(words[1],))  # as `python PROGRAM`
    one.start()
    one.join(250)
    assert one.exitcode == 0
    found = {n: json.loads((tmp_path / str(n)).read_text()) for n in (1, 2)}
    assert [found[n]["processes"] for n in (1, 2)] == [1, 2]
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    assert found[1]["losses"][-1] < found[1]["losses"][0]
