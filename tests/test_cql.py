"The conservative loss against independent computations, and the parts of the learner that no loss shows."
import numpy as np
import pytest
import torch

from kalm.core import IMAGINED, REAL, numpy_rng, torch_rng
from kalm.cql import CQL, cql_loss, double_dqn_target
from test_offline import replay


def by_hand(q, a, r, go_on, q2_online, q2_target, discount, alpha):
    "Row by row with plain loops; returns loss, td, conservative."
    td = cons = 0.
    for i in range(len(a)):
        best = max(range(q.shape[1]), key=lambda j: q2_online[i, j])
        y = r[i] + (discount * q2_target[i, best] if go_on[i] else 0.)
        d = abs(q[i, a[i]] - y)
        td += .5 * d * d if d < 1 else d - .5
        m = max(q[i]); cons += m + np.log(sum(np.exp(x - m) for x in q[i])) - q[i, a[i]]
    return td / len(a) + alpha * cons / len(a), td / len(a), cons / len(a)

def draw(seed=0, n=9, actions=40):
    rng = numpy_rng(seed, "cql")
    q, q2, t2 = rng.normal(scale=2, size=(3, n, actions))
    return q, rng.integers(0, actions, n), rng.normal(scale=2, size=n), np.arange(n) % 3 > 0, q2, t2

@pytest.mark.parametrize("seed", range(3))
def test_loss_against_numpy_by_hand(seed):
    q, a, r, go_on, q2, t2 = draw(seed)
    t = lambda x: torch.tensor(np.asarray(x))
    y = double_dqn_target(t(r), t(go_on).double(), t(q2), t(t2), .9)
    got = cql_loss(t(q), t(a), y, alpha=3.)
    np.testing.assert_allclose([got.loss, got.td, got.conservative], by_hand(q, a, r, go_on, q2, t2, .9, 3.), rtol=1e-12)
    np.testing.assert_allclose(got.q, q[np.arange(9), a].mean())

def test_gradient_of_the_conservative_part_is_softmax_minus_one_hot():
    q, a = torch.randn(4, 6, dtype=torch.float64, generator=torch_rng(0)).requires_grad_(), torch.tensor([0, 5, 2, 2])
    cql_loss(q, a, q.detach().gather(1, a[:, None])[:, 0], alpha=1.).loss.backward()  # td is 0, and so is its gradient
    torch.testing.assert_close(q.grad, (q.detach().softmax(1) - torch.nn.functional.one_hot(a, 6)) / 4)

def test_gradcheck_and_no_gradient_into_the_target():
    q, a = torch.randn(3, 6, dtype=torch.float64, generator=torch_rng(1)).requires_grad_(), torch.tensor([1, 3, 5])
    y = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: cql_loss(q, a, y.detach(), 2.).loss, (q,))
    cql_loss(q, a, y, 2.).loss.backward()
    assert y.grad is None

def test_the_online_network_chooses_and_the_target_judges():
    online, target = torch.tensor([[0., 9., 1.]]), torch.tensor([[50., 2., 70.]])
    one = torch.ones(1)
    assert double_dqn_target(one, one, online, target, .5).item() == 1 + .5 * 2
    assert double_dqn_target(one, 0 * one, online, target, .5).item() == 1

def test_one_step_of_the_learner_is_one_naive_step():
    "The shared goal part and the cached target layer change nothing: compare with concatenated networks and plain Adam."
    b, rng = replay(9, 9), torch_rng(0, "t")
    learner = CQL(hidden=16, batch_size=8, lr=1e-2, target_every=3).learner(b, [0]); learner.net.dtype = learner.target.dtype = torch.float32
    def sequential(net):
        layers = [torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 40)]
        with torch.no_grad():
            layers[0].weight.copy_(torch.cat([net.state.weight, net.goal.weight], 1)); layers[0].bias.copy_(net.goal.bias)
            for layer, twin in zip(layers[1:], (net.hidden, net.out)): layer.weight.copy_(twin.weight); layer.bias.copy_(twin.bias)
        return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    net, frozen = sequential(learner.net.one(0)), sequential(learner.target.one(0))
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(1, 8):
        rows = b.draw(8, 1, [rng])[0]; x, got = b.take(rows[0]), learner.step(b.take(rows))
        now, then = torch.cat([x.states, x.encodings], 1), torch.cat([x.next_states, x.encodings], 1)
        with torch.no_grad(): y = x.rewards + .99 * x.bootstrap * frozen(then)[torch.arange(8), net(then).argmax(1)]
        q = net(now); taken = q[torch.arange(8), x.actions]
        loss = torch.nn.functional.huber_loss(taken, y) + 10 * (torch.log(q.exp().sum(1)) - taken).mean()
        adam.zero_grad(); loss.backward(); adam.step()
        torch.testing.assert_close(got.loss[0], loss.detach(), rtol=1e-4, atol=1e-4)
        if step % 3 == 0: frozen.load_state_dict(net.state_dict())
    torch.testing.assert_close(torch.cat([learner.net.state_weight, learner.net.goal_weight], 1)[0].T, net[0].weight, rtol=1e-3, atol=1e-4)

def test_target_is_hard_and_late():
    b, rng = replay(), torch_rng(0, "t")
    learner = CQL(hidden=16, target_every=4).learner(b, [0, 1])
    same = lambda: torch.equal(learner.net.out_weight, learner.target.out_weight)
    assert same()
    for step in range(1, 9):
        learner.step(b.take(b.draw(8, 1, [rng, rng])[0]))
        assert same() == (step % 4 == 0)
        torch.testing.assert_close(learner.goal_parts, learner.target.goal_part(b.encodings.expand(2, -1, -1)))
    assert all(p.grad is None and not p.requires_grad for p in learner.target.parameters())

def test_more_doubt_about_what_was_imagined():
    "Only the conservative term of imagined rows is weighed by `alpha_imagined`."
    b = replay(9, 9); rows = b.draw(8, 1, [torch_rng(0)])[0]; record = lambda **k: CQL(hidden=16, alpha=2., **k).learner(b, [0]).loss(b.take(rows))
    same, none, more = record(), record(alpha_imagined=0.), record(alpha_imagined=4.); assert torch.equal(record(alpha_imagined=2.).loss, same.loss) and torch.equal(none.td, more.td) and none.loss < same.loss < more.loss
    torch.testing.assert_close(same.loss - none.loss, more.loss - same.loss); torch.testing.assert_close(record(alpha_imagined=0.).loss, record(alpha_imagined=0.).td + 2 * (same.loss - same.td - (same.loss - none.loss)) / 2)

def test_rewards_shape_the_choice():
    "Two actions equally often in the data, one rewarded: BC cannot tell them apart, CQL must."
    from kalm.core import Rollouts
    from kalm.goals import Goal
    from kalm.offline import Replay
    n = 200; actions = np.arange(n) % 2 * 20 + 3
    r = Rollouts(states=numpy_rng(0).normal(size=(n, 2, 10)), actions=actions[:, None], rewards=(actions == 23)[:, None] * 10., terminated=np.ones(n, bool), goal=np.zeros(n))
    e = np.ones((1, 6), np.float32)
    policy = CQL(lr=3e-3, alpha=.5, hidden=32).fit(Replay([(r, [Goal.push("red", "left")])], encodings=[e]), steps=300)
    assert (policy(numpy_rng(1).normal(size=(100, 10)), np.repeat(e, 100, 0)) == 23).mean() > .95
