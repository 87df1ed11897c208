"Imagination: fast equals slow, together equals alone, and the domain judges."

from dataclasses import replace

import numpy as np
import pytest
import torch
from lively import assert_close, lively_lm, made_up, same
from worlds import line, reached

import kalm.lm.decode as decode_module
import kalm.lm.imagine as imagine_module
import kalm.lm.parts as parts_module
from kalm.core.files import numpy_rng
from kalm.core.goals import Goal
from kalm.core.gym_domain import GymDomain
from kalm.core.results import wilson
from kalm.core.rollouts import IMAGINED, REAL, Rollouts
from kalm.lm.explain import Meaning
from kalm.lm.generate import Imagination, act_in, generate
from kalm.lm.imagine import imagine, imagine_filtered, unreal_steps
from kalm.lm.model import ACTION, STATE, TEXT
from kalm.lm.parts import PartByPart, imagine_by_parts, parts_of
from kalm.lm.sequences import Writer

pytestmark = pytest.mark.usefixtures("cache")

RIGHT, LEFT = (Goal(f"Walk to the {side} end.", "offline", 8, {"side": side}) for side in ("right", "left"))
ONE_STEP = Goal("One step, right!", "offline", 1, {"side": "right"})
SAMPLED = dict(temperature=1.5, top_p=0.95, seed=3)
each_way = pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(params=[False, True], ids=["discrete", "continuous"])
def world(request, cache):
    "(lively model, domain)"
    domain = line(request.param)
    return lively_lm(domain), domain


@pytest.fixture
def discrete(cache):
    domain = line()
    return lively_lm(domain), domain


@pytest.fixture
def rows():
    "Fifteen rows: goals of several lengths in mixed order."
    longer = "Could you see to it that the point ends up on the right, please?"
    goals = [RIGHT, LEFT, ONE_STEP, Goal(longer, "offline", 5, {"side": "right"})]
    states = numpy_rng(0, "starts").uniform(-0.6, 0.6, (15, 2)).astype(np.float32)
    return goals, np.arange(15) % 4, states


def made(world, rows, max_steps=6, streams=None, **how) -> Rollouts:
    return generate(*world, *rows, settings=Imagination(max_steps=max_steps, **how), streams=streams)


# ---------------------------------------------------------------- fast and slow, together and alone


@each_way
def test_cached_equals_uncached(how, world, rows):
    a, b = (made(world, rows, cached=cached, **how) for cached in (True, False))
    assert_close(a, b)
    assert len(set(a.lengths)) > 1 and len(np.unique(a.actions[a.mask])) > 1  # something was at stake


@each_way
def test_batched_equals_single(how, world, rows):
    together = made(world, rows, **how)
    for size in (1, 4):
        assert_close(together, made(world, rows, batch_size=size, **how))


@each_way
def test_a_row_does_not_depend_on_the_others(how, world, rows):
    goals, index, states = rows
    together = made(world, rows, **how)
    for b in (0, 3, 14):
        one = made(world, ([goals[index[b]]], [0], states[b : b + 1]), streams=np.array([b]), **how)[0]
        assert len(one) == together.lengths[b]
        np.testing.assert_allclose(one.actions, together[b].actions, atol=1e-4)
        np.testing.assert_allclose(one.states, together[b].states, atol=1e-4)


def test_the_same_seed_is_the_same_imagination(world, rows):
    a, b, c = (made(world, rows, temperature=1.5, seed=seed) for seed in (0, 0, 1))
    assert same(a, b) and not np.array_equal(a.actions, c.actions)
    assert same(made(world, rows, seed=0), made(world, rows, seed=1))  # nothing is drawn


def test_weights_and_the_global_generator_are_as_before(world, rows):
    before = {n: p.detach().clone() for n, p in world[0].named_parameters()}
    rng = torch.get_rng_state()
    made(world, rows, max_steps=2, temperature=1.0)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in world[0].named_parameters())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("rank", [0, 1])
def test_imagination_is_what_grounding_would_read(rank, discrete, rows):
    "The rollout read at once: actions are the likeliest but for the first, states are those predicted."
    lm, _ = discrete
    goals, index, _ = rows
    r = made(discrete, rows, max_steps=3, stop="limit", rank=rank, batch_size=6)
    writer = Writer(lm)
    for one, i in zip(r, index):
        ids = writer.start("generate", goals[i].text)
        kind = torch.tensor([[TEXT] * len(ids) + [STATE, ACTION] * len(one)])
        states = torch.zeros(1, kind.shape[1], 2)
        states[0, len(ids) :] = torch.from_numpy(np.repeat(one.states[:-1], 2, 0))
        told = torch.tensor([ids + [i for a in one.actions for i in (0, int(a))]])
        with torch.no_grad():
            h = lm(kind, told, states)[0, len(ids) :]
            order = lm.action_outputs(h[::2], states[0, len(ids) :: 2])[:, :2].argsort(dim=-1, descending=True)
            after = lm.next_states(h[1::2], states[0, len(ids) :: 2])
        assert [int(order[0, rank]), *order[1:, 0].tolist()] == one.actions.tolist()
        np.testing.assert_allclose(after, one.states[1:], atol=1e-4)


def test_another_try_begins_with_another_action(world, rows):
    first = [made(world, rows, max_steps=1, stop="limit", rank=k).actions[:, 0] for k in (0, 1)]
    assert (first[0] != first[1]).mean() > 0.8  # continuous ones may lie at a bound both times
    assert_close(made(world, rows, rank=1), made(world, rows, rank=1, cached=False))


# ---------------------------------------------------------------- how a rollout ends


def test_limits_of_the_call_and_of_each_goal(world, rows):
    r = made(world, rows, max_steps=6, stop="limit")
    np.testing.assert_array_equal(r.lengths, np.minimum(6, [8, 8, 1, 5])[rows[1]])
    assert r.truncated.all() and not r.success.any() and r.max_steps == 6
    assert made(world, rows, max_steps=None, stop="limit").lengths.max() == 8
    none = made(world, rows, max_steps=0)
    assert (none.lengths == 0).all() and none.states.shape == (15, 1, 2)


def test_a_goal_that_is_met_ends_its_row(world, rows):
    with torch.no_grad():
        world[0].state_head.out.bias[0] = 2  # every action leads to the right
    r = made(world, rows, max_steps=None)
    assert 0 < r.success.sum() < 15
    for one in r:
        met = reached(one.goal.task["side"], one.states[1:])
        assert not met[:-1].any() and met[-1] == one.success == (not one.truncated)


def test_what_else_rollouts_carry(world, rows):
    goals, index, states = rows
    lm, domain = world
    seeds = np.arange(15)
    r = generate(lm, domain, goals, index, states, seeds, Imagination(max_steps=6))
    np.testing.assert_array_equal(r.states[:, 0], states)
    np.testing.assert_array_equal(r.goal, index)
    np.testing.assert_array_equal(r.seed, seeds)
    assert (r.source == IMAGINED).all() and not r.failure.any() and r.goals == tuple(goals)
    assert r.codec == lm.codec and r.domain == "line"
    want = (np.arange(r.max_steps) == r.lengths[:, None] - 1) & r.success[:, None]  # nothing to judge rewards by
    np.testing.assert_array_equal(r.rewards, want)
    assert (made(world, rows).seed == -1).all()


def test_rewards_are_judged_where_the_domain_can(discrete, rows):
    lm, domain = discrete
    domain._earn = lambda goal, states, next_states, start: next_states[..., 0] - start[..., 0] + 2 * states[..., 1]
    r = made(discrete, rows)
    for one in r:
        want = one.states[1:, 0] - one.states[0, 0] + 2 * one.states[:-1, 1]
        np.testing.assert_allclose(one.rewards, want, atol=1e-6)
    assert not r.rewards[~r.mask].any()


def test_the_model_may_say_done(discrete, rows):
    lm, domain = discrete
    bias = lm.action_head.out.bias
    with torch.no_grad():
        bias[2] = 1e4
    r = made(discrete, rows, stop="done")
    assert (r.lengths == 0).all() and r.success.all()
    r = made(discrete, rows, stop="limit", temperature=1.0)
    assert (r.actions[r.mask] < 2).all() and (r.lengths >= 1).all()  # done is no action
    with torch.no_grad():
        bias[2] = -1e4
    r = made(discrete, rows, stop="done")
    assert not r.success.any() and r.lengths.max() == 6


@pytest.mark.parametrize("continuous", [False, True])
def test_where_nobody_judges_states_the_model_is_believed(continuous, rows):
    domain = line(continuous, judged=False)
    lm = lively_lm(domain)
    r = made((lm, domain), rows)
    assert same(r, made((lm, domain), rows, stop="done"))
    with torch.no_grad():
        lm.action_head.out.bias[-1] = 1e4
    r = made((lm, domain), rows)
    assert r.success.all() and (r.lengths == 0).all()
    with pytest.raises(ValueError, match="stop='success': this domain does not judge states"):
        made((lm, domain), rows, stop="success")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda g, i, s: (g, i, np.full_like(s, np.nan)), "NaN"),
        (lambda g, i, s: (g, i, s[:, :1]), r"\(15, 1\): expected \(B, 2\)"),
        (lambda g, i, s: (g, i, s[0]), "expected"),
        (lambda g, i, s: (g, i[:2], s), "15 rows"),
        (lambda g, i, s: (g, np.full(15, 4), s), "0 to 3"),
        (lambda g, i, s: ([], i, s), "expected whole numbers"),
    ],
)
def test_bad_requests(make, message, discrete, rows):
    with pytest.raises(ValueError, match=message):
        made(discrete, make(*rows))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(stop="never"), "one of success, done, limit"),
        (dict(rank=-1), "rank -1"),
        (dict(rank=2), "rank 2: expected 0 to 1"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(max_steps=-1), "max_steps -1"),
    ],
)
def test_bad_settings(settings, message, discrete, rows):
    with pytest.raises(ValueError, match=message):
        made(discrete, rows, **dict(max_steps=2) | settings)


def test_a_model_of_another_domain_is_refused(discrete, rows):
    with pytest.raises(ValueError, match="this model was made for states of 2 numbers and actions"):
        made((discrete[0], line(True)), rows)


# ---------------------------------------------------------------- the front door


def test_imagine_gives_n_rollouts_goals_in_turn_from_real_starts(world):
    lm, domain = world
    goals = domain.goals("rephrase")
    r = imagine(lm, domain, goals, n=7, seed=2, max_steps=4, progress=False)
    assert len(r) == 7 and sorted(np.bincount(r.goal)) == [3, 4] and r.goals == tuple(goals)
    np.testing.assert_array_equal(r.states[:, 0], domain.start(goals, r.goal, r.seed).states)
    assert same(r, imagine(lm, domain, goals, n=7, seed=2, max_steps=4))
    assert not same(r, imagine(lm, domain, goals, n=7, seed=3, max_steps=4))


def test_imagine_from_given_starts(discrete):
    starts = np.linspace(-0.4, 0.4, 10).reshape(5, 2)
    r = imagine(*discrete, [RIGHT, LEFT], n=5, starts=starts, max_steps=2)
    np.testing.assert_array_equal(r.states[:, 0], starts.astype(np.float32))
    assert (r.seed == -1).all()
    with pytest.raises(ValueError, match="4 starts for 5 rollouts"):
        imagine(*discrete, [RIGHT, LEFT], n=5, starts=starts[:4])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(filter="magic"), "filter 'magic': one of round_trip, success, limits, or None"),
        (dict(n=0), "0 rollouts"),
        (dict(goals=[]), "0 goals"),
        (dict(filter="round_trip"), "'line' has no words"),
        (dict(parts=True), "'line' has no words"),
        (dict(filter="limits"), "'line' has no limits"),
    ],
)
def test_options_that_a_domain_cannot_serve(options, message, cache):
    domain = line(words=False)
    domain.limits = None
    with pytest.raises(ValueError, match=message) as e:
        imagine(lively_lm(domain), domain, **dict(goals=[RIGHT], n=2) | options)
    assert "\n" not in str(e.value)


def test_the_filter_of_limits_drops_rollouts_with_unreal_steps(discrete):
    lm, domain = discrete
    domain.limits = replace(domain.limits, low=(-9.0, -9.0), high=(9.0, 9.0), step=(0.45, 1.0))
    every, kept = (imagine(lm, domain, [RIGHT, LEFT], n=20, filter=f, max_steps=3) for f in (None, "limits"))
    off, fast = unreal_steps(every, domain.limits)
    assert 0 < len(kept) < 20 and not off.any() and same(kept, every[~fast.any(1)])


def test_imagination_of_any_environment():
    "CartPole, whose states do not tell success and which has no words."
    domain = GymDomain("CartPole-v1", {"offline": ["Keep the pole up."]}, success="survive", max_steps=5)
    r = imagine(lively_lm(domain), domain, domain.goals("offline"), n=4, max_steps=3)
    assert len(r) == 4 and r.states.shape[2] == 4 and r.domain == "CartPole-v1"


# ---------------------------------------------------------------- imagined again


class Answers:
    "A round trip that passes row b (told by its start) at attempt `passes[b]`."

    def __init__(self, passes, starts):
        self.passes, self.starts, self.calls = passes, starts, []

    def __call__(self, lm, rollouts, words, batch_size):
        at = len(self.calls)
        b = [int(np.abs(self.starts - s).sum(1).argmin()) for s in rollouts.states[:, 0]]
        self.calls.append(b)
        return np.array([self.passes[i] == at for i in b]), [""] * len(b)


@pytest.mark.parametrize("tries, asked", [(1, [5]), (2, [5, 4]), (4, [5, 4, 2, 2]), (6, [5, 4, 2, 2, 1, 1])])
def test_only_what_fails_is_imagined_again(tries, asked, monkeypatch):
    "Rows pass in attempts 0, 1, 3, never and 1; each keeps the rollout that passed, or its first."
    domain = line(continuous=True)
    lm, passes = lively_lm(domain), [0, 1, 3, 99, 1]
    starts, index = numpy_rng(0, "again").uniform(-0.5, 0.5, (5, 2)).astype(np.float32), np.array([0, 1, 0, 1, 0])
    answers = Answers(passes, starts)
    monkeypatch.setattr(imagine_module, "round_trip", answers)
    settings = Imagination(max_steps=3, seed=5, stop="limit", tries=tries)
    r, ok = imagine_filtered(lm, domain, [RIGHT, LEFT], index, starts, np.arange(5), settings)
    assert [len(c) for c in answers.calls] == asked and ok.tolist() == [p < tries for p in passes]
    np.testing.assert_array_equal(r.states[:, 0], starts)
    np.testing.assert_array_equal(r.goal, index)
    np.testing.assert_array_equal(r.seed, np.arange(5))
    for b, p in enumerate(passes):
        kept = replace(settings, rank=p if p < tries else 0)
        alone = generate(lm, domain, [RIGHT, LEFT], index, starts, np.arange(5), kept)
        np.testing.assert_allclose(r.actions[b], alone.actions[b], atol=1e-4)


def test_there_are_no_more_tries_than_actions(discrete, monkeypatch):
    starts = np.zeros((3, 2), np.float32)
    answers = Answers([99] * 3, starts)
    monkeypatch.setattr(imagine_module, "round_trip", answers)
    _, ok = imagine_filtered(*discrete, [RIGHT], np.zeros(3, int), starts, settings=Imagination(max_steps=1, tries=8))
    assert len(answers.calls) == 2 and not ok.any()
    with pytest.raises(ValueError, match="tries 0"):
        Imagination(tries=0)


def test_the_front_door_drops_what_did_not_pass(discrete, monkeypatch):
    monkeypatch.setattr(
        imagine_module, "round_trip", lambda lm, r, words, batch_size: (r.states[:, 0, 0] > 0, [""] * len(r))
    )
    r = imagine(*discrete, [RIGHT, LEFT], n=20, filter="round_trip", tries=1, max_steps=2)
    assert 0 < len(r) < 20 and (r.states[:, 0, 0] > 0).all()
    apart = imagine(*discrete, [RIGHT, LEFT], n=20, filter="round_trip", parts=True, max_steps=2)
    assert len(apart) == len(r)


# ---------------------------------------------------------------- part by part

BOTH = Goal("First to the left, then to the right!", "offline", 20, {"side": "right"})


def test_parts_are_taught_goals_or_none(discrete, monkeypatch):
    lm, domain = discrete
    taught = {g.task["side"]: g for g in reversed(domain.goals("offline"))}
    cases = {
        "left; right": ["left", "right"],
        "right": ["right"],
        "right; right;left": ["right", "left"],
        "right; up": [],
        "blah": [],
        "": [],
    }
    for said, want in cases.items():
        monkeypatch.setattr(parts_module, "meaning", lambda lm, texts, **kw: [Meaning(said, 1.0)] * len(texts))
        assert parts_of(lm, domain, ["a", "b"]) == [[taught[side] for side in want]] * 2


class Obedient:
    "In place of `generate`: each part is done in two steps that do not disturb the other coordinate."

    def __init__(self):
        self.calls = []

    def __call__(self, lm, domain, goals, index, states, seeds=None, settings=None, streams=None):
        sides = [goals[i].task["side"] for i in index]
        self.calls.append(dict(goals=sides, settings=settings, streams=streams.tolist()))
        path = np.repeat(states[:, None], 3, 1)
        ends = np.array([0.9 if side == "right" else -0.9 for side in sides])
        path[:, 1, 0], path[:, 2, 0] = (path[:, 0, 0] + ends) / 2, ends
        n = len(index)
        return Rollouts(
            path,
            np.ones((n, 2), int),
            success=np.ones(n, bool),
            goal=index,
            goals=goals,
            codec=domain.codec,
            source=np.full(n, IMAGINED),
            domain=domain.name,
        )


@pytest.fixture
def obedient(monkeypatch):
    generate = Obedient()
    monkeypatch.setattr(parts_module, "generate", generate)
    return generate.calls


def by_parts(world, plans, states, **settings) -> Rollouts:
    work = PartByPart(*world, [BOTH], np.zeros(len(states), int), states, plans, Imagination(**settings))
    work.run()
    return work.rollouts()


def test_parts_are_imagined_one_from_where_the_last_ended(discrete, obedient):
    states = np.array([[0, 0.5], [0.1, 0.2]], np.float32)
    r = by_parts(discrete, [[LEFT, RIGHT]] * 2, states, stop="done", rounds=1, seed=3)
    assert r.lengths.tolist() == [4, 4] and r.success.all() and (r.source == IMAGINED).all()
    assert [c["goals"] for c in obedient] == [["left"] * 2, ["right"] * 2]
    assert {(c["settings"].seed, c["settings"].max_steps, c["settings"].stop) for c in obedient} == {(3, 12, None)}
    np.testing.assert_allclose(r.states[0, :, 0], [0, -0.45, -0.9, 0, 0.9], atol=1e-6)
    np.testing.assert_array_equal(r.states[:, 0], states)
    assert (r.actions == 1).all() and r.rewards.tolist() == [[0, 0, 0, 1]] * 2


def test_a_part_that_holds_is_left_and_one_that_was_undone_is_done_again(discrete, obedient):
    states = np.array([[0, 0]], np.float32)
    by_parts(discrete, [[RIGHT, LEFT]], states, stop="done", rounds=2)
    assert [c["goals"] for c in obedient] == [["right"], ["left"], ["right"], ["left"]]
    obedient.clear()
    by_parts(discrete, [[RIGHT, RIGHT]], states, stop="done", rounds=2)
    assert len(obedient) == 1  # it holds from then on
    short = by_parts(discrete, [[RIGHT, LEFT]], states, stop="limit", rounds=2, max_steps=3)
    assert short.lengths.tolist() == [3] and not short.success.any()


def test_a_goal_met_on_the_way_ends_the_rollout_unless_nobody_may_look(discrete, obedient):
    states = np.array([[0, 0]], np.float32)
    early, late = (by_parts(discrete, [[RIGHT, LEFT]], states, rounds=1, stop=stop) for stop in ("success", "done"))
    assert early.lengths.tolist() == [2] and early.success.all()
    assert late.lengths.tolist() == [4] and not late.success.any()
    np.testing.assert_array_equal(early.states, late.states[:, :3])


def test_without_judgement_each_part_has_one_turn_and_the_model_is_believed(obedient, cache):
    domain = line(judged=False)
    states = np.zeros((2, 2), np.float32)
    r = by_parts((lively_lm(domain), domain), [[LEFT, RIGHT], []], states, rounds=4)
    assert [c["goals"] for c in obedient] == [["left"], ["right"]]
    assert r.lengths.tolist() == [4, 0] and r.success.tolist() == [True, False]


def test_what_cannot_be_taken_apart_is_imagined_whole(discrete, rows):
    goals, index, states = rows
    settings = Imagination(max_steps=3, seed=1)
    seeds = np.arange(15)
    r = imagine_by_parts(*discrete, goals, index, states, seeds, settings)  # an untrained model says nothing taught
    assert_close(r, generate(*discrete, goals, index, states, seeds, settings))
    np.testing.assert_array_equal(r.seed, seeds)


def test_some_rows_apart_and_others_whole(discrete, rows, monkeypatch):
    goals, index, states = rows
    plans = {g.text: [RIGHT] if k == 1 else [] for k, g in enumerate(goals)}
    monkeypatch.setattr(parts_module, "parts_of", lambda lm, domain, texts, n: [plans[t] for t in texts])
    settings = Imagination(max_steps=4, stop="done")
    r = imagine_by_parts(*discrete, goals, index, states, settings=settings)
    assert r.goals == tuple(goals) and r.goal.tolist() == index.tolist()
    whole = index != 1
    want = generate(*discrete, goals, index[whole], states[whole], settings=settings, streams=np.flatnonzero(whole))
    assert_close(r[whole].with_goals(goals, index[whole]), want)


# ---------------------------------------------------------------- the model as a policy


@each_way
def test_the_model_acts_in_the_world(how, world):
    lm, domain = world
    temperature = how.get("temperature", 0.0)
    r = act_in(lm, domain, domain.goals("offline"), 10, seed=4, temperature=temperature, batch_size=4)
    assert (r.source == REAL).all() and len(r) == 10 and (r.seed >= 0).all()
    slow = act_in(lm, domain, domain.goals("offline"), 10, seed=4, temperature=temperature, batch_size=3, cached=False)
    assert_close(r, slow)
    np.testing.assert_array_equal(r.states[:, 0], domain.start(r.goals, r.goal, r.seed).states)
    moved = 0.3 * np.abs(np.diff(r.states[:, :, 0], axis=1))[r.mask]
    assert moved.max() <= 0.091  # real steps, not imagined ones


def test_acting_begins_as_imagining_does(discrete):
    "The first actions are those of rollouts imagined from the same starts."
    lm, domain = discrete
    real = act_in(lm, domain, domain.goals("offline"), 8, seed=1)
    made = generate(lm, domain, real.goals, real.goal, real.states[:, 0], settings=Imagination(seed=1, stop="limit"))
    np.testing.assert_array_equal(real.actions[:, 0], made.actions[:, 0])


def test_acting_uses_the_starts_of_evaluation(discrete):
    from kalm.core.episodes import evaluate

    lm, domain = discrete
    goals = domain.goals("offline")
    judged = evaluate("walk", domain, goals, episodes=9, seed=6, record=True)
    real = act_in(lm, domain, goals, 9, seed=6)
    np.testing.assert_array_equal(real.states[:, 0], judged.rollouts.states[:, 0])
    assert wilson(int(real.success.sum()), 9)[1] <= 1 and made_up(domain, 2).goals == tuple(goals)


def test_a_goal_too_long_for_the_model_is_refused_before_anything_is_imagined(discrete):
    "With the name of the goal; not after fifteen steps, with every other row lost."
    lm, domain = discrete
    state, words = np.zeros((1, 2), np.float32), "walk " * 2000
    for goals, message in (([Goal(words, max_steps=2, task={"side": "right"})], "goal 'walk .*reads at most"),
                           ([RIGHT.replace(max_steps=5000)], "goal 'Walk to the right.* with 5000 steps")):
        with pytest.raises(ValueError, match=message):
            generate(lm, domain, goals, [0], state)
        with pytest.raises(ValueError, match=message):
            act_in(lm, domain, goals, episodes=1)


def test_beside_a_very_long_sentence_few_rows_are_at_work(discrete, rows, monkeypatch):
    "Every slot is as long as the longest prompt: with 256 of them a single sentence fills the memory."
    lm, domain = discrete
    goals, index, states = rows
    sizes, begin = [], decode_module.CachedDecoder.__init__

    def counted(self, lm, slots):
        sizes.append(slots)
        begin(self, lm, slots)

    monkeypatch.setattr(decode_module.CachedDecoder, "__init__", counted)
    short = generate(lm, domain, goals, index, states)
    long = Goal("walk " * 300, "offline", 5, {"side": "right"})
    monkeypatch.setattr(decode_module, "MOST_READ", 4000)
    beside = generate(lm, domain, [*goals, long], [*index, 4], np.concatenate([states, states[:1]]))
    assert sizes[0] == 15 and 1 <= sizes[1] <= 4
    for a, b in zip(short, beside):
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_allclose(a.states, b.states, atol=1e-4)


def test_rewards_that_are_no_numbers_are_refused_before_anything_is_imagined(discrete, monkeypatch):
    lm, domain = discrete
    monkeypatch.setattr(domain, "_earn", lambda goal, states, after, start: np.full(states.shape[:-1], np.nan))
    with pytest.raises(ValueError, match="reward of domain 'line' gave NaN"):
        generate(lm, domain, [RIGHT], [0], np.zeros((1, 2), np.float32))


def test_tries_until_the_goal_is_met():
    "By judgement of the last state; without one it is refused."
    domain = line(continuous=True)
    lm, settings = lively_lm(domain), Imagination(max_steps=8, tries=5, seed=2)
    starts, index = numpy_rng(0, "met").uniform(0.5, 0.79, (12, 2)).astype(np.float32), np.arange(12) % 2
    starts[index == 1] *= -1   # near where they are to go
    r, ok = imagine_filtered(lm, domain, [RIGHT, LEFT], index, starts, settings=settings, filter="success")
    first, once = imagine_filtered(lm, domain, [RIGHT, LEFT], index, starts, settings=replace(settings, tries=1),
                                   filter="success")
    np.testing.assert_array_equal(ok, r.success)
    assert 0 < once.sum() < 12 and ok.sum() > once.sum() and (ok >= once).all()
    np.testing.assert_array_equal(r.states[once, 1], first.states[once, 1])
    kept = imagine(lm, domain, [RIGHT, LEFT], n=12, filter="success", tries=5, max_steps=8)
    assert 0 < len(kept) and kept.success.all()
    with pytest.raises(ValueError, match="expected one of round_trip, success"):
        imagine_filtered(lm, domain, [RIGHT], [0], starts[:1], filter="limits")
