"""`mosaics serve`: what is refused before it listens; the server itself is tested in tests/serving."""

import socket

import pytest


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--parallel", 0, "at least 1"),
        ("--max-context", 0, "at least 1"),
        ("--max-tokens", -1, "at least 1"),
        ("--max-body", 0, "at least 1"),
        ("--queue", -1, "from 0 up"),
        ("--memories", -1, "from 0 up"),
        ("--timeout", "nan", "from 0 up"),
        ("--grace", "inf", "from 0 up"),
        ("--port", 65536, "from 0 to 65535"),
        ("--host", "256.0.0.1", "choose another --port or --host"),
        ("--memory", "doc", "NAME=FILE"),
        ("--memory", "a/b=file", "NAME=FILE"),
        ("--memory", "doc=", "NAME=FILE"),
        ("--library", "doc", "NAME=FOLDER"),
    ],
)
def test_serve_refuses_impossible_options(refused, small_run, option, value, said):
    error = refused("serve", small_run, "--port", 0, option, value)
    assert option in error and said in error


def test_serve_refuses_what_can_not_be_served(refused, small_run, tmp_path):
    assert "there is no model" in refused("serve", tmp_path / "nothing", "--port", 0)
    assert "given twice" in refused("serve", small_run, "--memory", "a=x", "--memory", "a=y")
    (tmp_path / "bad.memory").write_bytes(b"no memory")
    assert "both name a" in refused("serve", small_run, "--memory", "a=x", "--library", "a=y")
    assert "there is no library" in refused("serve", small_run, "--port", 0, "--library", f"a={tmp_path / 'no'}")
    for file in ("none.memory", "bad.memory"):
        assert file in refused("serve", small_run, "--port", 0, "--memory", f"a={tmp_path / file}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "can't listen" in refused("serve", small_run, "--port", taken.getsockname()[1])


def test_serve_without_its_libraries_says_what_to_install(refused, small_run, monkeypatch):
    for name in ("server", "app"):
        monkeypatch.delitem(__import__("sys").modules, f"mosaics.serving.{name}", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    assert ".[serve]" in refused("serve", small_run)
