"Goals: what is refused, what survives a file, and fair choices."
import json
from types import SimpleNamespace

import numpy as np
import pytest
from worlds import line

from kalm.core.episodes import collect, evaluate
from kalm.core.files import numpy_rng, save_json
from kalm.core.goals import Goal, balanced, by_task, check_goals, check_index, in_turn, load_goals, save_goals
from kalm.core.rollouts import Rollouts

MOVE = Goal("Put red left of blue.", "offline", 20, {"type": "move", "ways": ("left", 1)}, "polite")


@pytest.mark.parametrize("values, message", [
    (dict(text=""), "a goal needs a sentence"), (dict(text=" \n"), "a goal needs a sentence"),
    (dict(text=3), "a goal needs a sentence, got 3"), (dict(max_steps=0), "at least 1"),
    (dict(max_steps=2.5), "whole number"), (dict(max_steps="9"), "whole number"), (dict(level=""), "expected words"),
    (dict(level=None), "expected words"), (dict(kind=1), "expected words"), (dict(task=[1]), "expected a dictionary"),
    (dict(task={"x": np.zeros(1)}), "is not JSON"), (dict(task={"x": float("nan")}), "is not JSON")])
def test_goals_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        Goal(**dict(text="Go.") | values)


def test_json_round_trip():
    again = Goal.from_json(json.loads(json.dumps(MOVE.to_json())))
    assert again == MOVE and hash(again) == hash(MOVE) and again.key == MOVE.key
    assert Goal("Go.").to_json() == dict(text="Go.", level="offline", max_steps=50)


@pytest.mark.parametrize("value", [None, [], "Go.", {}, {"text": "Go."}, MOVE.to_json() | dict(colour="red")])
def test_not_a_goal(value):
    with pytest.raises(ValueError, match="not a goal"):
        Goal.from_json(value)


def test_key_is_the_task_or_the_sentence():
    assert MOVE.key == MOVE.replace(text="Other words.", kind="", level="rephrase").key
    assert MOVE.key != MOVE.replace(task={"type": "push"}).key
    assert Goal("Go.").key == "Go."


def test_a_task_is_copied():
    task = {"sides": ["left"]}
    goal = Goal("Go.", task=task)
    task["sides"].append("right")
    assert goal.task == {"sides": ["left"]}


def test_equal_goals_have_equal_hashes():
    one, two = Goal("Go.", task={"n": 1}), Goal("Go.", task={"n": 1.0})
    assert one == two and hash(one) == hash(two)


def test_markdown_leaves_out_what_is_empty():
    assert "| task | type move, ways ['left', 1] |" in MOVE._repr_markdown_()
    assert "task" not in Goal("Go.")._repr_markdown_()


def test_goal_files(tmp_path):
    path = tmp_path/"goals.json"
    save_goals(path, [MOVE, Goal("Go.")])
    assert load_goals(path) == [MOVE, Goal("Go.")]
    for value in ([], {"format": "kalm goals 2"}, {"format": "other", "goals": []}):
        save_json(path, value)
        with pytest.raises(ValueError, match="goals.json is not a goal file"):
            load_goals(path)


GOALS = [Goal(f"Words {i}.", task={"task": i % 3}) for i in range(7)]  # tasks with 3, 2 and 2 sentences


@pytest.mark.parametrize("n", [0, 1, 7, 10, 100])
def test_goals_come_equally_often(n):
    index = in_turn(GOALS, n, numpy_rng(0, "x"))
    counts = np.bincount(index, minlength=7)
    assert len(index) == n and counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(index, in_turn(GOALS, n, numpy_rng(0, "x")))


@pytest.mark.parametrize("n", [0, 1, 6, 10, 100])
def test_tasks_come_equally_often_and_so_do_their_sentences(n):
    index = balanced(GOALS, n, numpy_rng(0, "x"))
    assert len(index) == n and index.dtype == np.int64
    tasks = np.bincount(index % 3, minlength=3)
    assert tasks.max() - tasks.min() <= 1
    for members in by_task(GOALS):
        counts = np.bincount(index, minlength=7)[members]
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("choose", [balanced, in_turn])
def test_nothing_to_choose_from(choose):
    with pytest.raises(ValueError, match="at least one goal"):
        choose([], 3, numpy_rng(0))
    with pytest.raises(ValueError, match="0 rollouts or more"):
        choose(GOALS, -1, numpy_rng(0))


def test_index():
    assert check_index(GOALS, np.array([6, 0], np.int16), 2).dtype == np.int64
    assert len(check_index([], [], 0)) == 0
    for bad in ([7, 0], [-1, 0], [0., 1.], [True, False], [0], [[0, 0]]):
        with pytest.raises(ValueError, match="goal index"):
            check_index(GOALS, bad, 2)


LIKE_A_GOAL = SimpleNamespace(text="Go.", max_steps=3, task={}, level="offline", kind="")


@pytest.mark.parametrize("thing", ["Go.", LIKE_A_GOAL, 3])
def test_nothing_but_a_goal_is_a_goal_anywhere(thing):
    "Objects that look like goals were taken by some functions and refused by others, late."
    d = line()
    for ask in (lambda: check_goals([Goal("Go."), thing]), lambda: collect(d, [thing], 2),
                lambda: evaluate("random", d, [thing], 2),
                lambda: Rollouts(np.zeros((1, 2, 2)), np.zeros((1, 1), int), goals=[thing])):
        with pytest.raises(ValueError, match=r"goal [01] is .*expected a Goal; give Goal\(text\)"):
            ask()
