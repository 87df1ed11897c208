"""Time the environment, imagination, grounding and offline RL beside what they replace: results/benchmark.json.

    python experiments/benchmark.py [--only environment imagination grounding rl] [--out results/benchmark.json]

Steps a second say as much about a machine, and about what else it does, as about a program. A ratio of two programs
that take turns on the same machine says something about the programs, so every job here takes turns with the one it is
compared with, and what counts is the median of the rounds' ratios. Leave the machine alone meanwhile.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch

import kalm
from kalm.clevr.goals import DIRECTIONS
from kalm.clevr.physics import initial_states, load_model, physics_of
from kalm.core.episodes import collect
from kalm.core.files import load_json, save_json
from kalm.lm.examples import Examples
from kalm.lm.generate import Imagination, generate
from kalm.lm.ground import Grounder, prepare
from kalm.lm.model import PAD, KalmLM
from kalm.rl.bc import BC
from kalm.rl.cql import CQL
from kalm.rl.replay import synthetic_replay
from kalm.rl.train import steps_per_second
from kalm.run.folder import commit, machine, versions
from kalm.run.presets import preset
from kalm.tensors.store import fast_dtype


def in_turns(clock: Callable[[], float], rounds: int, seconds: float, jobs: dict[str, Callable[[], int]]) -> dict:
    "Units a second of each job, a number a round. A turn is one call, and more until `seconds` are over."
    rates = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start, done = clock(), 0
            while not done or clock() - start < seconds:
                done += job()
            rates[name].append(round(done / (clock() - start), 4))
    return rates


def compared(unit: str, against: str, rates: dict[str, list[float]]) -> dict:
    "Rates with the medians of their ratios to one of them."
    ratios = {name: round(float(np.median(np.divide(r, rates[against]))), 4) for name, r in rates.items()}
    return dict(unit=unit, against=against, rates=rates, ratios=ratios)


def bare_mujoco(starts: np.ndarray, plan: np.ndarray) -> Callable[[], int]:
    "A job: the physics of CLEVR-Robot's steps and nothing else."
    model = load_model()
    data = mujoco.MjData(model)

    def job() -> int:
        for physics, actions in zip(starts, plan.tolist()):
            data.qpos[:], data.qvel[:] = physics[:37], physics[37:]
            for action in actions:
                ball, k = divmod(action, 8)
                data.qpos[35:37] = data.qpos[7 * ball:7 * ball + 2] - .15 * DIRECTIONS[k]
                data.qvel[30:32], data.qacc_warmstart[:], data.ctrl[:] = 0, 0, DIRECTIONS[k]
                mujoco.mj_step(model, data, nstep=40)
        return plan.size
    return job


def one_environment(starts: np.ndarray, plan: np.ndarray) -> Callable[[], int]:
    "A job: the Gymnasium environment, one step at a time."
    env = gym.make("kalm/ClevrRobot-v0")
    env.reset(seed=0)

    def job() -> int:
        for physics, actions in zip(starts, plan.tolist()):
            env.reset(options={"physics": physics})
            for action in actions:
                env.step(action)
        return plan.size
    return job


def environments_together(starts: np.ndarray, plan: np.ndarray, threads: int) -> Callable[[], int]:
    "A job: a row for each start, stepping together; turns that a finished row spends starting anew do not count."
    n = len(starts)
    goals = (kalm.domain("clevr").goals("offline") * n)[:n]
    env = gym.make_vec("kalm/ClevrRobot-v0", num_envs=n, vectorization_mode="vector_entry_point", goals=goals,
                       threads=threads)
    env.reset(seed=0)

    def job() -> int:
        env.reset(options={"physics": starts})
        steps, over = 0, np.zeros(n, bool)
        for actions in plan.T:
            steps += int((~over).sum())
            _, _, terminated, truncated, _ = env.step(actions)
            over = terminated | truncated
        return steps
    return job


def environment() -> dict:
    "Steps of the environment; processor time on one core, the clock where threads are compared."
    rng = np.random.default_rng(0)
    starts, plan = physics_of(initial_states(64, rng)), rng.integers(0, 40, (64, 20))
    one, few = one_environment(starts[:4], plan[:4]), dict(starts=starts[:4], plan=plan[:4])
    single = compared("steps a second of processor time", "bare MuJoCo", in_turns(
        time.process_time, 7, .4, {"bare MuJoCo": bare_mujoco(**few), "environment": one}))
    together = {f"64 together, {n} thread{'s' * (n > 1)}": environments_together(starts, plan, n) for n in (1, 2)}
    batched = compared("steps a second", "one environment", in_turns(
        time.perf_counter, 7, .4, {"one environment": one, **together}))
    return dict(environment=single, environments=batched)


def imagination() -> dict:
    "Rollouts of the shipped checkpoint with and without memory, and plain cached decoding of its backbone."
    d = kalm.domain("clevr")
    lm = KalmLM.grounded("clevr", dtype=fast_dtype())
    goals = d.goals("offline")
    index = np.arange(128) % len(goals)
    states = d.start(goals, index, np.arange(128)).states

    def imagining(rows: int, steps: int, cached: bool) -> Callable[[], int]:
        settings = Imagination(max_steps=steps, stop="limit", batch_size=rows, cached=cached)

        def job() -> int:
            made = generate(lm, d, goals, index[:rows], states[:rows], settings=settings)
            assert (made.lengths == steps).all()
            return rows
        return job

    imagining(8, 1, True)()
    jobs = {"no memory, 8 rows": imagining(8, 50, False), "memory, 8 rows": imagining(8, 50, True),
            "memory, 128 rows": imagining(128, 50, True)}
    found = compared("rollouts of 50 steps a second", "no memory, 8 rows", in_turns(time.perf_counter, 2, 0, jobs))
    texts = [goals[i].text for i in index]
    both = {"transformers": decoding(lm, texts), "kalm": lambda: 100 * imagining(128, 50, True)()}
    beside = compared("elements (words; actions and states) a second", "transformers",
                      in_turns(time.perf_counter, 3, 0, both))
    return dict(imagination=found, decoding=beside)


def decoding(lm: KalmLM, texts: list[str], new: int = 100) -> Callable[[], int]:
    "A job: `transformers` continues each sentence by `new` words with the same backbone."
    words = lm.tokenizer(texts, padding=True, return_tensors="pt", padding_side="left")

    @torch.no_grad()
    def job() -> int:
        with lm.merged():
            lm.backbone.generate(**words, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True,
                                 pad_token_id=lm.tokenizer.pad_token_id)
        return len(texts) * new
    return job


def grounding() -> dict:
    "Forward and backward through batches as they are, and through one padded row an example over the whole vocabulary."
    d = kalm.domain("clevr")
    real = collect(d, d.goals("offline"), 1500, seed=5, progress=False)
    config = replace(preset(d, "checkpoint").ground, batch_tokens=2048, compose=0.)
    plain = replace(config, branches=1, width=0, negatives=0)
    lm = prepare(d, real, config)
    lm.train()
    jobs, padding = {}, {}
    for name, settings in {"plain": plain, "packed": config}.items():
        examples = Examples(lm, real, d.words, settings, corpus=None)
        kinds = [examples.at((0, k))["kind"] for k in range(5)]
        padding[name] = round(float(sum((k == PAD).sum() for k in kinds) / sum(k.numel() for k in kinds)), 4)
        jobs[name] = training_step(lm, examples)
    found = compared("examples a second", "plain", in_turns(time.perf_counter, 3, 4., jobs))
    return dict(grounding=found | dict(padding=padding))


def training_step(lm: KalmLM, examples: Examples) -> Callable[[], int]:
    "A job: a batch forward and backward; it counts examples."
    grounder, step = Grounder(lm), iter(range(10**9))

    def job() -> int:
        plan = examples.plan(0)
        k = next(step) % len(plan)
        grounder(examples.at((0, k)))[0, 0].backward()
        for p in lm.own_parameters().values():
            p.grad = None
        return sum(len(planned) for planned in plan[k])
    return job


def rl() -> dict:
    "Gradient steps of the paper's networks: one seed at a time, and three side by side."
    found = {}
    for algorithm in (BC(), CQL()):
        replay = synthetic_replay(384)
        rates = {"one seed": [], "three seeds": []}
        for _ in range(3):
            rates["one seed"].append(round(steps_per_second(algorithm, replay, 300), 1))
            rates["three seeds"].append(round(steps_per_second(algorithm, replay, 300, range(3)), 1))
        found[algorithm.name] = compared("gradient steps a second of processor time", "one seed", rates)
    return found


PARTS = dict(environment=environment, imagination=imagination, grounding=grounding, rl=rl)


def cpu() -> str:
    "The processor's name as the system gives it."
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def origin() -> dict:
    "Where and when the numbers were made."
    return dict(commit=commit(), measured=datetime.now(UTC).strftime("%Y-%m-%d"), versions=versions(),
                machine=machine() | dict(cpu=cpu(), dtype=str(fast_dtype()).removeprefix("torch.")))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    p.add_argument("--out", type=Path, default=Path("results/benchmark.json"))
    a = p.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    for name in a.only:
        old = load_json(a.out) if a.out.exists() else {}
        load = round(os.getloadavg()[0], 1)
        for title, found in PARTS[name]().items():
            old[title] = found | dict(load_before=load, origin=origin())
            print(title, found["ratios"], flush=True)
        save_json(a.out, old)


if __name__ == "__main__":
    main()
