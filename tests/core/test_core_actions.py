"Action codecs: ranges, shapes, spaces, files."
import json

import gymnasium as gym
import numpy as np
import pytest

from kalm.core.actions import ContinuousActions, DiscreteActions, actions_from_spec, actions_of
from kalm.core.files import numpy_rng

PUSHES, HAND = DiscreteActions(40), ContinuousActions((-1, 0), (1, 10))
CODECS = [PUSHES, HAND, DiscreteActions(1)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_sampled_actions_and_padding_fit(codec):
    actions = codec.sample(numpy_rng(0, "x"), 500)
    checked = codec.check(actions, (500,))
    np.testing.assert_array_equal(checked, actions)
    assert checked is not actions and not np.shares_memory(checked, actions)
    assert codec.zeros(2, 3).shape == (2, 3, *codec.shape)
    assert codec.zeros(2, 3).dtype == checked.dtype == (np.float32 if codec.shape else np.int64)
    np.testing.assert_array_equal(codec.sample(numpy_rng(0, "x"), 500), actions)


def test_sampled_actions_fill_the_range():
    assert set(PUSHES.sample(numpy_rng(0, "x"), 2000).tolist()) == set(range(40))
    drawn = HAND.sample(numpy_rng(0, "x"), 2000)
    np.testing.assert_allclose(drawn.min(0), HAND.low, atol=.05)
    np.testing.assert_allclose(drawn.max(0), HAND.high, atol=.05)


@pytest.mark.parametrize("codec, actions, message", [
    (PUSHES, [40], "action 40 out of range: expected 0 to 39"), (PUSHES, [-1, 3], "action -1 out of range"),
    (PUSHES, [1.], "whole numbers"), (PUSHES, [True], "whole numbers"), (PUSHES, ["1"], "whole numbers"),
    (HAND, [[0, 11]], r"action 11 \(number 1 of 2\) out of range: expected 0 to 10"),
    (HAND, [[0, np.nan]], "action nan"), (HAND, [[np.inf, 0]], "action inf"), (HAND, [[0, 0, 0]], "actions of shape"),
    (HAND, [0], "actions of shape"), (HAND, [["a", "b"]], "expected numbers")])
def test_actions_that_do_not_fit(codec, actions, message):
    with pytest.raises(ValueError, match=message):
        codec.check(actions)


def test_shapes_are_checked():
    PUSHES.check([[1, 2]], (1, 2))
    HAND.check([[[0, 0], [0, 0]]], (1, 2))
    for codec, actions in ((PUSHES, [1, 2]), (HAND, [[0, 0], [0, 0]])):
        with pytest.raises(ValueError, match="actions of shape"):
            codec.check(actions, (1, 2))


def test_rounding_is_forgiven_and_removed():
    checked = HAND.check([[1 + 1e-7, 10 + 5e-6]])
    assert (checked <= np.float32(HAND.high)).all()
    with pytest.raises(ValueError, match="out of range"):
        HAND.check([[1.001, 0]])


def test_scaling():
    for bound, to in ((HAND.low, -1), (HAND.high, 1)):
        np.testing.assert_allclose((np.float32(bound) - HAND.centre) / HAND.scale, to)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_spec_round_trip(codec):
    assert actions_from_spec(json.loads(json.dumps(codec.spec()))) == codec


@pytest.mark.parametrize("spec", [None, {}, {"type": "words"}, {"type": "discrete"}, {"type": "discrete", "n": "3"},
                                  {"type": "discrete", "n": 0}, {"type": "continuous", "low": [0]},
                                  {"type": "continuous", "low": 0, "high": 1},
                                  {"type": "continuous", "low": ["a"], "high": ["b"]},
                                  {"type": "continuous", "low": [None], "high": [1]}])
def test_broken_specs(spec):
    with pytest.raises(ValueError):
        actions_from_spec(spec)


@pytest.mark.parametrize("low, high", [((), ()), ((0,), (0, 1)), ((1,), (0,)), ((0,), (np.inf,)), ((np.nan,), (1,))])
def test_impossible_bounds(low, high):
    with pytest.raises(ValueError, match="bounds"):
        ContinuousActions(low, high)


@pytest.mark.parametrize("space, message", [
    (gym.spaces.Discrete(3, start=1), "numbered from 0"), (gym.spaces.MultiDiscrete([2, 2]), "expected Discrete"),
    (gym.spaces.Box(-1, 1, (2, 2)), "expected Discrete"), (gym.spaces.Box(0, 9, (2,), np.int32), "a Box of fractions"),
    (gym.spaces.Box(-np.inf, 1, (2,)), "rescale the action first")])
def test_spaces_that_are_no_codec(space, message):
    with pytest.raises(ValueError, match=message) as e:
        actions_of(space)
    assert "\n" not in str(e.value)


def test_spaces():
    assert actions_of(gym.spaces.Discrete(40)) == PUSHES
    assert actions_of(gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 10]))) == HAND
