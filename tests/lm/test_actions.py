"Both kinds of action: losses against torch.distributions, choices against a loop, weights, ranks and bounds."

import numpy as np
import pytest
import torch

from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.core.files import numpy_rng
from kalm.lm.actions import BINS, LOG_STD, NEAR, PLAIN_STD, action_maps, choose, weighted_mean
from kalm.tensors.store import torch_rng

PUSHES = DiscreteActions(5)
ARM = ContinuousActions((-1.0, 0.0, 2.0), (1.0, 10.0, 3.0))


def batch(codec, n: int = 40, seed: int = 0):
    "Outputs of a head, actions, done, weights."
    g, maps = torch_rng(seed, "actions"), action_maps(codec)
    actions = torch.from_numpy(codec.sample(numpy_rng(seed, "actions"), n))
    done = torch.rand(n, generator=g) < 0.3
    return 2 * torch.randn(n, maps.outputs, generator=g), actions, done, torch.rand(n, generator=g)


# ---------------------------------------------------------------- losses


def test_discrete_loss_is_weighted_cross_entropy():
    outputs, actions, done, weights = batch(PUSHES)
    wanted = torch.where(done, 5, actions)
    log_p = torch.distributions.Categorical(logits=outputs).log_prob(wanted)
    record = action_maps(PUSHES).loss(outputs, actions, done, weights)
    torch.testing.assert_close(record.loss, -(log_p * weights).sum() / weights.sum())
    torch.testing.assert_close(record.accuracy, (outputs.argmax(-1) == wanted).float().mean())


def test_continuous_loss_is_that_of_distributions():
    maps = action_maps(ARM)
    outputs, actions, done, weights = batch(ARM)
    mean, log_std, logit = maps.split(outputs)
    low, high = torch.tensor(ARM.low), torch.tensor(ARM.high)
    scaled = 2 * (actions - low) / (high - low) - 1
    normal = torch.distributions.Normal(mean, log_std.exp()).log_prob(scaled).sum(-1)
    ended = torch.distributions.Bernoulli(logits=logit).log_prob(done.float())
    log_p = torch.where(done, 0.0, normal) + ended
    record = maps.loss(outputs, actions, done, weights)
    torch.testing.assert_close(record.loss, -(log_p * weights).sum() / weights.sum())
    torch.testing.assert_close(record.accuracy, ((scaled - mean).abs() < NEAR)[~done].float().mean())
    assert log_std.min() >= LOG_STD[0] and log_std.max() <= LOG_STD[1]


@pytest.mark.parametrize("codec", [PUSHES, ARM], ids=["discrete", "continuous"])
def test_rows_without_weight_and_actions_of_rows_that_are_done_do_not_matter(codec):
    outputs, actions, done, weights = batch(codec)
    maps, weights = action_maps(codec), torch.where(torch.arange(40) % 3 == 0, 0.0, weights)
    outputs.requires_grad_()
    loss = maps.loss(outputs, actions, done, weights).loss
    loss.backward()
    assert (outputs.grad[weights == 0] == 0).all()
    assert (outputs.grad[weights > 0].abs().sum(-1) > 0).all()
    if codec is ARM:
        assert (outputs.grad[done][:, :-1] == 0).all()
    other = torch.where(done[:, None] if codec is ARM else done, torch.from_numpy(codec.zeros(40)), actions)
    torch.testing.assert_close(maps.loss(outputs, other, done, weights).loss, loss)


@pytest.mark.parametrize("codec", [PUSHES, ARM], ids=["discrete", "continuous"])
def test_a_batch_without_actions_costs_nothing(codec):
    outputs, actions, done, weights = (x[:0] for x in batch(codec))
    record = action_maps(codec).loss(outputs.requires_grad_(), actions, done, weights)
    assert record.loss.item() == 0 and record.accuracy.item() == 0


def test_weighted_mean():
    values, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 3.0])
    assert float(weighted_mean(values, weights)) == 13 / 4
    assert float(weighted_mean(values, 0 * weights)) == 0


def test_a_gradient_reaches_spreads_far_outside_their_range():
    maps = action_maps(ContinuousActions((-1.0,), (1.0,)))
    outputs = torch.tensor([[0.0, 9.0, 0.0], [0.0, -9.0, 0.0]], requires_grad=True)
    maps.loss(outputs, torch.tensor([[0.1], [0.9]]), torch.tensor([False, False]), torch.ones(2)).loss.backward()
    assert outputs.grad[0, 1] > 0 > outputs.grad[1, 1]  # both want to come back


# ---------------------------------------------------------------- choices


def choose_by_hand(logits, u, temperature, top_p):
    "Sort, cut, walk until the share is passed."
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept, total = [], 0.0
    for i in order:
        if total < top_p:
            kept.append(i)
        total += p[i]
    share, goal = 0.0, u * sum(p[i] for i in kept)
    for i in kept:
        share += p[i]
        if share >= goal:
            return i
    return kept[-1]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 0.9), (2.0, 0.5), (1.0, 1e-6)])
def test_choices_are_those_of_a_loop(temperature, top_p):
    g = torch_rng(0, "choose")
    logits, u = 2 * torch.randn(300, 7, generator=g), torch.rand(300, generator=g)
    want = [choose_by_hand(a, float(b), temperature, top_p) for a, b in zip(logits, u)]
    assert choose(logits, u, temperature, top_p).tolist() == want
    assert len(set(want)) > 1


def test_a_choice_does_not_depend_on_the_rows_beside_it():
    maps = action_maps(PUSHES)
    outputs, *_ = batch(PUSHES)
    draws = maps.draw(numpy_rng(0, "draws"), 40)
    whole, done = maps.choose(outputs, draws, temperature=1.0)
    for i in range(40):
        one, ended = maps.choose(outputs[i : i + 1], draws[i : i + 1], temperature=1.0)
        assert (one[0], ended[0]) == (whole[i], done[i])


def test_discrete_ranks_count_from_the_likeliest_and_done_is_no_action():
    maps, (outputs, *_) = action_maps(PUSHES), batch(PUSHES)
    order = np.argsort(-outputs[:, :5].numpy(), axis=-1, kind="stable")
    rank = np.arange(40) % 5
    actions, done = maps.choose(outputs, maps.no_draws(40), rank=rank)
    assert actions.tolist() == order[np.arange(40), rank].tolist() and actions.dtype == np.int64
    assert done.tolist() == (outputs[:, 5] > outputs[:, :5].amax(-1)).tolist()
    assert 0 < done.sum() < 40
    assert (maps.choose(outputs, maps.no_draws(40), rank=3)[0] == order[:, 3]).all()
    assert maps.ranks == 5


def test_continuous_choices_are_the_mean_or_around_it():
    maps, (outputs, *_) = action_maps(ARM), batch(ARM, 2000)
    mean, log_std, logit = (x.numpy() for x in maps.split(outputs[:1].expand(2000, -1)))
    same = outputs[:1].expand(2000, -1)
    middle = ARM.clip(ARM.centre + ARM.scale * mean)
    actions, done = maps.choose(same, maps.no_draws(2000))
    np.testing.assert_allclose(actions, middle, rtol=1e-6)
    assert actions.dtype == np.float32 and (done == (logit > 0)).all()
    draws = maps.draw(numpy_rng(0, "draws"), 2000)
    drawn, _ = maps.choose(same, draws, temperature=0.5)
    want = ARM.clip(ARM.centre + ARM.scale * (mean + 0.5 * np.exp(log_std) * draws))
    np.testing.assert_allclose(drawn, want, atol=1e-5)
    assert (drawn >= np.float32(ARM.low)).all() and (drawn <= np.float32(ARM.high)).all()
    inside, _ = maps.choose(same, draws, temperature=0.5, top_p=0.5)
    limit = 0.5 * np.exp(log_std[0]) * 0.6745 * ARM.scale  # half of a normal lies within 0.6745 of its middle
    assert (np.abs(inside - (ARM.centre + ARM.scale * mean[0])) <= limit * 1.001 + 1e-5)[:, np.abs(mean[0]) < 0.3].all()


def test_a_rank_makes_continuous_rows_try_something_else():
    maps, outputs = action_maps(ARM), 0.2 * batch(ARM)[0]
    draws = maps.draw(numpy_rng(0, "draws"), 40)
    rank = np.arange(40) % 2
    plain, mixed = maps.choose(outputs, draws)[0], maps.choose(outputs, draws, rank=rank)[0]
    assert (plain == mixed)[rank == 0].all()
    assert (plain != mixed)[rank == 1].any(1).all()
    np.testing.assert_array_equal(mixed[rank == 1], maps.choose(outputs, draws, temperature=1.0)[0][rank == 1])
    assert maps.ranks is None


# ---------------------------------------------------------------- ways in


def test_embeddings_read_what_belongs_to_their_codec():
    at = torch.tensor([[True, False, True]])
    ids, actions = torch.tensor([[4, 9, 1]]), torch.tensor([[[-1.0, 0.0, 2.0], [0, 0, 0], [0.0, 10.0, 2.5]]])
    assert action_maps(PUSHES).given(ids, None, at).tolist() == [4, 1]
    arm = action_maps(ARM)
    torch.testing.assert_close(arm.given(ids, actions, at), torch.tensor([[-1.0, -1.0, -1.0], [0.0, 1.0, 0.0]]))
    assert arm.given(ids, None, torch.zeros_like(at)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"no action vectors: expected `actions` of shape \(B, L, 3\)"):
        arm.given(ids, None, at)


def test_outputs_and_draws_have_the_widths_of_their_codec():
    rng = numpy_rng(0, "x")
    assert (action_maps(PUSHES).outputs, action_maps(ARM).outputs) == (6, 7)
    assert action_maps(PUSHES).draw(rng, 4).shape == action_maps(PUSHES).no_draws(4).shape == (4,)
    assert action_maps(ARM).draw(rng, 4).shape == action_maps(ARM).no_draws(4).shape == (4, 3)


# ---------------------------------------------------------------- other heads


def fitted(head: str, shown: torch.Tensor) -> tuple:
    "Maps of a head, and what a free vector of outputs becomes that learns one coordinate's actions (N, 1)."
    maps = action_maps(ContinuousActions((-1.0,), (1.0,)), head)
    free = torch.zeros(maps.outputs, requires_grad=True)
    adam = torch.optim.Adam([free], lr=0.03)
    never, alike = torch.zeros(len(shown), dtype=bool), torch.ones(len(shown))
    for _ in range(500):
        adam.zero_grad()
        maps.loss(free.expand(len(shown), -1), shown, never, alike).loss.backward()
        adam.step()
    return maps, free.detach()


@pytest.mark.parametrize("head, likeliest", [("gaussian", 0.3), ("plain", 0.3), ("median", 0.9), ("bins", 0.9)])
def test_what_is_likeliest_where_a_third_of_the_data_differs(head, likeliest):
    maps, free = fitted(head, torch.tensor([[0.9], [0.9], [-0.9]]).repeat(20, 1))
    action, done = maps.choose(free[None], maps.no_draws(1))
    assert abs(action.item() - likeliest) < 0.05 and not done.any()


@pytest.mark.parametrize("value", [-1.0, -0.52, 0.0, 0.337, 1.0])
def test_bins_lose_no_resolution(value):
    maps, free = fitted("bins", torch.full((4, 1), value))
    assert maps.outputs == BINS + 1
    assert abs(maps.choose(free[None], maps.no_draws(1))[0].item() - value) < 0.01


def test_losses_of_fixed_spread_are_errors():
    outputs, actions = torch.randn(6, 4), torch.rand(6, 3) * 2 - 1
    done, weights = torch.zeros(6, dtype=bool), torch.ones(6)
    box = ContinuousActions((-1.0,) * 3, (1.0,) * 3)
    error, outputs[:, -1] = actions - outputs[:, :3], -50
    plain, median = (action_maps(box, head).loss(outputs, actions, done, weights).loss for head in ("plain", "median"))
    constant = 3 * np.log(PLAIN_STD * np.sqrt(2 * np.pi))
    torch.testing.assert_close(plain, (error**2).sum(-1).mean() / (2 * PLAIN_STD**2) + constant, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(median, error.abs().sum(-1).mean() / PLAIN_STD, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head", ["gaussian", "plain", "median", "bins"])
def test_every_head_draws_within_bounds_and_again_the_same(head):
    maps = action_maps(ARM, head)
    outputs, draws = torch.randn(50, maps.outputs), maps.draw(numpy_rng(1, "draws"), 50)
    rank = np.arange(50) % 2
    first, again = (maps.choose(outputs, draws, rank=rank)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first >= ARM.low).all() and (first <= ARM.high).all()
    certain = maps.choose(outputs, maps.no_draws(50))[0]
    np.testing.assert_array_equal(first[rank == 0], certain[rank == 0])
    assert (first[rank == 1] != certain[rank == 1]).any()


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="expected one of gaussian, plain, median, bins"):
        action_maps(ARM, "mixture")
