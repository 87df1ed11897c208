"Measures that tell real rollouts from unreal ones, and repairs."

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from lively import lively_lm, made_up, same
from worlds import line

from kalm.core.actions import DiscreteActions
from kalm.core.domain import Domain, Limits
from kalm.core.episodes import collect
from kalm.core.goals import Goal
from kalm.core.rollouts import IMAGINED, Rollouts
from kalm.lm.quality import Quality, cut_unreal, matches, perplexity, quality, repair_unreal, replays

PARTS = ((0, 1), (2, 3))


class Table(Domain):
    """Two discs on a table. Actions 0 to 3 carry the first disc 10 cm right, up, left, down, unless the world is stuck.

    A goal holds when the first disc lies within 15 cm of the second."""

    name, levels = "table", ("offline",)
    state_space, action_space = gym.spaces.Box(-9, 9, (4,), np.float32), gym.spaces.Discrete(4)

    def __init__(self, limits=Limits((-0.5,) * 4, (0.5,) * 4, PARTS, (0.2, 0.2)), stuck=False):
        self.limits, self.stuck = limits, stuck

    def goals(self, level):
        return [Goal("Bring them together.")]

    def start(self, goals, index, seeds):
        states = [np.random.default_rng(s).uniform(-0.4, 0.4, 4) for s in seeds]
        return Discs(goals, index, seeds, np.array(states, np.float32).reshape(-1, 4), self)

    def at(self, goals, index, states):
        return Discs(goals, index, np.full(len(states), -1), np.array(states, np.float32), self)

    def success(self, goals, index, states, start):
        return near(states)

    def reward(self, goals, index, states, next_states, start):
        return (10 * near(next_states)).astype(np.float32)


def near(states):
    return np.linalg.norm(np.asarray(states)[..., :2] - np.asarray(states)[..., 2:], axis=-1) < 0.15


class Discs:
    def __init__(self, goals, index, seeds, states, domain):
        self.goals, self.index, self.seeds, self.states, self.domain = goals, index, seeds, states, domain

    def step(self, rows, actions):
        states = self.states.copy()
        if not self.domain.stuck:
            states[rows, :2] += 0.1 * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])[actions]
        self.states = states
        met = near(states[rows])
        return 10 * met.astype(np.float32), met, np.zeros(len(rows), bool)


def batch(states, actions, lengths=None, **what) -> Rollouts:
    states = np.asarray(states, np.float32)
    n = len(states)
    given = dict(
        goal=np.zeros(n, int),
        goals=Table().goals("offline"),
        source=np.full(n, IMAGINED),
        domain="table",
        codec=DiscreteActions(4),
    )
    return Rollouts(states, np.asarray(actions), lengths=lengths, **given | what)


def still(n: int, steps: int) -> np.ndarray:
    "States in which nothing moves: the first disc at the centre, the second at (0.3, 0.3)."
    return np.tile(np.array([0, 0, 0.3, 0.3]), (n, steps + 1, 1))


def test_real_rollouts_are_perfect():
    domain = Table(limits=Limits((-9,) * 4, (9,) * 4, PARTS, (0.2, 0.2)))
    r = collect(domain, domain.goals("offline"), 20, policy="random", seed=1, keep_failures=True, progress=False)
    q = quality(r, domain)
    assert q.replay == q.match == r.success.mean() and (q.rollouts, q.length) == (20, r.lengths.mean())
    assert q.off_limits == q.too_fast == 0 and q.step_error < 1e-6
    assert q.still_error == pytest.approx(0.05, abs=5e-3)  # one of two discs goes 10 cm


def test_imagination_is_found_out():
    "Right actions without their consequences; right consequences with other actions; a leap off the table."
    start, path = still(1, 3), still(1, 3)
    path[0, :, 0] = 0, 0.1, 0.2, 0.3
    blind = quality(batch(start, [[0, 0, 1]]), Table())
    assert blind.match == 0 and blind.step_error == pytest.approx(0.05) and blind.still_error == pytest.approx(0.05)
    wrong = quality(batch(path + [0, 0, 0, -0.3], [[2, 2, 2]]), Table())
    assert wrong.match == 1 and wrong.replay == 0 and wrong.step_error == pytest.approx(0.1)
    far = still(1, 1)
    far[0, 1] += 3
    leap = quality(batch(far, [[0]]), Table())
    assert leap.off_limits == leap.too_fast == 1


def test_measures_by_hand():
    "Two rollouts, three steps, in a world where nothing moves."
    s = still(2, 2)
    s[0, 1:, 0] += 0.03  # the first disc goes 3 cm aside, then rests
    s[1, 1] = 0.3, 0.3, 0.9, 0.3  # here it goes on the second one's place, which leaves the table
    r = batch(s, [[0, 1], [0, 0]], lengths=[2, 1])
    domain = Table(limits=Limits((-0.5,) * 4, (0.5,) * 4, PARTS, (0.5, 0.5)), stuck=True)
    q = quality(r, domain)
    assert (q.rollouts, q.match, q.replay, q.length, q.still_error) == (2, 0, 0, 1.5, 0)
    assert [q.off_limits, q.too_fast] == pytest.approx([1 / 3, 1 / 3])
    assert q.step_error == pytest.approx((0.03 + 0.3 * 2**0.5 + 0.6) / 6, abs=1e-6)  # mean over steps and discs
    assert "| 2 | 0.000 |" in q._repr_markdown_()


def test_without_parts_each_coordinate_counts_in_its_own_spread():
    "An error of a millimetre beside one of a metre: both of half of what the coordinate varies."
    s = still(2, 1)
    s[:, :, 1] = [[0.002, 0.002], [-0.002, -0.002]]
    s[:, :, 3] = [[2, 2], [-2, -2]]
    s[:, 1] += [0, 0.001, 0, 1]
    q = quality(batch(s, [[0], [0]]), Table(limits=None, stuck=True))
    assert q.step_error == pytest.approx((0.5 + 0.5) / 4, abs=1e-6) and np.isnan([q.off_limits, q.too_fast]).all()
    s[:, :, 3] = 0.3  # one that never varies counts in the units of states
    s[:, 1, 3] += 0.25
    q = quality(batch(s, [[0], [0]]), Table(limits=None, stuck=True))
    assert q.step_error == pytest.approx((0.5 + 0.25) / 4, abs=1e-6)


def test_errors_are_measured_from_the_nearest_possible_state():
    s = still(1, 1)
    s[0, :, 2] = 0.8
    q = quality(batch(s, [[0]]), Table(stuck=True))
    assert q.step_error == pytest.approx(0.3 / 2, abs=1e-6) and q.still_error == 0


def test_what_a_domain_cannot_tell_is_nan():
    blind = line(judged=False)
    blind.limits = None
    r = made_up(blind, 4)
    q = quality(r, blind)
    assert np.isnan([q.match, q.replay, q.step_error, q.still_error, q.off_limits, q.too_fast]).all()
    assert q.rollouts == 4 and q.length == r.lengths.mean()
    assert matches(r, blind) is None and replays(r, blind) is None


def test_replays_by_seed_where_a_domain_cannot_be_set_to_a_state():
    domain = line()
    goals = domain.goals("offline")
    real = collect(domain, goals, 6, policy="walk", seed=2, progress=False)
    assert real.success.all() and quality(real, domain).replay == 1
    wrong = replace(real, actions=1 - real.actions)
    assert quality(wrong, domain).replay < 1 and quality(wrong, domain).match == 1


@pytest.mark.parametrize(
    "change, message",
    [(dict(domain="other"), "domain 'other'"), (dict(goal=[-1], goals=()), "no goal"), (dict(goal=[-1]), "no goal")],
)
def test_rollouts_that_cannot_be_judged(change, message):
    with pytest.raises(ValueError, match=message):
        quality(batch(still(1, 1), [[0]], **change), Table())


def test_measures_of_nothing():
    q = quality(batch(still(1, 1), [[0]])[:0], Table())
    assert isinstance(q, Quality) and q.rollouts == 0
    assert np.isnan([q.match, q.replay, q.step_error, q.off_limits, q.length]).all()


# ---------------------------------------------------------------- cut and repaired


def test_unreal_steps_are_cut_and_counted():
    s = still(5, 3)
    s[1, 1:, 0] = 0.15, 0.3, 0.6  # leaves the table with its third step
    s[2, 1:, 0] += 0.3  # jumps at once
    s[3, 3, 1] = -5  # padding of a rollout of two steps
    s[4, 2:, 2] += 0.21  # jumps with the second step, off the table
    r = batch(
        s,
        np.full((5, 3), 1),
        [3, 3, 3, 2, 3],
        rewards=np.arange(15).reshape(5, 3) + 1,
        seed=np.arange(5),
        success=[1, 1, 1, 1, 0],
        truncated=[0, 0, 0, 0, 1],
    )
    kept, counts = cut_unreal(r, Table(limits=Limits((-0.5,) * 4, (0.5,) * 4, PARTS, (0.2, 0.2))))
    assert counts == dict(rollouts=5, off_limits_steps=3, too_fast_steps=3, cut=2, dropped=1)
    assert kept.seed.tolist() == [0, 1, 3, 4] and kept.lengths.tolist() == [3, 2, 2, 1]
    assert kept.success.tolist() == [1, 0, 1, 0] and not kept.truncated.any()  # a cut rollout did not end by itself
    for one, i in zip(kept, kept.seed):
        n = len(one)
        np.testing.assert_array_equal(one.states, r.states[i, : n + 1])
        np.testing.assert_array_equal(one.rewards, r.rewards[i, :n])


def test_unreal_steps_are_repaired():
    "Four rollouts on a table of a metre, where discs go 20 cm a step at most."
    s = still(4, 3)
    s[0, 1:, 0] = 0.1, 0.15, 0.2  # nothing to repair
    s[1, 1:, :2] = (0.3, 0.4), (0.35, 0.4), (0.35, 0.35)  # jumps half a metre at once, goes on from there
    s[2, 1:, 2] = 0.45, 0.6, 0.5  # over the edge, and back a little
    s[3, 0, :2] = -0.6, -0.55  # begins off the table; one step, then padding
    s[3, 1:, :2] = -0.5, -0.55
    lengths = [3, 3, 3, 1]
    r = batch(s, np.full((4, 3), 2), lengths, success=[0, 1, 0, 0], truncated=[1, 0, 0, 1], seed=np.arange(4))
    got, counts = repair_unreal(r, Table())
    want = r.states.copy()
    want[1, 1:, :2] = (0.12, 0.16), (0.17, 0.16), (0.17, 0.11)
    want[2, 1:, 2] = 0.45, 0.5, 0.4
    want[3, 0, :2] = -0.5, -0.5
    want[3, 1, :2] = -0.4, -0.5
    np.testing.assert_allclose(got.states, want, atol=1e-6)
    assert counts == dict(rollouts=4, off_limits_steps=2, too_fast_steps=1, repaired=3, no_longer_met=1)
    assert not got.success.any() and got.truncated.tolist() == [1, 1, 0, 1]  # what was cut by nothing stays so
    assert got.seed.tolist() == [0, 1, 2, -1] and got.lengths.tolist() == lengths  # the last begins elsewhere now
    np.testing.assert_allclose(got.rewards, np.where(got.mask, 10 * near(got.states[:, 1:]), 0))
    np.testing.assert_array_equal(got.actions, r.actions)
    again, counts = repair_unreal(got, Table())
    np.testing.assert_allclose(again.states, got.states, atol=1e-6)
    assert counts["repaired"] == counts["no_longer_met"] == 0


def test_a_success_that_nobody_can_judge_is_kept():
    domain = line(judged=False)
    r = made_up(domain, 6)
    got, counts = repair_unreal(r, domain)
    np.testing.assert_array_equal(got.success, r.success)
    assert counts["no_longer_met"] == 0 and counts["repaired"] > 0
    want = (np.arange(r.max_steps) == r.lengths[:, None] - 1) & r.success[:, None]
    np.testing.assert_array_equal(got.rewards, want)


def test_real_rollouts_need_no_repair():
    domain = Table()
    r = collect(domain, domain.goals("offline"), 12, policy="random", seed=3, keep_failures=True, progress=False)
    inside = r[~domain.limits.outside(r.states).any(1)]
    got, counts = repair_unreal(inside, domain)
    assert counts == dict(rollouts=len(inside), off_limits_steps=0, too_fast_steps=0, repaired=0, no_longer_met=0)
    assert len(inside) and got.success.tolist() == inside.success.tolist()
    np.testing.assert_allclose(got.states, inside.states, atol=1e-6)
    assert same(repair_unreal(r[:0], domain)[0], r[:0])


@pytest.mark.parametrize("change", [cut_unreal, repair_unreal])
def test_without_limits_nothing_is_unreal(change):
    with pytest.raises(ValueError, match="'table' has no limits"):
        change(batch(still(1, 1), [[0]]), Table(limits=None))


# ---------------------------------------------------------------- ordinary text


def test_perplexity_of_text(cache):
    "A model that wavers between all words alike has as many as there are words."
    lm = lively_lm(line())
    texts = ["the cat sat on the mat. " * 20]
    got = perplexity(lm, texts, words=32)
    assert got > 1 and got == pytest.approx(perplexity(lm, texts, words=32, batch_size=2), rel=1e-4)
    with_start = lm.begin
    lm.begin = [1]
    assert perplexity(lm, texts, words=32) != got
    lm.begin = with_start
    head = lm.backbone.get_output_embeddings()
    head.weight.data.zero_()
    assert perplexity(lm, texts, words=32) == pytest.approx(head.weight.shape[0], rel=1e-4)
    with pytest.raises(ValueError, match="no text of at least 32 tokens"):
        perplexity(lm, ["short"], words=32)
    with pytest.raises(ValueError, match="words 1: expected a whole number, at least 2"):
        perplexity(lm, texts, words=1)   # no word has one before it
