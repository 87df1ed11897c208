"What a batch holds, where it is drawn from, and what makes a replay the same."

import warnings

import numpy as np
import pytest
import torch
from small import BOX, FOUR, GOALS, Fake, replay, rollouts

from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.core.files import numpy_rng
from kalm.core.goals import Goal
from kalm.core.rollouts import IMAGINED, REAL, Rollouts
from kalm.rl.bc import BC
from kalm.rl.cql import CQL
from kalm.rl.encoder import GivenEncodings, Whitening
from kalm.rl.replay import Replay, synthetic_replay
from kalm.tensors.store import torch_rng


def every(b):
    "All rows as one batch."
    return b.take(torch.arange(len(b)))


def test_a_batch_has_its_share_of_imagined_rows_however_few_there_are():
    b, rng = replay(real=3, imagined=300), torch_rng(0, "t")
    real = {row.numpy().tobytes() for row in b.floats[: b.sizes[0]]}
    for _ in range(20):
        batch = b.sample(16, rng)
        numbers = [x[:, None] for x in (batch.rewards, batch.bootstrap, batch.weights)]
        rows = torch.cat([batch.states, batch.next_states, *numbers], 1)
        assert [r.numpy().tobytes() in real for r in rows] == (batch.group == 0).tolist() == [True] * 8 + [False] * 8


def test_pooled_data_are_drawn_by_size_and_every_transition_is_drawn():
    for b in (replay(real=5), replay(real=0, imagined=5, imagined_fraction=1.0)):
        assert len(b.draw(4000, 1, [torch_rng(0, "t")]).unique()) == len(b)
    b = Replay([rollouts(5), rollouts(40, source=IMAGINED)], encoder=Fake())
    rows = b.draw(4000, 1, [torch_rng(0, "t")])
    n = int(rollouts(5).lengths.sum())
    assert (rows < n).float().mean().item() == pytest.approx(n / len(b), abs=0.03)


@pytest.mark.parametrize("fraction, imagined", [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_the_imagined_fraction_is_as_asked(fraction, imagined):
    b = replay(9, 9, imagined_fraction=fraction)
    rows = b.draw(8, 200, [torch_rng(0)])
    assert (b.take(rows).group.sum(-1) == imagined).all()
    assert len(rows.unique()) == (b.sizes[0] if fraction < 1 else 0) + (b.sizes[1] if fraction else 0)


def test_fractions_give_each_data_set_its_share():
    data = [rollouts(4, seed=s, source=source) for s, source in enumerate((REAL, IMAGINED, IMAGINED))]
    b = Replay(data, fractions=[0.5, 0.375, 0.125], encoder=Fake())
    rows = b.draw(8, 300, [torch_rng(0)])
    group = b.take(rows).group
    assert group[5, 0].tolist() == [0] * 4 + [1] * 3 + [2] and len(rows.unique()) == len(b)
    for i, r in enumerate(data):
        t, mine = r.transitions(), every(b)
        np.testing.assert_array_equal(mine.states[mine.group == i], t["states"])


def test_sources_are_told_apart_row_by_row():
    "A data set may hold both; the order of data sets does not matter to which group a row belongs."
    mixed = Rollouts.concat([rollouts(4, source=IMAGINED), rollouts(5)])
    b = Replay([mixed], imagined_fraction=0.5, encoder=Fake())
    assert b.sizes == [int(rollouts(5).lengths.sum()), int(rollouts(4, source=IMAGINED).lengths.sum())]


def test_sampling_depends_on_the_generator_alone():
    b = replay(9, 9)
    one, two, three = (b.sample(8, torch_rng(s, "t")) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(one, two)) and not torch.equal(one.states, three.states)


def streams(*seeds):
    return [torch_rng(s, "t") for s in seeds]


def test_draws_of_several_steps_and_seeds_are_those_of_one():
    b = replay(9, 9)
    at_once, one = b.draw(8, 5, streams(0, 1, 2)), streams(0, 1, 2)
    assert at_once.shape == (5, 3, 8)
    for rows in at_once:
        assert torch.equal(rows, b.draw(8, 1, one)[0])
    for s, rows in enumerate(at_once.unbind(1)):
        assert torch.equal(rows, b.draw(8, 5, streams(s))[:, 0])
    batch = b.take(at_once)
    assert batch.states.shape == (5, 3, 8, 3) and batch.encodings.shape == (5, 3, 8, 6)
    for x, y in zip(batch, b.take(at_once[2, 1])):
        assert torch.equal(x[2, 1], y)


@pytest.mark.parametrize("codec", [FOUR, BOX])
def test_transitions_keep_what_belongs_to_them(codec):
    r = rollouts(12, codec=codec)
    t = r.transitions()
    got = every(Replay(r, encoder=Fake()))
    for name in ("states", "actions", "rewards", "next_states"):
        np.testing.assert_array_equal(getattr(got, name), t[name])
    np.testing.assert_array_equal(got.encodings, Fake().encode([GOALS[g].text for g in t["goal"]]))
    assert got.actions.dtype == (torch.int64 if codec is FOUR else torch.float32)


@pytest.mark.parametrize("ended, last", [("success", 0), ("failure", 0), ("truncated", 1), (None, 1)])
def test_success_and_failure_end_the_future_and_time_does_not(ended, last):
    one = dict(states=np.arange(9).reshape(1, 3, 3), actions=[[1, 2]], goal=[0], goals=GOALS)
    got = every(Replay(Rollouts(**one, **({ended: [True]} if ended else {})), encoder=Fake()))
    assert got.bootstrap.tolist() == [1, last] and got.weights.tolist() == [1, 1]


@pytest.mark.parametrize("low, high, centre, scale", [
    (-0.5, 0.5, 0, 1), (-3, 3, 0, 1), (-8, 8, 0, 1), (-12, 12, 0, 0.1),
    (-0.2, 0.2, 0, 10), (-2e-4, 2e-4, 0, 1e4), (-4e6, 0, 0, 1e-7),
    (999, 1001, 1000, 1), (5, 7, 6, 1), (2, 2, 2, 1), (0, 0, 0, 1), (0.1999, 0.2001, 0.2, 1e4)])
def test_states_are_learnt_in_round_units(low, high, centre, scale):
    "The range of a coordinate, the point it is measured from, and the power of ten that brings it to about 1."
    states = np.linspace(low, high, 3 * 4 * 5 * 20).reshape(-1, 5, 3)
    found = Replay(rollouts(len(states), states=states), encoder=Fake()).scales
    np.testing.assert_allclose(found.centre, centre, rtol=0.01, atol=1e-6)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)


@pytest.mark.parametrize("reward, scale", [(25.0, 1), (0.25, 100), (-1e-4, 1e5), (250.0, 0.1), (0.0, 1)])
def test_rewards_are_learnt_in_round_units(reward, scale):
    "The largest return, here of four such rewards, comes nearest to 100; what lies behind the end does not count."
    r = rollouts(5, rewards=np.full((5, 4), reward), lengths=np.array([4, 1, 1, 1, 1]))
    assert Replay(r, encoder=Fake()).scales.reward == pytest.approx(scale)


def test_units_are_those_of_real_rollouts_where_there_are_any():
    small, large = (rollouts(40, source=s, states=np.full((40, 5, 3), v) * numpy_rng(0).choice([-1, 1], (40, 5, 3)))
                    for s, v in ((REAL, 1e-3), (IMAGINED, 1e3)))
    assert Replay([large, small], 0.5, encoder=Fake()).scales.scale.tolist() == [1000] * 3
    np.testing.assert_allclose(Replay(large, encoder=Fake()).scales.scale, 1e-3)


def test_a_batch_in_other_units():
    b = Replay(rollouts(20, states=1000 + numpy_rng(0).random((20, 5, 3)) / 50, rewards=np.ones((20, 4)) / 4),
               encoder=Fake())
    plain, scaled = every(b), b.scales(every(b))
    middle = torch.from_numpy(b.scales.centre).double()
    assert (middle - 1000.01).abs().max() < 5e-3
    for name in ("states", "next_states"):
        want = 100 * (getattr(plain, name).double() - middle)
        torch.testing.assert_close(getattr(scaled, name).double(), want, rtol=0, atol=1e-4)
    assert torch.equal(scaled.rewards, 100 * plain.rewards) and torch.equal(scaled.actions, plain.actions)
    assert not b.scales.same and replay().scales._replace(reward=1).same


def test_rewards_of_two_kinds_are_told_where_they_are_learnt_from():
    sparse = dict(rewards=np.zeros((20, 4)))
    costly = Replay([rollouts(20), rollouts(20, source=IMAGINED, **sparse)], 0.5, encoder=Fake())
    with pytest.warns(UserWarning, match="give the domain a reward of its own, or learn by BC"):
        CQL().learner(costly, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BC().learner(costly, [0])
        for real, imagined in ((sparse, sparse), ({}, {}), (sparse, {})):
            data = [rollouts(20, **real), rollouts(20, source=IMAGINED, **imagined)]
            CQL().learner(Replay(data, 0.5, encoder=Fake()), [0])


def test_weights_go_with_their_rollouts():
    r, imagined = rollouts(9), rollouts(7, source=IMAGINED)
    w = numpy_rng(0).random(7)
    b = Replay([imagined, r], 0.5, weights=[w, None], encoder=Fake())
    want = np.concatenate([np.ones(b.sizes[0]), np.repeat(w, imagined.lengths)]).astype(np.float32)
    np.testing.assert_array_equal(every(b).weights, want)
    np.testing.assert_array_equal(every(Replay(imagined, weights=w, encoder=Fake())).weights, want[b.sizes[0] :])


def test_sentences_are_stored_once_across_data_sets_with_different_goals():
    other = [GOALS[2], GOALS[0], Goal("Never used."), GOALS[1], Goal(GOALS[0].text, "hard")]
    b = Replay([rollouts(8), rollouts(8, goals=other, goal=[0, 1, 3, 4, 0, 1, 3, 4])], encoder=Fake())
    assert sorted(b.texts) == sorted(g.text for g in GOALS)
    np.testing.assert_array_equal(b.encodings, Fake().encode(b.texts))
    got, n = every(b), int(rollouts(8).lengths.sum())
    t = rollouts(8, goals=other, goal=[0, 1, 3, 4, 0, 1, 3, 4]).transitions()
    assert [b.texts[i] for i in got.goals[n:]] == [other[g].text for g in t["goal"]]


def test_which_actions_there_are():
    assert replay().codec == FOUR and replay(codec=BOX).codec == BOX
    bare = Rollouts(np.zeros((1, 3, 2)), [[1, 6]], goal=[0], goals=GOALS)
    assert Replay(bare, encoder=Fake()).codec == DiscreteActions(7)
    assert Replay(bare, encoder=Fake()).state_dim == 2
    known = Rollouts(np.zeros((1, 3, 2)), [[1, 6]], goal=[0], goals=GOALS, codec=DiscreteActions(9))
    assert Replay([bare, known], encoder=Fake()).codec == DiscreteActions(9)


# ---------------------------------------------------------------- identity


def test_the_digest_tells_replays_apart():
    r, s, i = rollouts(9), rollouts(9, seed=1), rollouts(9, source=IMAGINED)
    white = Whitening.fit(Fake(), [g.text for g in GOALS])
    other_words = [*GOALS[:2], Goal("Stay!")]
    made = [
        dict(datasets=[r]),
        dict(datasets=[s]),
        dict(datasets=[r, i]),
        dict(datasets=[r, i], imagined_fraction=0.5),
        dict(datasets=[r, i], imagined_fraction=0.25),
        dict(datasets=[r, i], fractions=[0.5, 0.5]),
        dict(datasets=[r], weights=[np.full(9, 0.5)]),
        dict(datasets=[r], whitening=white),
        dict(datasets=[rollouts(9, goals=other_words)]),
    ]
    digests = [Replay(**m, encoder=Fake()).digest() for m in made]
    texts = {g.text: v for g, v in zip(GOALS, Fake().encode([g.text for g in GOALS]))}
    digests.append(Replay([r], encoder=GivenEncodings(texts)).digest())
    assert len(set(digests)) == len(digests)
    assert [Replay(**m, encoder=Fake()).digest() for m in made] == digests[:-1]


def test_the_last_places_of_encodings_do_not_matter():
    class Shaken(Fake):
        def encode(self, texts):
            return super().encode(texts) * np.float32(1 + 1e-6)

    texts = [g.text for g in GOALS]
    one, two = (Replay(rollouts(9), encoder=e, whitening=Whitening.fit(e, texts)) for e in (Fake(), Shaken()))
    assert one.digest() == two.digest() and not torch.equal(one.encodings, two.encodings)


# ---------------------------------------------------------------- what is refused


def bare_box():
    return Rollouts(np.zeros((1, 3, 2)), np.zeros((1, 2, 1)), goal=[0], goals=GOALS)


def wide():
    return Rollouts(np.zeros((1, 3, 2)), [[1, 2]], goal=[0], goals=GOALS, codec=FOUR)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Replay([], encoder=Fake()), "empty"),
        (lambda: Replay(rollouts(3, lengths=np.zeros(3, int)), encoder=Fake()), "empty"),
        (lambda: Replay(rollouts(3, goal=[-1, 0, 0]), encoder=Fake()), "1 rollouts of data set 0 have no goal"),
        (lambda: Replay([rollouts(3), wide()], encoder=Fake()), "states of 2 and of 3 numbers"),
        (lambda: Replay([rollouts(3), rollouts(3, codec=BOX)], encoder=Fake()), "discrete actions and some continuous"),
        (lambda: Replay([rollouts(3), rollouts(3, codec=DiscreteActions(5))], encoder=Fake()), "different actions"),
        (
            lambda: Replay(
                [rollouts(3, codec=BOX), rollouts(3, codec=ContinuousActions((-9.0, -9.0), (9.0, 9.0)))], encoder=Fake()
            ),
            "different actions",
        ),
        (lambda: Replay(bare_box(), encoder=Fake()), "give the rollouts a codec"),
        (lambda: Replay(rollouts(3), encoder=GivenEncodings({"Go left.": [1.0]})), "no encoding was given"),
        (lambda: Replay(rollouts(3), imagined_fraction=0.5, encoder=Fake()), "imagined, but there are no such"),
        (lambda: Replay(rollouts(3), imagined_fraction=1.5, encoder=Fake()), "imagined_fraction=1.5"),
        (lambda: Replay([rollouts(3)] * 2, fractions=[0.5, 0.6], encoder=Fake()), "sum to 1"),
        (lambda: Replay([rollouts(3)] * 2, fractions=[1.0], encoder=Fake()), "expected 2 numbers"),
        (lambda: Replay([rollouts(3)] * 2, fractions=[-1.0, 2.0], encoder=Fake()), "at least 0"),
        (lambda: Replay([rollouts(3)] * 2, 0.5, [0.5, 0.5], encoder=Fake()), "expected one of them"),
        (
            lambda: Replay(rollouts(3), weights=np.ones(4), encoder=Fake()),
            r"weights of data set 0 of shape \(4,\): expected \(3,\)",
        ),
        (lambda: Replay(rollouts(3), weights=[1, -1, 1], encoder=Fake()), "at least 0"),
        (lambda: Replay([rollouts(3)] * 2, weights=[None], encoder=Fake()), "one entry a data set"),
        (lambda: replay(3, 3).sample(5, torch_rng(0)), "even"),
        (lambda: replay(3).sample(0, torch_rng(0)), "at least 1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message) as e:
        make()
    assert "\n" not in str(e.value)


def test_invented_data_are_of_the_kind_asked_for():
    b = synthetic_replay(7, 100, codec=BOX, state_dim=4)
    assert len(b) == 100 and b.encoding_dim == 7 and b.codec == BOX and b.state_dim == 4
