"Fair starts, success judged on real states only, intervals against known values, and a ledger that loses nothing."
import threading

import numpy as np
import pytest

from kalm.core import numpy_rng, read_csv
from kalm.env import Simulator, states_of
from kalm.evaluate import (RESULT_COLUMNS, Evaluation, GoalPolicy, RandomPolicy, evaluate, interquartile_mean, probability_of_improvement, schedule, start_physics,
                           stratified_bootstrap, wilson, write_result)
from kalm.goals import Goal, goal_array, goal_set
from kalm.offline import GoalMLP, Policy

MOVES = [Goal.move("red", "blue", "behind"), Goal.move("green", "cyan", "left"), Goal.move("purple", "red", "right")]
PUSHES = [Goal.push("red", "left"), Goal.push("cyan", "behind"), Goal.push("green", "front")]

@pytest.fixture(scope="module")
def sim(): return Simulator(threads=1)


class Recorder:
    "Random actions, and a memory of what it was shown."
    def __init__(self, seed=0): self.rng, self.seen = numpy_rng(seed, "recorder"), []
    def embed(self, goals): return np.arange(len(goals))
    def __call__(self, states, inputs):
        self.seen.append((states.copy(), inputs.copy()))
        return self.rng.integers(0, 40, len(states))


# ---------------------------------------------------------------- intervals

@pytest.mark.parametrize("k, n, low, high", [(0, 10, 0., .2775), (10, 10, .7225, 1.), (5, 10, .2366, .7634), (1, 29, .0061, .1718), (300, 1000, .2724, .3291)])
def test_wilson_against_published_values(k, n, low, high):
    np.testing.assert_allclose(wilson(k, n), (low, high), atol=1e-4)

def test_wilson_solves_its_own_equation():
    "Its ends are the rates p at which the observed rate is z standard errors away."
    for end in wilson(37, 120, .9): np.testing.assert_allclose(abs(37 / 120 - end) / np.sqrt(end * (1 - end) / 120), 1.6448536, rtol=1e-6)

@pytest.mark.parametrize("args", [(1, 0), (3, 2), (-1, 5), (1, 2, 1.)])
def test_wilson_bad_input(args):
    with pytest.raises(ValueError): wilson(*args)

def test_interquartile_mean():
    assert interquartile_mean([100, 1, 2, 3, 4, -50, 5, 6]) == np.mean([2, 3, 4, 5])
    assert interquartile_mean([1, 2, 6]) == 3
    with pytest.raises(ValueError): interquartile_mean([])

def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = numpy_rng(0, "coverage"); hits = 0
    for i in range(200):
        low, high = stratified_bootstrap([rng.random(60) < p for p in (.2, .5, .8)], level=.9, samples=200, seed=i)
        hits += low <= .5 <= high
    assert .82 < hits / 200 < .96

def test_improvement_is_the_share_of_pairs_won():
    p, low, high = probability_of_improvement([[1, 5], [4, 5]], [[2, 5], [3, 5], [0, 5]]); assert p == pytest.approx((4 / 6 + .5) / 2) and 0 <= low < p < high <= 1
    assert probability_of_improvement([[9.], [8.]], [[1.], [2.]]) == (1, 1, 1) and probability_of_improvement(np.ones((3, 2)), np.ones((2, 2))) == (.5, .5, .5)
    x = np.random.default_rng(0).normal(1, 1, (200, 1)); assert probability_of_improvement(x, x - 1, samples=200)[0] == pytest.approx(.76, abs=.05)   # two normals one deviation apart: Phi(1 / sqrt 2)
    for bad in (([[1, 2]], [[1]]), (np.zeros((0, 2)), [[1, 2]])):
        with pytest.raises(ValueError, match="same tasks"): probability_of_improvement(*bad)

def test_bootstrap_keeps_strata_apart():
    assert stratified_bootstrap([np.zeros(5), np.ones(50)]) == (.5, .5)   # pooled, it would vary round .91
    assert stratified_bootstrap([np.zeros(5), np.ones(50), np.ones(3)], statistic=np.median) == (1., 1.)

@pytest.mark.parametrize("strata", [[], [[1.], []], [[np.nan]]])
def test_bootstrap_bad_input(strata):
    with pytest.raises(ValueError): stratified_bootstrap(strata)


# ---------------------------------------------------------------- episodes

def test_goals_come_equally_often():
    for n in (3, 10, 12):
        counts = np.bincount(schedule(MOVES, n, 0), minlength=3)
        assert counts.max() - counts.min() <= 1 and counts.sum() == n
    few = schedule(goal_set("offline"), 200, 0)
    assert len(set(few)) == 200 and len({(g[1], g[2], g[3]) for g in goal_array(goal_set("offline"))[few].tolist()} ) > 60

def test_every_policy_starts_from_the_same_states(sim):
    one, two = Recorder(0), Recorder(1)
    evaluate(one, MOVES, 30, sim=sim); evaluate(two, MOVES, 30, sim=sim)
    np.testing.assert_array_equal(one.seen[0][0], two.seen[0][0]); np.testing.assert_array_equal(one.seen[0][1], two.seen[0][1])
    assert not np.array_equal(one.seen[1][0][:5], two.seen[1][0][:5])
    three = Recorder(); evaluate(three, MOVES, 30, seed=1, sim=sim)
    assert not np.array_equal(one.seen[0][0], three.seen[0][0])

def test_no_start_satisfies_its_goal(sim):
    goals = [Goal.move("red", "blue", d) for d in ("behind", "left", "front", "right")]
    index = schedule(goals, 400, 0)
    raw = states_of(sim.reset(400, numpy_rng(0, "evaluate", "starts")))
    before, after = (np.array([goals[g].success(s) for g, s in zip(index, x)]) for x in (raw, states_of(start_physics(sim, goals, index, 0))))
    assert before.any() and not after.any()

def test_a_goal_that_always_holds_is_an_error(sim, monkeypatch):
    monkeypatch.setattr("kalm.evaluate.success_rows", lambda goals, index, states, start=None: np.ones(len(index), bool))
    with pytest.raises(ValueError, match="nothing is left"): start_physics(sim, MOVES, np.zeros(2, int), 0, tries=3)

def test_batched_evaluation_is_one_episode_at_a_time(sim):
    "Replays every episode alone with the recorded actions: rows that leave the batch take nothing with them."
    class Fixed:  # an action that depends on the state alone
        def embed(self, goals): return np.zeros(len(goals))
        def __call__(self, states, inputs): return (np.abs(states).sum(1) * 1e4).astype(int) % 40
    got = evaluate(Fixed(), MOVES, 12, sim=sim)
    assert got.success.any() and not got.success.all()
    for i, physics in enumerate(start_physics(sim, MOVES, got.goal, 0)):
        goal, physics, t, won = MOVES[got.goal[i]], physics[None], 0, False
        while t < 50 and not won:
            physics = sim.step(physics, Fixed()(states_of(physics), None)); t += 1
            won = bool(goal.success(states_of(physics))[0])
        assert (won, t) == (got.success[i], got.length[i])

def test_recorded_episodes_are_what_happened(sim):
    one, two = Recorder(), Recorder(); plain, e = evaluate(one, MOVES, 12, sim=sim), evaluate(two, MOVES, 12, sim=sim, record=True); r = e.rollouts
    assert plain.rollouts is None and len(r) == 12 and (r.lengths == e.length).all() and (r.terminated == e.success).all() and (r.truncated == ~e.success).all() and (r.goal == e.goal).all() and (r.actions[~r.mask] == -1).all() and (r.rewards[~r.mask] == 0).all()
    np.testing.assert_array_equal(plain.success, e.success); again = sim.replay(r.states[:, 0], r.actions); np.testing.assert_allclose(again[:, 1], r.states[:, 1], atol=1e-5)   # the first push, before chaos
    for t, (states, _) in enumerate(two.seen[:50]): np.testing.assert_array_equal(r.states[r.lengths > t, t], states.astype(np.float32))
    for b in range(12): g = MOVES[r.goal[b]]; assert bool(g.success(r.last_states[b])) == e.success[b]; np.testing.assert_allclose(r.rewards[b, :r.lengths[b]], g.reward(r.states[b, :r.lengths[b]], r.states[b, 1:r.lengths[b] + 1]), atol=1e-6)

def test_push_goals_take_one_step_and_report_both_judges(sim):
    def right(states, goals): return np.array([8 * g.source + {0: 1, 1: 2, 2: 3, 3: 0}[g.direction] for g in goals])
    def wrong_ball(states, goals): return (right(states, goals) + 8) % 40
    good, bad = evaluate(GoalPolicy(right), PUSHES, 60, sim=sim), evaluate(GoalPolicy(wrong_ball), PUSHES, 60, sim=sim)
    assert (good.length == 1).all() and good.action_rate == 1 and bad.action_rate == 0
    assert bad.rate < .3 < good.rate
    assert evaluate(RandomPolicy(), MOVES + PUSHES, 6, sim=sim).action_match is None

def test_trained_policy_needs_its_encoder(sim):
    class Fake:
        def encode(self, texts): return np.zeros((len(texts), 6), np.float32)
    net = GoalMLP(6)
    assert evaluate(Policy(net), MOVES, 4, encoder=Fake(), sim=sim).episodes == 4
    with pytest.raises(ValueError, match="encoder="): evaluate(Policy(net, encoder_name=None), MOVES, 4, sim=sim)

@pytest.mark.parametrize("answer", [lambda n: np.zeros(n), lambda n: np.zeros((n, 1), int), lambda n: np.full(n, 40), lambda n: np.full(n, -1), lambda n: np.zeros(n + 1, int)])
def test_a_policy_that_answers_nonsense_is_refused(answer, sim):
    with pytest.raises(ValueError, match="integers in 0 to 39"): evaluate(GoalPolicy(lambda s, g: answer(len(s))), MOVES, 3, sim=sim)

@pytest.mark.parametrize("goals, n", [([], 10), (MOVES, 0)])
def test_nothing_to_evaluate(goals, n):
    with pytest.raises(ValueError, match="at least one"): evaluate(RandomPolicy(), goals, n)

def test_summary_agrees_with_outcomes():
    e = Evaluation(tuple(MOVES), np.array([0, 1, 2, 0]), np.array([True, False, True, True]), np.array([3, 50, 7, 1]))
    won, of = e.per_goal()
    assert won.tolist() == [2, 0, 1] and of.tolist() == [2, 1, 1] and (e.successes, e.episodes, e.rate) == (3, 4, .75) and e.ci == wilson(3, 4)
    assert "75.0%" in repr(e) and "75.0%" in e._repr_markdown_()


# ---------------------------------------------------------------- results.csv

ROW = dict(method="cql", level="easy", seed=0, step=1000, episodes=1000, successes=250, config="abc", commit="deadbee", backend="default", preset="quick")

def test_same_key_replaces_and_other_keys_stay(tmp_path):
    f = tmp_path/"results.csv"
    write_result(f, **ROW); write_result(f, **ROW | dict(seed=1)); write_result(f, **ROW | dict(successes=300, commit="cafe"))
    rows = read_csv(f)
    assert [(r["seed"], r["successes"], r["commit"]) for r in rows] == [("1", "250", "deadbee"), ("0", "300", "cafe")]
    assert tuple(rows[0]) == RESULT_COLUMNS and float(rows[1]["rate"]) == .3 and abs(float(rows[1]["low"]) - wilson(300, 1000)[0]) < 1e-6

@pytest.mark.parametrize("change", [dict(method="bc"), dict(level="hard"), dict(seed=2), dict(step=2000), dict(preset="paper"), dict(config="xyz"), dict(backend="other")])
def test_every_part_of_the_key_counts(change, tmp_path):
    write_result(tmp_path/"r.csv", **ROW); write_result(tmp_path/"r.csv", **ROW | change)
    assert len(read_csv(tmp_path/"r.csv")) == 2

def test_bad_rows_leave_the_file_alone(tmp_path):
    f = tmp_path/"r.csv"; write_result(f, **ROW); before = f.read_bytes()
    for bad in ({k: v for k, v in ROW.items() if k != "commit"}, ROW | dict(colour="red"), ROW | dict(successes=1001)):
        with pytest.raises(ValueError): write_result(f, **bad)
    assert f.read_bytes() == before

def test_a_kill_in_the_middle_of_a_write_loses_nothing(tmp_path, monkeypatch):
    import kalm.core as core
    f = tmp_path/"r.csv"; write_result(f, **ROW); before = f.read_bytes()
    def killed(*a): raise KeyboardInterrupt
    monkeypatch.setattr(core.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt): write_result(f, **ROW | dict(seed=1))
    monkeypatch.undo()
    assert f.read_bytes() == before
    write_result(f, **ROW | dict(seed=1)); assert len(read_csv(f)) == 2

def test_writers_side_by_side_lose_no_row(tmp_path):
    f = tmp_path/"r.csv"
    threads = [threading.Thread(target=lambda s=s: write_result(f, **ROW | dict(seed=s))) for s in range(16)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(int(r["seed"]) for r in read_csv(f)) == list(range(16))
