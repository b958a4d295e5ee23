"""What holds for all verbs: help, errors, exit codes."""

import errno
import os
import subprocess
import sys

import pytest

from mosaics._version import __version__
from mosaics.cli import VERBS, main, sentence


def test_help_is_quick_and_does_not_import_torch():
    command = [sys.executable, "-X", "importtime", "-m", "mosaics", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "mosaics.cli" in imported and not imported & {"torch", "transformers", "numpy"}
    assert all(verb in result.stdout for verb in VERBS)


def test_python_m_mosaics_is_the_command():
    result = subprocess.run([sys.executable, "-m", "mosaics", "--version"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{__version__}\n")


def test_no_arguments_show_the_help(mosaics):
    code, output, _ = mosaics()
    assert code == 0 and "Usage: mosaics" in output


def test_help_cuts_no_summary(mosaics):
    code, output, _ = mosaics("--help")
    assert code == 0 and "..." not in output.split("Commands:")[1] and "…" not in output


def test_the_shell_completes_verbs_and_options():
    def completed(*words: str) -> list[str]:
        asked = {"_MOSAICS_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        command = [sys.executable, "-c", "import sys; sys.argv = ['mosaics']; from mosaics.cli import main; main()"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | asked)
        return found.stdout.split()

    assert completed("mosaics", "re") == ["reproduce", "report"]
    assert completed("mosaics", "train", "--ext") == ["--extend"]
    assert completed("mosaics", "train", "--schedule", "r") == ["rewarm"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example(mosaics, verb):
    code, output, _ = mosaics(verb, "--help")
    assert code == 0 and "Example:" in output and f"mosaics {verb}" in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean 'train'"),
        (["info", "--jsn", "x"], "unknown option --jsn (did you mean --json?)"),
        (["info", "--zzz", "x"], "unknown option --zzz (--help lists them)"),
        (["info"], "name a preset, checkpoint, run or recipe"),
        (["generate"], "missing argument"),
        (["info", "x", "y"], "unexpected extra argument"),
        (["info", "memory-mosaics-v2-tiny", "--context", "many"], "'--context'"),
        (["generate", "x"], "give a --prompt"),
        (["train", "quickstart", "--dryrun"], "unknown option --dryrun (did you mean --dry-run?)"),
        (["quickstart", "--promt", "x"], "unknown option --promt (did you mean --prompt?)"),
    ],
)
def test_main_refuses_in_one_sentence(refused, words, said):
    assert said in refused(*words).lower()


def test_main_shows_the_traceback_when_asked(monkeypatch):
    monkeypatch.setenv("MOSAICS_TRACEBACK", "1")
    with pytest.raises(ValueError):
        main(["info", "no-such-preset"])


def test_main_lets_our_own_mistakes_be_seen(monkeypatch):
    def broken(*args):
        raise AssertionError("ours")

    monkeypatch.setattr("mosaics.cli.info.find_config", broken)
    with pytest.raises(AssertionError):
        main(["info", "memory-mosaics-v2-tiny"])


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            2,
            "error: runs/x: No space left on device; make room and run the same command again\n",
        ),
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (MemoryError(), 2, "error: out of memory; lower training.micro_batch_size or training.context_length\n"),
    ],
)
def test_main_exit_codes(mosaics, monkeypatch, raised, code, said):
    def fail(*args):
        raise raised

    monkeypatch.setattr("mosaics.cli.info.find_config", fail)
    assert mosaics("info", "memory-mosaics-v2-tiny") == (code, "", said)


def test_sentence_of_an_error_without_text_names_its_kind():
    assert sentence(ValueError()) == "ValueError"
