"Behaviour policies reach their goals; datasets are balanced, repeatable, and survive interruptions."
import numpy as np
import pytest

import kalm.data as data
from conftest import same_rollouts
from kalm.core import Rollouts, numpy_rng
from kalm.data import Expert, Medium, collect, expert_actions, fresh_starts, goal_rows, push_costs, schedule, statistics, symmetric, way_round
from kalm.env import Simulator, initial_states, physics_of, states_of
from kalm.goals import COMPASS_VECTORS, Goal, configurations, goal_array, goal_set, load_goals, success_rows

MOVES = configurations()


@pytest.fixture
def small_shards(monkeypatch): monkeypatch.setattr(data, "SHARD", 16)


# ---------------------------------------------------------------- the expert

def test_expert_reaches_95_percent_within_50_steps():
    r = collect(MOVES, 160, "expert", seed=11, keep_failures=True, progress=False)
    assert r.terminated.mean() >= .95 and r.max_steps <= 50 and np.median(r.lengths) <= 4


def test_expert_works_on_goals_of_several_parts():
    goals = [g for g in goal_set("hard") if len(g.parts) == 2]
    r = collect(goals, 60, "expert", seed=0, keep_failures=True, progress=False)
    assert r.terminated.mean() > .7


@pytest.mark.parametrize("kind", ["move", "push"])
def test_rows_do_not_influence_each_other(kind):
    goals = MOVES if kind == "move" else goal_set("easy")[::5]
    states, rows = initial_states(80, numpy_rng(0, "rows")), goal_array(goals)
    assert set(np.unique(rows[:, 0])) == {0 if kind == "move" else 1}
    together = expert_actions(states, rows)
    assert (together == [expert_actions(states[i:i + 1], rows[i:i + 1])[0] for i in range(80)]).all()
    mixed = expert_actions(states, goal_rows(goals[:79] + [Goal.all_of(MOVES[:1] + MOVES[40:41])]))
    assert (mixed[:79] == together[:79]).all()


def test_expert_pushes_only_balls_of_its_goal():
    states = initial_states(400, numpy_rng(1, "rows")); rows = goal_array([MOVES[i % 80] for i in range(400)])
    ball = expert_actions(states, rows) // 8
    assert ((ball == rows[:, 1]) | (ball == rows[:, 2])).all() and (ball == rows[:, 1]).mean() > .5


def test_easy_goals_get_pushes_that_count():
    goals = goal_set("easy")[::7]; actions = expert_actions(initial_states(len(goals), numpy_rng(2, "rows")), goal_array(goals))
    assert all(g.action_success(a) for g, a in zip(goals, actions))


def test_way_round_is_symmetric_and_longer_behind_the_target():
    out = np.linspace(.3, .8, 6)
    for d, u in enumerate(COMPASS_VECTORS):
        side = u[::-1] * [1, -1]
        ahead, behind, left, right = (way_round(out[:, None] * v, np.full(6, d)) for v in (u, -u, side, -side))
        np.testing.assert_allclose(ahead, out - .3, atol=1e-12); np.testing.assert_allclose(left, right, atol=1e-12)
        assert (behind > left).all() and (left > ahead).all() and (np.diff(behind) > 0).all()


def test_noise_leaves_the_experts_action_the_most_likely():
    states, rows = np.repeat(initial_states(3, numpy_rng(3, "rows")), 1200, 0), np.repeat(goal_array(MOVES[7:70:30]), 1200, 0)
    best, noisy = expert_actions(states, rows), expert_actions(states, rows, numpy_rng(0, "noise"), .85)
    for k in range(3):
        part = slice(1200*k, 1200*(k + 1)); assert np.bincount(noisy[part], minlength=40).argmax() == best[1200*k]
    assert (noisy != best).mean() > .7
    assert (expert_actions(states, rows, numpy_rng(0, "noise"), 0.) == best).all()


def test_policies_work_as_policies():
    states, goals = initial_states(80, numpy_rng(4, "rows")), MOVES
    for policy in (Expert(), Medium(seed=1)):
        a = policy(states, policy.embed(goals))
        assert a.shape == (80,) and a.dtype == np.int64 and a.min() >= 0 and a.max() < 40
    assert (Medium(2)(states, goal_array(goals)) == Medium(2)(states, goal_array(goals))).all()
    assert (Medium(2)(states, goal_array(goals)) != Expert()(states, goal_array(goals))).any()


# ---------------------------------------------------------------- a dataset

@pytest.fixture(scope="module")
def medium(): return collect(goal_set("offline"), 240, "medium", seed=0, progress=False)


def test_transitions_rewards_and_success_are_the_environments(medium):
    goals, sim = goal_set("offline"), Simulator(threads=1)
    physics = physics_of(medium.states[:40, 0])
    for t in range(6):
        live = np.flatnonzero(medium.lengths[:40] > t)
        physics[live] = sim.step(physics[live], medium.actions[live, t])
        assert np.array_equal(states_of(physics[live]), medium.states[live, t + 1])
    t = medium.transitions()
    for i in range(0, len(t["actions"]), 97):
        assert goals[t["goal"][i]].reward(t["states"][i], t["next_states"][i]) == pytest.approx(t["rewards"][i], abs=1e-5)
    assert np.array_equal(success_rows(goals, t["goal"], t["next_states"]), t["terminated"])
    assert not success_rows(goals, medium.goal, medium.states[:, 0]).any()


def test_medium_resembles_the_published_lengths(medium):
    assert medium.terminated.all() and not medium.truncated.any()
    s = statistics(medium, goal_set("offline"))
    assert 4 <= s["median_length"] <= 7 and 9.5 < s["mean_length"] < 13 and 40 < s["max_length"] <= 50


def test_balance(medium):
    s = statistics(medium, goal_set("offline"))
    assert (s["configurations"], s["fewest_per_configuration"], s["most_per_configuration"]) == (80, 3, 3)
    assert np.bincount(medium.goal).max() == 1
    index = schedule(goal_set("offline"), 1440 + 40, numpy_rng(0, "balance"))
    assert (np.bincount(index[:1440], minlength=1440) == 1).all() and len(set(index[1440:] // 18)) == 40


def test_statistics_by_hand():
    goals = [Goal.move("red", "blue", "left"), Goal.move("green", "red", "left")]
    r = Rollouts(np.zeros((2, 4, 10)), [[0, 9, 39], [17, -1, -1]], [[1, 2, 100], [100, 0, 0]], [3, 1], terminated=[True, True], goal=[0, 0])
    s = statistics(r, goals)
    assert (s["rollouts"], s["steps"], s["mean_length"], s["median_length"], s["max_length"], s["success"]) == (2, 4, 2, 2, 3, 1)
    assert (s["source_share"], s["target_share"], s["other_share"]) == (.25, .25, .5) and s["mean_reward"] == pytest.approx(203 / 4)
    assert (s["fewest_per_configuration"], s["most_per_configuration"]) == (0, 2)
    with pytest.raises(ValueError, match="no rollouts"): statistics(r[:0])


def test_starts_that_satisfy_their_goal_are_redrawn(monkeypatch):
    goal, draws = Goal.move("red", "blue", "left"), []
    done = np.array([-.2, .2, .1, .2, .4, .5, .4, 0, 0, -.15], np.float32)
    def first_done(n, rng):
        draws.append(n); s = initial_states(n, rng)
        if len(draws) == 1: s[:2] = done
        return s
    assert goal.success(done)
    monkeypatch.setattr(data, "initial_states", first_done)
    starts = fresh_starts([goal], np.zeros(4, int), numpy_rng(0, "starts"))
    assert draws[0] == 4 and draws[1] >= 2 and not goal.success(starts).any()


# ---------------------------------------------------------------- repeatable, resumable

def test_the_same_whatever_the_workers(small_shards):
    a, b = (collect(MOVES, 40, "medium", seed=5, workers=w, progress=False) for w in (1, 3))
    assert same_rollouts(a, b)
    assert not np.array_equal(a.states[:, 0], collect(MOVES, 40, "medium", seed=6, progress=False).states[:, 0])


def test_an_interrupted_run_continues(small_shards, tmp_path, monkeypatch):
    whole, play, calls = collect(MOVES, 60, "expert", seed=5, progress=False), data._play, []
    def dies(*args):
        calls.append(1)
        if len(calls) >= 3: raise OSError(28, "No space left on device")
        return play(*args)
    monkeypatch.setattr(data, "_play", dies)
    with pytest.raises(OSError, match="No space"): collect(MOVES, 60, "expert", seed=5, out=tmp_path, workers=1, progress=False)
    kept = sorted((tmp_path/"shards").iterdir())
    assert len(kept) == 2 and not (tmp_path/"rollouts.npz").exists()
    kept[1].write_bytes(kept[1].read_bytes()[:-40])                               # and one of them was cut off
    monkeypatch.setattr(data, "_play", lambda *args: calls.append(2) or play(*args))
    again = collect(MOVES, 60, "expert", seed=5, out=tmp_path, progress=False)
    assert same_rollouts(again, whole) and calls.count(2) == 3                    # four shards, one of them kept
    assert same_rollouts(Rollouts.load(tmp_path/"rollouts.npz"), whole) and load_goals(tmp_path/"goals.json") == MOVES
    assert not (tmp_path/"shards").exists()
    monkeypatch.setattr(data, "_play", None)
    assert same_rollouts(collect(MOVES, 60, "expert", seed=5, out=tmp_path, progress=False), whole)  # nothing is collected twice


def test_max_minutes_stops_cleanly(tmp_path):
    r = collect(MOVES, 20, "expert", out=tmp_path, progress=False, max_minutes=0)
    assert len(r) == 0 and not (tmp_path/"rollouts.npz").exists()
    assert len(collect(MOVES, 20, "expert", out=tmp_path, progress=False)) == 20


def test_a_folder_of_other_data_is_left_alone(tmp_path):
    collect(MOVES, 10, "expert", out=tmp_path, progress=False); before = (tmp_path/"rollouts.npz").read_bytes()
    for change, says in ((dict(seed=1), "seed 0 instead of 1"), (dict(policy="medium"), "'expert' instead of 'medium'"), (dict(n=11), "n 10 instead of 11"), (dict(goals=MOVES[:5]), "goals")):
        with pytest.raises(ValueError, match=says): collect(**(dict(goals=MOVES, n=10, policy="expert", out=tmp_path, progress=False) | change))
    assert (tmp_path/"rollouts.npz").read_bytes() == before


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, says", [
    (dict(goals=[]), "no goals"), (dict(n=0), "n=0"), (dict(n=-3), "n=-3"), (dict(workers=0), "workers=0"),
    (dict(policy="novice"), "unknown policy 'novice': one of expert, medium"), (dict(seed=-1), "seed -1")])
def test_bad_requests_write_nothing(tmp_path, change, says):
    with pytest.raises(ValueError, match=says): collect(**(dict(goals=MOVES, n=4, out=tmp_path/"new", progress=False) | change))
    assert not (tmp_path/"new").exists()


def test_bad_states_and_rows():
    rows = goal_array(MOVES[:2])
    with pytest.raises(ValueError, match="expected"): expert_actions(np.zeros((2, 9)), rows)
    with pytest.raises(ValueError, match="NaN"): expert_actions(np.full((2, 10), np.nan), rows)
    with pytest.raises(ValueError, match=r"\(2, 3\) for 2 states"): expert_actions(np.zeros((2, 10)), rows[:, :3])
    with pytest.raises(ValueError, match="goal_rows"): expert_actions(np.zeros((1, 10)), goal_array([Goal.all_of(MOVES[:1])]))


def test_a_goal_out_of_reach_is_named(monkeypatch):
    monkeypatch.setattr(data, "MAX_TRIES", 1)
    monkeypatch.setattr(data, "expert_actions", lambda states, *_: np.zeros(len(states), np.int64))
    with pytest.raises(ValueError, match="Move the green ball .* keep_failures"):
        collect([Goal.move("green", "cyan", "left")], 2, "expert", progress=False)


def test_costs_rule_out_bystanders():
    cost = push_costs(initial_states(1, numpy_rng(0, "cost")), goal_array([Goal.move("red", "cyan", "left")])).reshape(5, 8)
    assert np.isinf(cost[1:4]).all() and np.isfinite(cost[[0, 4]]).all()


# ---------------------------------------------------------------- other colours, and in a mirror

@pytest.mark.parametrize("goals", [MOVES, goal_set("easy")], ids=["moves", "pushes"])
def test_the_physics_cannot_tell_a_symmetric_rollout(goals):
    r = collect(goals, 80, "medium" if goals is MOVES else "expert", seed=2, keep_failures=True, progress=False); s = symmetric(r, goals, 200, seed=1); real = Simulator().replay(s.states[:, 0], s.actions[:, :1])[:, 1]
    on = s.lengths > 0; np.testing.assert_allclose(s.states[on, 1], real[on], atol=1e-5)
    for one in s: assert success_rows(goals, np.array([one.goal]), one.states[-1:], start=one.states[:1])[0] == one.terminated
    assert len({(a.tobytes(), b.tobytes()) for a, b in zip(s.states[:, 0], s.actions)}) > 190 and len(np.unique(goal_array(goals)[s.goal], axis=0)) > len(np.unique(goal_array(goals)[r.goal], axis=0)) / 2
    np.testing.assert_allclose(np.sort(s.rewards.sum(1))[[0, -1]], np.sort(r.rewards.sum(1))[[0, -1]], atol=20)

def test_a_symmetric_rollout_needs_a_goal_to_be_for():
    r = collect(MOVES[:1], 4, "expert", seed=0, progress=False)
    with pytest.raises(ValueError, match="no twin"): symmetric(r, MOVES[:1], 40)
    assert len(symmetric(r, MOVES, 0)) == 0
