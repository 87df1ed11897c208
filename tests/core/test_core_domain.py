"The seam: what a domain has to be, how it is found, what it is asked."
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from worlds import LineWords, line, line_goals

import kalm.core.domain as seam
from kalm.core.domain import (
    Behaviour,
    Domain,
    Features,
    Limits,
    Words,
    behaviour_of,
    check_domain,
    codec_of,
    judge_reward,
    judge_success,
    register_domain,
)
from kalm.core.files import numpy_rng
from kalm.core.goals import Goal
from kalm.core.rollouts import Rollouts


class Plain(Domain):
    "The least that a domain can be."
    name, levels = "plain", ("offline",)
    state_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3)

    def goals(self, level):
        return [Goal("Go.")]

    def start(self, goals, index, seeds):
        raise NotImplementedError


# ---------------------------------------------------------------- checks


def test_the_least_domain_has_defaults():
    d = check_domain(Plain())
    assert (d.words, d.limits, d.features, d.judged_only, dict(d.behaviours)) == (None, None, None, (), {})
    assert d.success(None, None, None, None) is None and d.reward(None, None, None, None, None) is None
    assert not hasattr(d, "at") and not hasattr(d, "draw") and not hasattr(d, "symmetries")


def test_a_domain_need_not_inherit():
    d = SimpleNamespace(**{name: getattr(Plain, name) for name in seam.REQUIRED})
    assert check_domain(d) is d
    states = np.zeros((1, 2))
    assert judge_success(d, [Goal("Go.")], [0], states, states) is None
    assert judge_reward(d, [Goal("Go.")], [0], states, states, states) is None
    assert behaviour_of(d)[0] == "random"


@pytest.mark.parametrize("missing", seam.REQUIRED)
def test_what_is_missing_is_named(missing):
    parts = {name: getattr(Plain, name) for name in seam.REQUIRED if name != missing}
    with pytest.raises(ValueError, match=f"is not a domain: it has no {missing}"):
        check_domain(SimpleNamespace(**parts))


@pytest.mark.parametrize("change, message", [
    (dict(levels=()), "has no levels"), (dict(judged_only=("hard",)), "judged_only names hard"),
    (dict(state_space=gym.spaces.Discrete(3)), "expected a Box"),
    (dict(state_space=gym.spaces.Box(0, 1, ())), "expected a Box"),
    (dict(action_space=gym.spaces.MultiBinary(2)), "expected Discrete"),
    (dict(limits=Limits((0,), (1,))), "limits of 1"),
    (dict(features=Features(angles=(2,))), "features name coordinate 2")])
def test_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        check_domain(type("Bad", (Plain,), change)())


# ---------------------------------------------------------------- features and limits


@pytest.mark.parametrize("bad", [dict(points=((0, 0),)), dict(points=((0, 1),), angles=(1,)), dict(angles=(-1,)),
                                 dict(one_of=((0, 3), (0, 2)))])
def test_features_name_a_coordinate_once(bad):
    with pytest.raises(ValueError, match="expected each once|angles -1: expected a whole number"):
        Features(**bad)


def test_limits_part_by_part():
    limits = Limits((-1,) * 3, (1,) * 3, parts=((0, 2), (1,)), step=(.5, .1))
    rng = numpy_rng(0, "limits")
    states, change = rng.uniform(-1, 1, (2, 50, 3))
    for s, c, fast in zip(states, change, limits.too_fast(states, states + change)):
        assert fast == (np.hypot(c[0], c[2]) > .5 or abs(c[1]) > .1)
    after = limits.nearest(states, change)
    assert not limits.outside(np.float32(after)).any()
    assert not limits.too_fast(np.float32(states), np.float32(after)).any()
    np.testing.assert_allclose(limits.nearest(states, change * 0), states)
    np.testing.assert_array_equal(limits.outside(np.float32([[0, 0, 0], [0, 2, 0]])), [False, True])


def test_a_still_state_on_the_bound_is_inside():
    "Bounds are float64, states float32."
    limits = Limits((.1,), (.3,))
    assert not limits.outside(np.float32([[.1], [.3]])).any()


def test_limits_without_steps_forbid_none():
    assert not Limits((0,), (1,), parts=((0,),)).too_fast(np.zeros((1, 1)), np.ones((1, 1))).any()


@pytest.mark.parametrize("bad", [dict(high=(1,)), dict(parts=((0,),), step=(1, 1))])
def test_limits_that_do_not_fit(bad):
    with pytest.raises(ValueError, match="expected"):
        Limits(**dict(low=(0, 0), high=(1, 1)) | bad)


def test_fitted_limits_hold_what_was_seen():
    d = line()
    r = Rollouts(numpy_rng(0, "x").random((9, 5, 2)), np.zeros((9, 4), int), lengths=[4] * 8 + [0])
    limits, t = Limits.fit(r, margin=.01), r.transitions()
    assert not limits.outside(t["next_states"]).any() and not limits.too_fast(t["states"], t["next_states"]).any()
    far = t["states"] + 1.1 * (t["next_states"] - t["states"])
    assert limits.too_fast(t["states"], far).any()
    with pytest.raises(ValueError, match="no transitions"):
        Limits.fit(r[8:])
    assert check_domain(d).limits.too_fast(np.zeros(2), np.array([.4, 0]))


def test_words_say_nothing_unless_told():
    silent, words = Words(), LineWords()
    assert silent.caption(None, None) == silent.meaning(None) == silent.read("") == "" and silent.questions(None) == []
    assert silent.checked_by(Goal("Go.")) == "" and silent.prompts == {}
    assert words.checked_by(line_goals("offline")[0]) == "explanation" and words.agree("a  b", " a b")
    assert not words.agree("a b", "b a")


# ---------------------------------------------------------------- finding a domain


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(seam, "_REGISTERED", {})
    yield
    seam.domain.cache_clear()


def test_registered_domains(registry):
    register_domain("plain", Plain)
    assert seam.domain("plain") is seam.domain("plain")
    register_domain("plain", lambda: line(name="another"))
    assert seam.domain("plain").name == "another"
    with pytest.raises(ValueError, match="unknown domain 'plane': one of .*plain, or package.module:object"):
        seam.domain("plane")


def test_entry_points(registry, monkeypatch):
    points = [SimpleNamespace(name="made", load=lambda: Plain), SimpleNamespace(name="wrong", load=lambda: 3)]
    monkeypatch.setattr(seam, "entry_points", lambda group: points if group == "kalm.domains" else [])
    assert seam.domain("made").name == "plain"
    with pytest.raises(ValueError, match="3 is not a domain"):
        seam.domain("wrong")


def test_objects_classes_and_functions_by_path(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_world", SimpleNamespace(A=Plain(), B=Plain, c=lambda: line(), n=3))
    assert [seam.domain(f"some_world:{name}").name for name in "ABc"] == ["plain", "plain", "line"]
    assert seam.domain("worlds:line").name == "line"


@pytest.mark.parametrize("spec", ["no.such.module:x", "math:nothing", ":x", "math:", "math:pi", ".relative:x"])
def test_paths_to_nothing(registry, spec):
    with pytest.raises(ValueError, match="domain"):
        seam.domain(spec)


# ---------------------------------------------------------------- asking


@pytest.mark.parametrize("behaviours, name, found", [
    ([], None, "random"), (["walk"], None, "walk"), (["walk"], "random", "random"), (["random"], None, "random"),
    (["expert", "medium"], None, "medium")])
def test_which_behaviour(behaviours, name, found):
    behaviours = {name: Behaviour(None) for name in behaviours}
    d = type("Some", (Plain,), dict(behaviours=behaviours))()
    chosen, behaviour = behaviour_of(d, name)
    assert chosen == found
    if found in behaviours:
        assert behaviour is behaviours[found]


def test_random_behaviour_acts_and_unknown_ones_are_named():
    _, behaviour = behaviour_of(Plain())
    assert set(behaviour.act(None, np.arange(50), numpy_rng(0)).tolist()) == {0, 1, 2} and behaviour.keep_failures
    with pytest.raises(ValueError, match="no behaviour 'expert': one of random"):
        behaviour_of(Plain(), "expert")
    assert codec_of(Plain()).n == 3


GO = [Goal("Go."), Goal("Stop.")]
STATES = np.zeros((2, 3, 2), np.float32)


@pytest.mark.parametrize("answer", [np.zeros((2, 3)), np.zeros(2, bool), np.zeros((3, 2), bool), True])
def test_answers_about_success_are_checked(answer):
    d = type("Bad", (Plain,), dict(success=lambda *a: answer))()
    with pytest.raises(ValueError, match=r"success of domain 'plain' gave .* expected bool of shape \(2, 3\)"):
        judge_success(d, GO, [0, 1], STATES, STATES[:, 0])


@pytest.mark.parametrize("answer", [np.zeros(2), np.zeros((2, 3, 1)), 0.])
def test_answers_about_reward_are_checked(answer):
    d = type("Bad", (Plain,), dict(reward=lambda *a: answer))()
    with pytest.raises(ValueError, match="reward of domain 'plain' has shape"):
        judge_reward(d, GO, [0, 1], STATES, STATES, STATES[:, 0])


def test_questions_are_checked_too():
    d = type("Good", (Plain,), dict(success=lambda s, g, i, states, start: states[..., 0] > 0,
                                    reward=lambda s, g, i, states, nxt, start: [[1] * 3] * 2))()
    assert judge_success(d, GO, [0, 1], STATES.tolist(), STATES[:, 0]).shape == (2, 3)
    assert judge_reward(d, GO, [0, 1], STATES, STATES, STATES[:, 0]).dtype == np.float32
    for ask in (lambda i: judge_success(d, GO, i, STATES, STATES[:, 0]),
                lambda i: judge_reward(d, GO, i, STATES, STATES, STATES[:, 0])):
        with pytest.raises(ValueError, match="goal index"):
            ask([0, 2])


@pytest.mark.parametrize("low, high, more", [
    ((np.nan,), (1.,), {}), ((2.,), (1.,), {}), ((0.,), (1.,), dict(parts=((7,),))),
    ((0.,), (1.,), dict(parts=((0,),), step=(-1.,))), ((0.,), (1.,), dict(parts=((0,),), step=(np.nan,)))])
def test_limits_that_make_no_sense_are_refused(low, high, more):
    with pytest.raises(ValueError, match="expected"):
        Limits(low, high, **more)


@pytest.mark.parametrize("wrong", [dict(angles=(1.7,)), dict(one_of=((0, 0),)), dict(points=((0, 1, 2, 3),))])
def test_features_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Features(**wrong)


@pytest.mark.parametrize("wrong", [dict(points=((0, 1), (2, 3, 4))), dict(points=((0,), (1,))),
                                   dict(points=((0, 1, 2, 3),)), dict(close=-1.0), dict(close=float("nan"))])
def test_points_are_all_of_a_plane_or_all_of_space(wrong):
    assert Features(points=((0, 1, 2), (3, 4, 5)), close=0.3).coordinates == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="expected"):
        Features(**wrong)
