"What of a level's imagined rollouts is kept."

from types import SimpleNamespace

import numpy as np
import pytest
from worlds import line

from kalm.run.presets import Imagined, Preset, check_preset, preset
from kalm.run.stages import _kept


@pytest.mark.parametrize("passed, kept", [([False, True, True], [1, 2]), ([False, False], [0, 1])])
def test_what_passed_is_kept_or_all(passed, kept):
    said = []
    assert _kept(SimpleNamespace(say=said.append), "easy", np.array(passed)).tolist() == kept
    assert bool(said) != any(passed)


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
