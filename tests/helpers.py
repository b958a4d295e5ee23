"""What several tests use."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

from mosaics import MosaicConfig, MosaicForCausalLM

VOCABULARY = 61


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what was expected; the plain difference where 0 was expected."""
    value, expected = value.detach().double(), expected.detach().double()
    size = expected.norm()
    return ((value - expected).norm() / (size if size > 0 else 1.0)).item()


def gradients(output: torch.Tensor, inputs, seed: int = 7) -> list[torch.Tensor]:
    """Gradients of a fixed random projection of `output`, 0 for inputs that it does not depend on."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def tiny_config(preset: str = "memory-mosaics-v2-tiny", **overrides) -> MosaicConfig:
    """Two blocks of width 16 whose windows and delays have borders within a few tokens."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2)
    if MosaicConfig.from_preset(preset).has("num_attention_heads"):
        sizes["num_attention_heads"] = 2
    if "v1" in preset:
        own = dict(num_pairs=7, num_banks=2, dropout=0.0, attention_dropout=0.0, embedding_dropout=None)
    else:
        own = dict(intermediate_size=24)
        reach = {"short_term.window": 6, "long_term.delay": 3, "long_term.train_delay": [3, 6]}
        own |= {key: value for key, value in reach.items() if MosaicConfig.from_preset(preset).has(key)}
        own = {key: value for key, value in own.items() if key.partition(".")[2] not in overrides}
    return MosaicConfig.from_preset(preset, **{**sizes, **own, **overrides})


def tiny_model(dtype: torch.dtype = torch.float64, scale: float = 4.0, **overrides) -> MosaicForCausalLM:
    """A random tiny model at evaluation, with weights so large that every memory matters to the logits."""
    torch.manual_seed(3)
    model = MosaicForCausalLM(tiny_config(**overrides)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


class Forked:
    """A command line in a process forked from this one, which costs no imports; as `subprocess.Popen`."""

    def __init__(self, words: list[object], said: Path):
        """Begin; what is printed and logged goes to the file `said`."""

        def run() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            with said.open("w") as file:
                for number in (1, 2):
                    os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            from mosaics.cli import main

            code = main(list(map(str, words)))
            sys.stdout.flush()
            os._exit(code)

        torch.set_num_threads(1)  # no pool of threads to be missing after the fork
        self._said = said
        self._process = multiprocessing.get_context("fork").Process(target=run)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("mosaics", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._said.read_text(), None


def together(size: int, function, folder: Path) -> list[str]:
    """Run `function` in processes that see the environment torchrun makes; what each printed, then how it ended."""
    from mosaics.training import run_folder

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)

    def child(rank: int) -> None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"} | {
            k: str(numbers[k]) for k in numbers
        }
        run_folder.plot_curves = lambda metrics, picture: None
        with (folder / f"{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
            try:
                function()
                print("done")
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")

    torch.set_num_threads(1)
    children = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(100)
        process.kill()
    return [(folder / f"{rank}.txt").read_text() for rank in range(size)]
