"Small worlds for tests: a walk on a line with two actions or a continuous one, and words about it."
import gymnasium as gym
import numpy as np

from kalm.core.domain import Behaviour, Features, Limits, Words
from kalm.core.goals import Goal
from kalm.core.gym_domain import GymDomain


class LineEnv(gym.Env):
    "A point on a line from -1 to 1; an action moves it by at most 0.3. Walking off the left end is a dead end."
    def __init__(self, continuous: bool = False):
        self.observation_space = gym.spaces.Box(-1.5, 1.5, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32) if continuous else gym.spaces.Discrete(2)
        self.continuous = continuous

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = (options or {}).get("goal")
        self.state = np.array([self.np_random.uniform(-.6, .4), self.np_random.uniform(-1, 1)], np.float32)
        return self.state.copy(), {}

    def step(self, action):
        push = float(np.asarray(action).ravel()[0]) if self.continuous else 2 * int(action) - 1
        self.state[0] = np.clip(self.state[0] + .3 * push, -1.5, 1.5)
        side = self.goal.task.get("side", "right") if self.goal else "right"
        success = bool(reached(side, self.state))
        return self.state.copy(), float(success), bool(success or self.state[0] < -1.2), False, {"success": success}


def reached(side: str, states: np.ndarray) -> np.ndarray:
    "Whether the point is near the right end, or the left one."
    x = np.asarray(states)[..., 0]
    return x > .8 if side == "right" else (x < -.8) & (x > -1.2)


class LineWords(Words):
    "Which way the point moved; where it is."
    def caption(self, state, next_state):
        step = float(next_state[0] - state[0])
        return "nothing" if abs(step) < .01 else "right" if step > 0 else "left"

    def questions(self, state):
        return [("side", "right" if state[0] > 0 else "left")]

    def meaning(self, goal):
        return goal.task.get("side", "")

    def read(self, text):
        return next((w for w in ("left", "right") if w in text.lower()), "")


SENTENCES = {"offline": ("Walk to the {} end.", "Please go {}."), "rephrase": ("The {} end is where you should be.",)}


def line_goals(level: str, max_steps: int = 8) -> list[Goal]:
    sides = ("right", "left")
    return [Goal(s.format(side), level, max_steps, {"side": side}) for s in SENTENCES[level] for side in sides]


def walk(simulator, rows, rng):
    "Towards the goal's end, one step in five the other way."
    sides = [simulator.goals[i].task["side"] for i in simulator.index[rows]]
    push = np.where(np.array(sides) == "right", 1., -1.) * np.where(rng.random(len(rows)) < .2, -1, 1)
    if simulator.domain.codec.shape:
        return push[:, None].astype(np.float32) * rng.uniform(.5, 1, (len(rows), 1)).astype(np.float32)
    return (push > 0).astype(np.int64)


def line(continuous: bool = False, words: bool = True, judged: bool = True, name: str = "line") -> GymDomain:
    "The line world as a domain; without `judged` success is known to the environment alone."
    return GymDomain(lambda: LineEnv(continuous), {level: line_goals(level) for level in SENTENCES}, name=name,
                     success=(lambda goal, states, start: reached(goal.task["side"], states)) if judged else "info",
                     behaviours={"walk": Behaviour(walk)}, words=LineWords() if words else None,
                     limits=Limits((-1.5, -1.), (1.5, 1.), ((0,), (1,)), (.31, .01)), features=Features())


def discrete_line() -> GymDomain:
    "For the command line: `--domain worlds:discrete_line`."
    return line(name="discrete_line")


def continuous_line() -> GymDomain:
    "For the command line: `--domain worlds:continuous_line`."
    return line(continuous=True, name="continuous_line")


def cart_pole() -> GymDomain:
    "CartPole: discrete actions, success is to last."
    def lean(simulator, rows, rng):
        return (simulator.states[rows, 2] + simulator.states[rows, 3] > 0).astype(np.int64)
    goals = {"offline": ["Keep the pole upright."], "rephrase": ["Balance it."]}
    return GymDomain("CartPole-v1", goals, success="survive", behaviours={"lean": lean}, max_steps=12,
                     name="cart_pole")


def pendulum() -> GymDomain:
    "Pendulum: a continuous action, success is told from states."
    def swing(simulator, rows, rng):
        return np.sign(simulator.states[rows, 2:]) * rng.uniform(1, 2, (len(rows), 1))
    goals = {"offline": ["Swing the pendulum up."], "rephrase": ["Make it point to the sky."]}
    return GymDomain("Pendulum-v1", goals, success=lambda goal, states, start: states[..., 0] > .5,
                     behaviours={"swing": Behaviour(swing, keep_failures=True)}, max_steps=12, name="pendulum")


def grid() -> GymDomain:
    "A MiniGrid level: seven actions, success is the end that earns a reward."
    import minigrid  # noqa: F401, registers the levels
    goals = {"offline": ["Go to the green square."], "rephrase": ["Reach the goal."]}
    return GymDomain("MiniGrid-Empty-Random-5x5-v0", goals, success="terminated", max_steps=12, name="grid",
                     observe=lambda o: np.append(o["image"][..., 0].ravel() / 10, o["direction"]))
