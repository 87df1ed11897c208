"""Ground small variants of the model and measure each: results/ablations.csv, one row a variant.

    python tools/ablate.py [--data runs/checkpoint/data] [--steps 200] [--rollouts 300] [--only base paper-tasks ...] [--out runs/ablations]

Every variant gets the same rollouts and the same number of tokens, except that a shallower backbone gets as many more as its blocks are fewer (equal arithmetic). Without a task, the others share its tokens.
Each is a folder in --out that can be stopped and continued; rows already in the file are kept. `--list` shows the variants.
"""
import argparse, math, shutil, time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kalm.core import Rollouts, append_csv, read_csv
from kalm.embeddings import Adapter
from kalm.goals import LEVELS, goal_set
from kalm.grounding import ground, half, perplexity
from kalm.pipeline import PRESETS, assess, assess_explanations

BLOCKS = 30  # of the default backbone

def variants(base) -> dict:
    "Name -> configuration; each differs from `base` in one respect."
    without = lambda k: tuple(0. if i == k else m for i, m in enumerate(base.mix))
    shallow = lambda n: dict(layers=n, steps=math.ceil(base.steps * BLOCKS / n))
    full = dict(adapter=Adapter(full=True), lr=2e-4)
    return dict(base={}, rank_4=dict(adapter=Adapter(rank=4, alpha=8)), rank_64=dict(adapter=Adapter(rank=64, alpha=128)), upper_half=dict(adapter=Adapter(first=15)), lr_5e_4=dict(lr=5e-4), lr_3e_3=dict(lr=3e-3),
                full=full, split=dict(adapter=Adapter(split=True)), plain_state=dict(pairs=False), factored=dict(directions=8), all_credit=dict(idle_credit=1.),
                no_dynamics=dict(mix=without(1)), no_explain=dict(mix=without(2)), no_consequence=dict(mix=without(3)), no_describe=dict(mix=without(4)), no_relate=dict(mix=without(5)), no_read=dict(mix=without(6)), no_gist=dict(gist=False), compose=dict(compose=.1), plain_words=dict(key_weight=1.), state_tokens_5=dict(state_tokens=5),
                layers_12=shallow(12), layers_20=shallow(20), random_weights=dict(scratch=True), random_weights_full=full | dict(scratch=True))

def keep(folder: Path):
    "A callback that copies the run's state at each checkpoint, for tools/track.py."
    return lambda lm, step: shutil.copy(folder/"state.safetensors", folder/f"state-{step}.safetensors")

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", type=Path, default=Path("runs/checkpoint/data"), help="collected rollouts (kalm collect --preset checkpoint)")
    p.add_argument("--steps", type=int, default=200); p.add_argument("--rollouts", type=int, default=300); p.add_argument("--max-steps", type=int, default=20); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="+"); p.add_argument("--list", action="store_true"); p.add_argument("--out", type=Path, default=Path("runs/ablations")); p.add_argument("--results", type=Path, default=Path("results/ablations.csv"))
    a = p.parse_args()
    base = replace(PRESETS["checkpoint"].ground, compose=0., steps=a.steps, log_every=10, checkpoint_every=50, seed=a.seed); every = variants(base)
    if a.list: print("\n".join(f"{n}: {c}" for n, c in every.items())); return
    if unknown := set(a.only or ()) - set(every): p.error(f"unknown variants {sorted(unknown)}: one of {', '.join(every)}")
    rollouts, goals = Rollouts.load(a.data/"rollouts.npz"), goal_set("offline")
    key = dict(steps=a.steps, rollouts=a.rollouts, max_steps=a.max_steps, seed=a.seed)
    done = {r["variant"] for r in read_csv(a.results) if all(r[k] == str(v) for k, v in key.items())}
    for name in a.only or every:
        if name in done: continue
        cfg, folder, began = replace(base, **every[name]), a.out/f"{name}-{a.steps}-{a.seed}", time.monotonic()
        lm = ground(rollouts, goals, cfg, out=folder, callback=keep(folder) if name == "base" else None).eval(); log = read_csv(folder/"log.csv")[-1]
        if half(cfg): lm.backbone.to(torch.bfloat16)
        row = dict(tokens=log["tokens"], ground_seconds=log["seconds"], action_loss=log["action"], state_loss=log["state"], text_loss=log["text"])
        for level in LEVELS:
            m = assess(lm, level, a.rollouts, max_steps=a.max_steps, full=False)
            row |= {f"{level}_{k}": round(m[k], 4) for k in ("match", "replay", "step_error", "off_table")} | ({"easy_action_match": round(m["action_match"], 4)} if level == "easy" else {})
        row |= {k: round(v, 4) for k, v in assess_explanations(lm, a.rollouts).items()} | dict(perplexity=round(perplexity(lm), 2))
        append_csv(a.results, key | dict(variant=name) | row | dict(seconds=round(time.monotonic() - began, 1))); print(name, row, flush=True)

if __name__ == "__main__": main()
