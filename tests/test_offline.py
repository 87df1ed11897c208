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
from kalm.offline import BC, GoalMLP, Policy, Replay, SentenceEncoder, bc_loss, load_policy

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
        rows = torch.cat([batch.states, batch.next_states, batch.rewards[:, None], batch.bootstrap[:, None]], 1)
        assert [r.numpy().tobytes() in real for r in rows] == [True] * 8 + [False] * 8

def test_one_source_alone_fills_the_batch_and_every_transition_is_drawn():
    for b in (replay(real=5), replay(real=0, imagined=5)):
        batch = b.sample(4000, torch_rng(0, "t"))
        assert len(batch.states.unique(dim=0)) == len(b.floats[:, :10].unique(dim=0)) == len(b)

def test_sampling_depends_on_the_generator_alone():
    b = replay(9, 9)
    one, two, three = (b.sample(8, torch_rng(s, "t")) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(one, two)) and not torch.equal(one.states, three.states)

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
    assert Replay([(done, GOALS)], encoder=Fake()).floats[:, -1].tolist() == [1, 0]
    assert Replay([(late, GOALS)], encoder=Fake()).floats[:, -1].tolist() == [1, 1]

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
    (lambda: replay(3).sample(0, torch_rng(0)), "at least 1"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message): make()


# ---------------------------------------------------------------- network and policy

def test_goal_part_equals_one_layer_on_the_concatenation():
    net = GoalMLP(6, torch_rng(0, "w"))
    s, e = torch.randn(5, 10, generator=torch_rng(1)), torch.randn(5, 6, generator=torch_rng(2))
    w = torch.cat([net.state.weight, net.goal.weight], 1)
    h = (torch.cat([s, e], 1) @ w.T + net.state.bias).relu()
    torch.testing.assert_close(net(s, e), net.out(net.hidden(h).relu()))
    assert w.abs().max() <= 1 / 4 and net.hidden.weight.abs().max() <= 1 / 16  # the concatenation's fan-in, 16, rules both parts

def test_networks_draw_nothing_from_the_global_generator():
    torch.manual_seed(0); want = torch.rand(1)
    torch.manual_seed(0); GoalMLP(6, torch_rng(0, "w")); BC().learner(replay(), 0)
    assert torch.equal(torch.rand(1), want)

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
