"Conservative Q-learning: its losses against independent computations, resuming, both kinds of action."

import numpy as np
import pytest
import torch

from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.rl.cql import CQL, cql_loss, double_dqn_target, log_integral, squashed_draw
from kalm.rl.replay import Batch, synthetic_replay
from kalm.rl.train import Every
from kalm.tensors.store import torch_rng

pytestmark = pytest.mark.usefixtures("single_precision")

BOX = ContinuousActions((-2.0, 0.0), (2.0, 1.0))
SMALL = CQL(batch_size=16, hidden=8, lr=1e-2, target_every=3, samples=2)


def replay_of(codec):
    return synthetic_replay(4, 200, codec=codec, state_dim=3)


def batch_of(replay, seeds=(0, 1), size=16) -> Batch:
    return replay.take(replay.draw(size, 1, [torch_rng(s, "test") for s in seeds])[0])


def network(net, k):
    "The k-th network as a function in NumPy, double precision."
    w = {name: p.detach().double().numpy() for name, p in net.one(k).named_parameters()}

    def f(x, encodings):
        h = np.maximum(x @ w["state.weight"].T + encodings @ w["goal.weight"].T + w["goal.bias"], 0)
        h = np.maximum(h @ w["hidden.weight"].T + w["hidden.bias"], 0)
        return h @ w["out.weight"].T + w["out.bias"]

    return f


def row(batch, k):
    return {name: value[k].double().numpy() for name, value in batch._asdict().items()}


def huber(x):
    return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def test_discrete_loss_equals_an_independent_computation():
    replay = replay_of(DiscreteActions(5))
    learner, batch = SMALL.learner(replay, [0, 1]), batch_of(replay)
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch_rng(0, "shake")))  # no longer equal to the target network
    record = learner.loss(batch)
    for k in (0, 1):
        b, online, target = row(batch, k), network(learner.net, k), network(learner.target, k)
        q, a = online(b["states"], b["encodings"]), b["actions"].astype(int)
        best = online(b["next_states"], b["encodings"]).argmax(1)
        there = target(b["next_states"], b["encodings"])[np.arange(16), best]
        y = b["rewards"] + 0.99 * b["bootstrap"] * there
        taken = q[np.arange(16), a]
        gap = np.log(np.exp(q).sum(1)) - taken
        np.testing.assert_allclose(record.td[k].item(), huber(taken - y).mean(), rtol=1e-4)
        np.testing.assert_allclose(record.conservative[k].item(), gap.mean(), rtol=1e-4)
        np.testing.assert_allclose(record.loss[k].item(), huber(taken - y).mean() + 10 * gap.mean(), rtol=1e-4)


def squashed(outputs, noise):
    "Actions and log densities of a squashed Gaussian, the plain way."
    mean, raw = np.split(outputs, 2, -1)
    log_std = -5 + 3.5 * (1 + np.tanh(raw))
    u = mean + np.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (normal - np.log(1 - np.tanh(u) ** 2)).sum(-1)


def test_continuous_losses_equal_an_independent_computation(monkeypatch):
    replay = replay_of(BOX)
    settings = CQL(
        batch_size=16, hidden=8, samples=2, lr=0.0, actor_lr=0.0, tau=0.0, alpha=3.0
    )  # a step that moves nothing
    learner, batch, drawn = settings.learner(replay, [0]), batch_of(replay, (0,)), []
    real = learner.normal
    monkeypatch.setattr(learner, "normal", lambda *a: drawn.append(real(*a)) or drawn[-1])
    record = learner.step(batch)
    b = row(batch, 0)
    noise = [d[0].double().numpy() for d in drawn]  # next actions; uniform, here, next; the actor's step
    actor = network(learner.actor, 0)
    critics, targets = ([network(net, 0) for net in nets] for nets in (learner.critics, learner.targets))
    here, there = (actor(b[s], b["encodings"]) for s in ("states", "next_states"))

    def value(f, states, actions):
        return f(np.concatenate([states, actions], 1), np.repeat(b["encodings"], len(actions) // 16, 0))[:, 0]

    action, _ = squashed(there, noise[0])
    y = b["rewards"] + 0.99 * b["bootstrap"] * np.min([value(f, b["next_states"], action) for f in targets], 0)
    data = (b["actions"] - [0.0, 0.5]) / [2.0, 0.5]
    uniform = 2 * torch.special.ndtr(torch.from_numpy(noise[1])).numpy() - 1
    sampled = [(uniform, np.full(32, -2 * np.log(2)))]
    sampled += [squashed(np.repeat(o, 2, 0), z) for o, z in ((here, noise[2]), (there, noise[3]))]
    td = conservative = 0
    for f in critics:
        q = value(f, b["states"], data)
        terms = [(value(f, np.repeat(b["states"], 2, 0), a) - d).reshape(16, 2) for a, d in sampled]
        gap = np.log(np.exp(np.concatenate(terms, 1)).mean(1)) - q
        td, conservative = td + ((q - y) ** 2).mean(), conservative + gap.mean()
    np.testing.assert_allclose(record.td.item(), td, rtol=1e-4)
    np.testing.assert_allclose(record.conservative.item(), conservative, rtol=1e-4)
    action, density = squashed(here, noise[4])
    q = np.min([value(f, b["states"], action) for f in critics], 0)
    np.testing.assert_allclose(record.actor.item(), (density - q).mean(), rtol=1e-4)  # entropy weight is 1 at first
    np.testing.assert_allclose(record.entropy.item(), -density.mean(), rtol=1e-4)


def test_log_integral_of_a_known_function():
    a = 2 * torch.rand(100_000, generator=torch_rng(0, "a")) - 1
    np.testing.assert_allclose(
        float(log_integral(a, torch.full_like(a, -np.log(2)))), np.log(np.e - 1 / np.e), atol=0.01
    )


def test_squashed_density_stays_finite_at_the_edges():
    _, density = squashed_draw(torch.tensor([[40.0, -40.0, 0.0, 0.0]]), torch.zeros(1, 2))
    assert density.isfinite().all()


def test_weights_count_rows():
    q, a, y = torch.randn(6, 3, generator=torch_rng(0, "q")), torch.tensor([0, 1, 2, 0, 1, 2]), torch.zeros(6)
    w = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert float(cql_loss(q, a, y, weights=w).loss) == pytest.approx(
        float(cql_loss(q[:1], a[:1], y[:1]).loss) / 6, rel=1e-5
    )


def test_nothing_follows_an_end():
    one = torch.ones(1, 2)
    assert float(double_dqn_target(torch.tensor([3.0]), torch.zeros(1), one, one)[0]) == 3.0


@pytest.mark.parametrize("codec", [DiscreteActions(5), BOX], ids=["discrete", "continuous"])
def test_interrupted_equals_uninterrupted(codec, tmp_path):
    replay = replay_of(codec)
    whole = SMALL.fit(replay, steps=8, seed=[0, 1])
    SMALL.fit(replay, steps=5, seed=[0, 1], out=tmp_path / "p", every=Every(log=2, checkpoint=2))
    resumed = SMALL.fit(replay, steps=8, seed=[0, 1], out=tmp_path / "p", every=Every(log=2, checkpoint=2))
    for a, b in zip(whole, resumed):
        for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values()):
            assert torch.equal(x, y)


@pytest.mark.parametrize("codec", [DiscreteActions(5), BOX], ids=["discrete", "continuous"])
def test_seeds_side_by_side_equal_seeds_alone(codec):
    replay = replay_of(codec)
    together = SMALL.fit(replay, steps=4, seed=[3, 4])
    alone = SMALL.fit(replay, steps=4, seed=4)
    for x, y in zip(together[1].net.state_dict().values(), alone.net.state_dict().values()):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=1e-5)


def test_continuous_policy_acts_within_the_box():
    actions = SMALL.fit(replay_of(BOX), steps=2).act(np.zeros((7, 3)), "sentence 3")
    assert actions.shape == (7, 2) and (actions >= [-2, 0]).all() and (actions <= [2, 1]).all()


@pytest.mark.parametrize(
    "wrong", [dict(alpha=float("nan")), dict(lr=-1.0), dict(batch_size=0), dict(temperature=float("inf"))]
)
def test_nonsense_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CQL(**wrong)
