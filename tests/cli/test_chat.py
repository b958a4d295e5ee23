"""`mosaics chat`, through a pipe and in a terminal; the conversation itself is tested in tests/serving."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest

LENGTH = ["--max-new-tokens", 8]


@pytest.fixture
def chat(mosaics, small_run, monkeypatch):
    """Says lines to the model; gives the exit code, the answers and what else was said."""

    def call(lines: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return mosaics("chat", small_run, *LENGTH, *words)

    return call


def test_chat_answers_lines_from_a_pipe_and_repeats_by_seed(chat):
    first, again, other = (chat("import os\nclass A:\n", "--seed", seed) for seed in (1, 1, 2))
    assert first[0] == 0 and first[1].count("\n") >= 2 and "no chat template" in first[2]
    assert first == again and first[1] != other[1]


def test_chat_reset_forgets_and_quit_ends(chat):
    whole = chat("import os\n/reset\nimport os\n/quit\nnever answered\n", "--temperature", 0)[1]
    once = chat("import os\n", "--temperature", 0)[1]
    assert whole == 2 * once


def test_chat_saves_what_was_said_as_a_memory(chat, mosaics, small_run, tmp_path):
    file = tmp_path / "said.memory"
    said = f"import os\n/save\n/save {tmp_path}/no/where\n/save {file}\nclass A\n"
    code, answers, told = chat(said, "--temperature", 0)
    assert code == 0 and "needs the name of a file" in told and f"kept in {file}" in told
    assert told.count("\nerror: ") == 2
    assert f"{tmp_path}/no/where can't be written" in told and told.count("\n") == 4
    assert chat("class A\n", "--memory", file, "--temperature", 0)[0] == 0
    assert mosaics("generate", small_run, "--memory", file, "--prompt", "x", "--max-new-tokens", 2)[0] == 0


def test_chat_says_which_commands_there_are(chat):
    code, answers, told = chat("/help\n")
    assert code == 0 and answers == "" and "there is no /help" in told and "/reset" in told


@pytest.mark.parametrize(
    ("option", "value"), [("--max-new-tokens", 0), ("--temperature", -1), ("--top-p", 0), ("--seed", -1)]
)
def test_chat_refuses_impossible_options(refused, small_run, option, value):
    assert option in refused("chat", small_run, option, value)


def test_chat_refuses_what_is_no_model_or_no_memory(refused, small_run, tmp_path):
    assert "there is no model" in refused("chat", tmp_path / "nothing")
    assert "none.memory" in refused("chat", small_run, "--memory", tmp_path / "none.memory")
    assert "there is no library" in refused("chat", small_run, "--library", tmp_path / "none")
    assert "leave one out" in refused("chat", small_run, "--library", tmp_path, "--memory", tmp_path)


@pytest.mark.clients
def test_chat_in_a_terminal_stops_an_answer_at_ctrl_c(small_run):
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "mosaics", "chat", str(small_run), "--max-new-tokens", "100000"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen, end = b"", time.monotonic() + 120

    def wait(for_what: bytes) -> None:
        nonlocal seen
        while for_what not in seen and time.monotonic() < end:
            seen += os.read(mine, 4096)

    try:
        wait(b"> ")
        os.write(mine, b"import os\n")
        wait(b"import os")
        begun = len(seen)
        while len(seen) < begun + 20 and time.monotonic() < end:  # it writes
            seen += os.read(mine, 4096)
        process.send_signal(2)
        seen = b""
        wait(b"> ")
        os.write(mine, b"/quit\n")
        assert process.wait(30) == 0 and b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(mine)
