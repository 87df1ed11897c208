"The loop: exact resume, curves, seeds side by side, folders that belong to one run; one network or several."

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import BOX, FOUR, GOALS, Fake, replay, rollouts
from torch import nn

import kalm.rl.train as module
import kalm.tensors.store as store
from kalm.core.actions import DiscreteActions
from kalm.core.files import numpy_rng, read_csv
from kalm.core.rollouts import IMAGINED, Rollouts
from kalm.rl.bc import BC
from kalm.rl.cql import CQL
from kalm.rl.policy import Policy, scaled_actions
from kalm.rl.replay import Replay
from kalm.rl.td3bc import TD3BC
from kalm.rl.train import Every, Learner, adam, goal_mlps, steps_per_second, train
from kalm.tensors.store import torch_rng


@dataclass(frozen=True)
class ToyLoss:
    loss: torch.Tensor
    critic: torch.Tensor
    actor: torch.Tensor
    alpha: torch.Tensor


class ToyLearner(Learner):
    "All that an actor-critic method needs: target network, learned number, noise, a slower actor."

    def __init__(self, toy, b, seeds):
        def fresh(what, outputs, inputs=None):
            return goal_mlps(b, [torch_rng(s, "toy", what) for s in seeds], outputs, inputs, toy.hidden)

        k = b.codec.k
        critic = fresh("critic", 1, b.state_dim + k)
        nets = dict(
            actor=fresh("actor", k),
            critic=critic,
            target=deepcopy(critic).requires_grad_(False),
            temperature=nn.ParameterDict({"log_alpha": nn.Parameter(torch.zeros(len(seeds)))}),
        )
        optimisers = {name: adam(nets[name].parameters(), toy.lr) for name in ("actor", "critic", "temperature")}
        super().__init__(
            nets, optimisers, "actor", "deterministic", dict(noise=[torch_rng(s, "toy", "noise") for s in seeds])
        )
        self.codec = b.codec

    def refresh(self):
        self.refreshed = self.steps

    def update(self, batch):
        nets, noise = self.networks, self.normal("noise", *batch.actions.shape[1:])
        actions = scaled_actions(batch.actions, self.codec)
        shaken = (actions + 0.1 * noise).clamp(-1, 1)
        q = nets["critic"](torch.cat([batch.states, shaken], -1), batch.encodings)[..., 0]
        with torch.no_grad():
            y = (
                batch.rewards
                + 0.9
                * batch.bootstrap
                * nets["target"](torch.cat([batch.next_states, actions], -1), batch.encodings)[..., 0]
            )
        critic = (q - y).square().mean(-1)
        self.minimise("critic", critic)
        alpha = nets["temperature"]["log_alpha"]
        self.minimise("temperature", (alpha - critic.detach()).square())
        actor = torch.full_like(critic, torch.nan)
        if self.steps % 2 == 0:
            mine = nets["actor"](batch.states, batch.encodings).tanh()
            actor = -nets["critic"](torch.cat([batch.states, mine], -1), batch.encodings)[..., 0].mean(-1)
            self.minimise("actor", actor)
            with torch.no_grad():
                for t, p in zip(nets["target"].parameters(), nets["critic"].parameters()):
                    t.lerp_(p, 0.1)
        return ToyLoss(critic, critic, actor, alpha.exp())


@dataclass(frozen=True)
class Toy:
    batch_size: int = 8
    lr: float = 1e-3
    hidden: int = 16
    temperature: float = 0.0
    name = "toy"

    def learner(self, b, seeds):
        return ToyLearner(self, b, seeds)

    def fit(self, b, **kw):
        return train(self, b, **kw)


CASES = {
    "bc": (BC(batch_size=8, hidden=16), {}),
    "bc-box": (BC(batch_size=8, hidden=16), dict(codec=BOX)),
    "bc-averaged": (BC(batch_size=8, hidden=16, averaging=0.1), {}),
    "toy": (Toy(), dict(codec=BOX)),
}
LOOP = dict(every=Every(log=4, checkpoint=8))
all_cases = pytest.mark.parametrize("algorithm, kind", CASES.values(), ids=CASES)


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Kill(Exception):
    pass


@all_cases
def test_interrupted_equals_uninterrupted(algorithm, kind, tmp_path):
    b, every = replay(9, 9, imagined_fraction=0.5, **kind), Every(4, 8, callback=5)
    whole = algorithm.fit(b, steps=30, out=tmp_path / "whole", **LOOP)

    def kill(policy, step):
        if step == 20:  # after the checkpoint of step 16 and four more steps
            raise Kill

    with pytest.raises(Kill):
        algorithm.fit(b, steps=30, out=tmp_path / "cut", callback=kill, every=every)
    assert [r["step"] for r in read_csv(tmp_path / "cut/curve.csv")] == ["4", "8", "12", "16"]
    stopped = algorithm.fit(b, steps=30, out=tmp_path / "cut", max_minutes=0, **LOOP)
    assert stopped.step == 20
    resumed = algorithm.fit(b, steps=30, out=tmp_path / "cut", **LOOP)
    assert resumed.step == whole.step == 30
    for name in ("training.safetensors", "policy.safetensors"):
        assert same_tensors(tmp_path / "whole" / name, tmp_path / "cut" / name)
    for name in ("curve.csv", "request.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "cut" / name).read_text()


@pytest.mark.parametrize("algorithm", [BC(8, hidden=16, head="deterministic"), TD3BC(8, hidden=16), CQL(8, hidden=16)])
def test_an_average_acts_and_what_is_trained_stays_the_same(algorithm, tmp_path):
    b, averaged = replay(9, 9, codec=BOX), replace(algorithm, averaging=0.3)
    for steps, same in ((1, True), (12, False)):   # the mean of one step's weights is these
        plain = algorithm.fit(b, steps=steps, out=tmp_path / f"plain-{steps}")
        mean = averaged.fit(b, steps=steps, out=tmp_path / f"mean-{steps}")
        trained = [load_file(tmp_path / f"{name}-{steps}/training.safetensors") for name in ("plain", "mean")]
        assert all(torch.equal(trained[0][k], trained[1][k]) for k in trained[0])
        pairs = list(zip(plain.net.parameters(), mean.net.parameters()))
        assert all(torch.equal(p, q) for p, q in pairs) is same


@all_cases
def test_seeds_side_by_side_are_seeds_alone(algorithm, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fast_dtype", lambda device: torch.float32)
    b, seen = replay(9, 9, imagined_fraction=0.5, **kind), []
    many = algorithm.fit(
        b,
        steps=12,
        seed=[4, 0, 7],
        out=tmp_path / "many",
        every=Every(4, 8, 8),
        callback=lambda ps, step: seen.append((step, ps)),
    )
    assert [s for s, _ in seen] == [8, 12] and all(len(ps) == 3 for _, ps in seen)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["many", "many-0", "many-4", "many-7"]
    for s, policy in zip((4, 0, 7), many):
        alone = algorithm.fit(b, steps=12, seed=s, out=tmp_path / f"{s}", **LOOP)
        again = Policy.load(tmp_path / f"many-{s}", encoder=Fake())
        assert policy.step == 12 and policy.seed == again.seed == s
        for x, y, z in zip(*(p.net.parameters() for p in (policy, alone, again)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
            assert torch.equal(x, z)
        for a, c in zip(read_csv(tmp_path / f"many-{s}/curve.csv"), read_csv(tmp_path / f"{s}/curve.csv"), strict=True):
            assert {k: float(v) for k, v in c.items()} == pytest.approx(
                {k: float(v) for k, v in a.items()}, rel=1e-3, abs=1e-4
            )


def test_several_seeds_are_continued_together(tmp_path):
    b, seeds, out = replay(9, 9), [0, 1], tmp_path / "run"
    bc = BC(hidden=16, batch_size=8)
    whole = bc.fit(b, steps=24, seed=seeds, **LOOP)
    part = bc.fit(b, steps=24, seed=seeds, out=out, max_minutes=0, **LOOP)
    rest = bc.fit(b, steps=24, seed=seeds, out=out, **LOOP)
    assert [p.step for p in part] == [4, 4] and len(read_csv(tmp_path / "run-1/curve.csv")) == 6
    assert all(torch.equal(x, y) for a, b in zip(whole, rest) for x, y in zip(a.net.parameters(), b.net.parameters()))
    with pytest.raises(ValueError, match="seeds"):
        bc.fit(b, steps=24, seed=[0, 2], out=out, **LOOP)
    assert not (tmp_path / "run-2").exists()


def test_a_seed_does_not_overwrite_another_runs_policy(tmp_path):
    BC(hidden=16).fit(replay(), steps=2, out=tmp_path / "run-1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run-1").iterdir()}
    with pytest.raises(ValueError, match="run-1 holds"):
        BC(hidden=16).fit(replay(), steps=2, seed=[0, 1], out=tmp_path / "run")
    assert (
        before == {p.name: p.read_bytes() for p in (tmp_path / "run-1").iterdir()} and not (tmp_path / "run").exists()
    )


def test_the_curve_holds_the_fields_of_the_loss(tmp_path):
    columns = {
        "bc": ["loss", "imitation", "penalty", "accuracy"],
        "bc-box": ["loss", "error", "std"],
        "bc-averaged": ["loss", "imitation", "penalty", "accuracy"],
        "toy": ["loss", "critic", "actor", "alpha"],
    }
    for name, (algorithm, kind) in CASES.items():
        algorithm.fit(replay(**kind), steps=10, out=tmp_path / name, **LOOP)
        rows = read_csv(tmp_path / name / "curve.csv")
        assert list(rows[0]) == ["step", *columns[name]] and [int(r["step"]) for r in rows] == [4, 8, 10]
        assert all(np.isfinite(float(v)) for r in rows for v in r.values())  # a step without an actor loss is left out


def test_a_row_of_the_curve_is_the_mean_over_its_steps(tmp_path):
    b = replay()
    BC(hidden=16).fit(
        b, steps=6, out=tmp_path, every=Every(log=4, checkpoint=1, callback=3), callback=lambda p, step: None
    )
    learner, rngs = BC(hidden=16).learner(b, [0]), [torch_rng(0, "bc", "batches")]
    losses = [learner.step(b.take(rows)).loss.item() for rows in b.draw(100, 6, rngs)]
    got = [float(r["loss"]) for r in read_csv(tmp_path / "curve.csv")]
    assert got == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], rel=1e-5)


def test_a_finished_run_is_not_trained_again(tmp_path):
    a = BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()
    b = BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    assert before == (tmp_path / "training.safetensors").read_bytes()
    assert all(torch.equal(x, y) for x, y in zip(a.net.parameters(), b.net.parameters()))


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda out: BC(hidden=16, lr=1.0).fit(replay(), steps=9, out=out), "lr was 0.001, is 1.0"),
        (lambda out: BC(hidden=16).fit(replay(), steps=9, seed=1, out=out), "seed"),
        (lambda out: BC(hidden=16).fit(replay(21), steps=9, out=out), "data"),
        (lambda out: Toy().fit(replay(codec=BOX), steps=9, out=out), "algorithm"),
        (lambda out: BC(hidden=16).fit(replay(), steps=5, out=out), "already holds 6"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(other, message, tmp_path):
    BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        other(tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize("damage", [lambda raw: raw[:-10], lambda raw: raw[:-10] + bytes([raw[-10] ^ 1]) + raw[-9:]])
def test_a_damaged_training_state_is_refused(damage, tmp_path):
    BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    f = tmp_path / "training.safetensors"
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match="training.safetensors"):
        BC(hidden=16).fit(replay(), steps=9, out=tmp_path)


def test_a_full_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    BC(hidden=16).fit(replay(), steps=6, out=tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError):
        BC(hidden=16).fit(replay(), steps=12, out=tmp_path)
    assert before == (tmp_path / "training.safetensors").read_bytes() and not list(tmp_path.glob("*.tmp"))


def test_seeds_differ_and_repeat():
    def w(seed):
        return BC(hidden=16).fit(replay(), steps=3, seed=seed).net.out.weight

    assert torch.equal(w(0), w(0)) and not torch.equal(w(0), w(1))


def test_callbacks_see_snapshots():
    seen = []
    last = BC(hidden=16).fit(
        replay(), steps=10, every=Every(callback=4), callback=lambda p, step: seen.append((p, step))
    )
    assert [s for _, s in seen] == [p.step for p, _ in seen] == [4, 8, 10]
    weights = [p.net.out.weight for p, _ in seen]
    assert torch.equal(weights[-1], last.net.out.weight) and not torch.equal(weights[0], weights[1])
    seen.clear()
    BC(hidden=16).fit(replay(), steps=10, callback=lambda p, step: seen.append(step))
    assert seen == [10]


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    with pytest.raises(RuntimeError, match="toy: the loss is .* learning rate"):
        Toy(lr=1e30).fit(replay(codec=BOX), steps=40, out=tmp_path, **LOOP)
    assert not (tmp_path / "policy.safetensors").exists()


def test_threads_are_given_back():
    n = torch.get_num_threads()
    BC(hidden=16).fit(replay(), steps=2)
    assert torch.get_num_threads() == n


def test_two_do_not_train_in_one_folder(tmp_path):
    "Both would succeed, and the curves hold every row twice."
    def intrude(policy, step):
        with pytest.raises(RuntimeError, match="another process works in"):
            BC(hidden=16).fit(replay(), steps=4, out=tmp_path)

    BC(hidden=16).fit(replay(), steps=4, out=tmp_path, callback=intrude, every=Every(log=2))
    assert [row["step"] for row in read_csv(tmp_path/"curve.csv")] == ["2", "4"]
    assert not (tmp_path/".lock").exists()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda out: BC().fit(replay(3), steps=0, out=out), "at least 1"),
        (lambda out: BC().fit(replay(3), steps=2, seed=[], out=out), "seeds"),
        (lambda out: BC().fit(replay(3), steps=2, seed=[1, 1], out=out), "no two alike"),
        (lambda out: BC(batch_size=5).fit(replay(3, 3), steps=2, out=out), "even"),
        (lambda out: Every(log=0), "log 0: expected a whole number"),
        (lambda out: Every(callback=0), "at least 1"),
    ],
)
def test_bad_settings_leave_nothing_behind(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_minimise_moves_its_own_parameters_alone():
    b = replay(codec=BOX)
    learner = Toy().learner(b, [0, 1])
    before = {k: v.clone() for k, v in learner.tensors().items()}
    batch = b.take(b.draw(8, 1, [torch_rng(s) for s in (0, 1)])[0])
    mine = learner.networks["actor"](batch.states, batch.encodings).tanh()
    q = learner.networks["critic"](torch.cat([batch.states, mine], -1), batch.encodings)
    learner.minimise("actor", q.mean((-2, -1)))
    after = learner.tensors()
    moved = {k.split(".")[1] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"actor"} and all(p.grad is None for p in learner.networks["critic"].parameters())


def test_noise_comes_from_each_seeds_own_stream():
    b = replay(codec=BOX)
    both, one = Toy().learner(b, [0, 1]), Toy().learner(b, [1])
    assert torch.equal(both.normal("noise", 3, 2)[1], one.normal("noise", 3, 2)[0])
    assert both.normal("noise", 3, 2).shape == (2, 3, 2)


def test_loading_refreshes_what_is_derived():
    b = replay(codec=BOX)
    learner = Toy().learner(b, [0])
    learner.step(b.take(b.draw(8, 1, [torch_rng(0)])[0]))
    other = Toy().learner(b, [0])
    other.load(learner.tensors(), 1)
    assert other.refreshed == 1 and all(torch.equal(v, other.tensors()[k]) for k, v in learner.tensors().items())


def test_steps_per_second_counts_all_seeds():
    assert steps_per_second(BC(hidden=16), replay(), steps=20, seed=[0, 1]) > 0


def test_imagined_data_change_the_result():
    real, imagined = rollouts(9), rollouts(9, source=IMAGINED)
    one, two = (
        BC(hidden=16, batch_size=8).fit(Replay([real, imagined], f, encoder=Fake()), steps=3) for f in (0.25, 0.5)
    )
    assert not torch.equal(one.net.out.weight, two.net.out.weight)
    assert replace(BC(), lr=0.1) != BC()


def test_a_learner_that_continues_shares_nothing_with_the_first():
    b = replay(codec=BOX)
    learner, other = Toy().learner(b, [0]), Toy().learner(b, [0])
    batches = [b.take(rows) for rows in b.draw(8, 3, [torch_rng(0)])]
    learner.step(batches[0])
    other.load(learner.tensors(), 1)
    for batch in batches[1:]:
        assert torch.equal(learner.step(batch).loss, other.step(batch).loss)
    assert all(torch.equal(v, other.tensors()[k]) for k, v in learner.tensors().items())


@pytest.mark.parametrize("codec, algorithms", [(FOUR, (BC(), CQL())), (BOX, (BC(), CQL.continuous(), TD3BC()))])
def test_units_do_not_matter(codec, algorithms):
    "Microns instead of metres, cents instead of euros: the same policy."
    r = rollouts(40, codec=codec)
    other = replace(r, states=r.states * 1e-4, rewards=r.rewards / 100)
    for algorithm in algorithms:
        small = replace(algorithm, hidden=16, batch_size=16)
        first, second = (small.fit(Replay(x, encoder=Fake()), steps=60) for x in (r, other))
        texts = [GOALS[0].text] * 40
        a, b = (p.net.from_part(torch.from_numpy(x.states[:, 0]), p._goal_parts(texts, 40)) for p, x in
                ((first, r), (second, other)))
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_coordinate_in_tiny_units_is_learnt_from():
    "Which of two actions is told by a number of 1e-4 beside one of 1 that says nothing."
    rng = numpy_rng(0, "tiny")
    sign = rng.integers(0, 2, (400, 2))
    states = np.stack([1e-4 * (2 * sign - 1), rng.normal(size=sign.shape)], -1)
    r = Rollouts(states, sign[:, :1], goal=np.zeros(400), goals=GOALS, codec=DiscreteActions(2))
    policy = BC(hidden=32).fit(Replay(r, encoder=Fake()), steps=300)
    assert (policy.act(states[:, 0], GOALS[0].text) == sign[:, 0]).mean() > 0.98


def test_rollouts_in_place_of_a_replay_are_named():
    with pytest.raises(ValueError, match=r"bc learns from a Replay: give kalm.Replay\(rollouts\)"):
        BC().fit(rollouts(5), steps=2)
