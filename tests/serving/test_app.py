"""The endpoints in this process, where what they do can be watched."""

import json
import sys

import pytest
from fastapi.testclient import TestClient

from mosaics.serving.app import build_app
from mosaics.serving.desk import Desk

TEXT = {"model": "tiny", "max_tokens": 4}
CHAT = TEXT | {"messages": [{"role": "user", "content": "file:///etc/passwd"}]}
PATH = "../../../../etc/passwd"


@pytest.fixture
def desk(loaded):
    made = Desk("tiny", *loaded)
    yield made
    made.engine.close(0)
    made.engine.join()


@pytest.fixture
def client(desk) -> TestClient:
    return TestClient(build_app(desk), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def watched():
    """Calls something, and gives what it did to the file system."""
    seen, watching = [], False

    def hook(event: str, arguments: tuple) -> None:
        if watching and event.split(".")[0] in ("open", "os", "shutil", "subprocess", "pathlib", "glob", "tempfile"):
            seen.append((event, arguments))

    sys.addaudithook(hook)

    def watch(call):
        nonlocal watching
        seen.clear()
        watching = True
        try:
            call()
        finally:
            watching = False
        return list(seen)

    return watch


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("POST", "/v1/completions", TEXT | {"prompt": PATH}),
        ("POST", "/v1/completions", TEXT | {"prompt": "x", "memory": PATH}),
        ("POST", "/v1/completions", TEXT | {"prompt": "x", "model": PATH}),
        ("POST", "/v1/completions", TEXT | {"prompt": "x", "stream": True}),
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/memories", {"text": PATH}),
        ("GET", f"/v1/models/{PATH}", None),
        ("GET", "/v1/models/%2fetc%2fpasswd", None),
        ("GET", "/v1/memories/..%2f..%2fetc%2fpasswd", None),
        ("DELETE", "/v1/memories/doc", None),
        ("GET", "/etc/passwd", None),
    ],
)
def test_request_never_touches_the_file_system(client, watched, method, path, fields):
    def ask() -> None:
        client.request(method, path, content=None if fields is None else json.dumps(fields), headers={
            "content-type": "application/json"
        })  # fmt: skip

    ask()  # what is imported or compiled late is now there
    assert watched(ask) == []


def test_watching_sees_a_file_that_is_opened(watched):
    assert [event for event, _ in watched(lambda: open("/dev/null").close())] == ["open"]


def test_request_to_an_engine_that_has_died_is_refused(client, desk):
    desk.engine.close(0)
    desk.engine.join()
    desk.engine._end = float("inf")  # as if it had not been asked to
    response = client.post("/v1/completions", json=TEXT | {"prompt": "x"})
    assert response.status_code == 503 and client.get("/health").json()["status"] == "failed"


def test_text_of_no_tokens_is_refused(client, desk, monkeypatch):
    async def none(text, special):
        return []

    monkeypatch.setattr(desk, "tokens", none)
    assert client.post("/v1/memories", json={"text": "x"}).status_code == 400
