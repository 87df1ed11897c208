"The scripted expert pushes as it always did; medium is the expert with a rollout's own share of stray pushes."
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kalm.clevr.expert import (
    BEHAVIOURS,
    ERRATIC,
    STEADY,
    STEADY_SHARE,
    expert_actions,
    noise_levels,
    noise_of,
    push_costs,
    statistics,
    stray_pushes,
    way_round,
)
from kalm.clevr.goals import COMPASS_VECTORS, LEVELS, action_success, all_of, goal_table, move
from kalm.clevr.sentences import goal_set
from kalm.core.files import numpy_rng
from kalm.core.rollouts import Rollouts

MOVES = goal_set("offline")[::18]
STORED = Path(__file__).with_name("expert.npz")  # written by the code before the move, see `test_...as_stored`


def tables(n, *names):
    "Random tables within the walls (n, 10)."
    return numpy_rng(0, *names).uniform((-.47, -.17) * 5, (.47, .57) * 5, (n, 10)).astype(np.float32)


def stand_in(goals, index, states, seeds):
    "As much of a simulator as a behaviour looks at."
    return SimpleNamespace(goals=goals, index=np.asarray(index), states=states, seeds=np.asarray(seeds))


# ---- the expert's choice ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", LEVELS[:4])
def test_pushes_are_those_of_the_code_before_the_move_as_stored(level):
    with np.load(STORED, allow_pickle=False) as stored:
        rows = stored["level"] == LEVELS.index(level)
        number, states, actions = (stored[name][rows] for name in ("number", "states", "actions"))
    assert len(number) == 60 and len(set(actions.tolist())) > 10
    np.testing.assert_array_equal(expert_actions(goal_set(level), number.astype(int), states), actions)


@pytest.mark.parametrize("level", ["offline", "easy"])
def test_rows_do_not_influence_each_other(level):
    goals = goal_set(level)[::5][:80]
    index, states = np.arange(80) % len(goals), tables(80, "rows")
    together = expert_actions(goals, index, states)
    alone = [expert_actions(goals, index[i:i + 1], states[i:i + 1])[0] for i in range(80)]
    np.testing.assert_array_equal(together, alone)
    mixed = expert_actions([*goals, all_of([MOVES[0], MOVES[40]])], np.append(index[:79], len(goals)), states)
    np.testing.assert_array_equal(mixed[:79], together[:79])


def test_only_balls_of_the_goal_are_pushed_and_mostly_the_source():
    index = np.arange(400) % 80
    ball = expert_actions(MOVES, index, tables(400, "balls")) // 8
    source, target = goal_table(MOVES)[index, 0, 1:3].T
    assert ((ball == source) | (ball == target)).all()
    assert (ball == source).mean() > .5


def test_bystanders_are_ruled_out():
    cost = push_costs(tables(1, "cost"), goal_table([move("red", "cyan", "left")])[:1]).reshape(5, 8)
    assert np.isinf(cost[1:4]).all() and np.isfinite(cost[[0, 4]]).all()


def test_easy_goals_get_pushes_that_count():
    goals = goal_set("easy")[::7]
    index = np.arange(len(goals))
    assert action_success(goals, index, expert_actions(goals, index, tables(len(goals), "easy"))).all()


def test_the_way_round_is_the_same_on_both_sides_and_longer_from_behind():
    out = np.linspace(.3, .8, 6)[:, None]
    for d, ahead in enumerate(COMPASS_VECTORS):
        side = ahead[::-1] * [1, -1]
        straight, behind, left, right = (way_round(out * v, np.full(6, d)) for v in (ahead, -ahead, side, -side))
        np.testing.assert_allclose(straight, out[:, 0] - .3, atol=1e-12)
        np.testing.assert_allclose(left, right, atol=1e-12)
        assert (behind > left).all() and (left > straight).all() and (np.diff(behind) > 0).all()


@pytest.mark.parametrize("states, says", [(np.zeros((2, 9)), "expected"), (np.full((2, 10), np.nan), "NaN"),
                                          (np.zeros((3, 10)), "for 3 rows")])
def test_bad_states_are_refused(states, says):
    with pytest.raises(ValueError, match=says):
        expert_actions(MOVES, np.arange(2), states)


# ---- stray pushes ----------------------------------------------------------------------------------------------------

def test_noise_leaves_the_experts_push_the_likeliest():
    index, states = np.repeat([7, 37, 67], 1200), np.repeat(tables(3, "noise"), 1200, 0)
    best = expert_actions(MOVES, index, states)
    parts = goal_table(MOVES)[index]
    noisy = stray_pushes(best, parts, np.full(3600, .85), numpy_rng(0, "stray"))
    for k in range(3):
        assert np.bincount(noisy[1200*k:1200*(k + 1)], minlength=40).argmax() == best[1200*k]
    assert (noisy != best).mean() > .7
    np.testing.assert_array_equal(stray_pushes(best, parts, np.zeros(3600), numpy_rng(0, "stray")), best)


def test_stray_pushes_are_mostly_of_the_two_balls():
    parts = np.repeat(goal_table([move("red", "cyan", "left")]), 9000, 0)
    ball = stray_pushes(np.zeros(9000, int), parts, np.ones(9000), numpy_rng(1, "stray")) // 8
    np.testing.assert_allclose(np.bincount(ball, minlength=5) / 9000, (.44, .04, .04, .04, .44), atol=.02)


def test_noise_levels_keep_to_their_ranges():
    levels = noise_levels(numpy_rng(0, "levels").random((5000, 2)))
    steady = levels < .5
    assert abs(steady.mean() - STEADY_SHARE) < .03
    for which, (low, high) in ((steady, STEADY), (~steady, ERRATIC)):
        assert low <= levels[which].min() < levels[which].max() < high
        np.testing.assert_allclose(levels[which].mean(), (low + high) / 2, atol=.01)


def test_medium_is_as_noisy_as_its_seed_says():
    seeds = np.arange(40)
    quiet = int(seeds[np.argmin([noise_of(s) for s in seeds])])
    wild = int(seeds[np.argmax([noise_of(s) for s in seeds])])
    index, states = np.arange(800) % 80, tables(800, "seeds")
    best = expert_actions(MOVES, index, states)
    for seed in (quiet, wild):
        simulator = stand_in(MOVES, index, states, np.full(800, seed))
        got = BEHAVIOURS["medium"].act(simulator, np.arange(800), numpy_rng(0, "act"))
        share = (got != best).mean()
        assert abs(share - noise_of(seed)) < .08, (seed, share)   # a stray push can be the expert's own


def test_behaviours_act_in_the_rows_asked_for():
    index, states = np.arange(60), tables(60, "rows asked for")
    simulator, rows = stand_in(MOVES, index, states, np.full(60, -1)), np.array([3, 41, 17])
    expert = BEHAVIOURS["expert"].act(simulator, rows, numpy_rng(0, "act"))
    np.testing.assert_array_equal(expert, expert_actions(MOVES, index, states)[rows])
    medium = [BEHAVIOURS["medium"].act(simulator, np.arange(60), numpy_rng(seed, "act")) for seed in (0, 0, 1)]
    assert (medium[0] == medium[1]).all() and (medium[0] != medium[2]).any()
    assert (medium[0] != expert_actions(MOVES, index, states)).any()


def test_both_keep_successes_only():
    assert [(name, b.keep_failures) for name, b in BEHAVIOURS.items()] == [("medium", False), ("expert", False)]


# ---- statistics ------------------------------------------------------------------------------------------------------

def test_statistics_by_hand():
    goals = [move("red", "blue", "left"), move("green", "red", "left")]
    rollouts = Rollouts(np.zeros((2, 4, 10)), [[0, 9, 39], [17, 0, 0]], [[1, 2, 100], [100, 0, 0]], [3, 1],
                        [True, True], goal=[0, 0], goals=goals)
    s = statistics(rollouts)
    assert [s[k] for k in ("rollouts", "steps", "success")] == [2, 4, 1]
    assert [s[k] for k in ("mean_length", "median_length", "max_length")] == [2, 2, 3]
    assert [s[k] for k in ("source_share", "target_share", "other_share")] == [.25, .25, .5]
    assert s["mean_reward"] == pytest.approx(203 / 4)
    assert [s[k] for k in ("tasks", "fewest_per_task", "most_per_task")] == [2, 0, 2]
    with pytest.raises(ValueError, match="no rollouts"):
        statistics(rollouts[:0])
