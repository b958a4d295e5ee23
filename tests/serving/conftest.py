"""A tiny model with a tokenizer and a chat template, exported; and server processes of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import openai
import pytest
import torch

from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.data import train_tokenizer

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
REACH = dict(window=8, delay=4, train_delay=[4, 12], max_position_embeddings=64)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
DOCUMENT = "import os\n\n\ndef path(name):\n    return os.path.join('a', name)\n" * 20


def export(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A model in float64, so that who else asks changes no token, with weights so large that every memory matters."""
    source = Path(sysconfig.get_path("stdlib"))
    lines = [line for name in ("bisect", "heapq", "textwrap") for line in (source / f"{name}.py").open()]
    tokenizer = train_tokenizer(["".join(lines[i : i + 12]) for i in range(0, len(lines), 12)], 320)
    tokenizer.chat_template = template
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = MosaicConfig.from_preset("memory-mosaics-v2-tiny", vocab_size=len(tokenizer), **SIZES, **REACH, **ids)
    model = MosaicForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """The folder of the exported model; its name is the model's."""
    return export(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def endless(exported, tmp_path_factory) -> Path:
    """The same model, whose answers no token ends."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("models") / "endless")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    return folder


@pytest.fixture(scope="session")
def loaded(exported):
    """The model and its tokenizer, in this process."""
    from mosaics.models.loading import load_exported

    return load_exported(exported)


@pytest.fixture(scope="session")
def greedy(loaded):
    """What the model writes after token ids, always the likeliest token: the ids."""
    model, tokenizer = loaded

    def write(ids: list[int], tokens: int) -> list[int]:
        given = torch.tensor([ids])
        written = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, top_k=None
        )
        return written[0, len(ids) :].tolist()

    return write


@pytest.fixture(scope="session")
def kept(exported, tmp_path_factory) -> Path:
    """A memory of DOCUMENT, as `mosaics generate` keeps it."""
    from mosaics.cli import main

    folder = tmp_path_factory.mktemp("memories")
    (folder / "doc.txt").write_text(DOCUMENT, encoding="utf-8")
    words = ["--context-file", str(folder / "doc.txt"), "--save-memory", str(folder / "doc.memory")]
    assert main(["generate", str(exported), *words]) == 0
    return folder / "doc.memory"


class Server:
    """`mosaics serve` in a process of its own, on a free port."""

    def __init__(self, model: Path, *words: object, log: Path, **environment: str) -> None:
        command = [sys.executable, "-m", "mosaics", "serve", str(model), "--port", "0", *map(str, words)]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment
            )
        self.said = self.process.stdout.readline()
        found = re.search(r"(http://\S+)/v1", self.said)
        assert found, log.read_text()
        self.url = found[1]

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def health(self) -> dict:
        with urllib.request.urlopen(f"{self.url}/health", timeout=30) as response:
            return json.load(response)

    def idle(self, seconds: float = 20) -> bool:
        """Whether no answers are under way, soon."""
        end = time.monotonic() + seconds
        while (busy := self.health()["answers"]) and time.monotonic() < end:
            time.sleep(0.05)
        return not busy

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """The exit code after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts servers that are ended at the end, whatever happens."""
    servers: list[Server] = []

    def started(model: Path, *words: object, **environment: str) -> Server:
        log = tmp_path_factory.mktemp("servers") / "log"
        servers.append(Server(model, *words, log=log, **environment))
        return servers[-1]

    yield started
    for server in servers:
        server.end()


@pytest.fixture(scope="session")
def server(start, exported, kept) -> Server:
    """A server with the limits that it has by default, and a memory `doc`."""
    return start(exported, "--memory", f"doc={kept}")


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return server.client()
