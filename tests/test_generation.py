"Imagination: fast equals slow, together equals alone, and measures that tell real rollouts from unreal ones."
import numpy as np
import pytest
import torch

from conftest import make_rollouts, mute, same_rollouts
from kalm.core import IMAGINED, Rollouts, numpy_rng
from kalm.embeddings import KalmLM
from kalm.generation import choose, cut_unreal, explain, generate, judge_explanations, keywords, quality
from kalm.goals import COLOURS, COMPASS, Goal, goal_set

pytestmark = pytest.mark.usefixtures("cache")

def starts(n, seed=0): return numpy_rng(seed, "starts").uniform(-.45, .45, (n, 10)).astype(np.float32)

def beside(n=1):
    "States in which the red ball already is behind the blue one."
    s = np.tile(np.array([0, .2, 0, 0, .4, -.2, -.4, -.2, .4, .4], np.float32), (n, 1))
    assert Goal.move("red", "blue", "behind").success(s).all()
    return s

def close(a: Rollouts, b: Rollouts):
    "The same decisions; states that differ by rounding only."
    for name in ("actions", "lengths", "terminated", "truncated", "goal", "source"): np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.states, b.states, atol=1e-4); np.testing.assert_allclose(a.rewards, b.rewards, atol=1e-2)

@pytest.fixture
def rows(goals):
    "Fifteen rows: goals of several lengths and kinds in mixed order, two of them met from the beginning, some of one step."
    s = starts(15); s[[3, 9]] = beside(2); index = np.arange(15) % 4; index[[3, 9]] = 0
    return goals, s, index

SAMPLED = dict(temperature=1.5, top_p=.95, seed=3)
each_way = pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])


# ---------------------------------------------------------------- generate

@each_way
def test_cached_equals_uncached(how, lively, rows):
    a, b = (generate(lively, *rows, max_steps=6, cached=c, **how) for c in (True, False))
    close(a, b)
    assert len(set(a.lengths)) > 1 and len(np.unique(a.actions[a.mask])) > 3   # something was at stake

@each_way
def test_batched_equals_single(how, lively, rows):
    together = generate(lively, *rows, max_steps=6, **how)
    for size in (1, 4): close(together, generate(lively, *rows, max_steps=6, batch_size=size, **how))

def test_one_row_alone_with_a_list_of_its_own(lively, rows):
    goals, s, index = rows; together = generate(lively, *rows, max_steps=5)
    for b in (0, 3, 14):
        one = generate(lively, [goals[index[b]]], s[b:b + 1], max_steps=5); t = one.lengths[0]
        assert t == together.lengths[b]
        np.testing.assert_array_equal(one.actions[0, :t], together.actions[b, :t]); np.testing.assert_allclose(one.states[0, :t + 1], together.states[b, :t + 1], atol=1e-4)

def test_rows_that_finish_early_leave_the_others_alone(lively, rows):
    goals, s, index = rows; all_ = generate(lively, *rows, max_steps=6); stay = all_.lengths == 6
    assert 0 < stay.sum() < len(s)
    close(all_[stay], generate(lively, goals, s[stay], index[stay], max_steps=6))

def test_limits_of_the_call_and_of_each_goal(lively, rows):
    goals, s, index = rows; r = generate(lively, *rows, max_steps=6, stop="limit")
    push = np.array([goals[i].kind == "push" for i in index])
    assert (r.lengths[push] == 1).all() and (r.lengths[~push] == 6).all() and r.max_steps == 6
    assert (generate(lively, *rows, max_steps=1).lengths == 1).all()
    assert r.truncated.all() and not r.terminated.any()
    close(generate(lively, goals[2:3], s, np.zeros(15, int), max_steps=6, stop="limit"), generate(lively, goals[2:3], s, np.zeros(15, int), max_steps=1, stop="limit"))

def test_nothing_is_longer_than_a_goal_allows(lively):
    assert generate(lively, [Goal.push("red", "left")], starts(3), np.zeros(3, int)).max_steps == 1
    assert generate(lively, [Goal.line_up()], starts(1), max_steps=60, stop="limit").lengths.tolist() == [50]

def test_a_goal_that_is_met_ends_its_row(lively, rows):
    goals, s, index = rows; r = generate(lively, *rows, max_steps=6)
    for one in r:
        met = goals[one.goal].success(one.states[1:], start=one.states[0])
        assert not met[:-1].any() and met[-1] == one.terminated == (not one.truncated)
    assert r.terminated[[3, 9]].all() and (r.lengths[[3, 9]] == 1).all()

def test_rewards_source_goal_and_padding(lively, rows):
    goals, s, index = rows; r = generate(lively, *rows, max_steps=6)
    np.testing.assert_array_equal(r.states[:, 0], s); np.testing.assert_array_equal(r.goal, index); assert (r.source == IMAGINED).all()
    for one in r: np.testing.assert_allclose(one.rewards, goals[one.goal].reward(one.states[:-1], one.states[1:], start=one.states[0]), rtol=1e-6)
    assert (r.actions[~r.mask] == -1).all() and (r.rewards[~r.mask] == 0).all() and (r.actions[r.mask] >= 0).all() and (r.actions < 40).all()
    assert not r.states[:, 1:][~r.mask].any()

def test_the_model_may_say_done(lively, rows):
    goals, s, index = rows
    with torch.no_grad(): lively.action_head.out.bias[lively.done] = 1e4
    r = generate(lively, *rows, max_steps=3, stop="done"); assert (r.lengths == 0).all() and r.terminated.all()
    r = generate(lively, *rows, max_steps=3, stop="limit", temperature=1.); assert (r.actions[r.mask] < 40).all() and (r.lengths >= 1).all()   # done is no action
    with torch.no_grad(): lively.action_head.out.bias[lively.done] = -1e4
    r = generate(lively, *rows, max_steps=3, stop="done"); assert not r.terminated.any() and r.lengths.max() == 3

def test_seeds(lively, rows):
    a, b, c = (generate(lively, *rows, max_steps=4, temperature=1.5, seed=s) for s in (0, 0, 1))
    assert same_rollouts(a, b) and not np.array_equal(a.actions, c.actions)
    greedy = [generate(lively, *rows, max_steps=4, seed=s) for s in (0, 1)]
    assert same_rollouts(*greedy) and not np.array_equal(a.actions, greedy[0].actions)

def test_weights_are_as_before_and_the_global_generator_too(lively, rows):
    before, rng = {n: p.detach().clone() for n, p in lively.named_parameters()}, torch.get_rng_state()
    generate(lively, *rows, max_steps=2, temperature=1.); explain(lively, make_rollouts(2), max_tokens=2)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in lively.named_parameters()) and torch.equal(torch.get_rng_state(), rng)

def test_no_rows_and_no_steps(lively, goals):
    assert len(generate(lively, goals, np.zeros((0, 10)), np.zeros(0, int))) == 0
    r = generate(lively, goals, starts(4), max_steps=0); assert (r.lengths == 0).all() and r.states.shape == (4, 1, 10)

@pytest.mark.parametrize("make, message", [
    (lambda g, s: dict(states=np.full_like(s, np.nan)), "NaN"),
    (lambda g, s: dict(states=np.where(np.arange(10) == 3, np.inf, s)), "NaN or infinity"),
    (lambda g, s: dict(states=s[:, :9]), r"\(4, 9\): expected \(B, 10\)"),
    (lambda g, s: dict(states=s[0]), "expected"),
    (lambda g, s: dict(states=s[:3]), "4 goals for 3 states"),
    (lambda g, s: dict(goals=[*g[:3], mute(g[3])]), "goal 3 has no sentence"),
    (lambda g, s: dict(index=[0, 1, 2, 4]), "below 4"),
    (lambda g, s: dict(index=[0, 1, 2, -1]), "below 4"),
    (lambda g, s: dict(index=[0, 1]), "4 numbers"),
    (lambda g, s: dict(goals=[]), "0 goals"),
    (lambda g, s: dict(stop="never"), "one of goal, done, limit"),
])
def test_bad_input(make, message, lively, goals):
    s = starts(4)
    with pytest.raises(ValueError, match=message): generate(lively, **dict(goals=goals, states=s) | make(goals, s))

def test_a_goal_without_a_sentence_does_no_harm_where_nobody_has_it(lively, goals):
    assert len(generate(lively, [goals[0], mute(goals[1])], starts(2), [0, 0], max_steps=1)) == 2


# ---------------------------------------------------------------- choose

def test_choose_inverts_the_distribution():
    logits = torch.tensor([1., 3., 0., 2.]); p = logits.softmax(0).numpy()
    u = (torch.arange(4000) + .5) / 4000
    got = choose(logits.expand(4000, 4), u, temperature=1.).numpy()
    np.testing.assert_allclose(np.bincount(got, minlength=4) / 4000, p, atol=1e-3)
    hot = choose(logits.expand(4000, 4), u, temperature=10.).numpy()
    np.testing.assert_allclose(np.bincount(hot, minlength=4) / 4000, (logits / 10).softmax(0), atol=1e-3)

def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([.1, .5, .15, .25])); u = (torch.arange(1000) + .5) / 1000; seen = lambda p: set(choose(logits.expand(1000, 4), u, 1., p).tolist())
    assert [seen(p) for p in (.01, .49, .51, .74, .76, 1.)] == [{1}, {1}, {1, 3}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}]

def test_greedy_ignores_the_number():
    assert choose(torch.tensor([[0., 2., 1.]] * 2), torch.tensor([0., .999])).tolist() == [1, 1]

@pytest.mark.parametrize("u", [0., 1 - 1e-7])
def test_ends_of_the_range(u): assert choose(torch.zeros(1, 40), torch.tensor([u]), 1.)[0] in (0, 39)


# ---------------------------------------------------------------- explain

@pytest.fixture
def talkative(lively, monkeypatch):
    "A model that ends some of its sentences early: the end token is raised to about the level of the best."
    plain, eos = KalmLM.text_logits, lively.tokenizer.eos_token_id
    def text_logits(self, h, states=None):
        z = plain(self, h, states); bonus = torch.zeros_like(z); bonus[..., eos] = lift[0]
        return z + bonus
    monkeypatch.setattr(KalmLM, "text_logits", text_logits); lift = [0.]
    return lively, lift

def test_explain_cached_batched_and_alone_agree(talkative):
    lm, lift = talkative; r = make_rollouts(12, steps=6, least=0)
    for lift[0] in (0., .05, .1, .15, .2, .3, .4, .6, .8, 1.2):   # until some rows end early and others do not
        texts = explain(lm, r, max_tokens=8)
        assert texts == explain(lm, r, max_tokens=8, cached=False) == explain(lm, r, max_tokens=8, batch_size=1) == explain(lm, r, max_tokens=8, batch_size=5)
        if 1 < len(set(map(len, texts))): break
    else: pytest.fail("no sentence ended early: the test compares nothing")
    assert len(set(texts)) > 2

def test_explanations_stay_with_their_rollouts(lively):
    r = make_rollouts(9, steps=6); texts = explain(lively, r, max_tokens=6); order = np.array([4, 0, 8, 2])
    assert explain(lively, r[order], max_tokens=6) == [texts[i] for i in order] and len(set(texts)) > 2

def test_explain_knows_limits(lively, monkeypatch):
    r = make_rollouts(6); assert explain(lively, r[:0]) == []
    monkeypatch.setattr(lively.tokenizer, "decode", lambda ids: str(len(ids)))
    assert max(map(int, explain(lively, r, max_tokens=4))) == 4 and max(map(int, explain(lively, r, max_tokens=1))) == 1


# ---------------------------------------------------------------- what explanations say

@pytest.mark.parametrize("text, colours, compass", [
    ("Move the red ball behind the blue ball.", ["red", "blue"], "behind"),
    ("Blue should have RED on its left, not blue.", ["blue", "red"], "left"),
    ("the green/cyan pair: front!", ["green", "cyan"], "front"),
    ("at the back of purple", ["purple"], "behind"), ("to the rear", [], "behind"), ("right of it, then left", [], "right"),
    ("reddish coloured leftovers", [], None), ("", [], None)])
def test_keywords(text, colours, compass): assert keywords(text) == (colours, compass)

def test_judging_explanations_by_hand():
    goals = [Goal.move("red", "blue", "left", text="Red left of blue."), Goal.move("red", "blue", "left", text="To the left of blue there should be red.")]
    texts = ["Red, left of blue.", "blue, left of red", "To the left of blue there should be red.", "red right of blue", "red left of green", "red and blue and green left", "mumble", ""]
    got = judge_explanations(texts, goals, np.zeros(len(texts), int), known=goals)
    assert got.balls.tolist() == [1, 1, 1, 1, 0, 0, 0, 0] and got.order.tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert got.direction.tolist() == [1, 1, 1, 0, 1, 1, 0, 0] and got.all.tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    assert not judge_explanations(texts[2:3], goals, [0], known=[]).order[0]   # without knowing the sentence, first named is first moved
    assert len(judge_explanations([], goals, [], goals).all) == 0

def test_every_taught_sentence_is_judged_right():
    "The judge must give full marks to a perfect pupil."
    known = goal_set("offline"); got = judge_explanations([g.text for g in known], known, np.arange(len(known)), known)
    assert got.all.mean() > .97 and got.balls.mean() > .99, [g.text for g, ok in zip(known, got.all) if not ok][:5]


# ---------------------------------------------------------------- measures

@pytest.fixture(scope="module")
def expert():
    "Two dozen real rollouts of the expert, and the world they come from."
    from kalm.data import collect
    from kalm.env import Simulator
    goals = goal_set("offline")[::37][:24]
    return collect(goals, 24, policy="expert", seed=1, workers=1, progress=False), goals, Simulator(threads=1)

def test_real_rollouts_are_perfect(expert):
    from kalm.env import MAX_STEP, WALLS
    q = quality(*expert, WALLS, MAX_STEP); r = expert[0]
    assert (q.rollouts, q.match, q.replay, q.off_table, q.too_fast) == (24, 1., 1., 0., 0.) and q.length == r.lengths.mean()
    assert q.step_error < .2 * q.still_error < .02   # not 0: a real ball may still roll when the next push comes, and positions do not tell
    once = quality(Rollouts(r.states[:, :2], r.actions[:, :1], goal=r.goal), *expert[1:], WALLS, MAX_STEP)
    assert once.step_error < 1e-6 and once.still_error > 1e-2   # from rest there is nothing to miss
    kept, counts = cut_unreal(r, WALLS, MAX_STEP)
    assert same_rollouts(kept, r) and counts == dict(rollouts=24, off_table_steps=0, too_fast_steps=0, cut=0, dropped=0)

def test_dreams_are_found_out(expert):
    from kalm.env import MAX_STEP, WALLS
    r, goals, world = expert; fields = {n: getattr(r, n) for n in ("rewards", "lengths", "terminated", "truncated", "goal")}
    idle = quality(Rollouts(np.repeat(r.states[:, :1], r.max_steps + 1, 1), r.actions, **fields), goals, world, WALLS, MAX_STEP)
    assert idle.match == 0 and idle.replay == 1 and idle.step_error == pytest.approx(idle.still_error)           # right actions, blind to what they do
    lazy = quality(Rollouts(r.states, np.where(r.mask, (r.actions + 8) % 40, -1), **fields), goals, world, WALLS, MAX_STEP)
    assert lazy.match == 1 and lazy.replay < .5 and lazy.step_error > 1e-2                                       # right states, actions that do not lead there
    far = r.states[:, :2].copy(); far[:, 1] += np.float32(3)
    far = quality(Rollouts(far, r.actions[:, :1], goal=r.goal), goals, world, WALLS, MAX_STEP); assert far.off_table == far.too_fast == 1

class Frozen:
    "A world in which nothing moves."
    def replay(self, states, actions): return np.repeat(np.asarray(states, np.float32)[:, None], actions.shape[1] + 1, 1)

def test_measures_by_hand():
    s = np.tile(beside(2)[:, None], (1, 3, 1))
    s[0, 1:, 0] += .03                         # red goes 3 cm aside, then rests
    s[1, 1, 5] += .6; s[1, 1, 6] -= .3         # green flies, purple leaves the table
    s[1, 2] = 0
    r = Rollouts(s, [[0, 1], [0, -1]], lengths=[2, 1], goal=[0, 1]); table = np.array([[-.6, -.3], [.6, .7]])
    q = quality(r, [Goal.move("red", "blue", "behind"), Goal.move("red", "blue", "left")], Frozen(), table, .5)
    assert (q.rollouts, q.match, q.replay, q.length, q.still_error) == (2, .5, .5, 1.5, 0.)
    assert [q.off_table, q.too_fast] == pytest.approx([1 / 3, 1 / 3]) and q.step_error == pytest.approx((.03 + .6 + .3) / 15, abs=1e-6)

def test_measures_of_nothing():
    q = quality(make_rollouts(2)[:0], [Goal.line_up()], Frozen(), np.array([[-1, -1], [1, 1]]), .5)
    assert q.rollouts == 0 and np.isnan([q.match, q.replay, q.step_error, q.off_table, q.length]).all()

def test_unreal_steps_are_cut_and_counted():
    s = np.tile(np.linspace(-.3, .3, 10, dtype=np.float32), (5, 4, 1))
    s[1, 1:, 4] = .4, .8, 1.05    # green leaves the table with its third step
    s[2, 1:, 0] += .7             # red jumps at once
    s[3, 3, 7] = -5               # padding of a rollout of two steps
    s[4, 2:, 8] = .9              # cyan jumps with the second step
    r = Rollouts(s, np.where(np.arange(3) < [[3], [3], [3], [2], [3]], 7, -1), np.arange(15).reshape(5, 3) + 1, [3, 3, 3, 2, 3], terminated=[1, 1, 1, 1, 0], truncated=[0, 0, 0, 0, 1], goal=range(5), source=[IMAGINED] * 5)
    kept, counts = cut_unreal(r, np.array([[-1., -1.], [1., 1.]]), max_step=.5)
    assert counts == dict(rollouts=5, off_table_steps=1, too_fast_steps=2, cut=2, dropped=1)
    assert kept.goal.tolist() == [0, 1, 3, 4] and kept.lengths.tolist() == [3, 2, 2, 1] and (kept.source == IMAGINED).all()
    assert kept.terminated.tolist() == [1, 0, 1, 0] and not kept.truncated.any()   # a cut rollout did not end by itself
    for one, i in zip(kept, kept.goal):
        n = len(one); np.testing.assert_array_equal(one.states, r.states[i, :n + 1]); np.testing.assert_array_equal(one.rewards, r.rewards[i, :n])
    assert not kept.states[:, 1:][~kept.mask].any() and (kept.actions[~kept.mask] == -1).all() and not kept.rewards[~kept.mask].any()
