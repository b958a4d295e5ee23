"""The documents tell the truth: their code runs, their commands exist, their links lead somewhere."""

import json
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from mosaics.cli import VERBS, main
from mosaics.memories import REGISTRY
from mosaics.training.recipe import Recipe, recipe_keys

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "docs/tutorial.md", "docs/architecture.md", "docs/cli.md", "docs/memory-mosaics-v1.md"]
DOCUMENTS += ["docs/library.md"]
PAGES = [
    *DOCUMENTS,
    "docs/index.md",
    "docs/inspect.md",
    "docs/reproduction.md",
    "docs/scaling.md",
    "docs/performance.md",
    "docs/reliability.md",
    "docs/security.md",
    "docs/serving.md",
    "docs/use-with.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
OPS = "kernel_regression leaky_average delta_rule inner_loop deep_attention local_linear lattice newton_schulz".split()
PAGES += [f"src/mosaics/ops/{op}/README.md" for op in OPS]
MEMORIES = "delta-rule ttt titans local-linear-attention miras gam mom lattice atlas rmt".split()
PAGES += [f"docs/memories/{name}.md" for name in MEMORIES]
# Appended to the commands, so that what they start ends within seconds.
SMALL = {
    "prepare": "--vocab-size 300 --validation 0.3",
    "train": "--model.hidden_size 16 --model.num_hidden_layers 1 --model.num_attention_heads 2 "
    "--model.intermediate_size 24 --model.window 8 --model.delay 4 --model.train_delay [4,8] "
    "--training.steps 2 --training.context_length 64 "
    "--training.batch_size 2 --validation.sequences 2",
    "generate": "--max-new-tokens 4",
    "ask": "--max-new-tokens 4",
}
SMALL["quickstart"] = SMALL["train"] + " --jobs 1"
SMALL["reproduce"] = SMALL["train"].replace("--validation.sequences 2", "--seeds 0 --samples 2")
SMALL["compare"] = SMALL["reproduce"] + " --worlds recall"
SMALL["bench"] = (
    "--contexts 16 --rounds 1 --no-memory --batch-sizes 1 --peers llama "
    "--model.hidden_size 16 --model.num_hidden_layers 1 --model.num_attention_heads 2 --model.vocab_size 300"
)
NOT_RUN = {"convert", "chat", "serve"}  # a Llama, or somebody who talks, would be needed


def blocks(document: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a document that can be run, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```(python|sh)\n(.*?)^```$", text, re.M | re.S)


def commands(document: str) -> list[list[str]]:
    """The words of every line of a document's shell blocks."""
    lines = "".join(text for language, text in blocks(document) if language == "sh").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with some books, to work in; memories that a document registers are forgotten again."""
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("bisect", "colorsys", "fnmatch", "heapq", "keyword", "string", "textwrap"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", folder / f"{name}.txt")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    known = dict(REGISTRY)
    yield tmp_path
    REGISTRY.clear()
    REGISTRY.update(known)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_runs_from_top_to_bottom(document, workplace, capsys):
    names: dict = {}
    for language, text in blocks(document):
        if language == "python":
            exec(compile(text, document, "exec"), names)
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["mosaics"] and words[1] not in NOT_RUN:
                dry = [] if "--dry-run" in words else shlex.split(SMALL.get(words[1], ""))
                if words[1] == "train" and "--data.prepared" not in words:
                    dry += ["--data.vocabulary_size", "300", "--data.validation", "0.3"]
                assert main([*words[1:], *dry]) == 0, f"{line}\n{capsys.readouterr().err}"
    if document == "docs/tutorial.md":  # what it says of its little model
        printed = capsys.readouterr().out
        assert float(re.search(r"512: ([\d.]+)}", printed)[1]) > 0.9
        assert "long_term at position 40 reads mostly from [8, 8]" in printed


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/performance.md", "docs/serving.md", "docs/use-with.md"])
def test_document_commands_have_their_options(document, capsys):
    for words in commands(document):
        if words[0] != "mosaics":
            continue
        assert words[1] in VERBS, words
        assert main([words[1], "--help"]) == 0
        helped = capsys.readouterr().out
        for option in re.findall(r"--[\w.-]+", " ".join(words[2:])):
            key = option.removeprefix("--")
            assert re.search(rf"{option}\b", helped) or key in recipe_keys() or key.startswith("model."), words


def test_readme_has_an_example_of_every_verb():
    shown = {words[1] for words in commands("README.md") if words[0] == "mosaics"}
    assert not set(VERBS) - shown, "README.md (Use it from the command line) has no line for these verbs"


def test_readme_shows_the_two_commands_first():
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert "make quickstart" in first and "make test" in first and "](docs/images/quickstart.png)" in first


TARGETS = "quickstart demo-model test test-conform test-clients soak screenshots lint docs wheel".split()


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target, tmp_path):
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert {"quickstart": "mosaics quickstart", "test": "pytest"}.get(target, "") in planned.stdout


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {"make test", "make test-conform", "make test-clients"} <= set(script.splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_cli_page_lists_every_recipe_key_with_its_default():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", text, re.M))
    values = Recipe().resolved()
    flat = {}
    for section, value in values.items():
        flat |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    assert {key: default for key, default in listed.items() if key in flat} == {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()
    }
