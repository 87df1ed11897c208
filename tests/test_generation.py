"Imagination: fast equals slow, together equals alone, and measures that tell real rollouts from unreal ones."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kalm.generation as generation
from conftest import liven, make_rollouts, mute, same_rollouts
from kalm.core import IMAGINED, Rollouts, numpy_rng
from kalm.embeddings import ACTION, TEXT, KalmLM
from kalm.generation import (Desk, GoalReader, Verdict, agrees, choose, cut_unreal, describe, explain, generate, imagine_by_parts, imagine_trusted, judge_explanations, keywords, likelihood, parts_of, quality, repair_unreal, round_trip, same_place, understand,
                             verdict)
from kalm.goals import COLOURS, COMPASS, COMPASS_VECTORS, Goal, configurations, goal_set, relations
from kalm.grounding import DESCRIBE, EXPLAIN, GENERATE, MEANING, Writer, collate, meaning, write

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
    (lambda g, s: dict(rank=-1), "rank -1: expected 0 to 39"), (lambda g, s: dict(rank=40), "rank 40: expected 0 to 39, this model knows 40 actions"),
])
def test_bad_input(make, message, lively, goals):
    s = starts(4)
    with pytest.raises(ValueError, match=message): generate(lively, **dict(goals=goals, states=s) | make(goals, s))

def test_a_goal_without_a_sentence_does_no_harm_where_nobody_has_it(lively, goals):
    assert len(generate(lively, [goals[0], mute(goals[1])], starts(2), [0, 0], max_steps=1)) == 2


# ---------------------------------------------------------------- states in one element or in five

@pytest.fixture(params=[1, 5])
def either(request): return liven(KalmLM.from_pretrained("tiny-random", state_tokens=request.param))

@each_way
def test_states_in_five_elements_are_imagined_alike(how, rows):
    five = liven(KalmLM.from_pretrained("tiny-random", state_tokens=5)); a = generate(five, *rows, max_steps=5, **how); assert len(set(a.lengths)) > 1 and len(np.unique(a.actions[a.mask])) > 3
    for kw in (dict(cached=False), dict(batch_size=4)): close(a, generate(five, *rows, max_steps=5, **how, **kw))

@pytest.mark.parametrize("rank", [0, 1, 7, 39])
def test_imagination_is_what_training_would_read(rank, either, rows):
    "The same rollout read as in grounding: the actions are the likeliest but for the first, which is so many places after it; the states are those predicted."
    goals, s, index = rows; r = generate(either, *rows, max_steps=3, stop="limit", rank=rank, batch_size=6); w = Writer(either)
    for one in r:
        b = collate([write(w, GENERATE, goals[one.goal].text, one.states, one.actions)], 10); at, go = b["action"][0] >= 0, b["kind"][0] == ACTION
        with torch.no_grad(): h = either(b["kind"], b["ids"], b["states"])[0]; order = either.action_logits(h[at], b["states"][0, at])[:-1, :40].argsort(dim=-1, descending=True, stable=True); after = either.next_states(h[go], b["states"][0, go])
        assert [order[0, rank], *order[1:, 0]] == one.actions.tolist(); np.testing.assert_allclose(after, one.states[1:], atol=1e-4)
    assert len(np.unique(r.actions[r.mask])) > 3

def test_ranks_are_first_actions_that_differ(lively, rows):
    first = np.stack([generate(lively, *rows, max_steps=1, rank=k).actions[:, 0] for k in range(12)], 1); assert all(len(set(row)) == 12 for row in first.tolist())
    np.testing.assert_array_equal(generate(lively, *rows, max_steps=2, rank=5, **SAMPLED).actions[:, 0], first[:, 5]); close(generate(lively, *rows, max_steps=3, rank=5), generate(lively, *rows, max_steps=3, rank=5, cached=False))

def read_before_the_answer(q):
    "What a sequence of grounding holds up to where its first word is asked for."
    n = 1 + next(i for i, t in enumerate(q.text) if t >= 0); keep = [i for i in range(n) if q.branch[i] in (0, q.branch[n - 1])]
    return [(q.kind[i], q.ids[i], None if q.kind[i] == TEXT else q.states[i].tolist()) for i in keep]

@pytest.fixture
def heard(monkeypatch):
    "What the model would be told, instead of asking it."
    got = []; monkeypatch.setattr(generation, "_say", lambda lm, prompts, states, *a, **k: got.append((prompts, states)) or [""] * len(prompts))
    return got

def test_questions_are_put_as_in_training(either, heard):
    w, r, text = Writer(either), make_rollouts(4, steps=3), "Red to the left of blue!"
    explain(either, r); describe(either, r); understand(either, [text]); told = [[[(k, i, None if s is None else s.tolist()) for k, i, s in p] for p in prompts] for prompts, _ in heard]
    for one, a, b in zip(r, *told[:2], strict=True):
        assert a == read_before_the_answer(write(w, EXPLAIN, "x", one.states, one.actions)) and b == read_before_the_answer(write(w, DESCRIBE, "x", one.states[-2:], one.actions[-1:]))
    assert told[2] == [read_before_the_answer(meaning(w, write(w, GENERATE, text, r.states[0], r.actions[0]), "x"))] and told[2][0][-1][1] == w.ids(MEANING)[-1]
    for _, states in heard[:2]: np.testing.assert_array_equal(states, r.last_states)
    assert heard[2][1] is None

def test_another_prompt(lively, heard):
    r, w = make_rollouts(2), Writer(lively); explain(lively, r, prompt=("One:", " two?")); ids = [i for k, i, _ in heard[0][0][1] if k == TEXT]; assert ids == w.ids("One:") + w.ids(" two?")

def test_understanding_cached_batched_and_alone_agree(lively, goals):
    texts = [g.text for g in goals] + ["Red!", "Blue?"]; got = understand(lively, texts, max_tokens=6); assert len(set(got)) > 2 and understand(lively, []) == []
    for kw in (dict(cached=False), dict(batch_size=1), dict(batch_size=4)): assert understand(lively, texts, max_tokens=6, **kw) == got
    assert understand(lively, texts[1:2], max_tokens=6) == got[1:2]

def test_descriptions_are_of_the_last_step(either):
    r = make_rollouts(6, steps=5, least=2); last = Rollouts(np.stack([[one.states[-2], one.states[-1]] for one in r]), np.stack([one.actions[-1:] for one in r])); got = describe(either, r, max_tokens=5)
    assert got == describe(either, last, max_tokens=5, batch_size=2) == describe(either, r, max_tokens=5, cached=False) and len(set(got)) > 1


# ---------------------------------------------------------------- who sits where

class Ledger:
    "A stream that keeps what every slot holds, and answers with the first thing told and how many there are."
    def __init__(self, slots): self.slots, self.held = slots, [None] * slots
    def _answer(self, slots): return torch.tensor([[float(self.held[b][0]), len(self.held[b])] for b in slots])
    def read(self, slots, prompts):
        for b, p in zip(slots, prompts, strict=True): self.held[b] = list(p)
        return self._answer(slots)
    def push(self, slots, kind, ids=None, states=None):
        for b, i in zip(slots, ids, strict=True): self.held[b].append(i)
        return self._answer(slots)
    def shrink(self, slots): self.held, self.slots = [self.held[b] for b in slots], len(slots); return np.arange(len(slots))

@pytest.mark.parametrize("slots, enough", [(1, 8), (3, 1), (4, 2), (5, 8), (16, 4), (40, 8)])
def test_every_row_is_served_to_its_end_whoever_leaves(slots, enough):
    life, done, desk = numpy_rng(0, "desk").integers(0, 9, 23), np.zeros(23, int), Desk(Ledger(slots), range(23)); busy, seen = [], []
    while desk:
        waiting, free = len(desk.queue), len(desk.free); desk.admit(lambda r: [r] * (1 + r % 3), enough); came = waiting - len(desk.queue); assert came == (min(waiting, free) if free * enough >= slots else 0)
        seen += desk.rows[done[desk.rows] == 0].tolist(); busy.append(len(desk.rows))
        assert desk.h.tolist() == [[r, 1 + r % 3 + done[r]] for r in desk.rows] and (np.diff(desk.slots) > 0).all() and len(desk.slots) == len(desk.rows) <= slots
        assert all(set(desk.stream.held[b]) == {r} for b, r in zip(desk.slots, desk.rows))
        desk.leave(done[desk.rows] >= life[desk.rows])
        if len(desk.rows):
            done[desk.rows] += 1; last = not desk.queue; assert desk.push(TEXT, desk.rows) is desk.h
            if last: assert desk.stream.slots == len(desk.rows) and desk.slots.tolist() == list(range(len(desk.rows)))   # no pass is wider than what is left
    assert (done == life).all() and max(busy) == min(slots, 23) and set(seen) == set(range(23)) and not desk


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


class Parrot(Ledger):
    "A stream of a model that says what it was taught to say of the first action in a story."
    def __init__(self, lm, slots): super().__init__(slots)
    def read(self, slots, prompts): return super().read(slots, [[next(i for k, i, _ in p if k == ACTION)] for p in prompts])

@pytest.fixture
def parrot(tiny, monkeypatch):
    "(model, rollouts): the k-th is told of in the words of `lines[k]`."
    lines = ["red blue left -> Move the red ball.", "No arrow here.", "green cyan back -> red blue left -> Twice.", "-> Only a sentence.", "red blue left ->"]
    ids = [tiny.tokenizer(t, add_special_tokens=False).input_ids + [tiny.tokenizer.eos_token_id] for t in lines]; r = make_rollouts(5); first = r.actions.copy(); first[:, 0] = range(5)
    def text_logits(self, h, states=None): return torch.nn.functional.one_hot(torch.tensor([ids[int(a)][int(n) - 1] for a, n in h]), 300).float()
    monkeypatch.setattr(generation, "Stream", Parrot); monkeypatch.setattr(KalmLM, "text_logits", text_logits)
    return tiny, Rollouts(r.states, first, lengths=r.lengths)

@pytest.mark.parametrize("size", [1, 3, 128])
def test_the_gist_is_no_part_of_the_sentence(size, parrot):
    assert explain(*parrot, max_tokens=99, batch_size=size) == ["Move the red ball.", "No arrow here.", "Twice.", "Only a sentence.", ""]

@pytest.mark.parametrize("size", [1, 3, 128])
def test_short_explanations_are_the_gist(size, parrot):
    assert explain(*parrot, max_tokens=99, batch_size=size, short=True) == ["red blue left", "No arrow here.", "green cyan back", "", "red blue left"]

def test_short_explanations_stop_at_the_arrow(parrot, monkeypatch):
    told = []; push = Parrot.push; monkeypatch.setattr(Parrot, "push", lambda self, *a: told.extend(a[2]) or push(self, *a)); explain(parrot[0], parrot[1][:1], max_tokens=99, short=True)
    assert len(told) <= len("red blue left ->")


# ---------------------------------------------------------------- what explanations say

@pytest.mark.parametrize("text, colours, compass", [
    ("Move the red ball behind the blue ball.", ["red", "blue"], "behind"),
    ("Blue should have RED on its left, not blue.", ["blue", "red"], "left"),
    ("the green/cyan pair: front!", ["green", "cyan"], "front"),
    ("at the back of purple", ["purple"], "behind"), ("to the rear", [], "behind"), ("right of it, then left", [], "right"),
    ("reddish coloured leftovers", [], None), ("", [], None)])
def test_keywords(text, colours, compass): assert keywords(text) == (colours, compass)

def table(**at):
    "One state: balls far from each other but for those given as colour=(x, y)."
    x = np.array([(-.9, .9), (.9, .9), (0, 2.), (.9, -.9), (-.9, -.9)], np.float32)
    for colour, xy in at.items(): x[COLOURS.index(colour)] = xy
    return x.ravel()

def test_judging_explanations_by_hand():
    goals = [Goal.move("red", "blue", "left", text="Red left of blue."), Goal.move("red", "blue", "left", text="To the left of blue there should be red.")]
    texts = ["Red, left of blue.", "blue, left of red", "To the left of blue there should be red.", "red right of blue", "red left of green", "red and blue and green left", "mumble", "", "blue right of red"]
    before, after = table(red=(-.9, 0), blue=(0, 0)), table(red=(-.2, 0), blue=(0, 0)); n = len(texts); r = Rollouts(np.tile(np.stack([before, after]), (n, 1, 1)), np.zeros((n, 1), int), goal=np.arange(n) % 2)
    got = judge_explanations(texts, r, goals, known=goals)
    assert got.balls.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 1] and got.order.tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 0]
    assert got.direction.tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 0] and got.all.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert got.true.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1]   # the last names another goal, which came true as well
    got = judge_explanations(texts[2:3], r[2:3], goals, known=[]); assert not got.order[0] and not got.true[0]   # without knowing the sentence, first named is first moved
    assert len(judge_explanations([], r[:0], goals, goals).all) == len(judge_explanations([], r[:0], goals, goals).true) == 0

def test_what_came_true_is_what_the_last_step_brought():
    goals, near, far = [Goal.move("red", "blue", "left")], table(red=(-.2, 0), blue=(0, 0)), table(red=(-.9, 0), blue=(0, 0)); green = table(red=(-.2, 0), blue=(0, 0), green=(0, .2))
    S = np.stack([[far, far, near], [far, near, near], [near, far, near], [near, near, far], [near, near, green], [near, 0 * near, 0 * near], [far, near, 0 * near]]); A = np.where(np.arange(2) < [[2], [2], [2], [2], [2], [0], [1]], 3, -1)
    r = Rollouts(S, A, lengths=[2, 2, 2, 2, 2, 0, 1]); said = lambda text: judge_explanations([text] * 7, r, goals, goals).true.tolist()
    assert said("red, left of blue") == [1, 0, 1, 0, 0, 0, 1] and said("green behind blue") == [0, 0, 0, 0, 1, 0, 0] and said("blue is right of red") == [1, 0, 1, 0, 0, 0, 1] and not any(said("red and blue") + said("red left"))

def test_every_taught_sentence_is_judged_right():
    "The judge must give full marks to a perfect pupil."
    known = goal_set("offline"); a, b, d = np.array([(g.source, g.target, g.direction) for g in known]).T; n = np.arange(len(known))
    x = np.tile(table().reshape(5, 2), (len(known), 2, 1, 1)); x[n, :, b] = 0; x[n, 1, a] = .2 * COMPASS_VECTORS[d]
    r = Rollouts(x.reshape(-1, 2, 10), np.zeros((len(known), 1), int), goal=n); got = judge_explanations([g.text for g in known], r, known, known)
    assert got.all.all() and got.balls.all() and got.true.all(), [g.text for g, ok in zip(known, got.all & got.balls & got.true) if not ok][:5]


# ---------------------------------------------------------------- the round trip

@pytest.mark.parametrize("goal, said, ok", [
    ("Push the red ball to the left.", "red left", True), ("Push the red ball to the left.", "red right", False), ("Push the red ball to the left.", "blue left", False), ("Push the red ball to the left.", "red", False),
    ("Push the red ball to the left.", "left", False), ("Push the red ball to the left.", "nothing", False), ("Push the red ball to the left.", "", False), ("Push the red ball to the left.", "red left front", False),
    ("Roll the cyan ball backwards.", "cyan back", True), ("Roll the cyan ball backwards.", "cyan behind", True), ("Steer green towards the rear.", "green front", False),
    ("Gather the other four balls around the green ball.", "green left", True), ("Gather the other four balls around the green ball.", "red left", False), ("Make a heap.", "red left", False),
    ("Move the red ball to the left of the blue ball.", "red left", True), ("Move the red ball to the left of the blue ball.", "blue and red: left", True), ("Move the red ball to the left of the blue ball.", "green left", False)])
def test_agreement(goal, said, ok): assert agrees(goal, said) is ok

@pytest.mark.parametrize("a, b, same", [
    ("red blue left", "red blue left", True), ("red blue left", "blue red right", True), ("red blue back", "blue red front", True), ("cyan red front", "red cyan back", True), ("red blue left", "Left of blue is red", False),
    ("red blue left", "red blue right", False), ("red blue left", "blue red left", False), ("red blue left", "blue red front", False), ("red blue left", "red green left", False), ("red left", "red left", False), ("red blue", "red blue", False),
    ("left", "left", False), ("", "", False), ("red blue green left", "red blue green left", False), ("red blue left front", "red blue left front", False), ("red blue left", "red blue left front", False), ("red blue left", "", False)])
def test_same_place_by_hand(a, b, same): assert same_place(a, b) is same and same_place(b, a) is same

def test_gists_say_the_same_where_they_hold_in_the_same_states():
    states = numpy_rng(0, "places").uniform(-.5, .5, (60, 10)); goals = configurations(); true = [{f"{q} {a}" for q, a in relations(s)} for s in states]
    holds = [tuple(g.gist in t for t in true) for g in goals]
    assert [[same_place(a.gist, b.gist) for b in goals] for a in goals] == [[x == y for y in holds] for x in holds] and len(set(holds)) == 40

@pytest.fixture
def answers(monkeypatch):
    "What the model would say, by goal, and which rollouts and sentences it was asked about."
    said, taken, calls = {}, {}, []
    def ask(name): return lambda lm, r, batch_size, **kw: calls.append((name, r.goal.tolist(), kw)) or [said[i] for i in r.goal]
    monkeypatch.setattr(generation, "describe", ask("describe")); monkeypatch.setattr(generation, "explain", ask("explain"))
    monkeypatch.setattr(generation, "understand", lambda lm, texts, batch_size: calls.append(("understand", list(texts), {})) or [taken[t] for t in texts])
    return said, taken, calls

def test_the_round_trip_by_hand(answers):
    said, taken, calls = answers; move = lambda text: Goal.move("red", "blue", "left", text=text); both = Goal.all_of([Goal.move("red", "blue", "left"), Goal.move("green", "blue", "right")])
    cases = [  # goal, what is said, what the goal is taken to mean, steps, whether it passes
        (Goal.push("purple", "front"), "purple front", None, 1, 1), (Goal.push("purple", "front"), "purple left", None, 1, 0), (Goal.push("red", "left"), None, None, 0, 0),
        (move("Red left of blue!"), "red blue left", "red blue left", 2, 1), (move("Blue: red on the left."), "blue red right", "red blue left", 3, 1), (move("Could red be left of blue?"), "red blue right", "red blue left", 1, 0),
        (move("Red is to go left of blue."), "green blue left", "green blue left", 1, 1), (move("Red, blue: left."), "red blue left", "green blue left", 1, 0), (move("Let red be left of blue."), None, "red blue left", 0, 0),
        (both, "", None, 2, 1), (Goal.line_up(), "", None, 0, 0), (Goal.gather("green", "All to the green ball."), "", None, 3, 1), (Goal.move("red", "blue", "left", text="Red and blue, please."), "", None, 1, 1)]
    goals = [c[0] for c in cases]; said |= {i: c[1] for i, c in enumerate(cases)}; taken |= {c[0].text: c[2] for c in cases}; lengths = np.array([c[3] for c in cases]); n = len(cases)
    r = Rollouts(np.where(np.arange(4)[:, None] <= lengths[:, None, None], .1, 0) * np.ones((n, 4, 10)), np.where(np.arange(3) < lengths[:, None], 5, -1), lengths=lengths, goal=np.arange(n))
    ok, words = round_trip(object(), r, goals); assert ok.dtype == bool and ok.tolist() == [bool(c[4]) for c in cases] and words == [c[1] or "" for c in cases]
    assert calls == [("describe", [0, 1], {}), ("explain", [3, 4, 5, 6, 7], dict(short=True)), ("understand", sorted(goals[i].text for i in range(3, 9)), {})]
    calls.clear(); ok, words = round_trip(object(), r[[9, 11, 10]], goals); assert ok.tolist() == [True, True, False] and words == [""] * 3 and not calls   # nothing to ask
    ok, words = round_trip(object(), r[:0], goals); assert ok.shape == (0,) and words == []

def test_the_round_trip_of_a_model(lively):
    goals = [Goal.push("red", "left"), Goal.move("red", "blue", "left"), Goal.line_up()]; r = make_rollouts(6, goals=3, steps=2); ok, said = round_trip(lively, r, goals, batch_size=2)
    at = lambda k: r[np.flatnonzero(r.goal == k)]; assert [said[0], said[3]] == describe(lively, at(0)) and [said[1], said[4]] == explain(lively, at(1), short=True) and said[2] == said[5] == ""
    assert ok.tolist() == [agrees(goals[0].text, said[0]), same_place(understand(lively, [goals[1].text])[0], said[1]), True, agrees(goals[0].text, said[3]), same_place(understand(lively, [goals[1].text])[0], said[4]), True]

def test_verdicts_by_hand():
    keep, good = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([1, 1, 0, 1, 1, 0, 0, 0], bool); assert verdict(keep, good) == Verdict(kept=3 / 8, precision=2 / 3, recall=1 / 2, base=1 / 2)
    none = verdict(~keep & keep, good); assert (none.kept, none.recall, none.base) == (0, 0, .5) and np.isnan(none.precision) and np.isnan(verdict(keep, good & ~good).recall) and np.isnan(verdict(keep[:0], good[:0]).base)

@pytest.mark.parametrize("tries, kept, asked", [(1, [0, 0, 0, 0, 0], [5]), (2, [0, 1, 0, 0, 1], [5, 4]), (4, [0, 1, 3, 0, 1], [5, 4, 2, 2]), (9, [0, 1, 3, 0, 1], [5, 4, 2, 2, 1, 1]), (6, [0, 1, 3, 0, 1], [5, 4, 2, 2, 1, 1])])
def test_only_what_fails_is_imagined_again(tries, kept, asked, monkeypatch):
    "Rows pass in attempts 0, 1, 3, never and 1; each keeps the rollout that passed, or its first. The model knows six actions."
    passes, calls, s, index, goals = [0, 1, 3, 99, 1], [], starts(5), np.array([3, 1, 2, 0, 4]), configurations()[:5]; attempt = {int(i): p for i, p in zip(index, passes)}
    def generate(lm, goals, states, index, rank, **kw):
        calls.append((index.tolist(), rank, kw)); return Rollouts(np.stack([states, states * 0 + rank], 1), np.zeros((len(states), 1), int), goal=index)
    monkeypatch.setattr(generation, "generate", generate); monkeypatch.setattr(generation, "round_trip", lambda lm, r, goals: (np.array([attempt[g] == len(calls) - 1 for g in r.goal]), [""] * len(r)))
    r, ok = imagine_trusted(SimpleNamespace(done=6), goals, s, index, tries=tries, seed=5, max_steps=3, stop="done")
    np.testing.assert_array_equal(r.goal, index); np.testing.assert_array_equal(r.states[:, 0], s); assert r.states[:, 1, 0].tolist() == kept and ok.tolist() == [p < tries for p in passes]
    assert [c[0] for c in calls] == [[i for i, p in zip(index, passes) if p >= k] for k in range(len(calls))] and [len(c[0]) for c in calls] == asked and [c[1] for c in calls] == list(range(len(calls))) and all(c[2] == dict(seed=5, max_steps=3, stop="done") for c in calls)

def test_trust_ends_when_all_have_passed(monkeypatch):
    calls, lm = [], SimpleNamespace(done=40); monkeypatch.setattr(generation, "generate", lambda lm, goals, states, index, **kw: calls.append(1) or make_rollouts(len(states)))
    monkeypatch.setattr(generation, "round_trip", lambda lm, r, goals: (np.ones(len(r), bool), [""] * len(r))); r, ok = imagine_trusted(lm, configurations()[:4], starts(4)); assert ok.all() and len(calls) == 1 and same_rollouts(r, make_rollouts(4))
    with pytest.raises(ValueError, match="tries 0: expected 1 or more"): imagine_trusted(lm, configurations()[:4], starts(4), tries=0)

def test_what_passed_would_pass_again(lively, monkeypatch):
    monkeypatch.setattr(generation, "describe", lambda lm, r, **kw: [f"{COLOURS[a // 8]} {COMPASS[a % 4]}" for a in r.actions[:, 0]])   # it says what it did, whatever that was
    goals, s = [Goal.push(c, d) for c in COLOURS for d in COMPASS], starts(40); index = np.arange(40) % 20; once, first = imagine_trusted(lively, goals, s, index, tries=1); r, ok = imagine_trusted(lively, goals, s, index, tries=4)
    assert round_trip(lively, r, goals)[0].tolist() == ok.tolist() and first.sum() < ok.sum() < 40 and same_rollouts(once[first], r[first]) and same_rollouts(once[~ok], r[~ok])


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

def test_unreal_steps_are_repaired():
    "Four rollouts on a table of a metre, where balls go 20 cm a step at most."
    walls = np.array([[-.5, -.5], [.5, .5]]); s = np.tile(np.array([-.4, 0, .4, 0, .3, .3, -.3, .3, -.3, -.3]), (4, 4, 1))
    s[0, 1:, 0] += .1, .15, .2                                    # nothing to repair
    s[1, 1:, 0] += .6, .65, .65; s[1, 1:, 1] += 0, .05, .05       # red jumps to blue's left at once, goes on from there
    s[2, 1:, 4] += .15, .3, .2                                    # green goes over the edge, and comes back a little
    s[3, 0, 8:] = -.6, -.55; s[3, 1:, 8:] = -.5, -.55   # cyan begins off the table; one step, then padding
    lengths = np.array([3, 3, 3, 1]); goals = [Goal.move("red", "blue", "left"), Goal.move("green", "cyan", "behind"), Goal.move("red", "purple", "front")]
    r = Rollouts(np.where((np.arange(4) <= lengths[:, None])[..., None], s, 0), np.where(np.arange(3) < lengths[:, None], 5, -1), 1 + np.arange(12).reshape(4, 3), lengths, terminated=[1, 1, 0, 0], truncated=[0, 0, 1, 1], goal=[2, 0, 1, 1], source=[IMAGINED] * 4)
    got, counts = repair_unreal(r, goals, walls, .2); want = r.states.copy()
    want[1, 1:, 0] = -.2, -.15, -.15; want[2, 1:, 4] = .45, .5, .4; want[3, 0, 8:] = -.5, -.5; want[3, 1, 8:] = -.4, -.5
    np.testing.assert_allclose(got.states, want, atol=1e-6); assert got.states.dtype == np.float32 and not got.states[3, 2:].any()
    assert counts == dict(rollouts=4, off_table_steps=2, too_fast_steps=1, repaired=3, no_longer_met=1) and got.terminated.tolist() == [1, 0, 0, 0] and (got.truncated == ~got.terminated).all()
    for a, b in zip(got, r): np.testing.assert_array_equal(a.actions, b.actions); np.testing.assert_allclose(a.rewards, goals[a.goal].reward(a.states[:-1], a.states[1:], start=a.states[0]), rtol=1e-5)
    assert not got.rewards[~got.mask].any() and (got.lengths == lengths).all() and (got.goal == r.goal).all() and (got.source == IMAGINED).all()
    again, counts = repair_unreal(got, goals, walls, .2); np.testing.assert_allclose(again.states, got.states, atol=1e-6); assert counts["repaired"] == counts["no_longer_met"] == 0

def test_real_rollouts_need_no_repair(expert):
    from kalm.env import MAX_STEP, WALLS
    r, goals, _ = expert; got, counts = repair_unreal(r, goals, WALLS, MAX_STEP); assert counts == dict(rollouts=24, off_table_steps=0, too_fast_steps=0, repaired=0, no_longer_met=0)
    np.testing.assert_allclose(got.states, r.states, atol=1e-6); np.testing.assert_allclose(got.rewards, r.rewards, atol=1e-4); assert same_rollouts(got[:0], r[:0]) and (got.terminated == r.terminated).all() and r.terminated.all()


# ---------------------------------------------------------------- one thing after the other

RED, GREEN, BLUE = Goal.move("red", "blue", "left"), Goal.move("green", "cyan", "behind"), Goal.move("blue", "purple", "right")

@pytest.mark.parametrize("said, want", [("red blue left; green cyan back", [RED, GREEN]), ("red blue left", [RED]), ("red blue left; red blue left;green cyan back", [RED, GREEN]), ("green cyan back; purple red", []), ("blah", []), ("", [])])
def test_parts_are_taught_goals_or_none(said, want, monkeypatch):
    monkeypatch.setattr(generation, "understand", lambda lm, texts, **k: [said] * len(texts)); taught = [*configurations(), *goal_set("offline")]
    for found in parts_of(None, ["a", "b"], taught): assert [(p.source, p.target, p.direction) for p in found] == [(g.source, g.target, g.direction) for g in want] and all(p in taught for p in found)

@pytest.fixture
def obedient(monkeypatch):
    "Each part is done in two pushes, and undoes nothing but what moves with its ball; `plans` says what each sentence asks for. (calls, plans)"
    calls, plans = [], {}
    def generate(lm, goals, states, index, max_steps=50, stop="goal", **k):
        calls.append(dict(index=list(index), goals=goals, max_steps=max_steps, stop=stop, **k)); S = np.repeat(states[:, None], 3, 1).astype(np.float32)
        for b, i in enumerate(index):
            g = goals[i]; x = S[b].reshape(3, 5, 2)
            if g.kind == "move": x[2, g.source] = x[2, g.target] + .3 * COMPASS_VECTORS[g.direction]; x[1, g.source] = x[0, g.source] + .1 * (x[2, g.source] - x[0, g.source])
        return Rollouts(S, np.full((len(states), 2), 7), goal=index, source=np.full(len(states), IMAGINED), terminated=np.ones(len(states), bool))
    monkeypatch.setattr(generation, "generate", generate); monkeypatch.setattr(generation, "parts_of", lambda lm, texts, *a: [plans[t] for t in texts])
    return calls, plans

def apart(n: int) -> np.ndarray: return np.tile(np.array([[0, .3], [.3, 0], [-.4, -.1], [-.3, .4], [.35, .45]], np.float32).reshape(10), (n, 1))

LM = SimpleNamespace(shape=dict(state_dim=10), done=40)

@pytest.mark.parametrize("stop", ["goal", "done"])
def test_parts_are_imagined_one_from_where_the_last_ended(stop, obedient):
    calls, plans = obedient; both = Goal.all_of([RED, GREEN], text="Both!"); plans |= {"Both!": [RED, GREEN]}; s = apart(3); assert not both.success(s).any()
    r = imagine_by_parts(LM, [both, RED], s, [0, 0, 0], stop=stop, seed=3); assert r.lengths.tolist() == [4] * 3 and both.success(r.last_states).all() and r.terminated.all() and r.goal.tolist() == [0] * 3 and (r.source == IMAGINED).all()
    assert [[c["goals"][i] for i in c["index"]] for c in calls] == [[RED] * 3, [GREEN] * 3] and all(c["seed"] == 3 and c["stop"] == "goal" for c in calls)   # a part ends by its own predicate, whoever ends the whole
    np.testing.assert_array_equal(r.states[:, 0], s); np.testing.assert_allclose(r.rewards[:, :4], [[both.reward(a, b) for a, b in zip(one.states, one.states[1:])] for one in r], atol=1e-6); assert (r.actions[:, :4] == 7).all() and (r.actions[:, 4:] == -1).all()

def test_a_goal_met_on_the_way_ends_the_rollout_only_where_its_predicate_may_be_looked_at(obedient):
    _, plans = obedient; one = Goal.move("red", "blue", "left", text="One!"); plans |= {"One!": [RED, GREEN]}
    early, late = (imagine_by_parts(LM, [one], apart(2), [0, 0], stop=stop) for stop in ("goal", "done")); assert early.lengths.tolist() == [2, 2] and late.lengths.tolist() == [4, 4] and early.terminated.all()
    np.testing.assert_array_equal(early.states[:, :3], late.states[:, :3]); assert not early.states[:, 3:].any() and not early.rewards[:, 2:].any()

def test_a_part_that_was_undone_is_done_again_and_one_that_holds_is_left(obedient):
    calls, plans = obedient; both = Goal.all_of([RED, BLUE], text="Both!"); plans |= {"Both!": [RED, BLUE]}                       # the second part carries away what the first lies beside
    r = imagine_by_parts(LM, [both], apart(1), rounds=2, stop="done"); asked = [c["goals"][c["index"][0]] for c in calls]; assert asked[:2] == [RED, BLUE] and asked[2:] == [RED] and r.lengths.tolist() == [6] and both.success(r.last_states).all()
    calls.clear(); once = imagine_by_parts(LM, [both], apart(1), rounds=1, stop="done"); assert len(calls) == 2 and not both.success(once.last_states).any() and not once.terminated.any()
    short = imagine_by_parts(LM, [both], apart(1), max_steps=3, stop="done"); assert short.lengths.tolist() == [3] and short.max_steps == 3; np.testing.assert_array_equal(short.states[0], r.states[0, :4])

def test_what_cannot_be_taken_apart_is_imagined_whole(obedient):
    calls, plans = obedient; goals = [Goal.all_of([RED, GREEN], text="Both!"), Goal.gather("green", text="Gather!")]; plans |= {"Both!": [RED, GREEN], "Gather!": []}
    r = imagine_by_parts(LM, goals, apart(4), [1, 0, 1, 0], stop="done", part_steps=5, max_steps=9); whole = [c for c in calls if c["goals"] == goals]; assert len(whole) == 1 and whole[0]["index"] == [1, 1] and whole[0]["stop"] == "done" and whole[0]["max_steps"] == 9
    assert r.goal.tolist() == [1, 0, 1, 0] and r.lengths.tolist() == [2, 4, 2, 4] and {c["max_steps"] for c in calls if c["goals"] != goals} == {5}

def test_parts_of_a_real_tiny_model(lively, goals):
    r = imagine_by_parts(lively, goals, starts(8), np.arange(8) % 4, max_steps=3, seed=1); want = generate(lively, goals, starts(8), np.arange(8) % 4, max_steps=3, seed=1); close(r, want)   # it says nothing that was taught, so all is imagined whole
    with pytest.raises(ValueError, match="NaN"): imagine_by_parts(lively, goals, np.full((4, 10), np.nan))


# ---------------------------------------------------------------- the model in the world; goals as vectors

@each_way
def test_what_really_happens_takes_the_place_of_what_is_imagined(how, rows, lively):
    "A world that answers as the model expects changes nothing; one that answers otherwise is what the model then reads."
    goals, s, index = rows; dream, seen = generate(lively, *rows, max_steps=4, **how), []
    def echo(which, actions): seen.append(which); n = count[which]; count[which] += 1; return dream.states[which, n + 1]
    count = np.zeros(len(s), int); real = generate(lively, *rows, max_steps=4, world=echo, **how); np.testing.assert_array_equal(real.actions, dream.actions); np.testing.assert_array_equal(real.states, dream.states); assert (real.source == 0).all() and (dream.source == IMAGINED).all()
    still = generate(lively, *rows, max_steps=4, world=lambda which, actions: np.asarray(s, np.float32)[which], **how); assert (still.states[:, 1] == still.states[:, 0]).all() and not np.array_equal(still.actions[:, 1:], dream.actions[:, 1:])

def test_goals_as_vectors_are_what_is_held_in_mind(lively, goals):
    w, reader, texts = Writer(lively), GoalReader(lively, batch_size=2), [g.text for g in goals]; got = reader.encode(texts + texts[:1])
    for t, v in zip(texts, got):
        ids = torch.tensor([w.prompt("generate", 0, t) + w.ids(MEANING)])
        with torch.no_grad(): h = lively(torch.full_like(ids, TEXT), ids, torch.zeros(*ids.shape, 10))[0, -1]
        np.testing.assert_allclose(v, h / h.norm(), atol=1e-4)
    assert got.dtype == np.float32 and np.array_equal(got[0], got[-1]) and np.array_equal(reader.encode(texts[1:2])[0], got[1]) and len(reader.known) == len(set(texts))

def test_likelihoods_are_probabilities_of_the_actions(either, goals):
    x = np.repeat(starts(1)[:, None], 40, 0); one = Rollouts(np.concatenate([x, x], 1), np.arange(40)[:, None], goal=np.zeros(40)); p = likelihood(either, one, goals[:1]); assert np.exp(p).sum() == pytest.approx(1, abs=1e-4) and p.std() > 0
    best = generate(either, goals[:1], x[:1, 0], max_steps=1, temperature=0.); assert p.argmax() == best.actions[0, 0]
    r = generate(either, goals, starts(6, 1), np.zeros(6, int), max_steps=5, stop="limit"); r = replace(r, lengths=np.array([5, 0, 3, 1, 5, 2]), actions=np.where(np.arange(5) < np.array([5, 0, 3, 1, 5, 2])[:, None], r.actions, -1)); p = likelihood(either, r, goals)
    assert p[1] == 0 and (np.delete(p, 1) < 0).all(); np.testing.assert_allclose(likelihood(either, r, goals, batch_size=1), p, atol=1e-4)
    whole, part = r[:1], r.pieces(np.array([0]), np.array([0]), np.array([4])); rest = 5 * likelihood(either, whole, goals) - 4 * likelihood(either, part, goals); assert rest < 0   # a mean a push: the last push's own share is left
    two = replace(r, actions=np.where(r.mask & (np.arange(5) == 0), (r.actions + 8) % 40, r.actions)); assert likelihood(either, two, goals)[0] != p[0]
