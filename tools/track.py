"""Measure a grounding run as it goes: results/grounding.csv, one row a kept state.

    python tools/track.py NAME STATE.safetensors ... [--data runs/checkpoint/data] [--before TOKENS] [--rollouts 300]

A state is the `state.safetensors` of a run folder, copied away now and then while the run goes on. NAME is the run's; --before counts tokens that its start had seen. Rows already in the file are kept.
"""
import argparse, json, time
from pathlib import Path

import torch
from safetensors import safe_open

from kalm.core import Rollouts, append_csv, read_csv
from kalm.goals import LEVELS
from kalm.grounding import TASKS, GroundConfig, half, perplexity, prepare
from kalm.pipeline import assess, assess_explanations

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("name"); p.add_argument("states", nargs="+", type=Path)
    p.add_argument("--data", type=Path, default=Path("runs/checkpoint/data"), help="the rollouts that the run learned from")
    p.add_argument("--before", type=int, default=0); p.add_argument("--rollouts", type=int, default=300); p.add_argument("--max-steps", type=int, default=20)
    p.add_argument("--results", type=Path, default=Path("results/grounding.csv"))
    a = p.parse_args(); rollouts, key = Rollouts.load(a.data/"rollouts.npz"), dict(run=a.name, rollouts=a.rollouts, max_steps=a.max_steps)
    for path in a.states:
        with safe_open(path, "pt") as f: progress, weights = json.loads(f.metadata()["progress"]), {k[2:]: f.get_tensor(k) for k in f.keys() if k.startswith("w.")}
        k, began = key | dict(step=progress["step"], tokens=progress["tokens"] + a.before), time.monotonic()
        if any(all(r[n] == str(v) for n, v in k.items()) for r in read_csv(a.results)): continue
        cfg = GroundConfig(**progress["config"] | dict(mix=(*progress["config"]["mix"], *[0.] * len(TASKS))[:len(TASKS)]))  # also from before a task was added
        lm = prepare(cfg, rollouts).load_own(weights, str(path)).quick_attention().eval()
        if half(cfg): lm.backbone.to(torch.bfloat16)
        row = {}
        for level in LEVELS:
            m = assess(lm, level, a.rollouts, max_steps=a.max_steps, full=False)
            row |= {f"{level}_{n}": m[n] for n in ("match", "replay", "step_error", "off_table")} | ({"easy_action_match": m["action_match"]} if level == "easy" else {})
        row |= assess_explanations(lm, a.rollouts) | dict(perplexity=perplexity(lm))
        append_csv(a.results, k | {n: round(v, 4) for n, v in row.items()} | dict(seconds=round(time.monotonic() - began, 1))); print(k, flush=True)

if __name__ == "__main__": main()
