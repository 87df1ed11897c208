"""Gradient steps a second of d3rlpy's discrete CQL and BC and of kalm's, in turns on the same machine.

d3rlpy 2.8.1 pins gymnasium 1.0.0, so it lives in a virtual environment of its own:

    python3 -m venv /tmp/d3 && /tmp/d3/bin/pip install torch==2.13.0 d3rlpy==2.8.1
    .venv/bin/python tools/measure_d3rlpy.py --theirs /tmp/d3/bin/python --out results/d3rlpy_speed.json

The two take turns, round by round, each in a process with one thread (OMP_NUM_THREADS=1). Other work may share the machine, so a
"second" is a second of the process's own processor time (time.process_time); with one thread that is what an idle machine's clock would show, but for shared caches.
Both train the paper's network (256-256) on the same number of inputs, and `fit` is timed whole: sampling, losses, Adam; neither writes logs.
d3rlpy trains one seed a process, in float32. kalm is timed with one seed and with three side by side, the steps of all three counted, as it trains (wide products in bfloat16 where the processor is good at that) and with float32 throughout.
"""
import argparse, json, os, platform, subprocess, sys, time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

CASES = [("cql", 394, 32), ("bc", 394, 100), ("cql", 778, 32), ("bc", 778, 100), ("cql", 778, 256)]  # algorithm, inputs (state and encoding), batch size; the paper's sizes are 32 and 100
STATE, SEEDS = 10, 3


def theirs(algorithm: str, inputs: int, batch: int, steps: int) -> float:
    "d3rlpy's `fit`, no logging, no progress bar."
    import d3rlpy, numpy as np, torch
    torch.set_num_threads(1)
    rng, n = np.random.default_rng(0), 10_000
    data = d3rlpy.dataset.MDPDataset(rng.normal(size=(n, inputs)).astype(np.float32), rng.integers(0, 40, (n, 1)), rng.normal(size=(n, 1)).astype(np.float32),
                                     (np.arange(n) % 5 == 4).astype(np.float32), action_space=d3rlpy.ActionSpace.DISCRETE)
    if algorithm == "cql":
        config = d3rlpy.algos.DiscreteCQLConfig(batch_size=batch, learning_rate=6.25e-5, alpha=10., target_update_interval=8000, gamma=.99)
    else: config = d3rlpy.algos.DiscreteBCConfig(batch_size=batch, learning_rate=1e-3, beta=.5)
    model = config.create(device=False); model.build_with_dataset(data)
    fit = lambda k: model.fit(data, n_steps=k, n_steps_per_epoch=k, logger_adapter=d3rlpy.logging.NoopAdapterFactory(), show_progress=False)
    fit(50); start = time.process_time(); fit(steps)
    return steps / (time.process_time() - start)


def ours(algorithm: str, inputs: int, batch: int, steps: int) -> tuple[float, float, float]:
    "`kalm`'s fit with one seed, with three, and with three in float32, as the benchmark notebook times it."
    import torch
    import kalm.offline
    from kalm.cql import CQL
    from kalm.offline import BC, steps_per_second, synthetic_replay
    fit, data = {"cql": CQL, "bc": BC}[algorithm](batch_size=batch), synthetic_replay(inputs - STATE)
    one, three = steps_per_second(fit, data, steps), steps_per_second(fit, data, steps, range(SEEDS))
    usual = kalm.offline.fast_dtype; kalm.offline.fast_dtype = lambda device: torch.float32
    try: return one, three, steps_per_second(fit, data, steps, range(SEEDS))
    finally: kalm.offline.fast_dtype = usual


def child(python: str, side: str, steps: int, core: int | None) -> list:
    "One round of one side: every case, in a fresh process."
    env = os.environ | {f"{k}_NUM_THREADS": "1" for k in ("OMP", "MKL", "OPENBLAS")} | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    pin = ["taskset", "-c", str(core)] if core is not None else []
    done = subprocess.run([*pin, python, __file__, "--one", side, "--steps", str(steps)], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict:
    "What it ran on."
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "") if os.path.exists("/proc/cpuinfo") else platform.processor()
    return dict(cpu=model, cores=os.cpu_count(), system=platform.platform(), python=platform.python_version())


def versions(python: str, packages: list[str]) -> dict:
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--theirs", metavar="PYTHON", help="the interpreter of d3rlpy's environment")
    p.add_argument("--out", default="results/d3rlpy_speed.json"); p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=400); p.add_argument("--core", type=int, default=None, help="pin both to this core")
    p.add_argument("--one", choices=["theirs", "ours"], help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: print(json.dumps([{"theirs": theirs, "ours": ours}[a.one](*case, a.steps) for case in CASES])); return
    if not a.theirs: p.error("--theirs: the interpreter of an environment with d3rlpy is needed")
    rounds, loads = [], []
    for _ in range(a.rounds):
        rounds.append((child(a.theirs, "theirs", a.steps, a.core), child(sys.executable, "ours", a.steps, a.core))); loads.append(round(os.getloadavg()[0], 1))
        print(rounds[-1], flush=True)
    rows = []
    for i, case in enumerate(CASES):
        t, o, s, f = ([round(x, 1) for x in side] for side in zip(*((r[0][i], *r[1][i]) for r in rounds)))
        ratio = lambda ours: round(median(y / x for x, y in zip(t, ours)), 2)
        rows.append(dict(algorithm=case[0], inputs=case[1], batch=case[2], d3rlpy=t, kalm=o, kalm_three=s, kalm_three_float32=f, median_ratio=ratio(o), median_ratio_three=ratio(s), median_ratio_three_float32=ratio(f)))
        print(rows[-1])
    report = dict(what="gradient steps a second of processor time, in turns, one thread each" + (f", both pinned to core {a.core}" if a.core is not None else ""), measured=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                  machine=machine(), steps=a.steps, load=loads, d3rlpy=versions(a.theirs, ["d3rlpy", "torch", "numpy"]), kalm=versions(sys.executable, ["torch", "numpy"]), rows=rows)
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
