"""`foreword serve` in a process of its own."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Running", "starting"]


class Running:
    """A server on a port that was free, once it listens."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, "-m", "foreword.cli", "serve", "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines = list[str]()
        found = None
        while found is None:
            line = self.process.stderr.readline()
            assert line, "".join(self.lines)
            self.lines.append(line)
            found = re.search(r"http://\S+:\d+", line)
        self.url = found.group()

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> str:
        """Its log, once it has ended."""
        self.process.send_signal(sent)
        _, rest = self.process.communicate(timeout=60)
        return "".join(self.lines) + rest


@contextmanager
def starting() -> Iterator[Callable[..., Running]]:
    """Starts servers, with the options given; ends those that still run."""
    started = list[Running]()

    def start(*options: object) -> Running:
        started.append(Running(*options))
        return started[-1]

    try:
        yield start
    finally:
        for server in started:
            server.process.kill()
            server.process.communicate()
