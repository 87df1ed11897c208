"The network, its twins side by side, and what a policy does, keeps and refuses."

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import BOX, FOUR, GOALS, Fake

from kalm.core.actions import ContinuousActions
from kalm.core.files import numpy_rng
from kalm.rl.encoder import GivenEncodings, Whitening
from kalm.rl.policy import LOG_STD, GoalMLP, GoalMLPs, Policy, head_outputs, mean_and_log_std, scaled_actions
from kalm.tensors.store import torch_rng

TEXTS = [g.text for g in GOALS]
VECTORS = GivenEncodings(dict(zip(TEXTS, Fake().encode(TEXTS))))


def network(outputs=4, seed=0):
    return GoalMLP(6, 3, outputs, hidden=16, rng=torch_rng(seed, "w"))


def policy(head="categorical", codec=FOUR, temperature=0.0, **about):
    return Policy(network(head_outputs(head, codec)), head, codec, VECTORS, temperature, **about)


def states(n, seed=0):
    return numpy_rng(seed, "states").normal(size=(n, 3)).astype(np.float32)


# ---------------------------------------------------------------- networks


def test_goal_part_equals_one_layer_on_the_concatenation():
    net = network()
    s, e = torch.randn(5, 3, generator=torch_rng(1)), torch.randn(5, 6, generator=torch_rng(2))
    w = torch.cat([net.state.weight, net.goal.weight], 1)
    h = (torch.cat([s, e], 1) @ w.T + net.goal.bias).relu()
    torch.testing.assert_close(net(s, e), net.out(net.hidden(h).relu()))
    assert (
        w.abs().max() <= 1 / 3 and net.hidden.weight.abs().max() <= 1 / 4
    )  # the concatenation's fan-in, 9, rules both


def test_networks_draw_nothing_from_the_global_generator():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    network()
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("inputs, outputs", [(3, 4), (1, 1)])
def test_networks_side_by_side_are_those_alone(inputs, outputs):
    nets = [GoalMLP(6, inputs, outputs, 16, torch_rng(k, "w")) for k in range(3)]
    s, e = torch.randn(3, 5, inputs, generator=torch_rng(1)), torch.randn(3, 5, 6, generator=torch_rng(2))
    many, want = GoalMLPs(nets), torch.stack([net(a, b) for net, a, b in zip(nets, s, e)])
    torch.testing.assert_close(many(s, e), want)
    torch.testing.assert_close(many.from_part(s, many.goal_part(e)), want)
    for k, net in enumerate(nets):
        one = many.one(k)
        assert one.sizes == net.sizes and all(
            torch.equal(a, b) for a, b in zip(one.parameters(), net.parameters(), strict=True)
        )
    many(s, e)[1].sum().backward()  # a seed's loss moves that seed alone
    assert all(p.grad[1].abs().sum() > 0 and not p.grad[[0, 2]].any() for p in many.parameters())
    rough = GoalMLPs(nets, torch.bfloat16)(s, e)
    assert rough.dtype == torch.float32 and 1e-6 < (rough - want).abs().max() < 0.05


def test_whitening_folded_in_takes_encodings_as_they_are():
    w = Whitening.fit(VECTORS, TEXTS)
    s, e = torch.from_numpy(states(3)), VECTORS.encode(TEXTS)
    inside = network()
    want = inside(s, torch.from_numpy(w(e)))
    torch.testing.assert_close(inside.fold_whitening(w)(s, torch.from_numpy(e)), want, rtol=1e-4, atol=1e-4)
    assert inside.fold_whitening(None) is inside


def test_scales_folded_in_take_states_as_they_are():
    s, e = torch.from_numpy(states(3)), VECTORS.encode(TEXTS)
    centre, scale = np.float32([5, 0, 1000]), np.float32([10, 1, 0.1])
    inside = network()
    want = inside((s - torch.from_numpy(centre)) * torch.from_numpy(scale), torch.from_numpy(e))
    torch.testing.assert_close(inside.fold_scales(centre, scale)(s, torch.from_numpy(e)), want, rtol=1e-4, atol=1e-4)
    untouched, other = network(), network().fold_scales(np.zeros(3, np.float32), np.ones(3, np.float32))
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------- acting


def test_the_likeliest_action_and_one_state_alone():
    p, s, texts = policy(), states(3), TEXTS
    outputs = p.net(torch.from_numpy(s), torch.from_numpy(VECTORS.encode(texts)))
    np.testing.assert_array_equal(p.act(s, texts), outputs.argmax(1))
    for k in range(3):
        one = p.act(s[k], texts[k])
        assert np.ndim(one) == 0 and one == outputs[k].argmax()
    np.testing.assert_array_equal(p.act(s, TEXTS[0]), p.act(s, [TEXTS[0]] * 3))


@pytest.mark.parametrize("head", ["gaussian", "squashed", "deterministic"])
def test_continuous_actions_lie_in_the_box(head):
    p, s = policy(head, BOX), 100 * states(200)
    outputs = p.net(torch.from_numpy(s), torch.from_numpy(VECTORS.encode([TEXTS[1]] * 200)))
    middle = np.tanh(outputs.detach().numpy()[:, :2])
    np.testing.assert_allclose(p.act(s, TEXTS[1]), BOX.centre + BOX.scale * middle, atol=1e-4)
    assert p.act(s[0], TEXTS[1]).shape == (2,) and p.act(s, TEXTS[1]).dtype == np.float32
    if head != "deterministic":
        drawn = policy(head, BOX, temperature=1.0).act(s, TEXTS[1])
        BOX.check(drawn, (200,))
        assert not np.allclose(drawn, p.act(s, TEXTS[1]))


def test_actions_are_drawn_from_the_softmax():
    p = policy(temperature=0.05, seed=1)
    s = np.repeat(states(1), 20_000, 0)
    out = p.net(torch.from_numpy(s[:1]), torch.from_numpy(VECTORS.encode(TEXTS[:1])))[0].detach()
    share = np.bincount(p.act(s, TEXTS[0]), minlength=4) / len(s)
    np.testing.assert_allclose(share, (out / 0.05).softmax(0).numpy(), atol=0.012)
    assert share.max() < 0.99


@pytest.mark.parametrize("head", ["gaussian", "squashed"])
def test_continuous_draws_spread_as_the_network_says(head):
    p = policy(head, ContinuousActions((-1.0, -1.0), (1.0, 1.0)), temperature=0.5)
    s = np.repeat(states(1), 20_000, 0)
    out = p.net(torch.from_numpy(s[:1]), torch.from_numpy(VECTORS.encode(TEXTS[:1])))[0].detach()
    mean, log_std = (x.numpy() for x in mean_and_log_std(out))
    drawn = p.act(s, TEXTS[0])
    if head == "squashed":
        drawn, middle = np.arctanh(drawn), mean
    else:
        middle = np.tanh(mean)
    np.testing.assert_allclose(drawn.mean(0), middle, atol=0.01)
    np.testing.assert_allclose(drawn.std(0), 0.5 * np.exp(log_std), rtol=0.03)


def test_draws_depend_on_what_is_passed_alone():
    p, s = policy(temperature=5.0), states(200)
    first = p.act(s, TEXTS[0])
    np.testing.assert_array_equal(first, p.act(s, TEXTS[0]))
    assert (first != policy(temperature=5.0, seed=1).act(s, TEXTS[0])).any()
    assert (p.act(s, TEXTS[0], rng=numpy_rng(1)) != p.act(s, TEXTS[0], rng=numpy_rng(2))).any()
    np.testing.assert_array_equal(p.act(s, TEXTS[0], rng=numpy_rng(1)), p.act(s, TEXTS[0], rng=numpy_rng(1)))
    rng = numpy_rng(1)
    assert (p.act(s, TEXTS[0], rng=rng) != p.act(s, TEXTS[0], rng=rng)).any()  # the stream moves on
    np.testing.assert_array_equal(policy().act(s, TEXTS[0], rng=numpy_rng(1)), policy().act(s, TEXTS[0]))


def test_a_sentence_is_encoded_once():
    calls = []

    class Counting(Fake):
        def encode(self, texts):
            calls.append(list(texts))
            return super().encode(texts)

    p = Policy(network(), "categorical", FOUR, Counting())
    for _ in range(3):
        p.act(states(4), [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[1]])
    p.act(states(2), TEXTS[1:])
    assert calls == [TEXTS[:2], TEXTS[2:]]


class Narrow(Fake):
    def encode(self, texts):
        return super().encode(texts)[:, :5]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: p.act(np.zeros((2, 4)), TEXTS[0]), r"states of shape \(2, 4\): expected \(B, 3\)"),
        (lambda p: p.act(np.zeros((0, 3)), []), "expected"),
        (lambda p: p.act(np.full((2, 3), np.nan), TEXTS[0]), "NaN"),
        (lambda p: p.act(np.zeros((2, 3)), TEXTS), "3 sentences for 2 states"),
        (lambda p: p.act(np.zeros((2, 3)), ["", "a"]), "expected a sentence"),
        (lambda p: p.act(np.zeros((2, 3)), "Unheard of."), "no encoding was given"),
        (lambda p: Policy(p.net, "categorical", FOUR, Narrow()).act(np.zeros((2, 3)), TEXTS[0]), r"shape \(1, 5\)"),
        (lambda p: Policy(p.net, "gaussian", FOUR, VECTORS), "head 'gaussian' for DiscreteActions"),
        (lambda p: Policy(p.net, "categorical", BOX, VECTORS), "expected gaussian or squashed or deterministic"),
        (
            lambda p: Policy(p.net, "deterministic", BOX, VECTORS),
            "network with 4 outputs: head 'deterministic' needs 2",
        ),
        (lambda p: policy("deterministic", BOX, temperature=1.0), "nothing to draw from"),
        (lambda p: policy(temperature=-1.0), "temperature -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(policy())


def test_the_log_std_is_bounded_and_keeps_a_gradient():
    raw = torch.tensor([[0.0, -3.0], [0.0, 3.0], [0.0, 0.0]], requires_grad=True)
    _, log_std = mean_and_log_std(raw)
    assert LOG_STD[0] < log_std[0] < -4.9 and 1.9 < log_std[1] < LOG_STD[1] and log_std[2].item() == sum(LOG_STD) / 2
    log_std.sum().backward()
    assert (raw.grad[:, 1] > 0).all()


def test_scaled_actions_reach_from_end_to_end():
    a = torch.tensor([BOX.low, BOX.high, BOX.centre.tolist()])
    assert scaled_actions(a, BOX).tolist() == [[-1, -1], [1, 1], [0, 0]]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "head, codec, temperature", [("categorical", FOUR, 0.3), ("gaussian", BOX, 1.0), ("deterministic", BOX, 0.0)]
)
def test_a_policy_comes_back_from_its_folder(head, codec, temperature, tmp_path):
    p = policy(head, codec, temperature, step=7, algorithm="bc", seed=3)
    p.save(tmp_path)
    q = Policy.load(tmp_path, encoder=VECTORS)
    assert (q.head, q.codec, q.temperature, q.step, q.algorithm, q.seed) == (head, codec, temperature, 7, "bc", 3)
    np.testing.assert_array_equal(p.act(states(5), TEXTS[0]), q.act(states(5), TEXTS[0]))


def test_loading_finds_the_sentence_encoder_and_names_any_other(tmp_path):
    from kalm.rl.encoder import SentenceEncoder

    Policy(network(), "categorical", FOUR, SentenceEncoder()).save(tmp_path / "sentence")
    assert Policy.load(tmp_path / "sentence").encoder.spec() == SentenceEncoder().spec()
    with pytest.raises(ValueError, match="does not fit"):
        Policy.load(tmp_path / "sentence", encoder=Fake())
    Policy(network(), "categorical", FOUR, Fake()).save(tmp_path / "fake")
    assert Policy.load(tmp_path / "fake", encoder=Fake()).act(states(1), "Anything.").shape == (1,)
    with pytest.raises(ValueError, match="type 'fake'"):
        Policy.load(tmp_path / "fake")


def rewritten(path, weights=None, **about):
    "A policy's file with other weights or another header, and no checksum beside it."
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["kalm"])
    save_file(load_file(path) | (weights or {}), path, metadata={"kalm": json.dumps(header | about)})
    path.with_name(path.name + ".sha256").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-8]),
        lambda p: p.write_bytes(b"not a policy"),
        lambda p: save_file({"a": torch.zeros(1)}, p),
        lambda p: rewritten(p, format="kalm-policy-1"),
        lambda p: rewritten(p, actions={"type": "odd"}),
        lambda p: rewritten(p, encoder=None),
        lambda p: rewritten(p, {"hidden.weight": torch.zeros(3, 3)}),
        lambda p: rewritten(p, {"extra": torch.zeros(3, 3)}),
        lambda p: rewritten(p, {"out.weight": torch.zeros(5, 16), "out.bias": torch.zeros(5)}),
    ],
)
def test_damaged_and_foreign_files_are_refused(damage, tmp_path):
    policy().save(tmp_path)
    damage(tmp_path / "policy.safetensors")
    with pytest.raises(ValueError):
        Policy.load(tmp_path, encoder=VECTORS)


def test_a_missing_policy_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="policy.safetensors"):
        Policy.load(tmp_path)
