"""Measure imagination before and after grounding: results/imagination.csv, one row a model and level.

    python tools/assess_checkpoint.py [--rollouts 500] [--max-steps 50] [--checkpoint FOLDER] [--levels offline rephrase easy hard]

Rows already in the file (same checkpoint, model, level, settings) are kept, so an interrupted run continues.
"""
import argparse, time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from kalm.core import Rollouts, append_csv, numpy_rng, read_csv, sha256
from kalm.data import collect, fresh_starts
from kalm.embeddings import Adapter, KalmLM, fast_dtype
from kalm.env import MAX_STEP, WALLS, Simulator
from kalm.generation import explain, generate, judge_explanations, quality
from kalm.goals import LEVELS, goal_array, goal_set

def first_action(r: Rollouts, goals) -> dict:
    "Easy goals: share of first actions that the action judge accepts. Empty for other kinds."
    if any(g.kind != "push" for g in goals): return dict(action_match="")
    return dict(action_match=float(np.mean([goals[g].action_success(a[:1])[0] for g, a in zip(r.goal, r.actions)])))

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rollouts", type=int, default=500); p.add_argument("--max-steps", type=int, default=50); p.add_argument("--seed", type=int, default=1)
    p.add_argument("--checkpoint", help="a grounded checkpoint's folder (default: the shipped one)"); p.add_argument("--out", type=Path, default=Path("results/imagination.csv"))
    p.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS); p.add_argument("--models", nargs="+", default=["grounded", "untrained"])
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kw, sim, taught = dict(device=device, dtype=fast_dtype(device)), Simulator(), goal_set("offline")
    lm = KalmLM.from_pretrained(a.checkpoint, **kw) if a.checkpoint else KalmLM.grounded(**kw)
    folder = Path(a.checkpoint) if a.checkpoint else Path(__import__("kalm").__file__).parent/"assets"/"grounded"
    models = dict(grounded=lm, untrained=KalmLM.from_pretrained(lm.name, **kw).normalise(lm.normaliser))
    key = dict(checkpoint=sha256(folder/"model.safetensors")[:12], rollouts=a.rollouts, max_steps=a.max_steps, seed=a.seed)
    done = {(r["model"], r["level"]) for r in read_csv(a.out) if all(r[k] == str(v) for k, v in key.items())}
    unseen = collect(taught, a.rollouts, policy="medium", seed=10_000 + a.seed, progress=False)  # rollouts that grounding never saw, of every length
    for model in a.models:
        for level in a.levels:
            if (model, level) in done: continue
            goals, rng, began = goal_set(level), numpy_rng(a.seed, "assess", level), time.monotonic()
            index = np.resize(rng.permutation(len(goals)), a.rollouts)
            r = generate(models[model], goals, fresh_starts(goals, index, rng), index, max_steps=a.max_steps, seed=a.seed, batch_size=250)
            row = key | dict(model=model, level=level) | {k: v for k, v in asdict(quality(r, goals, sim, WALLS, MAX_STEP)).items() if k != "rollouts"} | first_action(r, goals)
            heard = dict.fromkeys(("explained_balls", "explained_order", "explained_direction", "explained_all"), "")
            if level == "offline":
                h = judge_explanations(explain(models[model], unseen), taught, unseen.goal, taught)
                heard = dict(explained_balls=float(h.balls.mean()), explained_order=float(h.order.mean()), explained_direction=float(h.direction.mean()), explained_all=float(h.all.mean()))
            append_csv(a.out, row | heard | dict(seconds=round(time.monotonic() - began, 1)))
            print(model, level, {k: round(v, 3) if isinstance(v, float) else v for k, v in (row | heard).items() if k not in key}, flush=True)

if __name__ == "__main__": main()
