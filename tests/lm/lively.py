"Tiny models for tests that are untrained but not indifferent: what they do depends on what they read."

import numpy as np
import torch

from kalm.core.domain import codec_of
from kalm.core.files import numpy_rng
from kalm.core.rollouts import Rollouts
from kalm.lm.model import Adapter, KalmLM
from kalm.lm.sequences import prompts_of
from kalm.tensors.store import torch_rng


def liven(lm: KalmLM, seed: int = 0) -> KalmLM:
    "An adapter that does something, and heads whose answers depend on what they read."
    lm.adapt(Adapter(rank=4))
    g = torch_rng(seed, "liven")
    with torch.no_grad():
        for name, p in lm.own_parameters().items():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
        lm.action_head.out.weight.mul_(4 if lm.codec.shape else 30)  # continuous actions stay within bounds
        lm.state_head.out.weight.mul_(5)
    return lm.eval()


def lively_lm(domain, seed: int = 0) -> KalmLM:
    "A lively tiny model for a domain."
    lm = KalmLM.from_pretrained(
        "tiny-random",
        state_dim=domain.state_space.shape[0],
        codec=codec_of(domain),
        features=domain.features,
        prompts=prompts_of(domain.words),
        domain=domain.name,
    )
    return liven(lm, seed)


def made_up(domain, n: int, steps: int = 4, seed: int = 0, least: int = 1) -> Rollouts:
    "Random rollouts of `least` to `steps` steps, goals in turn; the first has the full length."
    rng, goals, codec = numpy_rng(seed, "made up"), domain.goals("offline"), codec_of(domain)
    lengths = rng.integers(least, steps + 1, n)
    lengths[:1] = steps
    states = rng.uniform(-0.5, 0.5, (n, steps + 1, domain.state_space.shape[0]))
    actions = codec.sample(rng, n * steps).reshape(n, steps, *codec.shape)
    success = rng.random(n) < 0.6
    return Rollouts(
        states,
        actions,
        rng.normal(size=(n, steps)),
        lengths,
        success=success,
        truncated=~success,
        goal=np.arange(n) % len(goals),
        goals=goals,
        codec=codec,
        domain=domain.name,
    )


def same(a: Rollouts, b: Rollouts) -> bool:
    "Equal to the last bit."
    names = ("states", "actions", "rewards", "lengths", "success", "failure", "truncated", "goal", "seed", "source")
    return a.goals == b.goals and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def assert_close(a: Rollouts, b: Rollouts) -> None:
    "The same decisions; numbers that differ by rounding only."
    for name in ("lengths", "success", "failure", "truncated", "goal", "source"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.actions, b.actions, atol=1e-4)
    np.testing.assert_allclose(a.states, b.states, atol=1e-4)
    np.testing.assert_allclose(a.rewards, b.rewards, atol=1e-3)
