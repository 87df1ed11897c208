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
from conftest import make_rollouts, mute
from kalm.core import Rollouts, numpy_rng, read_csv
from kalm.embeddings import ACTION, PAD, STATE, TEXT, Adapter, Normaliser
from kalm.grounding import (CONSEQUENCE, DYNAMICS, EXPLAIN, GENERATE, PROMPTS, Examples, GroundConfig, Grounder, Losses, Writer, collate, ground, learning_rate, positions, write)

pytestmark = pytest.mark.usefixtures("cache")

CFG = GroundConfig(backbone="tiny-random", adapter=Adapter(rank=2), steps=8, batch_tokens=400, mix=(1., 1., .5, .25), checkpoint_every=3, log_every=2, bf16=False)
LOSSES = ["loss", "action", "state", "text", "consequence", "ball_accuracy", "action_accuracy"]

@pytest.fixture(scope="module")
def data(goals): return make_rollouts(24, goals=len(goals), steps=5)


# ---------------------------------------------------------------- sequences

@pytest.fixture
def example(tiny):
    "A two-step rollout and its sentence in tokens."
    tok = lambda s: tiny.tokenizer(s, add_special_tokens=False).input_ids
    s = numpy_rng(0, "example").normal(size=(3, 10)).astype(np.float32)
    return SimpleNamespace(w=Writer(tiny), tok=tok, eos=tiny.tokenizer.eos_token_id, goal="Red behind blue, please.", states=s, actions=np.array([7, 31]))

def ask(e, task, **kw): return write(e.w, task, e.goal, e.states, e.actions, **kw)

def check(q, kinds, ids):
    "Kinds, and ids wherever text or an action stands."
    assert q.kind == kinds
    assert [i for k, i in zip(q.kind, q.ids) if k != STATE] == ids
    assert len({len(column) for column in vars(q).values()}) == 1

@pytest.mark.parametrize("success", [True, False])
def test_generate_asks_for_every_action_every_change_and_done(success, example):
    e, q = example, ask(example, GENERATE, success=success); head = e.tok(PROMPTS["generate"][0].format(goal=e.goal)); n = len(head)
    assert e.goal in PROMPTS["generate"][0].format(goal=e.goal)
    check(q, [TEXT] * n + [STATE, ACTION, STATE, ACTION, STATE], head + [7, 31])
    assert q.action == [-1] * n + [7, -1, 31, -1, 40 if success else -1] and q.span == [0] * n + [0, 1, 0, 1, 0] and set(q.text) == {-1}
    for i, k in [(n, 0), (n + 1, 0), (n + 2, 1), (n + 3, 1), (n + 4, 2)]: np.testing.assert_array_equal(q.states[i], e.states[k])
    for i, k in [(n + 1, 0), (n + 3, 1)]: np.testing.assert_array_equal(q.target[i], e.states[k + 1] - e.states[k])

def test_dynamics_asks_for_one_change_without_a_goal(example):
    e, q = example, ask(example, DYNAMICS); head = e.tok(PROMPTS["dynamics"][0]); n = len(head)
    check(q, [TEXT] * n + [STATE, ACTION], head + [7])
    assert q.span == [0] * n + [0, 1] and set(q.action) == set(q.text) == {-1}
    np.testing.assert_array_equal(q.target[-1], e.states[1] - e.states[0]); np.testing.assert_array_equal(q.states[-2], e.states[0])

def test_explain_asks_for_the_sentence_and_its_end(example):
    e, q = example, ask(example, EXPLAIN); head, middle = (e.tok(p) for p in PROMPTS["explain"]); answer = e.tok(" " + e.goal) + [e.eos]
    check(q, [TEXT] * len(head) + [STATE, ACTION, STATE, ACTION, STATE] + [TEXT] * (len(middle) + len(answer) - 1), head + [7, 31] + middle + answer[:-1])
    assert q.text == [-1] * (len(q) - len(answer)) + answer and set(q.action) == {-1} and set(q.span) == {0}
    for k, i in enumerate(range(len(head), len(head) + 5, 2)): np.testing.assert_array_equal(q.states[i], e.states[k])

def test_consequence_asks_for_the_end_from_the_start_and_the_goal(example):
    e, q = example, ask(example, CONSEQUENCE); head, tail = (e.tok(p.format(goal=e.goal)) for p in PROMPTS["consequence"])
    check(q, [TEXT] * len(head) + [STATE] + [TEXT] * len(tail), head + tail)
    assert q.span == [0] * (len(q) - 1) + [2] and set(q.action) == set(q.text) == {-1}
    np.testing.assert_array_equal(q.target[-1], e.states[2] - e.states[0]); np.testing.assert_array_equal(q.states[-1], e.states[0])

def test_collate_pads_on_the_right_with_nothing_to_answer(example):
    qs = [ask(example, t) for t in (DYNAMICS, EXPLAIN, GENERATE)]; b = collate(qs, [1, 2, 0], 10)
    L = max(map(len, qs)); assert b["kind"].shape == (3, L) and b["states"].shape == b["target"].shape == (3, L, 10) and b["task"].tolist() == [1, 2, 0]
    for i, q in enumerate(qs):
        n = len(q)
        for name in ("kind", "ids", "action", "text", "span"): assert b[name][i, :n].tolist() == getattr(q, name)
        assert set(b["kind"][i, n:].tolist()) <= {PAD} and all(set(b[k][i, n:].tolist()) <= {-1} for k in ("action", "text")) and not b["span"][i, n:].any()
        for k, s in enumerate(q.states): np.testing.assert_array_equal(b["states"][i, k], 0 if s is None else s)


# ---------------------------------------------------------------- loss

def alone(lm, task, goal, r):
    "Losses of one example, from the paper's description: no `write`, no padding, one element after another."
    tok = lambda s: lm.tokenizer(s, add_special_tokens=False).input_ids
    table, unit = lm.backbone.get_input_embeddings().weight, lm.normaliser
    mean, std = torch.tensor(unit.mean), torch.tensor(unit.std); norm = lambda s: (torch.as_tensor(s) - mean) / std
    word, state, act = lambda ids: [table[i] for i in ids], lambda s: [lm.state_embed(norm(s))], lambda a: [lm.action_embed.weight[a]]
    story = lambda: [v for s, a in zip(r.states, r.actions) for v in state(s) + act(a)] + state(r.states[-1])
    out = dict(action=[], state=[], text=[], consequence=[], ball_accuracy=[], action_accuracy=[])
    hidden = lambda x: lm.backbone.get_decoder()(inputs_embeds=torch.stack(x)[None]).last_hidden_state[0]
    nll = lambda logits, i: (torch.logsumexp(logits, 0) - logits[i]).item()
    gap = lambda h, s, d, scale: (lm.state_head(h, norm(s)) - torch.as_tensor(d) / scale).square().mean().item()
    if task == GENERATE:
        prompt = word(tok(PROMPTS["generate"][0].format(goal=goal))); h = hidden(prompt + story())[len(prompt):]
        for t in range(len(r) + 1):
            want = int(r.actions[t]) if t < len(r) else 40
            if t < len(r): out["state"].append(gap(h[2 * t + 1], r.states[t], r.states[t + 1] - r.states[t], unit.step))
            elif not r.terminated: continue
            logits = lm.action_head(h[2 * t], norm(r.states[t])); best = int(logits.argmax())
            out["action"].append(nll(logits, want)); out["action_accuracy"].append(best == want); out["ball_accuracy"].append(best // 8 == want // 8)
    elif task == DYNAMICS:
        h = hidden(word(tok(PROMPTS["dynamics"][0])) + state(r.states[0]) + act(r.actions[0]))
        out["state"].append(gap(h[-1], r.states[0], r.states[1] - r.states[0], unit.step))
    elif task == EXPLAIN:
        answer = tok(" " + goal) + [lm.tokenizer.eos_token_id]; before = word(tok(PROMPTS["explain"][0])) + story() + word(tok(PROMPTS["explain"][1]))
        h = hidden(before + word(answer))
        out["text"] = [nll(h[len(before) - 1 + k] @ table.T, i) for k, i in enumerate(answer)]
    else:
        h = hidden(word(tok(PROMPTS["consequence"][0].format(goal=goal))) + state(r.states[0]) + word(tok(PROMPTS["consequence"][1])))
        out["consequence"].append(gap(h[-1], r.states[0], r.states[-1] - r.states[0], unit.jump))
    return out

def test_loss_is_that_of_a_loop_over_samples(lively, data, goals):
    lively.normalise(Normaliser.fit(data)); ex = Examples(lively, data, goals, replace(CFG, batch_tokens=4000))
    assert {bool(t) for t in data.terminated} == {True, False}
    seen = set()
    for rows in ex.plan(0)[:3]:
        parts = {k: [] for k in LOSSES[1:]}
        with torch.no_grad():
            for i, task, first in rows:
                one = data[int(i)]
                if task == DYNAMICS: one = replace(one, states=one.states[first:first + 2], actions=one.actions[first:first + 1])
                for k, v in alone(lively, task, goals[one.goal].text, one).items(): parts[k] += v
            got = Grounder(lively)(collate([ex._write(*map(int, row)) for row in rows], rows[:, 1].tolist(), 10))
        want = {k: float(np.mean(v)) if v else 0. for k, v in parts.items()}
        np.testing.assert_allclose(got[0, 1:], [want[k] for k in LOSSES[1:]], rtol=1e-4, atol=1e-5)
        assert got[1, 1:].tolist() == [len(parts[k]) for k in LOSSES[1:]] and got[1, 0] == len(rows)
        np.testing.assert_allclose(got[0, 0], want["action"] + want["state"] + want["text"] + .3 * want["consequence"], rtol=1e-4)
        seen |= set(rows[:, 1].tolist())
    assert seen == {GENERATE, DYNAMICS, EXPLAIN, CONSEQUENCE}

def test_the_record_names_what_is_logged(): assert [f for f in Losses.__dataclass_fields__] == LOSSES

def test_padding_is_free(lively, data, goals):
    ex = Examples(lively, data, goals, CFG); rows = ex.plan(0)[0]
    seqs = [ex._write(*map(int, row)) for row in rows]; long = ex._write(int(data.lengths.argmax()), EXPLAIN, 0)
    with torch.no_grad():
        a = Grounder(lively)(collate(seqs, rows[:, 1].tolist(), 10))
        long.text, long.action, long.span = [-1] * len(long), [-1] * len(long), [0] * len(long)   # a longer row that is asked nothing
        b = Grounder(lively)(collate(seqs + [long], [*rows[:, 1].tolist(), EXPLAIN], 10))
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the plan

def test_every_example_once_an_epoch(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, mix=(1., 1., 1., 1.)))
    for epoch in (0, 1, 5):
        rows = np.concatenate(ex.plan(epoch))
        assert sorted(map(tuple, rows[:, :2].tolist())) == [(i, t) for i in range(len(data)) for t in range(4)]
        assert (rows[:, 2] < data.lengths[rows[:, 0]]).all() and (rows[rows[:, 1] != DYNAMICS, 2] == 0).all()

@pytest.mark.parametrize("mix, counts", [((1., 1., .5, .25), (24, 24, 12, 6)), ((2., 0., 0., 1.), (48, 0, 0, 24))])
def test_the_mix_decides_how_often(mix, counts, tiny, data, goals):
    rows = np.concatenate(Examples(tiny, data, goals, replace(CFG, mix=mix)).plan(0))
    for task, n in enumerate(counts):
        times = np.bincount(rows[rows[:, 1] == task, 0], minlength=24)
        assert times.sum() == n and times.max() - times.min() <= 1

def test_first_steps_of_dynamics_are_spread(tiny, data, goals):
    ex = Examples(tiny, data, goals, CFG)
    steps = {(i, f) for epoch in range(30) for i, t, f in np.concatenate(ex.plan(epoch)).tolist() if t == DYNAMICS}
    assert len(steps) > .9 * data.lengths.sum()

def test_epochs_and_seeds_differ_and_repeat(tiny, data, goals):
    plan = lambda seed, epoch: [r.tolist() for r in Examples(tiny, data, goals, replace(CFG, seed=seed)).plan(epoch)]
    assert plan(0, 0) == plan(0, 0) and plan(0, 0) != plan(0, 1) and plan(0, 0) != plan(1, 0)

@pytest.mark.parametrize("budget", [200, 400, 1500])
def test_batches_keep_to_the_token_budget(budget, tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, batch_tokens=budget)); several = 0
    for i, rows in enumerate(ex.plan(0)):
        several += len(rows) > 1
        assert len(rows) == 1 or ex.at((0, i))["kind"].numel() <= budget
    assert several

def test_lengths_are_mixed_with_little_padding(tiny, goals):
    ex = Examples(tiny, make_rollouts(150, goals=len(goals), steps=20), goals, replace(CFG, batch_tokens=1500))
    kinds = [ex.at((0, i))["kind"] for i in range(len(ex.plan(0)))]
    assert sum((k == PAD).sum() for k in kinds) / sum(k.numel() for k in kinds) < .15

def test_max_length_keeps_long_rollouts_for_dynamics_only(tiny, data, goals):
    rows = np.concatenate(Examples(tiny, data, goals, replace(CFG, max_length=2, mix=(1., 4., 1., 1.))).plan(0))
    long = data.lengths[rows[:, 0]] > 2
    assert long.any() and (rows[long, 1] == DYNAMICS).all()

def test_shares_of_processes_make_up_the_batch(tiny, data, goals):
    ex = Examples(tiny, data, goals, replace(CFG, batch_tokens=128)); small = 0
    for i, rows in enumerate(ex.plan(0)):
        whole = ex.at((0, i)); small += len(rows) < 2
        shares = [ex.at((0, i), rank, 2) for rank in range(2)]   # each process needs something to do, or the others wait for ever
        assert sorted({*shares[0]["task"].tolist(), *shares[1]["task"].tolist()}) == sorted(set(whole["task"].tolist()))
        if len(rows) > 1: assert sum(len(s["kind"]) for s in shares) == len(rows)
    assert small

def test_positions_continue_where_they_are_told(tiny, data, goals):
    ex = Examples(tiny, data, goals, CFG); n = len(ex.plan(0)); it = positions(ex, (0, 0))
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
    from kalm.embeddings import KalmLM
    lm, back = ground(data, goals, CFG), KalmLM.from_pretrained(whole)
    for (n, a), b in zip(lm.own_parameters().items(), back.own_parameters().values()): torch.testing.assert_close(a, b, rtol=2**-8, atol=0)
    assert back.normaliser == Normaliser.fit(data) and back.adapter == CFG.adapter and not lm.training

@pytest.mark.parametrize("change", [dict(lr=1.), dict(seed=1), dict(adapter=Adapter(rank=3)), dict(mix=(1., 1., 1., 1.)), dict(steps=9), dict(adapter=Adapter(full=True))], ids=str)
def test_other_settings_in_the_folder_are_refused(change, whole, data, goals):
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}
    with pytest.raises(ValueError): ground(data, goals, replace(CFG, **change), out=whole)
    assert before == {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}

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

@pytest.mark.parametrize("change", [dict(mix=(1., 1., 1.)), dict(mix=(0., 0., 0., 0.)), dict(mix=(1., -1., 1., 1.)), dict(steps=0), dict(batch_tokens=10), dict(adapter=dict(rank=0))], ids=str)
def test_bad_settings(change):
    with pytest.raises(ValueError): replace(CFG, **change)

def test_nothing_short_enough(data, goals, tiny):
    with pytest.raises(ValueError, match="max_length = 1"): Examples(tiny, data[data.lengths > 1], goals, replace(CFG, max_length=1))
