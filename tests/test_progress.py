"""Lines for what lasts, none for what does not; times as one reads them."""

import sys

import pytest

from recipe_lib import progress as module
from recipe_lib.progress import Meter, lasting, progress


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run(clock, total, seconds, capsys, **options):
    """(seconds, line) of what a meter says over steps of equal length."""
    meter, said = Meter("dishes", total, **options), []
    for _ in range(total - meter.done):
        clock.now += seconds / total
        meter.step()
        if line := capsys.readouterr().out:
            said.append((clock.now - 1000, line.strip()))
    return said


@pytest.mark.parametrize("seconds", [1, 29.9])
def test_what_is_over_in_half_a_minute_says_nothing(clock, capsys, seconds):
    assert run(clock, 50, seconds, capsys) == []


@pytest.mark.parametrize("seconds", [45, 200, 3_600, 86_400])
def test_never_two_within_half_a_minute_and_one_a_tenth(clock, capsys, seconds):
    said = run(clock, 1000, seconds, capsys)
    times = [time for time, _ in said]
    assert times[0] == pytest.approx(max(30, seconds / 1000), abs=seconds / 999)
    gaps = [b - a for a, b in zip(times, [*times[1:], seconds], strict=True)]
    assert all(gap >= 30 - 1e-6 for gap in gaps[:-1]) and max(gaps) <= max(seconds / 10, 30) + seconds / 500


def test_a_line_tells_count_rate_and_time_left(clock, capsys):
    said = run(clock, 1000, 2_000, capsys)
    assert said[0][1] == "dishes: 15 of 1,000, 0.5/s, 33 min left"
    resumed = run(clock, 1000, 2_000, capsys, done=900)
    assert resumed[0][1] == "dishes: 915 of 1,000, 0.5/s, 3 min left", "the rate is of what was done here"


def test_long_trainings_say_early_how_long_they_take_and_short_ones_do_not(clock, capsys):
    assert run(clock, 100, 20, capsys, times=12)[0][0] == pytest.approx(10, abs=0.3)
    assert run(clock, 100, 9, capsys, times=12) == [] and run(clock, 100, 20, capsys, times=5) == []


def test_steps_without_a_number_are_told_more_and_more_seldom(clock, capsys):
    said = []
    for _ in progress(iter(range(20_000)), "recipes"):
        clock.now += 1
        if line := capsys.readouterr().out:
            said.append((clock.now, line))
    assert said[0][1] == "recipes: 30, 1/s\n"
    assert 25 < len(said) < 60 and list(progress([1, 2], "few")) == [1, 2]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(range(3), "dishes")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == "" and "dishes: 100%" in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5_399, "90 min"), (12_600, "3.5 h"), (200_000, "2.3 days")],
)
def test_times(seconds, text):
    assert lasting(seconds) == text
