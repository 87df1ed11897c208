"What of a level's imagined rollouts is kept."

from types import SimpleNamespace

import numpy as np
import pytest
from worlds import line

from kalm.core.goals import Goal
from kalm.run.presets import Imagined, Preset, check_preset, preset
from kalm.run.stages import _spared

GOALS = [Goal("Open it.", task={"name": "open"}), Goal("Unclose it.", task={"name": "open"}),
         Goal("Lock it.", task={"name": "lock"})]


@pytest.mark.parametrize("filter, passed, spared", [
    ("success", [0, 0, 0, 1], [1, 1, 1, 0]),     # nothing opened: all of that is kept
    ("success", [1, 0, 0, 1], [0, 0, 0, 0]),
    ("success", [0, 0, 0, 0], [1, 1, 1, 1]),
    ("round_trip", [0, 0, 0, 1], [0, 0, 0, 0]),  # what contradicts its goal in words is kept only if all does
    ("round_trip", [0, 0, 0, 0], [1, 1, 1, 1])])
def test_what_is_spared(filter, passed, spared):
    said = []
    raw = SimpleNamespace(goals=GOALS, goal=np.array([0, 1, 0, 2]))
    run = SimpleNamespace(say=said.append)
    found = _spared(run, "easy", raw, np.array(passed, bool), filter)
    assert found.tolist() == [bool(s) for s in spared] and bool(said) == any(spared)


def test_filters_of_presets_are_checked():
    with pytest.raises(ValueError, match="filter 'luck': expected one of round_trip, success"):
        Imagined(10, tries=2, filter="luck")
    silent, smoke = line(words=False), preset(line(), "smoke")
    asks = {level: Imagined(4, tries=2) for level in smoke.imagined}
    with pytest.raises(ValueError, match="has no words"):
        check_preset(_with(smoke, asks), silent)
    check_preset(_with(smoke, {level: Imagined(4, tries=2, filter="success") for level in asks}), silent)


def _with(p: Preset, imagined: dict) -> Preset:
    return Preset(p.name, p.about, p.rollouts, p.rl_rollouts, p.ground, imagined, p.trainings)
