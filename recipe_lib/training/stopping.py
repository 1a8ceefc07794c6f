"""SIGUSR1 and SIGTERM, as Slurm sends them before a job's time is over: what can be saved is saved, then they kill."""

from __future__ import annotations

import os
import signal
import threading


class Stop:
    """While it is entered the signals are only noted; `obey` does what they want.

    Attributes:
        asked: the signal that came, or 0.
    """

    def __init__(self):
        self.asked = 0

    def __enter__(self) -> Stop:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    def listen(self) -> None:
        """Take the signals, from whoever took them meanwhile."""
        self._set(dict.fromkeys(self._before, self._note))

    def _set(self, handlers: dict) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.asked = number

    def obey(self) -> None:
        """End this process by the signal that came, if one did."""
        if self.asked:
            signal.signal(self.asked, signal.SIG_DFL)
            os.kill(os.getpid(), self.asked)
