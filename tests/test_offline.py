"The sentence encoder's cache, the replay's mixture, behaviour cloning's loss, and exact resume."
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kalm.offline as offline
from kalm.core import IMAGINED, REAL, Rollouts, numpy_rng, read_csv, torch_rng
from kalm.cql import CQL
from kalm.goals import Goal
from kalm.offline import BC, GoalMLP, GoalMLPs, InverseDynamics, Policy, Replay, SentenceEncoder, Whitening, bc_loss, hindsight, load_policy

GOALS = [Goal.move("red", "blue", "behind"), Goal.move("green", "cyan", "left"), Goal.push("red", "front")]


class Fake:
    "An encoder that needs no model."
    name = "fake"
    def encode(self, texts): return np.stack([numpy_rng(0, t).normal(size=6) for t in texts]).astype(np.float32)


def rollouts(n, steps=4, source=REAL, seed=0, **over):
    rng = numpy_rng(seed, "rollouts", source)
    lengths = rng.integers(1, steps + 1, n)
    actions = np.where(np.arange(steps) < lengths[:, None], rng.integers(0, 40, (n, steps)), -1)
    ended = rng.random(n) < .5
    return Rollouts(**dict(states=rng.normal(size=(n, steps + 1, 10)), actions=actions, rewards=rng.normal(size=(n, steps)), lengths=lengths,
                           terminated=ended, truncated=~ended, goal=rng.integers(0, len(GOALS), n), source=np.full(n, source)) | over)


def replay(real=20, imagined=0):
    parts = [(rollouts(n, source=s), GOALS) for n, s in ((real, REAL), (imagined, IMAGINED)) if n]
    return Replay(parts, encoder=Fake())


# ---------------------------------------------------------------- encoder

@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A folder with a tiny random BERT."
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder = tmp_path_factory.mktemp("bert")
    (folder/"vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] push the red blue ball left and right please".split()))
    BertTokenizerFast(vocab_file=str(folder/"vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
    return folder

SENTENCES = ["push the red ball left", "push", "the blue ball and the red ball right please"]

def test_encoder_is_the_masked_mean_of_the_last_layer(bert, tmp_path):
    from transformers import AutoModel, AutoTokenizer
    got = SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES)
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for text, row in zip(SENTENCES, got):  # one sentence at a time: no padding, a plain mean
        with torch.no_grad(): mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    assert got.dtype == np.float32 and got.shape == (3, 16)

def test_a_known_sentence_needs_no_model(bert, tmp_path, monkeypatch):
    first = SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES)
    def no_model(self): raise AssertionError("the model was loaded")
    monkeypatch.setattr(offline, "_load_model", no_model)
    again = SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES[::-1])
    np.testing.assert_array_equal(first, again[::-1])
    with pytest.raises(AssertionError, match="loaded"): SentenceEncoder(bert, cache=tmp_path).encode(["blue"])

def test_a_damaged_cache_is_made_again_and_a_pickle_never_read(bert, tmp_path):
    encoder = SentenceEncoder(bert, cache=tmp_path); first = encoder.encode(SENTENCES)
    stored, = encoder.folder.glob("*.npz")
    stored.write_bytes(stored.read_bytes()[:100])
    class Payload:
        def __reduce__(self): return (tmp_path/"owned").touch, ()
    np.savez(encoder.folder/"evil.npz", keys=np.array([Payload()], object), rows=np.zeros((1, 16), np.float32))
    np.testing.assert_allclose(SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES), first, atol=1e-6)
    assert not (tmp_path/"owned").exists()

def test_other_weights_have_another_cache(bert, tmp_path):
    other = tmp_path/"other"; other.mkdir()
    for f in bert.iterdir(): (other/f.name).write_bytes(f.read_bytes())
    config = json.loads((other/"config.json").read_text()); (other/"config.json").write_text(json.dumps(config | {"layer_norm_eps": .1}))
    assert SentenceEncoder(bert, cache=tmp_path).folder != SentenceEncoder(other, cache=tmp_path).folder

@pytest.mark.parametrize("texts", [[""], ["  "], [None], [3], []])
def test_what_is_not_a_sentence_is_refused(texts, bert, tmp_path):
    with pytest.raises(ValueError, match="sentence"): SentenceEncoder(bert, cache=tmp_path).encode(texts)

def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path/"pytorch_model.bin").write_bytes(b"pickle"); (tmp_path/"config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"): SentenceEncoder(tmp_path)


# ---------------------------------------------------------------- replay

def test_every_batch_is_half_real_half_imagined():
    b, rng = replay(real=3, imagined=300), torch_rng(0, "t")
    real = {row.numpy().tobytes() for row in b.floats[:b.n_real]}
    for _ in range(20):
        batch = b.sample(16, rng)
        rows = torch.cat([batch.states, batch.next_states, *(x[:, None] for x in (batch.rewards, batch.bootstrap, batch.weights))], 1)
        assert [r.numpy().tobytes() in real for r in rows] == (~batch.imagined).tolist() == [True] * 8 + [False] * 8

def test_one_source_alone_fills_the_batch_and_every_transition_is_drawn():
    for b in (replay(real=5), replay(real=0, imagined=5)):
        batch = b.sample(4000, torch_rng(0, "t"))
        assert len(batch.states.unique(dim=0)) == len(b.floats[:, :10].unique(dim=0)) == len(b)

def test_sampling_depends_on_the_generator_alone():
    b = replay(9, 9)
    one, two, three = (b.sample(8, torch_rng(s, "t")) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(one, two)) and not torch.equal(one.states, three.states)

def test_draws_of_several_steps_and_seeds_are_those_of_one():
    b, rng = replay(9, 9), lambda: [torch_rng(s, "t") for s in (0, 1, 2)]
    at_once, one = b.draw(8, 5, rng()), rng(); assert at_once.shape == (5, 3, 8)
    for rows in at_once: assert torch.equal(rows, b.draw(8, 1, one)[0])
    for s, rows in enumerate(at_once.unbind(1)): assert torch.equal(rows, b.draw(8, 5, [torch_rng(s, "t")])[:, 0])
    batch = b.take(at_once); assert batch.states.shape == (5, 3, 8, 10) and batch.encodings.shape == (5, 3, 8, 6) and batch.imagined.shape == batch.weights.shape == (5, 3, 8)
    for x, y in zip(batch, b.take(at_once[2, 1])): assert torch.equal(x[2, 1], y)

@pytest.mark.parametrize("share, imagined", [(0., 0), (.25, 2), (.5, 4), (1., 8)])
def test_the_share_of_imagined_rows_is_as_asked(share, imagined):
    b = Replay([(rollouts(9), GOALS), (rollouts(9, source=IMAGINED), GOALS)], encoder=Fake(), share=share); rows = b.draw(8, 200, [torch_rng(0)])
    assert ((rows >= b.n_real).sum(-1) == imagined).all() and len(rows.unique()) == (b.n_real if share < 1 else 0) + (b.n_imagined if share else 0)
    assert b.fingerprint() != replay(9, 9).fingerprint() or share == .5

def test_weights_go_with_their_rollouts():
    r, dream = rollouts(9), rollouts(7, source=IMAGINED); w = numpy_rng(0).random(7)
    b = Replay([(dream, GOALS), (r, GOALS)], encoder=Fake(), weights=[w, None]); got = b.take(torch.arange(len(b)))
    np.testing.assert_array_equal(got.weights, np.concatenate([np.ones(b.n_real), np.repeat(w, dream.lengths)]).astype(np.float32)); assert b.fingerprint() != replay(9, 7).fingerprint()

def test_transitions_keep_their_goal_encoding():
    r = rollouts(12); t = r.transitions(); b = Replay([(r, GOALS)], encoder=Fake())
    want = Fake().encode([GOALS[g].text for g in t["goal"]])
    row = {s.tobytes(): i for i, s in enumerate(t["states"])}
    batch = b.sample(200, torch_rng(0, "t"))
    for s, e, a, n in zip(batch.states, batch.encodings, batch.actions, batch.next_states):
        i = row[s.numpy().tobytes()]
        np.testing.assert_array_equal(e, want[i]); np.testing.assert_array_equal(n, t["next_states"][i]); assert a == t["actions"][i]

def test_success_ends_the_future_and_a_time_limit_does_not():
    one = dict(states=np.arange(30).reshape(1, 3, 10) / 10, actions=[[1, 2]], goal=[0])
    done, late = Rollouts(**one, terminated=[True]), Rollouts(**one, truncated=[True])
    every = lambda r: (b := Replay([(r, GOALS)], encoder=Fake())).take(torch.arange(len(b)))
    assert every(done).bootstrap.tolist() == [1, 0] and every(late).bootstrap.tolist() == [1, 1] and every(late).weights.tolist() == [1, 1]

def test_sentences_are_stored_once_across_parts_with_different_goal_lists():
    b = Replay([(rollouts(8), GOALS), (rollouts(8, source=IMAGINED), GOALS[::-1] + GOALS)], encoder=Fake())
    assert len(b.encodings) == len(b.texts) == 3
    np.testing.assert_array_equal(b.encodings, Fake().encode(b.texts))

def test_given_encodings_equal_an_encoders():
    a = Replay([(rollouts(8), GOALS)], encoder=Fake()); b = Replay([(rollouts(8), GOALS)], encodings=[Fake().encode([g.text for g in GOALS])])
    assert a.fingerprint() == b.fingerprint() and a.encoder_name == "fake" and b.encoder_name is None

@dataclass
class Mute:
    text: str = " "

@pytest.mark.parametrize("make, message", [
    (lambda: Replay([], encoder=Fake()), "empty"),
    (lambda: Replay([(rollouts(3, lengths=np.zeros(3, int), actions=np.full((3, 4), -1)), GOALS)], encoder=Fake()), "empty"),
    (lambda: Replay([(rollouts(8), GOALS[:1])], encoder=Fake()), "list of 1"),
    (lambda: Replay([(rollouts(3, goal=[-1, 0, 0]), GOALS)], encoder=Fake()), "-1"),
    (lambda: Replay([(rollouts(3), [*GOALS[:2], Mute()])], encoder=Fake()), "no sentence"),
    (lambda: Replay([(rollouts(3, actions=np.full((3, 4), 40)), GOALS)], encoder=Fake()), "outside 0 to 39"),
    (lambda: Replay([(rollouts(3, states=np.zeros((3, 5, 9))), GOALS)], encoder=Fake()), "width 9"),
    (lambda: Replay([(rollouts(3, states=np.full((3, 5, 10), np.nan)), GOALS)], encoder=Fake()), "NaN"),
    (lambda: Replay([(rollouts(3), GOALS)], encodings=[np.zeros((2, 6))]), r"\(2, 6\)"),
    (lambda: Replay([(rollouts(3), GOALS)], encodings=[np.full((3, 6), np.nan)]), "NaN"),
    (lambda: Replay([(rollouts(3), GOALS)], encodings=[]), "one a part"),
    (lambda: Replay([(rollouts(3), GOALS)] * 2, encodings=[np.zeros((3, 6)), np.ones((3, 7))]), "widths"),
    (lambda: replay(3, 3).sample(5, torch_rng(0)), "even"),
    (lambda: Replay([(rollouts(3), GOALS)], encoder=Fake(), share=1.5), "share=1.5"),
    (lambda: Replay([(rollouts(3), GOALS)], encoder=Fake(), weights=[np.ones(4)]), r"weights of part 0 of shape \(4,\): expected \(3,\)"),
    (lambda: Replay([(rollouts(3), GOALS)], encoder=Fake(), weights=[[1, -1, 1]]), "at least 0"),
    (lambda: BC().fit(replay(3), steps=2, seed=[]), "seeds"), (lambda: BC().fit(replay(3), steps=2, seed=[1, 1]), "no two alike"),
    (lambda: replay(3).sample(0, torch_rng(0)), "at least 1"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message): make()


# ---------------------------------------------------------------- network and policy

def test_goal_part_equals_one_layer_on_the_concatenation():
    net = GoalMLP(6, torch_rng(0, "w"))
    s, e = torch.randn(5, 10, generator=torch_rng(1)), torch.randn(5, 6, generator=torch_rng(2))
    w = torch.cat([net.state.weight, net.goal.weight], 1)
    h = (torch.cat([s, e], 1) @ w.T + net.goal.bias).relu()
    torch.testing.assert_close(net(s, e), net.out(net.hidden(h).relu()))
    assert w.abs().max() <= 1 / 4 and net.hidden.weight.abs().max() <= 1 / 16  # the concatenation's fan-in, 16, rules both parts

def test_networks_draw_nothing_from_the_global_generator():
    torch.manual_seed(0); want = torch.rand(1)
    torch.manual_seed(0); GoalMLP(6, torch_rng(0, "w")); BC().learner(replay(), [0, 1])
    assert torch.equal(torch.rand(1), want)

def side_by_side(n=3, dtype=torch.float32):
    nets = [GoalMLP(6, torch_rng(k, "w"), hidden=16) for k in range(n)]
    return nets, GoalMLPs(nets, dtype), torch.randn(n, 5, 10, generator=torch_rng(1)), torch.randn(n, 5, 6, generator=torch_rng(2))

def test_networks_side_by_side_are_those_alone():
    nets, many, s, e = side_by_side(); want = torch.stack([net(a, b) for net, a, b in zip(nets, s, e)])
    torch.testing.assert_close(many(s, e), want); torch.testing.assert_close(many.from_part(s, many.goal_part(e)), want)
    for k, net in enumerate(nets): assert all(torch.equal(a, b) for a, b in zip(many.one(k).parameters(), net.parameters(), strict=True)) and many.one(k).sizes == net.sizes
    (many(s, e)[1].sum()).backward(); assert all(p.grad[1].abs().sum() > 0 and not p.grad[[0, 2]].any() for p in many.parameters())   # a seed's loss moves that seed alone
    rough = side_by_side(dtype=torch.bfloat16)[1](s, e); assert rough.dtype == torch.float32 and 1e-6 < (rough - want).abs().max() < .02

def test_policy_round_trip(tmp_path):
    policy = BC().fit(replay(), steps=3)
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    s, e = numpy_rng(0).normal(size=(50, 10)), numpy_rng(1).normal(size=(50, 6))
    actions = policy(s, e)
    assert actions.dtype == np.int64 and actions.shape == (50,)
    np.testing.assert_array_equal(actions, again(s, e))
    assert (again.algorithm, again.encoder_name, again.step) == ("bc", "fake", 3)

@pytest.mark.parametrize("s, e", [((5, 9), (5, 6)), ((5, 10), (5, 7)), ((5, 10), (4, 6)), ((10,), (6,))])
def test_policy_refuses_wrong_shapes(s, e):
    with pytest.raises(ValueError, match="expected"): Policy(GoalMLP(6))(np.zeros(s), np.zeros(e))

def test_policy_refuses_nan():
    with pytest.raises(ValueError, match="NaN"): Policy(GoalMLP(6))(np.full((1, 10), np.nan), np.zeros((1, 6)))

def test_damaged_or_foreign_policies_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError): load_policy(tmp_path)
    Policy(GoalMLP(6)).save(tmp_path); f = tmp_path/"policy.safetensors"; whole = f.read_bytes()
    f.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="policy.safetensors"): load_policy(tmp_path)
    f.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"): load_policy(tmp_path)
    torch.save({"a": torch.zeros(1)}, f)  # a pickle in disguise
    with pytest.raises(ValueError, match="policy.safetensors"): load_policy(tmp_path)


# ---------------------------------------------------------------- behaviour cloning

def test_bc_loss_against_numpy():
    rng = numpy_rng(0); z, a = rng.normal(size=(7, 40)), rng.integers(0, 40, 7)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    got = bc_loss(torch.tensor(z), torch.tensor(a), beta=.3)
    nll, penalty = -log_p[np.arange(7), a].mean(), (log_p ** 2).mean()
    np.testing.assert_allclose([got.loss, got.imitation, got.penalty, got.accuracy], [nll + .3 * penalty, nll, penalty, (z.argmax(1) == a).mean()])

def test_bc_loss_gradient():
    z, a = torch.randn(3, 5, dtype=torch.float64, generator=torch_rng(0)).requires_grad_(), torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: bc_loss(z, a).loss, (z,))

def test_bc_learns_which_goal_wants_which_action():
    n = 60; goal = np.arange(n) % 3
    r = Rollouts(states=numpy_rng(0).normal(size=(n, 2, 10)), actions=(goal * 7)[:, None], goal=goal)
    encodings = np.eye(3, 6, dtype=np.float32)
    policy = BC().fit(Replay([(r, GOALS)], encodings=[encodings]), steps=150)
    assert (policy(numpy_rng(1).normal(size=(n, 10)), encodings[goal]) == goal * 7).mean() > .95


# ---------------------------------------------------------------- the loop, for both algorithms

ALGORITHMS = [BC(batch_size=8, hidden=16), CQL(batch_size=8, hidden=16, target_every=7)]
LOOP = dict(log_every=4, checkpoint_every=8)

@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_interrupted_equals_uninterrupted(algorithm, tmp_path):
    whole = algorithm.fit(replay(9, 9), steps=30, out=tmp_path/"whole", **LOOP)
    class Kill(Exception): pass
    def kill(policy, step):
        if step == 20: raise Kill   # after the checkpoint of step 16 and four more steps
    with pytest.raises(Kill): algorithm.fit(replay(9, 9), steps=30, out=tmp_path/"cut", callback=kill, callback_every=4, **LOOP)
    assert len(read_csv(tmp_path/"cut/curve.csv")) == 5
    stopped = algorithm.fit(replay(9, 9), steps=30, out=tmp_path/"cut", max_minutes=0, **LOOP)
    assert stopped.step == 20
    resumed = algorithm.fit(replay(9, 9), steps=30, out=tmp_path/"cut", **LOOP)
    assert resumed.step == whole.step == 30
    for name in ("checkpoint.safetensors", "policy.safetensors"):
        a, b = load_file(tmp_path/"whole"/name), load_file(tmp_path/"cut"/name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path/"whole/curve.csv").read_text() == (tmp_path/"cut/curve.csv").read_text()

@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_curve_holds_the_fields_of_the_loss(algorithm, tmp_path):
    algorithm.fit(replay(), steps=10, out=tmp_path, **LOOP)
    rows = read_csv(tmp_path/"curve.csv")
    names = {"bc": ["loss", "imitation", "penalty", "accuracy"], "cql": ["loss", "td", "conservative", "q"]}[algorithm.name]
    assert list(rows[0]) == ["step", *names] and [int(r["step"]) for r in rows] == [4, 8, 10]

def test_finished_run_is_not_trained_again(tmp_path):
    a = BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    before = (tmp_path/"checkpoint.safetensors").read_bytes()
    b = BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    assert before == (tmp_path/"checkpoint.safetensors").read_bytes()
    assert all(torch.equal(x, y) for x, y in zip(a.net.parameters(), b.net.parameters()))

@pytest.mark.parametrize("other, message", [
    (lambda out: BC(hidden=16, lr=1.).fit(replay(), steps=9, out=out), "lr was 0.001, is 1.0"),
    (lambda out: BC(hidden=16).fit(replay(), steps=9, seed=1, out=out), "seed"),
    (lambda out: BC(hidden=16).fit(replay(21), steps=9, out=out), "data"),
    (lambda out: CQL(hidden=16).fit(replay(), steps=9, out=out), "algorithm"),
    (lambda out: BC(hidden=16).fit(replay(), steps=5, out=out), "already holds 6"),
])
def test_another_run_in_the_same_folder_is_refused(other, message, tmp_path):
    BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message): other(tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}

def test_damaged_checkpoint_is_refused(tmp_path):
    BC(hidden=16).fit(replay(), steps=6, out=tmp_path); f = tmp_path/"checkpoint.safetensors"
    f.write_bytes(f.read_bytes()[:-10])
    with pytest.raises(ValueError, match="checkpoint.safetensors"): BC(hidden=16).fit(replay(), steps=9, out=tmp_path)

def test_full_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    before = (tmp_path/"checkpoint.safetensors").read_bytes()
    def full(tensors, path, metadata=None):
        path.write_bytes(b"half"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(offline, "save_file", full)
    with pytest.raises(OSError): BC(hidden=16).fit(replay(), steps=12, out=tmp_path)
    assert before == (tmp_path/"checkpoint.safetensors").read_bytes() and not list(tmp_path.glob("*.tmp"))

@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_seeds_side_by_side_are_seeds_alone(algorithm, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "fast_dtype", lambda device: torch.float32); b = replay(9, 9); seen = []
    many = algorithm.fit(b, steps=12, seed=[4, 0, 7], out=tmp_path/"many", callback=lambda ps, step: seen.append((step, ps)), callback_every=8, **LOOP)
    assert [s for s, _ in seen] == [8, 12] and all(len(ps) == 3 for _, ps in seen) and sorted(f.name for f in tmp_path.iterdir()) == ["many", "many-0", "many-4", "many-7"]
    for s, policy in zip((4, 0, 7), many):
        alone = algorithm.fit(b, steps=12, seed=s, out=tmp_path/f"{s}", **LOOP); assert policy.step == 12
        for x, y, z in zip(policy.net.parameters(), alone.net.parameters(), load_policy(tmp_path/f"many-{s}").net.parameters(), strict=True): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5); assert torch.equal(x, z)
        for a, c in zip(read_csv(tmp_path/f"many-{s}/curve.csv"), read_csv(tmp_path/f"{s}/curve.csv"), strict=True): assert {k: float(v) for k, v in c.items()} == pytest.approx({k: float(v) for k, v in a.items()}, rel=1e-3, abs=1e-4)

def test_several_seeds_are_continued_together(tmp_path):
    whole, seeds = BC(hidden=16, batch_size=8).fit(replay(9, 9), steps=24, seed=[0, 1], **LOOP), [0, 1]
    out = tmp_path/"run"; part = BC(hidden=16, batch_size=8).fit(replay(9, 9), steps=24, seed=seeds, out=out, max_minutes=0, **LOOP); rest = BC(hidden=16, batch_size=8).fit(replay(9, 9), steps=24, seed=seeds, out=out, **LOOP)
    assert [p.step for p in part] == [4, 4] and all(torch.equal(x, y) for a, b in zip(whole, rest) for x, y in zip(a.net.parameters(), b.net.parameters())) and len(read_csv(tmp_path/"run-1/curve.csv")) == 6
    with pytest.raises(ValueError, match="seed"): BC(hidden=16, batch_size=8).fit(replay(9, 9), steps=24, seed=[0, 2], out=out, **LOOP)

@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_what_weighs_nothing_is_not_learnt(algorithm):
    "A second part of weight 0 changes nothing but which rows are drawn."
    r, dream = rollouts(9), rollouts(9, source=IMAGINED); w = np.zeros(9); loss = lambda actions: algorithm.learner(b := Replay([(r, GOALS), (Rollouts(**vars(dream) | dict(actions=actions)), GOALS)], encoder=Fake(), weights=[None, w]), [0]).loss(b.take(b.draw(8, 1, [torch_rng(0)])[0])).loss
    other = np.where(dream.actions >= 0, (dream.actions + 1) % 40, -1); assert torch.equal(loss(dream.actions), loss(other)); w[:] = 1; assert not torch.equal(loss(dream.actions), loss(other))

def test_seeds_differ_and_repeat():
    w = lambda seed: BC(hidden=16).fit(replay(), steps=3, seed=seed).net.out.weight
    assert torch.equal(w(0), w(0)) and not torch.equal(w(0), w(1))

def test_callback_sees_snapshots():
    seen = []
    last = BC(hidden=16).fit(replay(), steps=10, callback=lambda p, step: seen.append((p, step)), callback_every=4)
    assert [s for _, s in seen] == [p.step for p, _ in seen] == [4, 8, 10]
    assert torch.equal(seen[-1][0].net.out.weight, last.net.out.weight) and not torch.equal(seen[0][0].net.out.weight, seen[1][0].net.out.weight)

def test_nan_loss_stops_training(tmp_path):
    with pytest.raises(RuntimeError, match="learning rate"): CQL(hidden=16, lr=1e30).fit(replay(), steps=40, out=tmp_path, **LOOP)

def test_threads_are_given_back():
    n = torch.get_num_threads(); BC(hidden=16).fit(replay(), steps=2)
    assert torch.get_num_threads() == n

@pytest.mark.parametrize("over", [dict(steps=0), dict(steps=5, callback_every=0), dict(steps=5, log_every=0)])
def test_bad_loop_settings(over):
    with pytest.raises(ValueError, match="at least 1"): BC().fit(replay(), **over)


# ---------------------------------------------------------------- more from the same data

MOVES = [Goal.move("red", "blue", "left"), Goal.move("blue", "red", "right", text="Blue to red's right, please."), Goal.move("red", "blue", "left", text="Red left of blue!"), Goal.move("green", "cyan", "behind")]

def test_hindsight_tells_a_success_of_goals_that_were_met_on_the_way():
    r = rollouts(60, steps=9); r = Rollouts(**vars(r) | dict(states=.3 * r.states)); h = hindsight(r, MOVES, 40, seed=1); assert len(h) == 40 and h.terminated.all() and not h.truncated.any() and len(set(h.goal)) == 4
    where = {s.tobytes(): (one, t) for one in r for t, s in enumerate(one.states)}
    for one in h:
        g, n, (was, t) = MOVES[one.goal], len(one), where[one.states[0].tobytes()]
        assert g.success(one.states[-1]) and not any(g.success(s) for s in one.states[:-1]); np.testing.assert_array_equal(one.states, was.states[t:t + n + 1]); np.testing.assert_array_equal(one.actions, was.actions[t:t + n])
        assert t == 0 or g.success(was.states[t - 1])                                                   # as long as it can be
        np.testing.assert_allclose(one.rewards, [g.reward(a, b) for a, b in zip(one.states, one.states[1:])], rtol=1e-4, atol=1e-5)
    assert max(h.lengths) > 2 >= max(hindsight(r, MOVES, 40, within=2).lengths)
    assert len({(o.goal, o.states.tobytes(), o.actions.tobytes()) for o in h}) == 40 and len(hindsight(r, MOVES, 5000)) == 5000                     # without repetition as long as there are enough
    with pytest.raises(ValueError, match="none of these"): hindsight(Rollouts(**vars(r) | dict(states=0 * r.states)), MOVES, 3)

def test_inverse_dynamics_finds_the_action_between_two_states():
    rng = numpy_rng(0, "inverse"); s = rng.normal(size=(400, 2, 10)).astype(np.float32); a = rng.integers(0, 4, 400); s[:, 1] = s[:, 0]; s[np.arange(400), 1, a] += .1
    r = Rollouts(s, a[:, None], goal=np.zeros(400)); model = InverseDynamics(r[:300], steps=400, n_actions=4); t = r[300:].transitions(); assert (model(t["states"], t["next_states"]) == t["actions"]).mean() > .95
    wrong = Rollouts(s, ((a + 1) % 4)[:, None], goal=np.zeros(400)); mended = model.relabel(wrong); assert (mended.actions[:, 0] == a).mean() > .95 and np.array_equal(mended.states, wrong.states) and (wrong.actions[:, 0] == (a + 1) % 4).all()


# ---------------------------------------------------------------- whitened encodings, sampled actions

def rows_of(n=300, d=6, seed=0): return (numpy_rng(seed, "rows").normal(size=(n, d)) * 3. ** -np.arange(d) + 2).astype(np.float32)

@pytest.mark.parametrize("power, shape", [(0, 1), (.5, .5), (1, 0)])
def test_whitening_evens_out_the_axes(power, shape):
    x = rows_of(); y = Whitening.fit(x, power)(x); spread = lambda z: np.linalg.svd(z - z.mean(0), compute_uv=False); before, after = spread(x), spread(y)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-3); assert (y ** 2).mean() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(after / after[0], (before / before[0]) ** shape, rtol=1e-3)

def test_whitening_of_few_sentences_is_finite():
    y = Whitening.fit(rows_of(3), 1.)(rows_of(9, seed=1)); assert np.isfinite(y).all() and np.isfinite(Whitening.fit(rows_of(1), .5)(rows_of(2))).all()

def test_a_policy_trained_on_whitened_encodings_takes_them_as_they_are():
    w = Whitening.fit(np.stack([Fake().encode([g.text])[0] for g in GOALS] + list(rows_of(9))), .5); parts = [(rollouts(20), GOALS)]
    plain, white = (Replay(parts, encoder=Fake(), whitening=x) for x in (None, w)); np.testing.assert_allclose(white.encodings, w(plain.encodings.numpy()), rtol=1e-5)
    inside = BC().learner(white, [0]).net.one(0); policy = BC().fit(white, steps=1, seed=0); b, c = (r.take(torch.arange(20)) for r in (plain, white)); learner = BC().learner(white, [0])
    torch.testing.assert_close(inside(c.states, c.encodings), learner.net.one(0).absorb(w)(b.states, b.encodings), rtol=1e-4, atol=1e-4)
    assert plain.fingerprint() != white.fingerprint() and policy.net.sizes["encoding_dim"] == 6

def test_actions_are_drawn_from_the_softmax():
    net = GoalMLP(6, torch_rng(3, "w")); s, e = np.zeros((20_000, 10)), np.ones((20_000, 6)); out = net(torch.zeros(1, 10), torch.ones(1, 6))[0].detach(); T = .05
    drawn = Policy(net, temperature=T, seed=1)(s, e); share = np.bincount(drawn, minlength=40) / len(drawn)
    np.testing.assert_allclose(share, (out / T).softmax(0).numpy(), atol=.012); assert set(Policy(net)(s, e)) == {int(out.argmax())}
    np.testing.assert_array_equal(drawn, Policy(net, temperature=T, seed=1)(s, e)); assert (drawn != Policy(net, temperature=T, seed=2)(s, e)).any()

def test_the_temperature_of_an_algorithm_is_its_policys(tmp_path):
    BC(temperature=.3).fit(replay(), steps=2, out=tmp_path); assert load_policy(tmp_path).temperature == .3 and BC().fit(replay(), steps=2).temperature == 0
