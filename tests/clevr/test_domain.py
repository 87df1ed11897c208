"CLEVR-Robot keeps the contract of a domain: starts, judging, replay, data, copies."
from pathlib import Path

import numpy as np
import pytest

import kalm
from kalm.clevr.domain import CLEVR, ClevrRobot, symmetries
from kalm.clevr.expert import statistics
from kalm.clevr.goals import LEVELS, gather, goal_table, move, push
from kalm.core.domain import check_domain, codec_of, domain, judge_reward, judge_success
from kalm.core.episodes import collect, evaluate, replay
from kalm.core.rollouts import Rollouts

OFFLINE = CLEVR.goals("offline")
MOVES = OFFLINE[::18]
EASY = CLEVR.goals("easy")
STORED = Path(__file__).with_name("symmetries.npz")  # written by the code before the move


@pytest.fixture(scope="module")
def medium():
    return collect(CLEVR, OFFLINE, 160, "medium", seed=0, progress=False)


@pytest.fixture(scope="module")
def pushes():
    return collect(CLEVR, EASY, 60, "expert", seed=2, keep_failures=True, progress=False)


def same(a, b):
    "Whether two batches hold the same rollouts."
    return a.digest() == b.digest()


# ---- what the domain says of itself ----------------------------------------------------------------------------------

def test_the_entry_point_finds_it():
    assert kalm.domain("clevr") is CLEVR and domain("kalm.clevr.domain:CLEVR") is CLEVR
    assert isinstance(domain("kalm.clevr.domain:ClevrRobot"), ClevrRobot)


def test_it_is_a_whole_domain():
    assert check_domain(CLEVR) is CLEVR and CLEVR.name == "clevr" and CLEVR.levels == LEVELS
    assert CLEVR.judged_only == ("unheard",)
    assert CLEVR.state_space.shape == (10,) and codec_of(CLEVR).n == 40
    assert [len(CLEVR.goals(level)) for level in CLEVR.levels] == [1440, 2080, 400, 200, 1060]
    assert list(CLEVR.behaviours) == ["medium", "expert"]
    assert CLEVR.features.points == CLEVR.limits.parts == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
    assert len(CLEVR.limits.low) == len(CLEVR.limits.high) == 10 and CLEVR.limits.step == (.5,) * 5
    with pytest.raises(ValueError, match="offline"):
        CLEVR.goals("impossible")


def test_real_rollouts_keep_the_limits(medium, pushes):
    for r in (medium, pushes):
        t = r.transitions()
        assert not CLEVR.limits.outside(t["next_states"]).any()
        assert not CLEVR.limits.too_fast(t["states"], t["next_states"]).any()
        assert CLEVR.state_space.contains(t["states"].min(0)) and CLEVR.state_space.contains(t["states"].max(0))


def test_the_number_of_threads_changes_nothing():
    index, actions = np.arange(12), np.arange(12) * 3
    found = []
    for threads in (1, 3, None):
        simulator = ClevrRobot(threads).start(OFFLINE, index, index)
        simulator.step(index, actions)
        found.append(simulator.states)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


# ---- starts and judging ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", LEVELS)
def test_starts_are_seeds_and_fulfil_no_goal(level):
    goals = CLEVR.goals(level)
    index, seeds = np.arange(60) % len(goals), 1000 + np.arange(60)
    simulator = CLEVR.start(goals, index, seeds)
    assert not CLEVR.success(goals, index, simulator.states, simulator.states).any()
    np.testing.assert_array_equal(CLEVR.start(goals, index[20:23], seeds[20:23]).states, simulator.states[20:23])
    assert len(np.unique(simulator.states, axis=0)) == 60


def test_at_stands_where_it_is_told_and_has_no_seed(medium):
    states = medium.last_states[:5]
    simulator = CLEVR.at(OFFLINE, medium.goal[:5], states)
    np.testing.assert_array_equal(simulator.states, states)
    np.testing.assert_array_equal(simulator.seeds, [-1] * 5)


def test_states_are_judged_as_the_simulator_judges(medium, pushes):
    for r in (medium[:40], pushes):
        start, mask = r.states[:, 0], r.mask
        success = judge_success(CLEVR, r.goals, r.goal, r.states[:, 1:], start)
        reward = judge_reward(CLEVR, r.goals, r.goal, r.states[:, :-1], r.states[:, 1:], start)
        np.testing.assert_allclose(reward[mask], r.rewards[mask], atol=1e-5)
        last = np.arange(r.max_steps) == r.lengths[:, None] - 1
        np.testing.assert_array_equal(success[last], r.success)
        assert not success[mask & ~last].any()


def test_a_push_is_judged_from_its_start():
    goal, start = push("red", "left"), np.zeros((1, 10), np.float32)
    after = start.copy()
    after[0, 0] = -.2
    assert CLEVR.success([goal], [0], after, start)[0] and not CLEVR.success([goal], [0], after, after)[0]


# ---- data ------------------------------------------------------------------------------------------------------------

def test_replay_is_the_original(medium):
    some = medium[30:50]
    again = replay(CLEVR, some)
    steps = again.max_steps
    np.testing.assert_array_equal(again.states, some.states[:, :steps + 1])
    np.testing.assert_array_equal(again.rewards, some.rewards[:, :steps])
    np.testing.assert_array_equal(again.success, some.success)


def test_a_rollout_that_was_moved_is_not_replayed(medium):
    states = medium.states[:2].copy()
    states[1, 0, 0] += .01
    moved = Rollouts(states, medium.actions[:2], lengths=medium.lengths[:2], goal=medium.goal[:2], seed=medium.seed[:2],
                     goals=medium.goals, domain="clevr")
    with pytest.raises(ValueError, match="rollout 1 does not begin"):
        replay(CLEVR, moved)


def test_the_expert_reaches_its_goal():
    r = collect(CLEVR, MOVES, 160, "expert", seed=11, keep_failures=True, progress=False)
    assert r.success.mean() >= .95 and r.max_steps <= 50 and np.median(r.lengths) <= 4


def test_the_expert_works_on_two_goals_at_once():
    goals = [goal for goal in CLEVR.goals("hard") if len(goal.task.get("parts", [])) == 2]
    assert evaluate("expert", CLEVR, goals, episodes=40).rate > .7


def test_medium_resembles_the_published_lengths(medium):
    s = statistics(medium)
    assert s["success"] == 1 and 4 <= s["median_length"] <= 7
    assert 8.5 < s["mean_length"] < 14 and 35 < s["max_length"] <= 50
    assert s["source_share"] > s["target_share"] > .3 and .03 < s["other_share"] < .2
    assert (s["tasks"], s["fewest_per_task"], s["most_per_task"]) == (80, 2, 2)


def test_data_depend_on_the_seed_and_not_on_the_workers():
    few = [collect(CLEVR, MOVES, 30, "medium", seed=seed, workers=workers, progress=False)
           for seed, workers in ((5, 1), (5, 3), (6, 1))]
    assert same(few[0], few[1]) and not same(few[0], few[2])


# ---- copies ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, goals", [("moves", OFFLINE), ("pushes", EASY)])
def test_copies_are_those_of_the_code_before_the_move_as_stored(name, goals):
    with np.load(STORED, allow_pickle=False) as z:
        found = {k.removeprefix(f"{name}_"): z[k] for k in z.files if k.startswith(name)}
    fields = ("states", "actions", "rewards", "lengths", "success", "goal")
    given = Rollouts(**{k: found[k].astype(int) if k == "actions" else found[k] for k in fields}, goals=goals)
    copies = symmetries(given, 30, seed=5)
    for k in fields:
        np.testing.assert_allclose(getattr(copies, k), found[f"copies_{k}"], atol=1e-7, err_msg=k)
    assert (copies.seed == -1).all() and copies.goals == tuple(goals)


@pytest.mark.parametrize("name", ["medium", "pushes"])
def test_the_physics_cannot_tell_a_copy(name, request):
    r = request.getfixturevalue(name)
    r = r[r.lengths <= 4]
    copies = CLEVR.symmetries(r, 120, seed=1)
    real = replay(CLEVR, copies)
    np.testing.assert_allclose(real.states[:, 1], copies.states[:, 1], atol=1e-5)
    judged = judge_success(CLEVR, copies.goals, copies.goal, copies.last_states, copies.states[:, 0])
    np.testing.assert_array_equal(judged, copies.success)
    assert (real.success == copies.success).mean() > .95
    assert len({(a.tobytes(), b.tobytes()) for a, b in zip(copies.states[:, 0], copies.actions)}) > 110
    tasks = np.unique(goal_table(r.goals)[copies.goal, 0], axis=0)
    assert len(tasks) > len(np.unique(goal_table(r.goals)[r.goal, 0], axis=0)) / 2


def test_copies_without_a_goal_are_refused(medium):
    lonely = collect(CLEVR, MOVES[:1], 3, "expert", progress=False)
    with pytest.raises(ValueError, match="no twin"):
        symmetries(lonely, 40)
    with pytest.raises(ValueError, match="moves and pushes only"):
        symmetries(lonely.with_goals([gather("green")], [0, 0, 0]), 4)
    with pytest.raises(ValueError, match="no rollouts"):
        symmetries(lonely[:0], 4)
    assert len(symmetries(medium, 0)) == 0


def test_goals_of_other_types_in_the_list_do_no_harm(medium):
    goals = [gather("green"), *medium.goals]
    shifted = symmetries(medium.with_goals(goals, medium.goal + 1), 20, seed=4)
    plain = symmetries(medium, 20, seed=4)
    np.testing.assert_array_equal(shifted.goal, plain.goal + 1)
    np.testing.assert_array_equal(shifted.states, plain.states)


def test_rollouts_whose_goal_is_not_known_are_refused(medium):
    unknown = medium.with_goals([move("red", "blue", "left")], np.full(len(medium), -1))
    with pytest.raises(ValueError, match="goals are not known"):
        symmetries(unknown, 2)
