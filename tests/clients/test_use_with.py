"""The page of other tools runs from top to bottom."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mosaics.cli import main

pytestmark = pytest.mark.clients
PAGE = Path(__file__).parents[2] / "docs" / "use-with.md"
SECTIONS = ["lm-eval", "PEFT", "TRL", "Accelerate", "torchao", "torch.compile", "torch.export", "Serve"]


def test_use_with_page_runs(exported, texts, tmp_path, monkeypatch, capsys):
    for library in ("trl", "torchao"):
        pytest.importorskip(library)
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    shutil.copytree(exported, tmp_path / "models" / "first")
    (tmp_path / "books").mkdir()
    for i, one in enumerate(texts):
        (tmp_path / "books" / f"{i}.txt").write_text(one)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    for language, block in re.findall(r"^```(python|sh|yaml)\n(.*?)^```$", text, re.M | re.S):
        if language == "yaml":
            Path(re.match(r"# (.*)\n", block)[1]).write_text(block)
        elif language == "sh":
            for line in block.splitlines():
                assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
        else:
            exec(compile(block, str(PAGE), "exec"), names)
    assert "colours" in (tmp_path / "results" / "colours" / "table.txt").read_text()
    printed = capsys.readouterr().out
    assert 0 < float(re.search(r"trainable%: ([\d.]+)", printed)[1]) < 100
