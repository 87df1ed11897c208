"TD3+BC: its losses against an independent computation, its rhythm, resuming."

import numpy as np
import pytest
import torch
from test_cql import network, row

from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.rl.replay import synthetic_replay
from kalm.rl.td3bc import TD3BC
from kalm.rl.train import Every
from kalm.tensors.store import torch_rng

pytestmark = pytest.mark.usefixtures("single_precision")

BOX = ContinuousActions((-2.0, 0.0), (2.0, 1.0))
SMALL = TD3BC(batch_size=16, hidden=8, lr=1e-2)


def replay_of():
    return synthetic_replay(4, 200, codec=BOX, state_dim=3)


def test_losses_equal_an_independent_computation(monkeypatch):
    replay = replay_of()
    settings = TD3BC(batch_size=16, hidden=8, lr=0.0, tau=0.0, actor_every=1)  # a step that moves nothing
    learner, drawn = settings.learner(replay, [0]), []
    real = learner.normal
    monkeypatch.setattr(learner, "normal", lambda *a: drawn.append(real(*a)) or drawn[-1])
    batch = replay.take(replay.draw(16, 1, [torch_rng(0, "test")])[0])
    record, b = learner.step(batch), row(batch, 0)
    actor, slow = network(learner.actor, 0), network(learner.slow_actor, 0)
    critics, targets = ([network(net, 0) for net in nets] for nets in (learner.critics, learner.slow_critics))
    noise = np.clip(0.2 * drawn[0][0].double().numpy(), -0.5, 0.5)
    action = np.clip(np.tanh(slow(b["next_states"], b["encodings"])) + noise, -1, 1)

    def value(f, states, actions):
        return f(np.concatenate([states, actions], 1), b["encodings"])[:, 0]

    y = b["rewards"] + 0.99 * b["bootstrap"] * np.min([value(f, b["next_states"], action) for f in targets], 0)
    data = (b["actions"] - [0.0, 0.5]) / [2.0, 0.5]
    td = sum(((value(f, b["states"], data) - y) ** 2).mean() for f in critics)
    np.testing.assert_allclose(record.loss.item(), td, rtol=1e-4)
    action = np.tanh(actor(b["states"], b["encodings"]))
    q = value(critics[0], b["states"], action)
    wanted = (-2.5 * q / np.abs(q).mean()).mean() + ((action - data) ** 2).mean()
    np.testing.assert_allclose(record.actor.item(), wanted, rtol=1e-4)


def test_the_actor_moves_every_second_step():
    replay = replay_of()
    learner = SMALL.learner(replay, [0])
    before = learner.actor.out_weight.clone()
    batch = replay.take(replay.draw(16, 1, [torch_rng(0, "test")])[0])
    assert learner.step(batch).actor.isnan().all() and torch.equal(before, learner.actor.out_weight)
    assert learner.step(batch).actor.isfinite().all() and not torch.equal(before, learner.actor.out_weight)


def test_interrupted_equals_uninterrupted(tmp_path):
    replay, every = replay_of(), Every(log=2, checkpoint=2)
    whole = SMALL.fit(replay, steps=8, seed=[0, 1])
    SMALL.fit(replay, steps=5, seed=[0, 1], out=tmp_path / "p", every=every)
    resumed = SMALL.fit(replay, steps=8, seed=[0, 1], out=tmp_path / "p", every=every)
    for a, b in zip(whole, resumed):
        for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values()):
            assert torch.equal(x, y)


def test_policies_act_within_the_box_and_survive_disk(tmp_path):
    from kalm.rl.policy import Policy

    policy, states = SMALL.fit(replay_of(), steps=2), np.zeros((7, 3))
    actions = policy.act(states, "sentence 3")
    assert actions.shape == (7, 2) and (actions >= [-2, 0]).all() and (actions <= [2, 1]).all()
    policy.save(tmp_path)
    np.testing.assert_array_equal(Policy.load(tmp_path, encoder=policy.encoder).act(states, "sentence 3"), actions)


def test_discrete_actions_are_refused():
    with pytest.raises(ValueError, match="needs continuous actions"):
        TD3BC().fit(synthetic_replay(4, 100, codec=DiscreteActions(3)), steps=1)


@pytest.mark.parametrize("wrong", [dict(alpha=float("nan")), dict(noise=-1.0), dict(batch_size=0)])
def test_nonsense_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TD3BC(**wrong)
