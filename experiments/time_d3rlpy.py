"""Gradient steps a second of d3rlpy's discrete CQL and BC, and of kalm's, in turns: results/d3rlpy_speed.json.

d3rlpy 2.8.1 pins gymnasium 1.0.0, so it lives in a virtual environment of its own:

    python3 -m venv /tmp/d3 && /tmp/d3/bin/pip install torch==2.13.0 d3rlpy==2.8.1
    python experiments/time_d3rlpy.py --theirs /tmp/d3/bin/python

The two take turns, each in a process with one thread, and a second is a second of that process's own time, so that
other work on the machine does not blur it. Both train the paper's networks (256-256) on as many inputs; `fit` is timed
whole, without logs. d3rlpy trains one seed in a process. kalm is timed with one, with three side by side (all their
steps counted), and with three in float32 where it would multiply in bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

CASES = [("cql", 394, 32), ("bc", 394, 100), ("cql", 778, 32), ("bc", 778, 100)]  # algorithm, inputs, batch size
STATE, SEEDS = 10, 3


def theirs(algorithm: str, inputs: int, batch: int, steps: int) -> float:
    "Of d3rlpy."
    import d3rlpy
    import numpy as np
    import torch

    torch.set_num_threads(1)
    rng, n = np.random.default_rng(0), 10_000
    arrays = dict(observations=rng.normal(size=(n, inputs)).astype(np.float32), actions=rng.integers(0, 40, (n, 1)),
                  rewards=rng.normal(size=(n, 1)).astype(np.float32),
                  terminals=(np.arange(n) % 5 == 4).astype(np.float32))
    data = d3rlpy.dataset.MDPDataset(**arrays, action_space=d3rlpy.ActionSpace.DISCRETE)
    if algorithm == "cql":
        config = d3rlpy.algos.DiscreteCQLConfig(batch_size=batch, learning_rate=6.25e-5, alpha=10.,
                                                target_update_interval=8000, gamma=.99)
    else:
        config = d3rlpy.algos.DiscreteBCConfig(batch_size=batch, learning_rate=1e-3, beta=.5)
    model = config.create(device=False)
    model.build_with_dataset(data)

    def fit(k: int) -> None:
        model.fit(data, n_steps=k, n_steps_per_epoch=k, show_progress=False,
                  logger_adapter=d3rlpy.logging.NoopAdapterFactory())

    fit(50)
    start = time.process_time()
    fit(steps)
    return steps / (time.process_time() - start)


def ours(algorithm: str, inputs: int, batch: int, steps: int) -> tuple[float, float, float]:
    "Of kalm: one seed, three, three in float32."
    import torch

    import kalm.rl.train
    from kalm.rl.bc import BC
    from kalm.rl.cql import CQL
    from kalm.rl.replay import synthetic_replay
    from kalm.rl.train import steps_per_second

    learner, replay = {"cql": CQL, "bc": BC}[algorithm](batch_size=batch), synthetic_replay(inputs - STATE)
    one, three = steps_per_second(learner, replay, steps), steps_per_second(learner, replay, steps, range(SEEDS))
    kalm.rl.train.fast_dtype = lambda device="cpu": torch.float32
    return one, three, steps_per_second(learner, replay, steps, range(SEEDS))


def one_round(python: str, side: str, steps: int) -> list:
    "Every case of one side, in a fresh process."
    env = os.environ | {f"{k}_NUM_THREADS": "1" for k in ("OMP", "MKL", "OPENBLAS")}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([python, __file__, "--one", side, "--steps", str(steps)], env=env, capture_output=True,
                          text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def versions(python: str, packages: list[str]) -> dict:
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def summary(rounds: list[tuple[list, list]]) -> list[dict]:
    "A row for each case: rates of all rounds, medians of their ratios."
    rows = []
    for i, (algorithm, inputs, batch) in enumerate(CASES):
        them, one, three, float32 = zip(*((t[i], *o[i]) for t, o in rounds))
        row = dict(algorithm=algorithm, inputs=inputs, batch=batch, d3rlpy=them, kalm=one, kalm_three=three,
                   kalm_three_float32=float32)
        for name, rates in (("", one), ("_three", three), ("_three_float32", float32)):
            row[f"median_ratio{name}"] = round(median(y / x for x, y in zip(them, rates)), 2)
        rows.append({k: [round(x, 1) for x in v] if isinstance(v, tuple) else v for k, v in row.items()})
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--theirs", metavar="PYTHON", help="the interpreter of d3rlpy's environment")
    p.add_argument("--out", type=Path, default=Path("results/d3rlpy_speed.json"))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--one", choices=["theirs", "ours"], help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        return print(json.dumps([{"theirs": theirs, "ours": ours}[a.one](*case, a.steps) for case in CASES]))
    if not a.theirs:
        p.error("--theirs: the interpreter of an environment with d3rlpy is needed")
    sides = dict(theirs=a.theirs, ours=sys.executable)
    rounds = [tuple(one_round(python, side, a.steps) for side, python in sides.items()) for _ in range(a.rounds)]
    from benchmark import origin

    from kalm.core.files import save_json

    report = dict(what="gradient steps a second of processor time, in turns, one thread each",
                  **origin(), steps=a.steps,
                  d3rlpy=versions(a.theirs, ["d3rlpy", "torch", "numpy"]),
                  kalm=versions(sys.executable, ["torch", "numpy"]), rows=summary(rounds))
    save_json(a.out, report)


if __name__ == "__main__":
    main()
