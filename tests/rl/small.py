"Small data for the tests of this wing: random rollouts, and an encoder that needs no model."

import numpy as np

from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.core.files import numpy_rng
from kalm.core.goals import Goal
from kalm.core.rollouts import IMAGINED, REAL, Rollouts
from kalm.rl.replay import Replay

GOALS = [Goal("Go left."), Goal("Go right."), Goal("Stay where you are.")]
FOUR = DiscreteActions(4)
BOX = ContinuousActions((-1.0, 0.0), (1.0, 4.0))


class Fake:
    "Random vectors, the same for the same sentence."

    def encode(self, texts):
        return np.stack([numpy_rng(0, t).normal(size=6) for t in texts]).astype(np.float32)

    def spec(self):
        return dict(type="fake")


def rollouts(n, steps=4, source=REAL, seed=0, codec=FOUR, goals=GOALS, **over):
    rng = numpy_rng(seed, "rollouts", source)
    success = rng.random(n) < 0.5
    fields = dict(
        states=rng.normal(size=(n, steps + 1, 3)),
        actions=codec.sample(rng, n * steps).reshape(n, steps, *codec.shape),
        rewards=rng.normal(size=(n, steps)),
        lengths=rng.integers(1, steps + 1, n),
        success=success,
        truncated=~success,
        goal=rng.integers(0, len(goals), n),
        source=np.full(n, source),
    )
    return Rollouts(**fields | over, goals=goals, codec=codec)


def replay(real=20, imagined=0, codec=FOUR, **settings):
    data = [rollouts(n, source=s, codec=codec) for n, s in ((real, REAL), (imagined, IMAGINED)) if n]
    settings = settings or (dict(imagined_fraction=0.5) if imagined else {})
    return Replay(data, encoder=Fake(), **settings)
