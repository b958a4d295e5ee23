"""What a run shows: a live line in a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import AbstractContextManager


class Progress(AbstractContextManager):
    """Progress of a run on stdout.

    Args:
        steps: the last step.
        start: the step from which the run goes on.
        every: steps between plain lines (the live line of a terminal is refreshed by time).
    """

    def __init__(self, steps: int, start: int = 0, every: int = 10):
        self._steps, self._every, self._start = steps, every, start
        self._began = time.monotonic()
        self._bits: float | None = None
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._task = self._bar.add_task("", total=steps, completed=start)

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Show a line above the progress."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A step is done; `loss` in nats per token."""
        text = f"loss {loss:.3f} · {tokens_per_second:,.0f} tokens/s"
        if self._bits is not None:
            text += f" · {self._bits:.3f} bits per byte"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif step % self._every == 0 or step == self._steps:
            seconds = (time.monotonic() - self._began) / max(1, step - self._start) * (self._steps - step)
            print(f"step {step}/{self._steps} · {text} · {as_clock(seconds)} left", flush=True)

    def validation(self, step: int, bits_per_byte: float, nats_per_token: float) -> None:
        """Held-out text was measured."""
        self._bits = bits_per_byte
        self.say(f"step {step}: validation {bits_per_byte:.3f} bits per byte, {nats_per_token:.3f} nats per token")

    def sample(self, text: str) -> None:
        """A text that the model wrote."""
        self.say("\n".join(f"  | {line}" for line in text.splitlines()))


def as_clock(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
