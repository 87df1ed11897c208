"Both losses of behaviour cloning against NumPy, and that both learn."

import numpy as np
import pytest
import torch
from small import BOX, FOUR, GOALS, Fake, replay, rollouts

from kalm.core.files import numpy_rng
from kalm.core.rollouts import IMAGINED, Rollouts
from kalm.rl.bc import BC, bc_loss, gaussian_bc_loss, median_bc_loss
from kalm.rl.encoder import Whitening
from kalm.rl.replay import Replay
from kalm.tensors.store import torch_rng


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_discrete_loss_against_numpy(beta):
    rng = numpy_rng(0, "loss")
    logits, actions, weights = rng.normal(size=(3, 7, 5)), rng.integers(0, 5, (3, 7)), rng.random((3, 7))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = np.take_along_axis(-np.log(p), actions[..., None], -1)[..., 0] + beta * (np.log(p) ** 2).mean(-1)
    got = bc_loss(torch.from_numpy(logits), torch.from_numpy(actions), beta, torch.from_numpy(weights))
    np.testing.assert_allclose(got.loss, (weights * rows).mean(-1))
    np.testing.assert_allclose(got.accuracy, (p.argmax(-1) == actions).mean(-1), rtol=1e-6)
    np.testing.assert_allclose(got.loss, got.imitation + beta * got.penalty)


def test_continuous_loss_against_numpy():
    rng = numpy_rng(0, "loss")
    outputs, actions, weights = 0.3 * rng.normal(size=(3, 7, 4)), rng.uniform(-1, 1, (3, 7, 2)), rng.random((3, 7))
    mean, std = np.tanh(outputs[..., :2]), np.exp(-1.5 + 3.5 * np.tanh(outputs[..., 2:]))
    density = np.exp(-(((actions - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    got = gaussian_bc_loss(*(torch.from_numpy(x) for x in (outputs, actions, weights)))
    np.testing.assert_allclose(got.loss, -(weights * np.log(density).sum(-1)).mean(-1))
    np.testing.assert_allclose(got.error, np.abs(actions - mean).mean((-2, -1)))
    np.testing.assert_allclose(got.std, std.mean((-2, -1)))


def test_actions_at_the_edge_of_the_box_cost_a_finite_amount():
    edge = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert gaussian_bc_loss(torch.zeros(2, 4), edge).loss.isfinite()
    assert gaussian_bc_loss(torch.full((2, 4), 50.0), edge).loss.isfinite()


@pytest.mark.parametrize("codec", [FOUR, BOX])
def test_it_learns_which_goal_asks_for_which_action(codec):
    n, rng = 300, numpy_rng(0, "learn")
    goal = rng.integers(0, 3, n)
    wanted = np.array([3, 0, 2]) if codec is FOUR else np.float32([[-1, 4], [0.5, 1], [0, 0]])
    r = Rollouts(rng.normal(size=(n, 2, 3)), wanted[goal][:, None], goal=goal, goals=GOALS, codec=codec)
    policy = BC(hidden=64, lr=3e-3).fit(Replay(r, encoder=Fake()), steps=150 if codec is FOUR else 300)
    new = policy.act(rng.normal(size=(n, 3)), [GOALS[g].text for g in goal])
    if codec is FOUR:
        assert (new == wanted[goal]).mean() > 0.95
    else:
        assert np.abs(new - wanted[goal]).max(1).mean() < 0.15


def test_spread_of_the_data_is_learnt_for_each_state():
    "Where the data scatter, draws scatter; where they do not, draws do not."
    rng, n = numpy_rng(0, "spread"), 2000
    states = np.zeros((n, 2, 3), np.float32)
    states[:, :, 0] = rng.choice([-1, 1], n)[:, None]
    noise = np.where(states[:, :1, :1] > 0, 0.3, 0.02) * rng.normal(size=(n, 1, 1))
    actions = np.clip(np.concatenate([noise, 2 + 2 * noise], 2), BOX.low, BOX.high)
    r = Rollouts(states, actions, goal=np.zeros(n, int), goals=GOALS, codec=BOX)
    policy = BC(hidden=64, lr=3e-3, temperature=1.0).fit(Replay(r, encoder=Fake()), steps=250)
    still, wild = (policy.act(np.repeat([[x, 0, 0]], 1000, 0), GOALS[0].text)[:, 0].std() for x in (-1, 1))
    assert still < 0.08 and 0.2 < wild < 0.4


@pytest.mark.parametrize("codec", [FOUR, BOX])
def test_what_weighs_nothing_is_not_learnt(codec):
    "Rows of weight 0 change nothing but which rows are drawn."
    r, imagined = rollouts(9, codec=codec), rollouts(9, source=IMAGINED, codec=codec)
    other = rollouts(
        9, source=IMAGINED, codec=codec, actions=codec.sample(numpy_rng(5), 36).reshape(imagined.actions.shape)
    )

    def loss(part, w):
        b = Replay([r, part], 0.5, weights=[None, np.full(9, w)], encoder=Fake())
        learner = BC(hidden=16).learner(b, [0])
        return learner.loss(b.take(b.draw(8, 1, [torch_rng(0)])[0])).loss

    assert torch.equal(loss(imagined, 0.0), loss(other, 0.0)) and not torch.equal(loss(imagined, 1.0), loss(other, 1.0))


def test_a_policy_trained_on_whitened_encodings_takes_them_as_they_are():
    texts = [g.text for g in GOALS]
    white = Replay(rollouts(20), whitening=Whitening.fit(Fake(), texts), encoder=Fake())
    learner = BC(hidden=16).learner(white, [0])
    policy = BC(hidden=16, lr=0.0).fit(white, steps=1)
    batch = white.take(torch.arange(20))
    want = learner.networks["policy"].one(0)(batch.states, batch.encodings).argmax(1)
    said = [white.texts[i] for i in batch.goals]
    np.testing.assert_array_equal(policy.act(batch.states.numpy(), said), want)


@pytest.mark.parametrize("codec, head", [(FOUR, "categorical"), (BOX, "gaussian")])
def test_the_policy_is_that_of_the_settings(codec, head, tmp_path):
    policy = BC(hidden=16, temperature=0.3).fit(replay(codec=codec), steps=2, seed=4)
    assert (policy.head, policy.codec, policy.temperature, policy.seed) == (head, codec, 0.3, 4)
    assert policy.algorithm == "bc" and policy.step == 2


def test_absolute_error_follows_most_of_the_data():
    "A third of the actions are of another kind: the Gaussian's mean goes between, the median does not."
    actions = np.tile([[0.8, 1.0]], (60, 1)).astype(np.float32)
    actions[::3] = [-0.8, 3.5]
    data = _one_step(actions)
    mean, median = (BC(head=head, lr=1e-2).fit(data, steps=400, seed=0) for head in ("gaussian", "deterministic"))
    state, text = np.zeros((1, data.state_dim), np.float32), [data.texts[0]]
    assert np.abs(median.act(state, text)[0] - [0.8, 1.0]).max() < 0.15
    assert np.abs(mean.act(state, text)[0] - [0.8, 1.0]).max() > 0.2
    outputs, shown, weights = torch.randn(5, 2), torch.rand(5, 2), torch.rand(5)
    got = median_bc_loss(outputs, shown, weights)
    torch.testing.assert_close(got.loss, (weights[:, None] * (shown - outputs.tanh()).abs()).mean())
    with pytest.raises(ValueError, match="expected gaussian or deterministic"):
        BC(head="squashed")


def _one_step(actions: np.ndarray) -> Replay:
    r = Rollouts(np.zeros((len(actions), 2, 3)), actions[:, None], goals=GOALS[:1], goal=np.zeros(len(actions), int),
                 codec=BOX)
    return Replay([r], encoder=Fake())


def test_what_never_varied_is_not_looked_at():
    r = rollouts(60)
    states = np.concatenate([r.states, np.full_like(r.states[..., :1], 3)], -1)
    data = Replay([Rollouts(states, r.actions, r.rewards, r.lengths, goal=r.goal, goals=r.goals, codec=r.codec)],
                  encoder=Fake())
    policy = BC().fit(data, steps=20, seed=0)
    shown, texts = states[:8, 0].astype(np.float32), [data.texts[0]] * 8
    other = shown.copy()
    other[:, -1] = 50
    np.testing.assert_array_equal(policy.act(shown, texts), policy.act(other, texts))
    assert data.varies.tolist() == [True] * r.states.shape[-1] + [False]
