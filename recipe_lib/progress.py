"""How far something is: a live bar on a terminal, else a line now and then, for what takes more than half a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized

from tqdm import tqdm

EVERY = 30.0  # seconds: nothing that is over before is worth a line, and no two lines are nearer than that
SOON, LONG = 10.0, 120.0  # seconds after which it is told how long a thing will take, if that is more than two minutes


def lasting(seconds: float) -> str:
    """A time as one reads it: 40 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size, digits in (("days", 172_800, 1), ("h", 5_400, 1), ("min", 90, 0)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3_600, 'min': 60}[unit]:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


class Meter:
    """Counts steps and says how far they are.

    The first line comes when half a minute is over; then one a tenth, of the time where nobody knows how many steps
    there are, but never two within half a minute.

    Args:
        what: is counted.
        total: steps, where that is known.
        done: of them before.
        times: as long again all will take so often; where that is long, the first line comes after the first steps.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0, times: int = 1):
        self.what, self.total, self.done, self.times = what, total, done, times
        self.began, self.told, self._first, self._at = time.monotonic(), 0.0, done, done
        self.bar = tqdm(None, what, total, initial=done, unit="", mininterval=5, disable=None)

    @property
    def seconds(self) -> float:
        """Since the first step."""
        return max(time.monotonic() - self.began, 1e-9)

    @property
    def rate(self) -> float:
        """Steps a second."""
        return (self.done - self._first) / self.seconds

    @property
    def left(self) -> float:
        """Seconds that the other steps will take."""
        return ((self.total or self.done) - self.done) / max(self.rate, 1e-9)

    def step(self, say: Callable[[], str] | None = None) -> None:
        """One more is done.

        Args:
            say: what to tell when it is time, in place of count, rate and time left.
        """
        self.done += 1
        if not self.bar.disable:
            if self.bar.update() and say:
                self.bar.set_postfix_str(say())
        elif self._due():
            self.told, self._at = self.seconds, self.done
            print(f"{self.what}: {(say or self._say)()}", flush=True)

    def _due(self) -> bool:
        now = self.seconds
        if not self.told:
            soon = self.times > 1 and now >= SOON and (now + self.left) * self.times > LONG
            return (soon or now >= EVERY) and self.done != self.total
        part = self.done - self._at >= self.total / 10 if self.total else now - self.told >= now / 10
        return now >= EVERY and now - self.told >= EVERY and part

    def _say(self) -> str:
        of = (
            f" of {self.total:,}, {self.rate:.3g}/s, {lasting(self.left)} left"
            if self.total
            else f", {self.rate:.3g}/s"
        )
        return f"{self.done:,}{of}"

    def close(self) -> None:
        """No more steps."""
        self.bar.close()


def progress(steps: Iterable, what: str, total: int | None = None) -> Iterator:
    """The steps, with a `Meter` that counts them."""
    meter = Meter(what, len(steps) if total is None and isinstance(steps, Sized) else total)
    for step in steps:
        yield step
        meter.step()
    meter.close()
