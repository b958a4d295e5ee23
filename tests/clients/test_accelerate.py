"""`accelerate launch` on an exported mosaic, as on a Llama."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

pytestmark = pytest.mark.clients
PROGRAM = Path(__file__).parent / "accelerated.py"


def test_accelerate_launch_of_two_processes_equals_one(folder, texts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [ids for text in texts if len(ids := tokenizer(text, truncation=True, max_length=32).input_ids) == 32][:4]
    found = {}
    for processes in (1, 2):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
        launch += ["--num_processes", str(processes), "--mixed_precision", "no"]
        launch += ["--multi_gpu"] if processes > 1 else ["--cpu"]  # the program itself asks for processors
        output = tmp_path / str(processes)
        launch += ["--main_process_port", "0", str(PROGRAM), str(folder), json.dumps(rows), str(output)]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        found[processes] = json.loads(output.read_text())
    assert [found[n]["processes"] for n in (1, 2)] == [1, 2]
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    assert found[1]["losses"][-1] < found[1]["losses"][0]
