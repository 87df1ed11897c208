"Features, heads and statistics against loops, number by number."
import numpy as np
import pytest
import torch

from kalm.core.domain import Features
from kalm.core.files import numpy_rng
from kalm.core.rollouts import Rollouts
from kalm.lm.maps import RBF_CENTRES, RBF_WIDTH, UNSEEN, Head, Normaliser, PairwiseFeatures, StateFeatures
from kalm.tensors.store import torch_rng


def points_of(state_dim: int) -> tuple:
    return tuple((i, i + 1) for i in range(0, state_dim, 2))


def pairs_by_hand(s, points):
    "Normalised states (N, S) -> features of every two points, number by number."
    rows = []
    for x in np.asarray(s, float):
        p = [(x[a], x[b]) for a, b in points]
        couples = [(i, j) for i in range(len(p)) for j in range(i + 1, len(p))]
        offset = [(p[i][0] - p[j][0], p[i][1] - p[j][1]) for i, j in couples]
        far = [np.sqrt(a * a + b * b + 1e-6) for a, b in offset]
        near = [[np.exp(-((d - c) / RBF_WIDTH)**2) for c in RBF_CENTRES] for d in far]
        way = [m * v / d for o, d, ms in zip(offset, far, near) for m in ms for v in o]
        rows.append([v for o in offset for v in o] + [m for ms in near for m in ms] + way)
    return np.array(rows)


@pytest.mark.parametrize("points", [((0, 1), (2, 3)), points_of(10), ((7, 2), (0, 9), (4, 5))])
def test_pairwise_features_are_those_of_a_loop(points):
    s = torch.from_numpy(1.2 * numpy_rng(0, "pairs").normal(size=(20, 10))).float()
    f, n = PairwiseFeatures(points), len(points)
    got = f(s)
    assert f.width == n * (n - 1) // 2 * 11 and not list(f.parameters()) and not f.state_dict()
    np.testing.assert_allclose(got, pairs_by_hand(s, points), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(f(s[None, :, None]), got[None, :, None])


def test_points_in_one_place_have_finite_features_and_gradients():
    s = torch.zeros(1, 10, requires_grad=True)
    f = PairwiseFeatures(points_of(10))(s)
    f.sum().backward()
    assert f.isfinite().all() and s.grad.isfinite().all()


def test_a_state_of_points_is_told_as_it_always_was():
    "The state itself, then its pairs: the features of the checkpoint that ships."
    s = torch.randn(5, 10, generator=torch_rng(0, "s"))
    f = StateFeatures(Features(points=points_of(10)), 10)
    assert f.width == 10 + 10 * 11
    torch.testing.assert_close(f(s, 7 * s), torch.cat([s, PairwiseFeatures(points_of(10))(s)], -1))


def test_one_point_has_no_pair_and_no_features_are_the_state():
    s = torch.randn(5, 3, generator=torch_rng(0, "s"))
    for spec in (Features(), Features(points=((0, 2),))):
        f = StateFeatures(spec, 3)
        assert f.width == 3 and torch.equal(f(s, s), s)


def test_angles_and_classes():
    spec = Features(angles=(1, 3), one_of=((0, 4), (2, 2)))
    f = StateFeatures(spec, 4)
    states = torch.tensor([[2., .5, 1., 3.], [-1., .5 + 2 * torch.pi, .4, -3.], [9., 0., .6, 0.], [3.4, 0., 0., 0.]])
    out = f(states / 3, states)
    assert f.width == out.shape[1] == 4 + 4 + 4 + 2
    torch.testing.assert_close(out[:, :4], states / 3)
    torch.testing.assert_close(out[:, 4:6], states[:, [1, 3]].sin())
    torch.testing.assert_close(out[:, 6:8], states[:, [1, 3]].cos())
    assert out[:, 8:12].argmax(-1).tolist() == [2, 0, 3, 3] and out[:, 12:].argmax(-1).tolist() == [1, 0, 1, 0]
    assert (out[:, 8:].sum(-1) == 2).all()


MISSING = Features(points=((0, 4),)), Features(angles=(9,)), Features(one_of=((4, 2),))


@pytest.mark.parametrize("spec", MISSING, ids=str)
def test_features_of_coordinates_that_are_not_there_are_refused(spec):
    with pytest.raises(ValueError, match="a state has 4 numbers, counted from 0"):
        StateFeatures(spec, 4)


def test_heads_are_those_of_a_loop():
    g = torch_rng(0, "heads")
    head = Head(6, 4, 5, 3)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    w = {n: p.detach().double().numpy() for n, p in head.named_parameters()}
    h, f = torch.randn(7, 6, generator=g), torch.randn(7, 4, generator=g)

    def gelu(x):
        return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()

    def one(h, f):
        x = (h - h.mean()) / np.sqrt(h.var() + 1e-5) * w["norm.weight"] + w["norm.bias"]
        z = gelu((w["up.weight"] @ x + w["up.bias"]) * (1 + w["gate.weight"] @ f) + w["shift.weight"] @ f)
        second = gelu((w["mid.weight"] @ z + w["mid.bias"]) * (1 + w["gate2.weight"] @ f))
        return w["out.weight"] @ (z + second) + w["out.bias"]

    want = [one(a, b) for a, b in zip(h.double().numpy(), f.double().numpy())]
    with torch.no_grad():
        np.testing.assert_allclose(head(h, f), want, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- normaliser

def walks(n: int = 30, width: int = 4) -> Rollouts:
    rng = numpy_rng(0, "walks")
    lengths = rng.integers(0, 7, n)
    steps = rng.normal(size=(n, 7, width)) * np.arange(1, width + 1)
    inside = np.arange(7) <= lengths[:, None]
    return Rollouts(steps.cumsum(1) * inside[..., None], np.zeros((n, 6), int), lengths=lengths)


def test_statistics_are_those_of_a_loop():
    r = walks()
    states = np.concatenate([one.states[:-1] for one in r]).astype(float)
    steps = np.concatenate([np.diff(one.states, axis=0) for one in r]).astype(float)
    jumps = np.array([one.states[-1].astype(float) - one.states[0] for one in r])
    n = Normaliser.fit(r)
    for got, want in ((n.mean, states.mean(0)), (n.std, states.std(0) + 1e-3), (n.step, steps.std(0) + 1e-3),
                      (n.jump, jumps.std(0) + 1e-3)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    one = Normaliser.fit(r, Features(points=((0, 1), (2, 3))))
    np.testing.assert_allclose([one.step, one.jump], [steps.std() + 1e-3, jumps.std() + 1e-3], rtol=1e-5)
    some = Normaliser.fit(r, Features(points=((0, 2),)))
    shared = steps[:, [0, 2]].std() + 1e-3
    np.testing.assert_allclose(some.step, [shared, n.step[1], shared, n.step[3]], rtol=1e-5)


def test_bad_statistics():
    with pytest.raises(ValueError, match="empty data set"):
        Normaliser.fit(walks()[:0])
    with pytest.raises(ValueError, match="expected one width"):
        Normaliser((0.,) * 3, (1.,) * 3, (1.,) * 4)
    for bad in (dict(mean="xyz", std=(1.,) * 3), dict(mean=None, std=None)):
        with pytest.raises((ValueError, TypeError)):
            Normaliser(**bad)


@pytest.mark.parametrize("unit", [1., 1e-4, 1e-6, 1e-8])
def test_scales_hold_in_any_unit(unit):
    "A state in micrometres is no state that stands still."
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(40, 6, 2)) * [unit, 5.]
    n = Normaliser.fit(Rollouts(steps.cumsum(1), np.zeros((40, 5), int)))
    assert .9 < n.step[0] / unit < 1.2 and n.std[0] / unit < 4
    still = Normaliser.fit(Rollouts(np.ones((4, 3, 2)), np.zeros((4, 2), int)))
    assert still.step == (1e-3, 1e-3)


@pytest.mark.parametrize("wrong", [dict(mean=(np.nan,)), dict(std=(0.,)), dict(std=(np.inf,)), dict(step=-1.),
                                   dict(jump=np.nan)])
def test_statistics_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="of a normaliser .*expected finite numbers"):
        Normaliser(**dict(mean=(0.,), std=(1.,)) | wrong)


def test_points_in_space_seen_close_up():
    points, s = ((0, 1, 2), (6, 4, 5), (3, 7, 8)), torch.randn(9, 9, generator=torch_rng(0, "space"))
    far, close = PairwiseFeatures(points)(s), PairwiseFeatures(points, close=0.4)(s)
    assert far.shape == (9, 3 * (3 + 3 + 9)) and close.shape == (9, 3 * (3 + 3 + 9 + 3))
    torch.testing.assert_close(close[:, :45], far)
    offsets = torch.cat([s[:, list(points[i])] - s[:, list(points[j])] for i, j in ((0, 1), (0, 2), (1, 2))], 1)
    torch.testing.assert_close(far[:, :9], offsets)
    torch.testing.assert_close(close[:, 45:], (offsets / 0.4).tanh())


def test_points_that_meet_are_told_apart_by_nothing():
    "Each axis of all points has one mean and one spread; what never varies is not seen."
    rng = numpy_rng(0, "meet")
    states = rng.normal(size=(30, 5, 6)) * [1, 2, 1, 5, 2, 0] + [0, 0, 3, 0, 1, 7]
    features = Features(points=((0, 1), (2, 4)), close=0.3)
    n = Normaliser.fit(Rollouts(states, np.zeros((30, 4), int)), features)
    assert (n.mean[0], n.std[0], n.mean[1], n.std[1]) == (n.mean[2], n.std[2], n.mean[4], n.std[4])
    assert n.std[3] > 2 * n.std[0] and n.std[5] == UNSEEN
    absent = Normaliser.fit(Rollouts(states * [1, 1, 0, 1, 0, 1], np.zeros((30, 4), int)), features)
    assert absent.std[2] == absent.std[4] == UNSEEN and abs(absent.std[0] - 1) < 0.1


def test_a_place_that_no_step_changes_has_a_scale_of_its_own():
    "Else a goal would creep: what is small for things that move is large for one that never does."
    rng = numpy_rng(0, "goal")
    hand = rng.normal(size=(30, 5, 2)).cumsum(1)
    goal = np.repeat(rng.normal(size=(30, 1, 2)), 5, 1)
    n = Normaliser.fit(Rollouts(np.concatenate([hand, goal], -1), np.zeros((30, 4), int)),
                       Features(points=((0, 1), (2, 3)), close=0.3))
    assert n.std[0] == n.std[2] and n.std[0] > 0.5   # where it lies is seen all the same
    assert n.step[2:] == (1e-3, 1e-3)
    alone = Normaliser.fit(Rollouts(np.concatenate([hand, goal, hand], -1), np.zeros((30, 4), int)),
                           Features(points=((0, 1), (2, 3)), close=0.3))
    assert alone.step[2:4] == alone.jump[2:4] == (1e-3, 1e-3) and 0.8 < alone.step[0] == alone.step[1] < 1.2
