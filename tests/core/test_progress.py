"Progress where there is no terminal: now and then a line with the time, and nothing about short work."

import re
import time
from functools import partial

import pytest

import kalm.core.progress as progress


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr(progress, "_Lines", partial(progress._Lines, disable=False))  # the tests silence bars


def walk(steps: int, pause: float = 0.0, show: bool = True) -> None:
    with progress.progress_bar(steps + 1, "walking", "step", initial=1, show=show) as bar:
        bar.mininterval = 0
        for _ in range(steps):
            time.sleep(pause)
            bar.update()


def test_short_work_says_nothing(capsys):
    walk(100)
    walk(0)
    assert capsys.readouterr().err == ""


def test_long_work_says_how_far_it_is_and_how_long_it_will_take(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    walk(6, 0.04)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) < 6
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d  walking: \d of 7 steps(, about \d+ s left)?", line) for line in lines)


def test_what_is_not_to_be_shown_is_not(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    walk(5, 0.01, show=False)
    assert capsys.readouterr().err == ""
