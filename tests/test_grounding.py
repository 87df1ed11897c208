"What the model is asked, what it is charged for, and training that can be stopped anywhere."
import errno
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kalm.core as core
import kalm.grounding as grounding
from conftest import liven, make_rollouts, mute
from kalm.core import Rollouts, numpy_rng, read_csv, torch_rng
from kalm.embeddings import ACTION, PAD, STATE, TEXT, Adapter, KalmLM, Normaliser
from kalm.goals import MOVED, motions, relations
from kalm.grounding import (ARROW, CONSEQUENCE, DESCRIBE, DYNAMICS, EXPLAIN, GENERATE, MEANING, PASSAGE, PROMPTS, READ, RELATE, TASKS, COMPOSE, Examples, GroundConfig, Grounder, Losses, Sequence, Writer, collate, compose,
                            ground, learning_rate, meaning, ordinary_text, pack, passages, perplexity, positions, prepare, read, write)

pytestmark = pytest.mark.usefixtures("cache")

CFG = GroundConfig(backbone="tiny-random", adapter=Adapter(rank=2), steps=8, batch_tokens=400, mix=(1., 1., .5, .25, .25, .25, 0.), checkpoint_every=3, log_every=2, bf16=False)
LOSSES = ["loss", "action", "state", "text", "consequence", "ball_accuracy", "action_accuracy"]

CORPUS = ["The five boxing wizards jump quickly. " * 9, "too short to read", "Pack my box with five dozen liquor jugs, twice. " * 4]   # 5, 0 and 3 passages

@pytest.fixture(scope="module")
def data(goals): return make_rollouts(24, goals=len(goals), steps=5)


# ---------------------------------------------------------------- sequences

@pytest.fixture
def example(tiny):
    "A two-step rollout and its sentence in tokens."
    tok = lambda s: tiny.tokenizer(s, add_special_tokens=False).input_ids
    s = numpy_rng(0, "example").normal(size=(3, 10)).astype(np.float32)
    return SimpleNamespace(w=Writer(tiny), tok=tok, eos=tiny.tokenizer.eos_token_id, goal="Red behind blue, please.", gist="red blue back", states=s, actions=np.array([7, 31]))

def ask(e, task, **kw): return write(e.w, task, e.goal, e.states, e.actions, **kw)

def about(q, n, state):
    "Words before `n` are about nothing, those after the rollout about `state`."
    assert all((x is None) == (i < n) for i, (k, x) in enumerate(zip(q.kind, q.states)) if k == TEXT)
    for i, k in enumerate(q.kind):
        if k == TEXT and i >= n: np.testing.assert_array_equal(q.states[i], state)

def check(q, kinds, ids):
    "Kinds, and ids wherever text or an action stands."
    assert q.kind == kinds
    assert [i for k, i in zip(q.kind, q.ids) if k != STATE] == ids
    assert {len(getattr(q, name)) for name in (*Sequence.COLUMNS, "states", "target")} == {len(q)}

@pytest.mark.parametrize("success", [True, False])
def test_generate_asks_for_every_action_every_change_and_done(success, example):
    e, q = example, ask(example, GENERATE, success=success); head = e.tok(PROMPTS["generate"][0][0].format(goal=e.goal)); n = len(head)
    assert e.goal in PROMPTS["generate"][0][0].format(goal=e.goal)
    check(q, [TEXT] * n + [STATE, ACTION, STATE, ACTION, STATE], head + [7, 31])
    assert q.action == [-1] * n + [7, -1, 31, -1, 40 if success else -1] and q.span == [0] * n + [0, 1, 0, 1, 0] and set(q.text) == {-1}
    assert q.credit == [0] * n + [1, 0, 1, 0, success] and q.branch == [0] * n + [1] * 5 and q.position == list(range(n + 5))
    for i, k in [(n, 0), (n + 1, 0), (n + 2, 1), (n + 3, 1), (n + 4, 2)]: np.testing.assert_array_equal(q.states[i], e.states[k])
    for i, k in [(n + 1, 0), (n + 3, 1)]: np.testing.assert_array_equal(q.target[i], e.states[k + 1] - e.states[k])

def test_dynamics_asks_for_one_change_without_a_goal(example):
    e, q = example, ask(example, DYNAMICS); head = e.tok(PROMPTS["dynamics"][0][0]); n = len(head)
    check(q, [TEXT] * n + [STATE, ACTION], head + [7])
    assert q.span == [0] * n + [0, 1] and set(q.action) == set(q.text) == {-1}
    np.testing.assert_array_equal(q.target[-1], e.states[1] - e.states[0]); np.testing.assert_array_equal(q.states[-2], e.states[0])

@pytest.mark.parametrize("wording, gist", [(0, ""), (3, "red blue back"), (8, "red blue back"), (13, "")])
def test_explain_asks_for_the_gist_the_sentence_its_end_and_every_change(wording, gist, example):
    e, q = example, ask(example, EXPLAIN, wording=wording, gist=gist, key=3.); head, middle = (e.tok(p) for p in PROMPTS["explain"][wording % 8]); first = e.tok(f" {gist}") if gist else []
    answer = first + e.tok(" -> " * bool(gist) + " " * (not gist) + e.goal) + [e.eos]; assert ARROW == " ->" and q.credit == [0] * (len(q) - len(answer)) + [3] * len(first) + [1] * (len(answer) - len(first))
    check(q, [TEXT] * len(head) + [STATE, ACTION, STATE, ACTION, STATE] + [TEXT] * (len(middle) + len(answer) - 1), head + [7, 31] + middle + answer[:-1])
    n = len(head)
    assert q.text == [-1] * (len(q) - len(answer)) + answer and set(q.action) == {-1} and q.span == [0] * n + [0, 1, 0, 1, 0] + [0] * (len(q) - n - 5)
    for k, i in enumerate(range(n, n + 5, 2)): np.testing.assert_array_equal(q.states[i], e.states[k])
    about(q, n, e.states[2])
    for k, i in enumerate((n + 1, n + 3)): np.testing.assert_array_equal(q.states[i], e.states[k]); np.testing.assert_array_equal(q.target[i], e.states[k + 1] - e.states[k])

@pytest.mark.parametrize("wording", [0, 3, 5])
def test_describe_asks_for_the_caption_of_one_step(wording, example):
    e = example; q = write(e.w, DESCRIBE, "red left", e.states[:2], e.actions[:1], wording=wording, gist="red blue back", key=.5); (head, middle), answer = (e.tok(p) for p in PROMPTS["describe"][wording % 4]), e.tok(" red left") + [e.eos]; n = len(head)
    check(q, [TEXT] * n + [STATE, ACTION, STATE] + [TEXT] * (len(middle) + len(answer) - 1), head + [7] + middle + answer[:-1])
    assert q.text == [-1] * (len(q) - len(answer)) + answer and set(q.action) == {-1} and q.span == [0] * n + [0, 1, 0] + [0] * (len(q) - n - 3) and q.credit == [0] * (len(q) - len(answer)) + [.5] * (len(answer) - 1) + [1]
    np.testing.assert_array_equal(q.target[n + 1], e.states[1] - e.states[0]); np.testing.assert_array_equal(q.states[n + 2], e.states[1]); about(q, n, e.states[1])

def test_wordings_are_different_and_whole():
    assert [*PROMPTS, "read"] == list(TASKS) and [len(PROMPTS[t]) for t in ("explain", "describe", "relate")] == [8, 4, 4]
    for task, said in PROMPTS.items(): assert len(set(said)) == len(said) and {len(parts) for parts in said} == {1 if task in ("generate", "dynamics") else 2} and all(("{goal}" in parts[0]) == (task in ("generate", "consequence")) for parts in said)

@pytest.mark.parametrize("moves, caption", [
    ({}, "nothing"), ({0: (-.2, .1)}, "red left"), ({1: (.1, .3)}, "blue back"), ({2: (-.1, -.2)}, "green front"), ({4: (.3, 0)}, "cyan right"), ({0: (.1, 0), 3: (0, -.11)}, "purple front"),
    ({0: (.2, 0), 3: (0, -.19)}, "red right"), ({2: (.9 * MOVED, 0)}, "nothing"), ({2: (1.1 * MOVED, 0)}, "green right"), ({i: (0, .9 * MOVED) for i in range(5)}, "nothing"),
    ({2: (.8 * MOVED, .8 * MOVED - 1e-4)}, "green right")], ids=str)
def test_captions_by_hand(moves, caption):
    s = numpy_rng(0, "captions").uniform(-.4, .4, 10); d = np.zeros((5, 2))
    for ball, step in moves.items(): d[ball] = step
    assert motions(s, s + d.ravel()) == caption

def test_branches_restart_after_the_shared_prompt(example):
    "Two rollouts behind one prompt: said once, and each goes on as if it were alone."
    e = example; a, b = ask(e, GENERATE), write(e.w, GENERATE, e.goal, e.states[:2] + 1, e.actions[1:], False, credit=.5); n = len(a) - 5
    q = write(e.w, GENERATE, e.goal, e.states[:2] + 1, e.actions[1:], False, into=ask(e, GENERATE), credit=.5)
    assert len(q) == n + 5 + 3 and q.branch == [0] * n + [1] * 5 + [2] * 3 and q.position == [*range(n + 5), *range(n, n + 3)]
    for name in ("kind", "ids", "action", "text", "span", "credit"): assert getattr(q, name) == getattr(a, name) + getattr(b, name)[n:]
    for name in ("states", "target"):
        for x, y in zip(getattr(q, name), getattr(a, name) + getattr(b, name)[n:]): assert (x is None) == (y is None); np.testing.assert_array_equal(x, y)
    third = write(e.w, GENERATE, e.goal, e.states, e.actions, into=q); assert third is q and q.position[-5:] == list(range(n, n + 5)) and q.branch[-5:] == [3] * 5

def test_consequence_asks_for_the_end_from_the_start_and_the_goal(example):
    e, q = example, ask(example, CONSEQUENCE); head, tail = (e.tok(p.format(goal=e.goal)) for p in PROMPTS["consequence"][0])
    check(q, [TEXT] * len(head) + [STATE] + [TEXT] * len(tail), head + tail)
    assert q.span == [0] * (len(q) - 1) + [2] and set(q.action) == set(q.text) == {-1}
    np.testing.assert_array_equal(q.target[-1], e.states[2] - e.states[0]); np.testing.assert_array_equal(q.states[-1], e.states[0])

@pytest.mark.parametrize("key", [1., 2.5])
def test_the_meaning_of_a_goal_is_asked_for_in_a_branch_of_its_own(key, example):
    e = example; plain, q = ask(e, GENERATE), ask(e, GENERATE); n = len(plain); root = n - 5; assert meaning(e.w, q, e.gist, key) is q
    middle, answer = e.tok(" Means:"), e.tok(" red blue back") + [e.eos]; assert MEANING == " Means:"
    for name in (*Sequence.COLUMNS, "states", "target"): assert [x is y or np.array_equal(x, y) for x, y in zip(getattr(q, name), getattr(plain, name))] == [True] * n
    assert q.kind[n:] == [TEXT] * (len(middle) + len(answer) - 1) and q.ids[n:] == middle + answer[:-1] and q.branch[n:] == [2] * (len(q) - n) and q.position[n:] == list(range(root, root + len(q) - n))
    assert q.text[n:] == [-1] * (len(middle) - 1) + answer and q.credit[n:] == [0] * (len(middle) - 1) + [key] * (len(answer) - 1) + [1] and {len(getattr(q, c)) for c in Sequence.COLUMNS} == {len(q)}
    assert all(x is None for x in q.states[n:] + q.target[n:]) and set(q.action[n:]) == {-1} and not any(q.span[n:])   # it speaks of no state

@pytest.mark.parametrize("wording", [0, 2, 7])
def test_relate_asks_each_question_in_a_branch_of_its_own(wording, example):
    e, s = example, example.states[1]; head, middle = (e.tok(p) for p in PROMPTS["relate"][wording % 4]); q = grounding.ask(e.w, s, [("red blue", "left"), ("cyan green", "back")], wording, key=2.); n, m = len(head), len(head) + 1 + len(middle)
    questions, answers = [e.tok(" red blue"), e.tok(" cyan green")], [e.tok(" left"), e.tok(" back")]; body = [x + y[:-1] for x, y in zip(questions, answers)]
    check(q, [TEXT] * n + [STATE] + [TEXT] * (len(q) - n - 1), head + middle + body[0] + body[1])
    assert q.branch == [0] * m + [1] * len(body[0]) + [2] * len(body[1]) and q.position == [*range(m), *range(m, m + len(body[0])), *range(m, m + len(body[1]))]
    asked = [([-1] * (len(x) - 1) + y, [0] * (len(x) - 1) + [2] * len(y)) for x, y in zip(questions, answers)]; assert q.text == [-1] * m + asked[0][0] + asked[1][0] and q.credit == [0] * m + asked[0][1] + asked[1][1]
    assert set(q.action) == {-1} and not any(q.span) and all(x is None for x in q.target); np.testing.assert_array_equal(q.states[n], s); about(q, n, s)

def test_reading_asks_for_every_word_after_the_first(example):
    q = read([5, 9, 9, 4]); check(q, [TEXT] * 3, [5, 9, 9]); assert q.text == [9, 9, 4] and q.credit == [1] * 3 and q.branch == [0] * 3 and q.position == [0, 1, 2] and q.states == q.target == [None] * 3 and set(q.action) == {-1} and len(read([5])) == 0

def test_states_are_looked_at_in_parts_and_asked_at_the_last(example):
    s = example.states[0]; q = Sequence().words([7]).look(s, 3, action=4, credit=.5); assert q.kind == [TEXT] + [STATE] * 3 and q.ids == [7, 0, 1, 2] and q.action == [-1, -1, -1, 4] and q.credit == [0, 0, 0, .5] and q.position == [0, 1, 2, 3]
    assert q.states[0] is None and all(x is s for x in q.states[1:]) and Sequence().look(s).ids == [0]

@pytest.mark.parametrize("task", [GENERATE, DYNAMICS, EXPLAIN, CONSEQUENCE, DESCRIBE, RELATE])
def test_five_elements_a_state_change_nothing_else(task, example):
    e = example; make = lambda: grounding.ask(e.w, e.states[0], relations(e.states[0])[:3]) if task == RELATE else write(e.w, task, e.goal, e.states, e.actions, into=ask(e, task) if task == GENERATE else None, gist=e.gist, credit=.5)
    one = make(); e.w.parts = 5; five = make(); last = [i for i in range(len(five)) if five.kind[i] != STATE or five.ids[i] == 4]; first = [i for i in range(len(five)) if five.kind[i] != STATE or five.ids[i] == 0]
    assert len(five) == len(one) + 4 * one.kind.count(STATE) and [five.ids[i:i + 5] for i in first if five.kind[i] == STATE] == [[0, 1, 2, 3, 4]] * one.kind.count(STATE)
    for name in ("kind", "action", "text", "span", "branch", "credit", "states", "target"): assert all(x is y or np.array_equal(x, y) for x, y in zip([getattr(five, name)[i] for i in last], getattr(one, name), strict=True)), name
    rest = set(range(len(five))) - set(last); assert all(five.action[i] == five.text[i] == -1 and five.span[i] == five.credit[i] == 0 and five.states[i] is five.states[i + 1] for i in rest)
    root = five.branch.count(0); assert five.position == [k for b in range(max(five.branch) + 1) for k in range(root if b else 0, (root if b else 0) + five.branch.count(b))]

@pytest.mark.parametrize("width, rows", [(0, 3), (10, 3), (60, 2), (10_000, 1)])
def test_collate_pads_on_the_right_with_nothing_to_answer(width, rows, example):
    qs = [ask(example, t) for t in (DYNAMICS, EXPLAIN, GENERATE)]; ask(example, DYNAMICS, into=qs[0]); b = collate(qs, 10, width); left = list(qs)
    L = b["kind"].shape[1]; assert b["kind"].shape == (rows, L) and b["states"].shape == b["target"].shape == (rows, L, 10) and b["credit"].dtype == b["states"].dtype == torch.float32 and PAD == -1
    for r in range(rows):
        n = 0
        for k in range(int(b["tree"][r].max()) + 1):
            at = slice(n, n + int((b["tree"][r] == k).sum())); n = at.stop; [q] = [q for q in left if q.kind == b["kind"][r, at].tolist() and q.ids == b["ids"][r, at].tolist()]; left.remove(q)
            for name in Sequence.COLUMNS: assert b[name][r, at].tolist() == getattr(q, name)
            assert set(b["tree"][r, at].tolist()) == {k}
            for name in ("states", "target"):
                for x, want in zip(b[name][r, at], getattr(q, name), strict=True): np.testing.assert_array_equal(x, 0 if want is None else want)
            assert b["known"][r, at].tolist() == [x is not None for x in q.states]
        assert n and all(set(b[k][r, n:].tolist()) <= {-1} for k in ("kind", "tree", "action", "text")) and not b["span"][r, n:].any() and not b["known"][r, n:].any()
    assert not left and (b["tree"].amax(0) >= 0).all() and (b["kind"] == PAD).any() == (rows > 1)

def test_rows_are_about_as_wide_as_asked(example):
    rng = numpy_rng(0, "widths"); qs = [Sequence().words([5] * int(n)) for n in rng.integers(5, 60, 60)]; total = sum(map(len, qs))
    for width in (50, 128, 300, 1000): b = collate(qs, 10, width)["kind"]; assert (b != PAD).sum() == total and len(b) <= round(total / width) and b.shape[1] <= 1.3 * max(60, width)

def test_pack_puts_everything_somewhere_once():
    assert pack([5, 3, 4, 2], 7) == [[0, 3], [2, 1]] and pack([3, 3], 0) == [[0], [1]] and pack([], 9) == []
    rng = numpy_rng(0, "pack")
    for width in (1, 20, 50, 1000):
        lengths = rng.integers(1, 60, 80).tolist(); rows = pack(lengths, width)
        assert sorted(sum(rows, [])) == list(range(80)) and all(len(r) == 1 or sum(lengths[i] for i in r) <= width for r in rows)
        if width > 60: assert len(rows) <= 1.3 * sum(lengths) / width + 1    # and it is worth the trouble


# ---------------------------------------------------------------- loss

def speak(lm):
    "Words that depend on the state they are about."
    with torch.no_grad(): lm.word_head.out.weight.copy_(.3 * torch.randn(lm.word_head.out.weight.shape, generator=torch_rng(0, "outspoken")))
    return lm

@pytest.fixture
def outspoken(lively): return speak(lively)

def alone(lm, ex, rows):
    "Losses of one sequence, from the paper's description: no `write`, no padding, nothing shared, one element after another."
    cfg, task, wording, P = ex.cfg, int(rows[0, 1]), int(rows[0, 0]), lm.shape["state_tokens"]
    tok, eos = (lambda s: lm.tokenizer(s, add_special_tokens=False).input_ids), [lm.tokenizer.eos_token_id]
    table, unit, look = lm.backbone.get_input_embeddings().weight, lm.normaliser, lambda s: lm.features(torch.as_tensor(s))
    word, act = lambda ids: [table[i] for i in ids], lambda a: [lm.action_embed.weight[a]]
    state = lambda s: [lm.state_embed(look(s))] if P == 1 else [lm.state_embed(look(s) * lm.about[k]) + lm.part_embed.weight[k] for k in range(P)]
    out = dict(action=[], state=[], text=[], consequence=[], ball_accuracy=[], action_accuracy=[], credit=[], said=[])
    hidden = lambda x: lm.backbone.get_decoder()(inputs_embeds=torch.stack(x)[None]).last_hidden_state[0]
    nll = lambda logits, i: (torch.logsumexp(logits, 0) - logits[i]).item()
    gap = lambda h, s, d, scale: (lm.state_head(h, look(s)) - torch.as_tensor(d) / scale).square().mean().item()
    step = lambda h, r, t: out["state"].append(gap(h, r.states[t], r.states[t + 1] - r.states[t], unit.step))
    def answer(before, keys, rest, s=None):
        "Key words and plain ones, in this order, said of a state or of none."
        h = hidden(before + word(keys + rest))[len(before) - 1:]
        out["text"] += [nll((v if s is None else v + lm.word_head(v, look(s))) @ table.T, i) for v, i in zip(h, keys + rest)]; out["said"] += [cfg.key_weight] * len(keys) + [1.] * len(rest)
        return hidden(before)
    if task == READ: ids = ex.passages[wording]; answer(word(ids[:1]), [], ids[1:]); return out
    said = PROMPTS[TASKS[task]]; said = said[wording % len(said)]; goal = ex.goals[ex.r.goal[wording]]; gist = goal.gist if cfg.gist else ""; prompt = word(tok(said[0].format(goal=goal.text)))
    if task == RELATE:
        s = ex.r.states[wording, rows[0, 2]]
        for question, what in ex._questions(wording, int(rows[0, 2])): answer(prompt + state(s) + word(tok(said[1] + " " + question)), tok(" " + what), [], s)
    if task == GENERATE and gist: answer(prompt + word(tok(" Means:")), tok(" " + gist), eos)
    for i, _, first in rows:
        r, n = ex.r[int(i)], len(prompt)
        if task in (DYNAMICS, DESCRIBE): r = replace(r, states=r.states[first:first + 2], actions=r.actions[first:first + 1])
        story = [v for s, a in zip(r.states, r.actions) for v in state(s) + act(a)] + state(r.states[-1])
        if task == GENERATE:
            h = hidden(prompt + story)[n:]
            for t in range(len(r) + 1):
                want = int(r.actions[t]) if t < len(r) else 40
                if t < len(r): step(h[(P + 1) * t + P], r, t)
                elif not r.terminated: continue
                logits = lm.action_head(h[(P + 1) * t + P - 1], look(r.states[t])); best = int(logits.argmax())
                out["action"].append(nll(logits, want)); out["action_accuracy"].append(best == want); out["ball_accuracy"].append(best // 8 == want // 8)
                out["credit"].append(1. if t == len(r) or r.rewards[t] > 0 else cfg.idle_credit)
        elif task == DYNAMICS: step(hidden(prompt + story[:P + 1])[-1], r, 0)
        elif task in (EXPLAIN, DESCRIBE):
            keys, rest = (tok(" " + motions(*r.states)), []) if task == DESCRIBE else (tok(" " + gist), tok(" -> " + goal.text)) if gist else ([], tok(" " + goal.text))
            h = answer(prompt + story + word(tok(said[1])), keys, rest + eos, r.states[-1])
            for t in range(len(r.actions)): step(h[n + (P + 1) * t + P], r, t)
        elif task == CONSEQUENCE: out["consequence"].append(gap(hidden(prompt + state(r.states[0]) + word(tok(said[1])))[-1], r.states[0], r.states[-1] - r.states[0], unit.jump))
    return out

@pytest.mark.parametrize("weight, parts, change", [(1., 1, dict(width=0)), (.5, 1, dict(width=400, idle_credit=.25, key_weight=4., share=3)), (2., 1, dict(gist=False, key_weight=.5)), (1., 5, dict(width=600, key_weight=2.))], ids=str)
def test_loss_is_that_of_a_loop_over_samples(weight, parts, change, cache, data, goals):
    lm = speak(liven(KalmLM.from_pretrained("tiny-random", state_tokens=parts))).normalise(Normaliser.fit(data))
    ex = Examples(lm, data, goals, replace(CFG, batch_tokens=600, negatives=0, mix=(.7, 1., .5, .25, .5, .2, .3), state_tokens=parts, **change), corpus=CORPUS)
    assert {bool(t) for t in data.terminated} == {True, False} and len(ex.plan(0)) > 2
    seen, branched, packed = set(), False, False
    for k, seqs in enumerate(ex.plan(0)):
        sums, batch = {k: [] for k in [*LOSSES[1:], "credit", "said"]}, ex.at((0, k))
        with torch.no_grad():
            for rows in seqs:
                for name, v in alone(lm, ex, rows).items(): sums[name] += v
                seen.add(int(rows[0, 1]))
            got = Grounder(lm, text_weight=weight)(batch)
        want = {name: float(np.mean(v)) if v else 0. for name, v in sums.items()}
        for name, credit in (("action", "credit"), ("text", "said")):
            if sums[name]: want[name] = np.average(sums[name], weights=sums[credit])
        np.testing.assert_allclose(got[0, 1:], [want[name] for name in LOSSES[1:]], rtol=1e-4, atol=1e-5)
        assert got[1, 1:].tolist() == [len(sums[name]) for name in LOSSES[1:]] and got[1, 0] == len(batch["kind"])
        np.testing.assert_allclose(got[0, 0], want["action"] + want["state"] + weight * want["text"] + .3 * want["consequence"], rtol=1e-4)
        branched |= any(len(rows) > 1 for rows in seqs); packed |= len(batch["kind"]) < len(seqs)
    assert seen == set(range(7)) and branched and packed == bool(ex.cfg.width)

@pytest.fixture
def grove(lively, data, goals):
    "One row with seven trees, of several branches where a task has them, and how the model reads it."
    ex = Examples(lively, data, goals, replace(CFG, mix=ALL), corpus=CORPUS); pick = lambda task, *who: ex._write(np.array([(i, task, 0) for i in who]))
    batch = collate([pick(GENERATE, 0, 4, 8), pick(DYNAMICS, 1, 2, 3), pick(EXPLAIN, 5), pick(CONSEQUENCE, 6, 10), pick(DESCRIBE, 7, 9), pick(RELATE, 11), pick(READ, 6)], 10, 10_000); assert len(batch["kind"]) == 1
    def read(b, **kw):
        with torch.no_grad(): return lively(b["kind"], b["ids"], b["states"], **(dict(positions=b["position"], tree=b["tree"], branch=b["branch"]) | kw))[0]
    return SimpleNamespace(lm=lively, batch=batch, read=read, limbs=sorted(set(zip(batch["tree"][0].tolist(), batch["branch"][0].tolist()))))

@pytest.mark.parametrize("how", ["grouped", "sdpa", "eager"])
def test_every_branch_reads_as_if_it_were_alone(how, grove):
    g = grove; g.lm.backbone.set_attn_implementation(how); b = g.batch; h = g.read(b); tree, branch = b["tree"][0], b["branch"][0]; compared = 0
    for k, j in g.limbs:
        mine = (tree == k) & ((branch == 0) | (branch == j))
        with torch.no_grad(): want = g.lm(b["kind"][:, mine], b["ids"][:, mine], b["states"][:, mine])[0]
        torch.testing.assert_close(h[mine], want, rtol=1e-4, atol=1e-4); compared += int(j > 0)
    assert compared == 4 + 3 + 1 + 2 + 2 + 8   # one of the first is about the goal's meaning
    for loss in (dict(tree=None, branch=None), dict(positions=torch.arange(len(h))[None])): assert (g.read(b, **loss) - h).abs().max() > 1e-3   # the comparison can fail

@pytest.mark.parametrize("how", ["grouped", "sdpa", "eager"])
def test_branches_and_trees_do_not_see_each_other(how, grove):
    g = grove; g.lm.backbone.set_attn_implementation(how); b = g.batch; h = g.read(b); tree, branch = b["tree"][0], b["branch"][0]
    for k, j in g.limbs:
        at = (tree == k) & (branch == j); new = b | dict(ids=torch.where(at, (b["ids"] + 1) % 40, b["ids"]), states=torch.where(at[:, None], b["states"] + .3, b["states"]))
        change = (g.read(new) - h).abs().amax(-1); touched = (tree == k) if j == 0 else at   # the shared beginning is seen by its own branches
        assert change[~touched].max() <= 1e-6 and (change[at] > 1e-3).all()
        if j == 0: assert (change[touched] > 1e-6).all()

@pytest.mark.parametrize("idle", [1., .2, 0.])
def test_only_actions_that_paid_off_have_full_credit(idle, tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, idle_credit=idle)); paid = 0
    for i, r in enumerate(data):
        q = ex._write(np.array([[i, GENERATE, 0]])); asked = [c for c, a in zip(q.credit, q.action) if a >= 0]
        assert asked == [1. if x > 0 else idle for x in r.rewards[:len(r)]] + [1.] * bool(r.terminated) and not any(c for c, a, t in zip(q.credit, q.action, q.text) if a < 0 and t < 0); paid += sum(r.rewards[:len(r)] > 0)
    assert 0 < paid < data.lengths.sum()

def test_credit_weighs_the_actions(lively, data, goals):
    batch = collate([Examples(lively, data, goals, CFG)._write(np.array([[0, GENERATE, 0], [4, GENERATE, 0]]))], 10); at = (batch["action"] >= 0).nonzero(); assert len(at) > 4
    def action(credit):
        c = torch.zeros_like(batch["credit"]); c[at[:, 0], at[:, 1]] = torch.as_tensor(credit, dtype=c.dtype)
        with torch.no_grad(): return float(Grounder(lively)(batch | dict(credit=c))[0, 1])
    n = len(at); one = [action([float(k == i) for k in range(n)]) for i in range(n)]; some = np.linspace(0, 1, n)
    assert max(one) - min(one) > .1
    np.testing.assert_allclose([action(np.ones(n)), action(np.full(n, .3)), action(some)], [np.mean(one), np.mean(one), np.average(one, weights=some)], rtol=1e-5); assert action(np.zeros(n)) == 0

def test_the_record_names_what_is_logged(): assert [f for f in Losses.__dataclass_fields__] == LOSSES

@pytest.mark.parametrize("width", [0, 500])
def test_padding_is_free(width, outspoken, data, goals):
    ex = Examples(outspoken, data, goals, replace(CFG, batch_tokens=1500)); seqs = [ex._write(rows) for rows in ex.plan(0)[0]]; long = ex._write(np.array([[data.lengths.argmax(), EXPLAIN, 0]]))
    with torch.no_grad():
        a = collate(seqs, 10, width); x = Grounder(outspoken)(a)
        long.words([5] * 600); long.text, long.action, long.span = [-1] * len(long), [-1] * len(long), [0] * len(long)   # a longer row that is asked nothing
        b = collate(seqs + [long], 10, width); y = Grounder(outspoken)(b)
    assert (b["kind"] == PAD).sum() > (a["kind"] == PAD).sum() and x[1].all(); torch.testing.assert_close(x[0], y[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- sampled words

def texts(ex, epoch=0): return [ex.at((epoch, k)) for k in range(len(ex.plan(epoch)))]

def test_candidates_are_the_asked_words_and_some_others(tiny, data, goals):
    few, whole = (texts(Examples(tiny, data, goals, replace(CFG, negatives=n))) for n in (30, 0)); V = tiny.backbone.config.vocab_size; asked = drawn = 0
    for a, b in zip(few, whole, strict=True):
        assert not {"candidates", "weight"} & b.keys() and torch.equal(a["text"] < 0, b["text"] < 0)
        words, at = a["candidates"], b["text"] >= 0; used = set(b["text"][at].tolist()); u = len(used); asked += u; drawn += len(words) - u
        assert torch.equal(words[a["text"][at]], b["text"][at]) and set(words[:u].tolist()) == used and not set(words[u:].tolist()) & used and 0 <= words.min() and words.max() < V and len(words) - u <= 30
        torch.testing.assert_close(a["weight"].exp(), torch.tensor([1.] * u + [(V - u) / (len(words) - u)] * (len(words) - u)))
    assert asked and drawn

def test_candidates_differ_between_batches_and_repeat(tiny, data, goals):
    draw = lambda seed, k: Examples(tiny, data, goals, replace(CFG, negatives=30, seed=seed))._candidates(torch.tensor([[-1]]), (0, k))["candidates"].tolist()
    assert draw(0, 0) == draw(0, 0) and draw(0, 0) != draw(0, 1) and draw(0, 0) != draw(1, 0)

def test_importance_weights_make_the_expected_denominator_right(outspoken, data, goals):
    ex, g = Examples(outspoken, data, goals, replace(CFG, negatives=20)), Grounder(outspoken); text = torch.tensor([[-1, 70, 9, 70, -1, 200]])
    h = 4 * torch.from_numpy(numpy_rng(0, "words").normal(size=(3, 64))).float(); s = torch.from_numpy(numpy_rng(1, "words").uniform(-.4, .4, (3, 10))).float()
    at, about = torch.tensor([[True, False, True, True]]), dict(states=s[None, [0, 1, 1, 2]], known=torch.tensor([[True] * 4]))
    with torch.no_grad():
        full = outspoken.text_logits(h, s).exp(); some = [g.words(h, at, about | ex._candidates(text, (0, k))).exp().sum(-1) for k in range(3000)]; plain = [outspoken.text_logits(h, s, ex._candidates(text, (0, k))["candidates"]).exp().sum(-1) for k in range(50)]
    assert (torch.stack(some).std(0) > .2 * full.sum(-1)).all()   # single draws are far off
    torch.testing.assert_close(torch.stack(some).mean(0), full.sum(-1), rtol=.05, atol=0); assert (torch.stack(plain).mean(0) < .5 * full.sum(-1)).all()

def test_many_negatives_give_the_loss_of_the_whole_vocabulary(outspoken, data, goals):
    with torch.no_grad():
        outspoken.backbone.get_output_embeddings().weight.mul_(8)   # so that words differ in probability
        loss = {n: torch.stack([Grounder(outspoken)(b)[0] for b in texts(Examples(outspoken, data, goals, replace(CFG, batch_tokens=900, negatives=n)))]) for n in (0, 3, 200_000)}
    rows = loss[0][:, 3] > 0; assert rows.sum() > 1
    torch.testing.assert_close(loss[200_000], loss[0], rtol=5e-3, atol=1e-5); assert not torch.allclose(loss[3][rows, 3], loss[0][rows, 3], rtol=2e-2)
    torch.testing.assert_close(loss[3][:, [1, 2, 4, 5, 6]], loss[0][:, [1, 2, 4, 5, 6]])   # nothing else depends on it


# ---------------------------------------------------------------- the plan

ALL = (1.,) * 7

def examples(plan):
    "Every (rollout, task, first step) of a plan."
    return np.concatenate([rows for batch in plan for rows in batch])

def test_every_example_once_an_epoch(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, mix=ALL), corpus=CORPUS)
    for epoch in (0, 1, 5):
        rows = examples(ex.plan(epoch)); text = rows[:, 1] == READ; assert np.bincount(rows[text, 0]).tolist() == [3] * 8 and not rows[text, 2].any(); rows = rows[~text]; one_step = np.isin(rows[:, 1], (DYNAMICS, DESCRIBE, RELATE))
        assert sorted(map(tuple, rows[:, :2].tolist())) == [(i, t) for i in range(len(data)) for t in range(6)]
        assert (rows[:, 2] < data.lengths[rows[:, 0]]).all() and (rows[~one_step, 2] == 0).all() and (rows[one_step, 2] > 0).any()

@pytest.mark.parametrize("share, gist", [(1, True), (3, True), (3, False), (8, True), (30, False)])
def test_branches_share_a_task_and_a_prompt(share, gist, tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, mix=ALL, share=share, gist=gist), corpus=CORPUS); most = {}
    for batch in ex.plan(0):
        for rows in batch:
            t = int(rows[0, 1]); most[t] = max(most.get(t, 0), len(rows)); q = ex._write(rows); goal = goals[data.goal[rows[0, 0] % len(data)]]; assert (rows[:, 1] == t).all()
            branches = {GENERATE: len(rows) + bool(gist and goal.gist), RELATE: min(share, 20), READ: 0}.get(t, len(rows)); assert set(q.branch) == set(range(branches + 1)) and (t not in (GENERATE, CONSEQUENCE) or len(set(data.goal[rows[:, 0]])) == 1)
            if t == READ: assert q.ids + q.text[-1:] == ex.passages[rows[0, 0]]; continue
            prompt = ex.w.prompt(TASKS[t], 0, goal.text, int(rows[0, 0])); assert q.ids[:len(prompt)] == prompt and q.branch.count(0) == len(prompt) + (1 + len(ex.w.prompt("relate", 1, wording=int(rows[0, 0]))) if t == RELATE else 0)
    assert most == {GENERATE: min(share, 6), DYNAMICS: min(share, 24), EXPLAIN: 1, CONSEQUENCE: min(share, 6), DESCRIBE: min(share, 24), RELATE: 1, READ: 1}

def test_every_wording_is_used(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, mix=ALL, share=3), corpus=CORPUS); heads = lambda t, epoch: {tuple(q.ids[:q.kind.index(STATE)]) for batch in ex.plan(epoch) for rows in batch if rows[0, 1] == t for q in [ex._write(rows)]}
    for t in (EXPLAIN, DESCRIBE, RELATE): assert heads(t, 0) | heads(t, 1) | heads(t, 2) == {tuple(ex.w.ids(said[0])) for said in PROMPTS[TASKS[t]]}

def said(ex, q):
    "What a sequence asks for, answer by answer."
    words, out = [(b, i) for b, i in zip(q.branch, q.text) if i >= 0], {}
    for b, i in words: out.setdefault(b, []).append(i)
    return [ex.w.tokenizer.decode(ids) for ids in out.values()]

def test_explanations_and_goals_come_with_the_gist_where_there_is_one(tiny, data, goals):
    for gist in (True, False):
        ex = Examples(tiny, data, goals, replace(CFG, gist=gist, key_weight=5.)); eos = tiny.tokenizer.eos_token
        for i, goal in enumerate(goals):
            g = goal.gist if gist else ""; assert bool(goal.gist) == (i < 3) and data.goal[i] == i
            assert said(ex, ex._write(np.array([[i, EXPLAIN, 0]]))) == [(f" {g} ->" if g else "") + f" {goal.text}{eos}"] and said(ex, ex._write(np.array([[i, GENERATE, 0], [i + 4, GENERATE, 0]]))) == ([f" {g}{eos}"] if g else [])
            q = ex._write(np.array([[i, EXPLAIN, 0]])); assert sum(c == 5 for c in q.credit) == (len(g) + 1 if g else 0)
    bare = [SimpleNamespace(text=g.text) for g in goals]; assert said(ex, Examples(tiny, data, bare, CFG)._write(np.array([[0, EXPLAIN, 0]]))) == [f" {goals[0].text}{eos}"]   # other goals than ours know no gist

def test_questions_are_some_of_those_about_the_state(tiny, data, goals):
    ex = Examples(tiny, data, goals, CFG); drawn = {}
    for i, t in ((0, 0), (0, 2), (3, 0)):
        got = ex._questions(i, t); drawn[i, t] = [q for q, _ in got]; assert len(set(got)) == CFG.share == 8 and set(got) <= set(relations(data.states[i, t])) and got == ex._questions(i, t)
        assert said(ex, ex._write(np.array([[i, RELATE, t]]))) == [" " + a for _, a in got]
    assert len(set(map(tuple, drawn.values()))) == 3 and [q for q, _ in Examples(tiny, data, goals, replace(CFG, seed=1))._questions(0, 0)] != drawn[0, 0]
    other = Examples(tiny, data, goals, replace(CFG, key_weight=3.), relate=lambda s: [("how wide?", f"{len(s)}")]); q = other._write(np.array([[0, RELATE, 1]])); assert said(ex, q) == [" 10"] and tiny.tokenizer.decode(q.ids).endswith(" how wide? 1") and set(q.credit) == {0, 3}

def test_passages_by_hand(tiny):
    w = Writer(tiny); ids = w.ids("abcdefgh"); assert passages(w, ["abcdefgh", "abc", "", "abcdefg"], 3) == [ids[:3], ids[3:6], ids[:3], ids[:3], ids[3:6]] and passages(w, ["ab"], 3) == []

def test_corpora(tiny, data, goals, monkeypatch):
    ex = Examples(tiny, data, goals, replace(CFG, mix=ALL), corpus=CORPUS); assert len(ex.passages) == 8 and {len(p) for p in ex.passages} == {PASSAGE} and CORPUS[0].startswith(tiny.tokenizer.decode(ex.passages[0]))
    asked = []; monkeypatch.setattr(grounding, "ordinary_text", lambda *a, **k: asked.append((a, k)) or CORPUS)
    assert Examples(tiny, data, goals, replace(CFG, mix=ALL)).passages == ex.passages and asked == [((), {})] and not Examples(tiny, data, goals, CFG).passages and len(asked) == 1   # not even looked for where nothing is read

def test_pages_held_out_are_not_learnt():
    learn, held = ordinary_text(), ordinary_text(held_out=True); assert min(len(learn), len(held)) > 20 and sum(map(len, held)) > 100_000 and all(isinstance(t, str) and t.strip() for t in learn + held)
    long = lambda pages: {p for t in pages for p in t.split("\n\n") if len(p) > 120}; assert not long(learn) & long(held)   # pages repeat each other: not a paragraph may be in both parts

def test_steps_are_described_in_the_words_given(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, mix=(0., 0., 0., 0., 1., 0., 0.), negatives=0)); eos = tiny.tokenizer.eos_token_id
    for rows in ex.plan(0)[0]:
        q = ex._write(rows); said = tiny.tokenizer.decode([i for i in q.text if i >= 0]).split(tiny.tokenizer.eos_token)
        assert said == [" " + motions(data.states[i, f], data.states[i, f + 1]) for i, _, f in rows] + [""] and q.text.count(eos) == len(rows)
    other = Examples(tiny, data, goals, ex.cfg, describe=lambda a, b: f"{len(a)}")._write(np.array([[0, DESCRIBE, 1]])); assert [i for i in other.text if i >= 0] == ex.w.ids(" 10") + [eos]

@pytest.mark.parametrize("mix, counts", [((1., 1., .5, .25, 0., .5, 0.), (24, 24, 12, 6, 0, 12, 0)), ((2., 0., 0., 1., .5, 0., 3.), (48, 0, 0, 24, 12, 0, 72)), ((0., 0., 0., 0., 0., 0., .25), (0, 0, 0, 0, 0, 0, 6))])
def test_the_mix_decides_how_often(mix, counts, tiny, data, goals):
    rows = examples(Examples(tiny, data, goals, replace(CFG, mix=mix), corpus=CORPUS).plan(0))
    for task, n in enumerate(counts):
        times = np.bincount(rows[rows[:, 1] == task, 0], minlength=8 if task == READ else 24)
        assert times.sum() == n and times.max() - times.min() <= 1

def test_first_steps_of_dynamics_captions_and_questions_are_spread(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, mix=ALL), corpus=CORPUS)
    for task in (DYNAMICS, DESCRIBE, RELATE): assert len({(i, f) for epoch in range(30) for i, t, f in examples(ex.plan(epoch)).tolist() if t == task}) > .9 * data.lengths.sum()

def test_epochs_and_seeds_differ_and_repeat(tiny, data, goals):
    plan = lambda seed, epoch: [[rows.tolist() for rows in batch] for batch in Examples(tiny, data, goals, replace(CFG, seed=seed)).plan(epoch)]
    assert plan(0, 0) == plan(0, 0) and plan(0, 0) != plan(0, 1) and plan(0, 0) != plan(1, 0)

@pytest.mark.parametrize("budget, parts, gist", [(200, 1, True), (400, 1, False), (1500, 1, True), (1500, 5, True)])
def test_batches_keep_to_the_token_budget(budget, parts, gist, tiny, data, goals):
    "A batch ends with the sequence that fills it: what follows its first is less than the budget, and two neighbours make up at least one."
    ex = Examples(tiny, data, goals, replace(CFG, batch_tokens=budget, gist=gist, mix=(2., 2., 2., 1., 2., .5, 1.)), corpus=CORPUS); several, sizes, ex.w.parts = 0, [], parts
    for k, batch in enumerate(ex.plan(0)):
        lengths = [len(ex._write(rows)) for rows in batch]; several += len(batch) > 1; sizes.append(sum(lengths))
        assert sum(lengths[1:]) < budget and lengths == [ex._length(rows) for rows in batch] and (ex.at((0, k))["kind"] != PAD).sum() == sum(lengths)
    assert several and len(sizes) > 2 and all(a + b >= budget for a, b in zip(sizes, sizes[1:]))

def test_sequences_are_packed_with_little_padding(tiny, goals):
    r = make_rollouts(150, goals=len(goals), steps=20)
    def waste(width):
        ex = Examples(tiny, r, goals, replace(CFG, batch_tokens=3000, width=width)); kinds = [ex.at((0, k))["kind"] for k in range(len(ex.plan(0)))]
        return sum((k == PAD).sum() for k in kinds) / sum(k.numel() for k in kinds)
    assert waste(700) < .15 < waste(0)

def test_max_length_keeps_long_rollouts_for_single_steps_only(tiny, data, goals):
    rows = examples(Examples(tiny, data, goals, replace(CFG, max_length=2, mix=(1., 4., 1., 1., 4., 4., 0.))).plan(0))
    long = data.lengths[rows[:, 0]] > 2
    assert set(rows[long, 1]) == {DYNAMICS, DESCRIBE, RELATE} and set(rows[~long, 1]) == set(range(6))

def elements(batches):
    "Everything asked and read in some batches, in no order."
    return sorted(tuple(b[n][at].item() for n in ("kind", "ids", "action", "text", "span", "branch", "position", "credit")) + tuple(b["states"][at].tolist()) for b in batches for at in map(tuple, (b["kind"] != PAD).nonzero().tolist()))

def test_shares_of_processes_make_up_the_batch(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, batch_tokens=128, negatives=0)); small = large = 0
    for k, batch in enumerate(ex.plan(0)):
        whole, shares = ex.at((0, k)), [ex.at((0, k), rank, 2) for rank in range(2)]   # each process needs something to do, or the others wait for ever
        if len(batch) > 1: large += 1; assert elements(shares) == elements([whole]) and all((s["kind"] != PAD).any() for s in shares)
        else: small += 1; assert elements(shares[:1]) == elements(shares[1:]) == elements([whole])
    assert small and large

def test_positions_continue_where_they_are_told(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, batch_tokens=200)); n = len(ex.plan(0)); it = positions(ex, (0, 0)); assert n > 6
    first = [next(it) for _ in range(n + 3)]
    assert first == [(0, i) for i in range(n)] + [(1, 0), (1, 1), (1, 2)]
    again = positions(ex, first[5]); assert [next(again) for _ in range(n - 2)] == first[5:]

def test_learning_rate_warms_up_and_decays():
    cfg = replace(CFG, steps=100, warmup=.1); f = [learning_rate(s, cfg) for s in range(100)]
    np.testing.assert_allclose(f[:10], np.arange(1, 11) / 10); assert max(f) == f[9] == f[10] == 1 and all(a > b for a, b in zip(f[10:], f[11:])) and .019 < f[-1] < .03


# ---------------------------------------------------------------- training, stopping, continuing

class Kill(Exception): pass

def killer(step):
    def callback(lm, at):
        if at == step: raise Kill
    return callback

def log(folder): return [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder/"log.csv")]

@pytest.fixture
def clock(monkeypatch):
    "Training sees a clock that ticks a minute a look, so that a limit falls on the same step everywhere."
    now = [0.]
    def tick(): now[0] += 60; return now[0]
    monkeypatch.setattr(grounding, "time", SimpleNamespace(monotonic=tick))

@pytest.fixture(scope="module")
def whole(data, goals, session_cache, tmp_path_factory):
    "A run that nobody disturbed."
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("KALM_CACHE", str(session_cache)); ground(data, goals, CFG, out=out)
    return out

def same_weights(a, b):
    for name in ("model.safetensors", "state.safetensors"):
        x, y = load_file(a/name), load_file(b/name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name

@pytest.mark.parametrize("kills", [[3], [6], [3, 6]], ids=str)
def test_killed_and_continued_equals_undisturbed(kills, whole, data, goals, tmp_path):
    for step in kills:
        with pytest.raises(Kill): ground(data, goals, CFG, out=tmp_path, callback=killer(step))
        assert not (tmp_path/"kalm.json").exists()
    ground(data, goals, CFG, out=tmp_path)
    same_weights(whole, tmp_path); assert log(tmp_path) == log(whole) and [int(r["step"]) for r in log(whole)] == [2, 4, 6, 8]

def test_stopped_by_the_clock_and_continued_equals_undisturbed(whole, data, goals, tmp_path, clock):
    stops = 0
    while not (tmp_path/"kalm.json").exists():
        ground(data, goals, CFG, out=tmp_path, max_minutes=5); stops += 1   # three steps each
        assert (tmp_path/"state.safetensors").exists() and stops < 9
    assert stops == 3
    same_weights(whole, tmp_path); assert log(tmp_path) == log(whole)

def test_no_time_at_all_keeps_the_beginning(whole, data, goals, tmp_path):
    ground(data, goals, CFG, out=tmp_path, max_minutes=1e-9); assert not (tmp_path/"kalm.json").exists()
    ground(data, goals, CFG, out=tmp_path); same_weights(whole, tmp_path)

def test_finished_run_is_not_trained_again(whole, data, goals):
    before = {n: (whole/n).read_bytes() for n in ("model.safetensors", "log.csv")}
    ground(data, goals, CFG, out=whole)
    assert before == {n: (whole/n).read_bytes() for n in before}

def test_checkpoint_is_what_training_returned(whole, data, goals):
    lm, back = ground(data, goals, CFG), KalmLM.from_pretrained(whole)
    for (n, a), b in zip(lm.own_parameters().items(), back.own_parameters().values()): torch.testing.assert_close(a, b, rtol=2**-8, atol=0)
    assert back.normaliser == Normaliser.fit(data) and back.adapter == CFG.adapter and not lm.training

@pytest.mark.parametrize("change", [dict(lr=1.), dict(seed=1), dict(adapter=Adapter(rank=3)), dict(mix=(1., 1., 1., 1., 0., 0., 0.)), dict(steps=9), dict(adapter=Adapter(full=True)),
                                    dict(adapter=Adapter(rank=2, split=True)), dict(idle_credit=.5), dict(negatives=0), dict(share=2), dict(directions=8), dict(pairs=False), dict(scratch=True), dict(text_weight=.5),
                                    dict(state_tokens=5), dict(gist=False), dict(key_weight=2.)], ids=str)
def test_other_settings_in_the_folder_are_refused(change, whole, data, goals):
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}
    cfg = replace(CFG, **change)
    with pytest.raises(ValueError): ground(data, goals, cfg, out=whole)
    assert before == {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}

def test_every_option_at_once_is_continued_and_comes_back(data, goals, tmp_path, monkeypatch):
    monkeypatch.setattr(grounding, "ordinary_text", lambda: CORPUS)
    cfg = replace(CFG, steps=5, adapter=Adapter(rank=2, split=True, first=1), directions=8, pairs=False, state_tokens=5, idle_credit=.3, text_weight=.5, key_weight=3., negatives=40, share=3, width=500, mix=ALL)
    lm = ground(data, goals, cfg, out=tmp_path/"a")
    with pytest.raises(Kill): ground(data, goals, cfg, out=tmp_path/"b", callback=killer(3))
    ground(data, goals, cfg, out=tmp_path/"b"); same_weights(tmp_path/"a", tmp_path/"b"); back = KalmLM.from_pretrained(tmp_path/"a")
    assert back.shape == lm.shape and back.shape["directions"] == 8 and back.shape["state_tokens"] == 5 and not back.shape["pairs"] and back.adapter == cfg.adapter and back.own_parameters().keys() == lm.own_parameters().keys()
    fresh = grounding.prepare(cfg, data).own_parameters(); assert all(not torch.equal(p, fresh[n]) for n, p in lm.own_parameters().items() if p.dim() > 1)   # all of it learnt

@pytest.mark.parametrize("change", [lambda r: r[:20], lambda r: make_rollouts(24, goals=4, steps=5, seed=1), lambda r: replace(r, actions=np.where(r.mask, (r.actions + 1) % 40, -1))], ids=["fewer", "others", "other actions"])
def test_other_data_in_the_folder_is_refused(change, whole, data, goals):
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=f"{whole.name} holds a run on other data.*{len(data)} rollouts, {data.lengths.sum()} steps"): ground(change(data), goals, CFG, out=whole)
    assert before == {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}

@pytest.fixture
def later(goals): return make_rollouts(12, goals=len(goals), steps=4, seed=7)

def test_a_start_brings_its_weights_and_its_normaliser(whole, data, later, monkeypatch):
    back, asked = KalmLM.from_pretrained(whole), []; monkeypatch.setattr(KalmLM, "grounded", staticmethod(lambda **kw: asked.append(kw) or KalmLM.from_pretrained(whole, **kw)))
    for start in (str(whole), "shipped"):
        lm = prepare(replace(CFG, start=start), later); assert lm.normaliser == Normaliser.fit(data) != Normaliser.fit(later) and lm.adapter == CFG.adapter
        assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(lm.own_parameters().values(), back.own_parameters().values(), strict=True))
    assert asked == [dict(dtype=torch.float32)] and prepare(replace(CFG, start=str(whole), bf16=True), later).backbone.dtype == torch.bfloat16

def test_a_run_with_a_start_is_continued_too(whole, later, goals, tmp_path):
    cfg = replace(CFG, start=str(whole), steps=4); first = KalmLM.from_pretrained(whole).own_parameters(); lm = ground(later, goals, cfg, out=tmp_path/"a"); assert not any(torch.equal(p, first[n]) for n, p in lm.own_parameters().items() if p.dim() > 1)
    with pytest.raises(Kill): ground(later, goals, cfg, out=tmp_path/"b", callback=killer(3))
    ground(later, goals, cfg, out=tmp_path/"b"); same_weights(tmp_path/"a", tmp_path/"b"); assert log(tmp_path/"a") == log(tmp_path/"b")

@pytest.mark.parametrize("change, message", [
    (dict(adapter=Adapter(rank=3)), r"adapter Adapter\(rank=2.*asked for is Adapter\(rank=3"), (dict(directions=8), "directions 0, asked for is 8"), (dict(pairs=False), "pairs True, asked for is False"), (dict(state_tokens=5), "state_tokens 1, asked for is 5"),
    (dict(layers=1), "layers 2, asked for is 1"), (dict(n_actions=41), "n_actions 40, asked for is 41"), (dict(backbone="smollm2-135m"), "backbone tiny-random, asked for is smollm2-135m"), (dict(scratch=True), "random weights"),
    (dict(layers=1, directions=8), "layers 2, asked for is 1, directions 0, asked for is 8"), (dict(start="tiny-random"), "adapter None"), (dict(start="/no/such/folder"), "no causal language model")], ids=str)
def test_a_start_of_another_form_is_refused(change, message, whole, later, goals, tmp_path):
    with pytest.raises(ValueError, match=message): ground(later, goals, replace(CFG, **dict(start=str(whole)) | change), out=tmp_path/"out")
    assert not (tmp_path/"out").exists()

def test_a_start_for_other_states_is_refused(whole):
    r = make_rollouts(4); r = Rollouts(r.states[..., :4], r.actions, lengths=r.lengths)
    with pytest.raises(ValueError, match="state_dim 10, asked for is 4"): prepare(replace(CFG, start=str(whole)), r)

def test_damaged_states_are_refused_and_kept(data, goals, tmp_path):
    with pytest.raises(Kill): ground(data, goals, CFG, out=tmp_path, callback=killer(3))
    f = tmp_path/"state.safetensors"; state, rows = f.read_bytes(), (tmp_path/"log.csv").read_bytes()
    from safetensors.torch import save
    for bad in (state[:-100], b"", b"not a state", save({"w": torch.zeros(3)}), save({"w": torch.zeros(3)}, metadata={"progress": "{}"}), save({"w": torch.zeros(3)}, metadata={"progress": "[1"})):
        f.write_bytes(bad)
        with pytest.raises(ValueError, match="state.safetensors"): ground(data, goals, CFG, out=tmp_path)
        assert f.read_bytes() == bad and (tmp_path/"log.csv").read_bytes() == rows

def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def test_full_disk_at_a_checkpoint_keeps_the_last_one(whole, data, goals, tmp_path):
    def fill(lm, step): monkey.setattr(core.os, "replace", full)
    with pytest.MonkeyPatch.context() as monkey, pytest.raises(OSError, match="space"): ground(data, goals, CFG, out=tmp_path, callback=fill)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
    ground(data, goals, CFG, out=tmp_path); same_weights(whole, tmp_path)

def test_full_disk_while_the_log_is_trimmed_keeps_the_log(whole, data, goals, tmp_path, monkeypatch):
    plain = grounding.Run.save
    with monkeypatch.context() as m:
        m.setattr(grounding.Run, "save", lambda run: plain(run) if run.step < 6 else full())
        with pytest.raises(OSError): ground(data, goals, CFG, out=tmp_path)
    rows = log(tmp_path); assert [r["step"] for r in rows] == ["2", "4", "6"]   # the state is that of step 3
    with monkeypatch.context() as m:
        m.setattr(grounding, "append_csv", full); m.setattr(core.os, "replace", full)
        with pytest.raises(OSError, match="space"): ground(data, goals, CFG, out=tmp_path)
    assert log(tmp_path) == rows
    ground(data, goals, CFG, out=tmp_path); same_weights(whole, tmp_path); assert log(tmp_path) == log(whole)

def test_loss_goes_down_on_a_handful(goals, tmp_path):
    r = make_rollouts(6, goals=len(goals), steps=3)
    ground(r, goals, replace(CFG, steps=60, log_every=5, checkpoint_every=60, lr=5e-3, head_lr=5e-3), out=tmp_path)
    first, last = log(tmp_path)[0], log(tmp_path)[-1]
    assert list(first) == ["step", "epoch", "tokens", *LOSSES]
    for k, share in dict(loss=.7, action=.7, text=.9).items(): assert float(last[k]) < share * float(first[k]), k
    assert float(last["action_accuracy"]) > float(first["action_accuracy"]) and int(last["tokens"]) > int(first["tokens"]) > 0

def test_seeds_and_the_global_generator(data, goals):
    short = replace(CFG, steps=2)
    def weights(seed, global_seed):
        with torch.random.fork_rng(): torch.manual_seed(global_seed); return [p.detach() for p in ground(data, goals, replace(short, seed=seed)).own_parameters().values()]
    a, b, c = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not any(torch.equal(x, y) for x, y in zip(a, c) if x.dim() > 1)


# ---------------------------------------------------------------- bad input

def spoilt(r, **change):
    "`r` with a field changed behind the back of its checks."
    copy = r[:]
    for k, v in change.items(): object.__setattr__(copy, k, v)
    return copy

@pytest.mark.parametrize("make, message", [
    (lambda r, g: (r, [*g[:-1], mute(g[-1])]), "goal 3 has no sentence"),
    (lambda r, g: (r, g[:2]), "2 goals"),
    (lambda r, g: (r, []), "0 goals"),
    (lambda r, g: (spoilt(r, goal=np.full(len(r), -1)), g), "goal indices -1"),
    (lambda r, g: (r[:0], g), "no transitions|no rollouts"),
    (lambda r, g: (Rollouts(np.zeros((3, 1, 10)), np.zeros((3, 0), int), goal=np.zeros(3)), g), "no transitions|no rollouts"),
    (lambda r, g: (spoilt(r, actions=np.where(r.mask, 40, -1)), g), "action"),
    (lambda r, g: (Rollouts(r.states * np.nan, r.actions, lengths=r.lengths), g), "NaN"),
])
def test_bad_data_is_an_error_before_anything_is_written(make, message, data, goals, tmp_path):
    with pytest.raises(ValueError, match=message): ground(*make(data, goals), CFG, out=tmp_path/"out")
    assert not (tmp_path/"out").exists()

@pytest.mark.parametrize("change", [dict(mix=(1., 1., 1., 1., 1.)), dict(mix=(1.,) * 8), dict(mix=(0.,) * 7), dict(mix=(1., -1., 1., 1., 1., 1., 1.)), dict(key_weight=-1.), dict(steps=0), dict(batch_tokens=10), dict(adapter=dict(rank=0))], ids=str)
def test_bad_settings(change):
    with pytest.raises(ValueError): replace(CFG, **change)

def test_nothing_short_enough(data, goals, tiny):
    with pytest.raises(ValueError, match="max_length = 1"): Examples(tiny, data[data.lengths > 1], goals, replace(CFG, max_length=1))

ASK = ["Put the red ball behind the blue one.", "Put the green ball to the left of the cyan one.", "Could you hurry?"]

def test_composed_sentences_ask_for_all_of_it():
    made = [compose(ASK[:2], numpy_rng(0, k)) for k in range(200)]; brief = [t for t in made if t.lower().count("put") == 1]; assert len(set(made)) > 8 and .6 < len(brief) / 200 < .9
    for t in made: assert t.startswith("Put the red ball behind the blue one") and t.endswith("green ball to the left of the cyan one.") and t.count(".") == 1 and "  " not in t and "Put" not in t[3:]
    assert all("the green ball" in t for t in made)
    for k in range(20): assert compose([ASK[0], ASK[2]], numpy_rng(0, k)).startswith("Put the red ball behind the blue one") and compose([ASK[0], ASK[2]], numpy_rng(0, k)).endswith("could you hurry?")
    three = compose(["Red left.", "Red right.", "Red up."], numpy_rng(1)); assert all(w in three for w in ("left", "right", "up")) and compose(["Same.", "Same."], numpy_rng(0)) in {f"Same{j}{s}." for j in grounding.JOINTS for s in ("Same", "same")}

@pytest.mark.parametrize("share, gist, want", [(.5, True, 12), (0., True, 0), (.5, False, 0)])
def test_composed_sentences_are_asked_for_their_gists(share, gist, want, tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, compose=share, gist=gist)); rows = [q for batch in ex.plan(0) for q in batch if q[0, 1] == COMPOSE]; assert len(rows) == want
    made = [ex._write(q) for q in rows]; assert len({tuple(q.ids) for q in made}) == len(made)
    for r, q in zip(rows, made):
        said = tiny.tokenizer.decode([i for i in q.text if i >= 0][:-1]).strip().split("; "); assert 2 <= len(said) <= 3 and set(said) <= {g.gist for g in goals} - {""} and q.text[-1] == tiny.tokenizer.eos_token_id
        assert set(q.kind) == {TEXT} and ex._length(r) == len(q) and all(s is None for s in q.states)
    assert ex.plan(0) is ex.plan(0) and [ex._write(q).ids for q in rows] == [q.ids for q in made]

def test_nothing_to_read(data, goals, tiny):
    with pytest.raises(ValueError): Examples(tiny, data, goals, replace(CFG, mix=ALL), corpus=["short"]).at((0, 0))


# ---------------------------------------------------------------- perplexity

def test_perplexity_is_that_of_a_loop(outspoken):
    table = outspoken.backbone.get_output_embeddings().weight
    with torch.no_grad(): table.mul_(4)
    text, w = [CORPUS[0][:140], CORPUS[2][:130]], Writer(outspoken); pieces = [w.ids(t)[k:k + 20] for t in text for k in range(0, len(t) - 19, 20)]; assert len(pieces) == 7 + 6
    with torch.no_grad(): surprise = [[-float(outspoken.backbone(input_ids=torch.tensor([p])).logits[0, k].log_softmax(-1)[p[k + 1]]) for k in range(19)] for p in pieces]
    want = lambda which: pytest.approx(np.exp(np.mean([surprise[i] for i in which])), rel=1e-4)
    for size in (1, 4, 100): assert perplexity(outspoken, text, words=20, batch_size=size) == want(range(13))
    for most, which in ((1, [0]), (4, [0, 3, 6, 9]), (12, range(12)), (13, range(13))): assert perplexity(outspoken, text, words=20, most=most) == want(which)
    assert np.std([np.mean(p) for p in surprise]) > .01 and perplexity(outspoken, text, words=20) != want([0])

def test_perplexity_of_knowing_nothing_is_the_vocabulary(tiny):
    with torch.no_grad(): tiny.backbone.get_output_embeddings().weight.zero_()
    assert perplexity(tiny, CORPUS[:1], words=30) == pytest.approx(tiny.backbone.config.vocab_size, rel=1e-4)

def test_perplexity_is_of_held_out_pages_and_needs_text(tiny, monkeypatch):
    asked = []; monkeypatch.setattr(grounding, "ordinary_text", lambda **kw: asked.append(kw) or CORPUS)
    assert perplexity(tiny, words=40) == perplexity(tiny, CORPUS, words=40) and asked == [dict(held_out=True)]
    with pytest.raises(ValueError, match="no text of at least 400 tokens"): perplexity(tiny, CORPUS, words=400)
