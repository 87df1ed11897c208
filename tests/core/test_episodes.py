"Collecting that survives interruptions, replaying, and evaluations that depend on their arguments alone."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from worlds import line, line_goals, walk

from kalm.core import episodes
from kalm.core.domain import Behaviour
from kalm.core.episodes import CollectOptions, Evaluation, check_rollouts, collect, evaluate, play, replay
from kalm.core.files import numpy_rng, owned, start_seeds
from kalm.core.goals import Goal
from kalm.core.results import wilson
from kalm.core.rollouts import ARRAYS, Rollouts

GOALS = line_goals("offline")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(episodes, "SIDE_BY_SIDE", 4)


def same(a: Rollouts, b: Rollouts) -> bool:
    return a.goals == b.goals and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("continuous", [False, True])
def test_side_by_side_is_one_at_a_time(continuous):
    d = line(continuous)

    def choose(simulator, rows, t):   # depends on the state alone
        x = 7 * simulator.states[rows, 0] % 1
        return x[:, None] if continuous else (x > .5).astype(int)
    index, seeds = np.arange(20) % 4, np.arange(20)
    together = play(d, GOALS, index, d.start(GOALS, index, seeds), choose)
    assert len({tuple(getattr(r, name) for name in ("success", "failure", "truncated")) for r in together}) > 1
    for i in range(20):
        alone = play(d, GOALS, index[i:i + 1], d.start(GOALS, index[i:i + 1], seeds[i:i + 1]), choose)[0]
        np.testing.assert_array_equal(alone.states, together[i].states)
        np.testing.assert_array_equal(alone.actions, together[i].actions)
        assert (alone.success, alone.failure, alone.truncated) == (
            together.success[i], together.failure[i], together.truncated[i])


def test_limits_row_by_row():
    d = line()
    index, limit = np.zeros(4, int), np.array([0, 1, 2, 3])
    r = play(d, GOALS, index, d.start(GOALS, index, np.arange(4)), lambda sim, rows, t: t % 2, limit)
    assert r.lengths.tolist() == [0, 1, 2, 3] and r.truncated.tolist() == [False, True, True, True]
    nothing = play(d, GOALS, index[:0], d.start(GOALS, index[:0], index[:0]), None)
    assert len(nothing) == 0 and nothing.states.shape == (0, 1, 2)


def test_steps_taken_are_handed_on():
    d, seen = line(), []
    play(d, GOALS, [0], d.start(GOALS, [0], [0]), lambda sim, rows, t: seen.append(t[0]) or np.array([t[0] % 2]))
    assert seen == list(range(8))


def test_success_comes_before_failure_and_both_before_the_end_of_time():
    "A simulator that reports everything at once."
    d = line()

    def ends(success, failure):
        flags = np.array([success]), np.array([failure])
        simulator = SimpleNamespace(states=np.zeros((1, 2), np.float32), seeds=np.zeros(1, int),
                                    truncated=np.ones(1, bool), step=lambda rows, actions: ([1.], *flags))
        r = play(d, GOALS, [0], simulator, lambda sim, rows, t: np.array([0]))
        assert len(r[0]) == 1
        return r.success[0], r.failure[0], r.truncated[0]
    assert ends(True, True) == (True, False, False)
    assert ends(False, True) == (False, True, False)
    assert ends(False, False) == (False, False, True)


# ---------------------------------------------------------------- collecting


@pytest.mark.parametrize("continuous", [False, True])
def test_a_data_set(continuous):
    d = line(continuous)
    r = collect(d, GOALS, 30, seed=0)
    assert len(r) == 30 and r.success.all() and r.goals == tuple(GOALS) and r.domain == "line" and r.codec == d.codec
    assert r.max_steps == r.lengths.max()
    sides = np.array([GOALS[i].task["side"] for i in r.goal])
    assert (sides == "left").sum() == 15
    assert not same(collect(d, GOALS, 30, seed=1), r)


def test_failures_are_begun_anew_or_kept():
    d = line()
    d.behaviours = {"right": Behaviour(lambda sim, rows, rng: np.ones(len(rows), int))}
    with pytest.raises(ValueError, match="right never reached the goal 'Walk to the left end.' from 200 starts: give"):
        collect(d, [g for g in GOALS if g.text.startswith("Walk")], 4, policy="right")
    kept = collect(d, GOALS, 8, policy="right", keep_failures=True)
    assert kept.success.sum() == 4 and kept.truncated.sum() == 4
    assert collect(d, GOALS, 8, policy="random").truncated.any()   # random actions keep them of their own
    assert collect(d, GOALS, 8, policy="random", keep_failures=False).success.all()


def test_threads_do_not_matter(small_shards):
    d = line()
    assert same(collect(d, GOALS, 18, workers=1), collect(d, GOALS, 18, workers=3))
    seen = []
    d = replaced_threads(line(), seen)
    collect(d, GOALS, 8, workers=2)
    assert d.threads == 8 and set(seen) == {1}   # its own threads rest while the shards keep the cores busy


def replaced_threads(d, seen: list):
    "A domain whose simulator has threads of its own, and tells how many it was started with."
    class Threaded(type(d)):
        def start(self, *args):
            seen.append(self.threads)
            return super().start(*args)
    d.__class__, d.threads = Threaded, 8
    return d


def test_stopped_and_continued(small_shards, tmp_path, monkeypatch):
    d = line()
    whole = collect(d, GOALS, 18, out=tmp_path/"whole")
    assert [p.name for p in sorted((tmp_path/"whole").iterdir())] == ["request.json", "rollouts.npz"]
    calls, real = [], episodes.Rollouts.save

    def killed(self, path):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path.name)
        real(self, path)
    with monkeypatch.context() as patched:
        patched.setattr(episodes.Rollouts, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(d, GOALS, 18, out=tmp_path/"parts", workers=1)
    assert sorted(p.name for p in (tmp_path/"parts"/"shards").iterdir()) == ["00000.npz", "00001.npz"]
    some = collect(d, GOALS, 18, out=tmp_path/"parts", max_minutes=0)   # no time for more
    assert len(some) == 8 and same(some, whole[:8])
    (tmp_path/"parts"/"shards"/"00001.npz").write_bytes(b"damaged")
    assert len(collect(d, GOALS, 18, out=tmp_path/"parts", max_minutes=0)) == 4
    assert same(collect(d, GOALS, 18, out=tmp_path/"parts"), whole)
    assert (tmp_path/"parts"/"rollouts.npz").read_bytes() == (tmp_path/"whole"/"rollouts.npz").read_bytes()
    assert not (tmp_path/"parts"/"shards").exists()


def test_whole_files_of_something_else_are_collected_again(tmp_path):
    "Their checksums agree; their goals, the order of them, or their domain do not."
    d = line()
    made = collect(d, GOALS, 6, out=tmp_path)
    before = (tmp_path/"rollouts.npz").read_bytes()
    for other in (made.with_goals(made.goals, made.goal[::-1]), made.with_goals(made.goals[::-1], made.goal),
                  made.with_goals(made.goals, made.goal*0 - 1), made[:5], replace(made, domain="other")):
        other.save(tmp_path/"rollouts.npz")
        assert same(collect(d, GOALS, 6, out=tmp_path), made)
        assert (tmp_path/"rollouts.npz").read_bytes() == before


def test_two_do_not_collect_in_one_folder(tmp_path):
    with owned(tmp_path), pytest.raises(RuntimeError, match="another process works in"):
        collect(line(), GOALS, 6, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_only_read(tmp_path, monkeypatch):
    d = line()
    whole = collect(d, GOALS, 6, out=tmp_path)
    monkeypatch.setattr(d, "start", None)
    assert same(collect(d, GOALS, 6, out=tmp_path), whole)


@pytest.mark.parametrize("args, kwargs, differ", [
    ((GOALS, 7), {}, "n was 6, is 7"), ((GOALS[:2], 6), {}, "goals was"),
    ((GOALS, 6), dict(seed=1), "seed was 0, is 1"),
    ((GOALS, 6), dict(policy="random"), "policy was"), ((GOALS, 6), dict(keep_failures=True), "keep_failures was")])
def test_other_settings_are_refused(args, kwargs, differ, tmp_path):
    d = line()
    collect(d, GOALS, 6, out=tmp_path)
    before = (tmp_path/"rollouts.npz").read_bytes()
    with pytest.raises(ValueError, match=f"holds data with other settings .*{differ}"):
        collect(d, *args, **kwargs, out=tmp_path)
    assert (tmp_path/"rollouts.npz").read_bytes() == before
    with pytest.raises(ValueError, match="domain was"):
        collect(line(name="other"), GOALS, 6, out=tmp_path)


def test_an_error_in_one_shard_ends_the_rest(small_shards, tmp_path):
    d, calls = line(), []

    def act(simulator, rows, rng):
        calls.append(1)
        raise RuntimeError("broken script")
    d.behaviours = {"broken": Behaviour(act)}
    with pytest.raises(RuntimeError, match="broken script"):
        collect(d, GOALS, 40, workers=1, out=tmp_path)
    assert len(calls) < 10 and not (tmp_path/"rollouts.npz").exists()


@pytest.mark.parametrize("goals, n, kwargs, error", [
    ([], 3, {}, "0 goals, 3 rollouts"), (GOALS, 0, {}, "4 goals, 0 rollouts"),
    (GOALS, 3, dict(policy="x"), "no behaviour 'x'")])
def test_nothing_to_collect(goals, n, kwargs, error):
    with pytest.raises(ValueError, match=error):
        collect(line(), goals, n, **kwargs)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="workerz"):
        collect(line(), GOALS, 3, workerz=2)
    assert CollectOptions() == CollectOptions(None, None, None, True)


# ---------------------------------------------------------------- replaying


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("policy", ["walk", "random"])
def test_collected_rollouts_are_replayed_exactly(continuous, policy):
    d = line(continuous)
    r = collect(d, GOALS, 20, policy=policy, seed=3, keep_failures=True)
    again = replay(d, r)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(r, name), err_msg=name)


def test_more_than_one_chunk(small_shards):
    d = line()
    r = collect(d, GOALS, 10)
    assert same(replay(d, r), r) and len(replay(d, r[:0])) == 0


def test_imagined_states_do_not_matter_but_starts_do():
    d = line()
    r = collect(d, GOALS, 5)
    states = r.states.copy()
    states[:, 1:] += 1
    assert same(replay(d, replace(r, states=states, source=np.ones(5))), r)
    states[3, 0] += .01
    with pytest.raises(ValueError, match="rollout 3 does not begin where its seed and goal put line"):
        replay(d, replace(r, states=states))


def test_it_ends_when_the_goal_is_met_or_the_actions_are_over():
    d = line()
    r = collect(d, GOALS, 6)
    cut = r.pieces(np.arange(6), np.zeros(6), r.lengths - 1)   # the last step is missing
    short = replay(d, cut)
    assert not short.success.any() and short.truncated.all()
    np.testing.assert_array_equal(short.lengths, cut.lengths)
    more = np.concatenate([r.actions, np.zeros((6, 3), int)], 1)
    longer = Rollouts(np.pad(r.states, ((0, 0), (0, 3), (0, 0))), more, lengths=r.lengths + 3, goal=r.goal, seed=r.seed,
                      goals=r.goals, codec=r.codec, domain=r.domain)
    assert same(replay(d, longer), r)


def test_without_a_seed_the_domain_is_set_to_a_state():
    d = line()
    r = replace(collect(d, GOALS, 4), seed=[-1, 5, 5, 5])
    with pytest.raises(ValueError, match="not replayable: 1 rollouts have no seed, and line cannot be set"):
        replay(d, r)

    def at(goals, index, states):
        simulator = d.start(goals, index, np.arange(4))
        for env, state in zip(simulator.envs, states):
            env.state = state.copy()
        simulator.states, simulator.seeds = states.copy(), np.full(4, -1)
        return simulator
    d.at = at
    again = replay(d, r)
    np.testing.assert_array_equal(again.states, r.states)
    assert (again.seed == -1).all()


@pytest.mark.parametrize("change, message", [
    (dict(domain="clevr"), "rollouts of domain 'clevr' were handed to 'line'"),
    (dict(states=np.zeros((4, 9, 3))), "states of 3 numbers: 'line' has 2"),
    (dict(actions=np.zeros((4, 8, 1)), codec=None), "whole numbers"),
    (dict(actions=np.full((4, 8), 2), codec=None), "action 2 out of range"),
    (dict(goal=[-1] * 4), "its goal is not known")])
def test_rollouts_of_elsewhere(change, message):
    d = line()
    r = replace(collect(d, GOALS, 4, keep_failures=True, policy="random"), lengths=[8] * 4)
    with pytest.raises(ValueError, match=message):
        replay(d, replace(r, **change))


def test_continuous_rollouts_in_a_discrete_domain():
    r = collect(line(True), GOALS, 4)
    with pytest.raises(ValueError, match="rollouts with actions ContinuousActions"):
        check_rollouts(line(), r)
    check_rollouts(line(True), r)


# ---------------------------------------------------------------- evaluating


class Recorder:
    "Random actions, and a memory of what it was shown."
    def __init__(self):
        self.seen = []

    def act(self, states, texts, rng):
        self.seen.append((states.copy(), list(texts)))
        return rng.integers(0, 2, len(states))


def test_a_policy_sees_states_and_sentences():
    policy = Recorder()
    e = evaluate(policy, line(), GOALS, 10, record=True)
    states, texts = policy.seen[0]
    np.testing.assert_array_equal(states, e.rollouts.states[:, 0])
    assert texts == e.rollouts.texts
    for t, (states, _) in enumerate(policy.seen):
        np.testing.assert_array_equal(e.rollouts.states[e.rollouts.lengths > t, t], states)


def test_the_same_arguments_are_the_same_result(small_shards):
    d = line()
    for policy in (Recorder(), "walk", Behaviour(walk)):
        one, two = (evaluate(policy, d, GOALS, 18, seed=1, record=True) for _ in range(2))
        assert same(one.rollouts, two.rollouts) and one.seed == 1
    assert not same(evaluate("walk", d, GOALS, 18, seed=2, record=True).rollouts, two.rollouts)


def test_every_policy_meets_the_same_goals_and_starts():
    one, two = (evaluate(p, line(), GOALS, 30, record=True).rollouts for p in ("walk", Recorder()))
    np.testing.assert_array_equal(one.goal, two.goal)
    np.testing.assert_array_equal(one.states[:, 0], two.states[:, 0])
    assert (np.abs(np.bincount(one.goal) - 7.5) < 1).all()
    np.testing.assert_array_equal(one.seed, start_seeds(0, 30, "evaluate"))


def test_recorded_episodes_are_what_happened():
    d = line()
    plain, e = (evaluate(Recorder(), d, GOALS, 12, record=record) for record in (False, True))
    assert plain.rollouts is None
    r = e.rollouts
    np.testing.assert_array_equal(plain.success, e.success)
    np.testing.assert_array_equal(r.lengths, e.length)
    np.testing.assert_array_equal(r.success, e.success)
    assert same(replay(d, r), r)


def test_a_better_policy_scores_better():
    scores = [evaluate(p, line(), GOALS, 60).rate for p in ("walk", "random")]
    assert scores[0] > .8 > .5 > scores[1]


@pytest.mark.parametrize("answer", [lambda n: np.zeros(n), lambda n: np.zeros((n, 1), int), lambda n: np.full(n, 2),
                                    lambda n: np.full(n, -1), lambda n: np.zeros(n + 1, int)])
def test_a_policy_that_answers_nonsense_is_refused(answer):
    policy = SimpleNamespace(act=lambda states, texts, rng: answer(len(states)))
    with pytest.raises(ValueError, match="action"):
        evaluate(policy, line(), GOALS, 3)


@pytest.mark.parametrize("policy, goals, n, message", [
    ("walk", [], 10, "0 goals, 10 episodes"), ("walk", GOALS, 0, "4 goals, 0 episodes"),
    ("run", GOALS, 3, "no behaviour 'run': one of walk, random"), (len, GOALS, 3, "is not a policy"),
    (None, GOALS, 3, "None is not a policy")])
def test_nothing_to_evaluate(policy, goals, n, message):
    with pytest.raises(ValueError, match=message):
        evaluate(policy, line(), goals, n)


def test_summary_agrees_with_outcomes():
    goals = tuple(Goal(f"Words {i}.", kind="odd" if i % 2 else "even") for i in range(3))
    e = Evaluation(goals, np.array([0, 1, 2, 0]), np.array([True, False, True, True]), np.array([3, 50, 7, 1]))
    won, of = e.per_goal()
    assert won.tolist() == [2, 0, 1] and of.tolist() == [2, 1, 1]
    assert (e.successes, e.episodes, e.rate) == (3, 4, .75) and e.ci == wilson(3, 4)
    assert e.per_kind() == {"even": (3, 3), "odd": (0, 1)}
    assert "3 of 4: 75.0%" in repr(e) and "75.0% (3 of 4)" in e._repr_markdown_()
    assert "3.7 when successful" in e._repr_markdown_()
    assert "when" not in replace(e, success=np.zeros(4, bool))._repr_markdown_()


def test_rng_streams_of_chunks_differ(small_shards):
    "Two chunks of episodes must not share their random numbers."
    draws = []
    policy = SimpleNamespace(act=lambda states, texts, rng: draws.append(rng.random()) or np.zeros(len(states), int))
    evaluate(policy, line(), [g.replace(max_steps=1) for g in GOALS], 12)
    assert len(set(draws)) == 3
    assert draws[0] == numpy_rng(0, "evaluate", "policy", 0).random()


def test_an_unknown_goal_counts_for_none():
    with pytest.raises(ValueError, match="goal index from -1"):
        Evaluation((Goal("Go."),), np.array([0, -1]), np.array([True, False]), np.array([1, 1]))
