"""Train small variants of the policies and judge each: results/policy_ablations.csv, one row a variant, method, level and seed.

    kalm run --preset quick --out runs/quick
    python tools/ablate_policies.py [--run runs/quick] [--steps 20000] [--episodes 1000] [--only base greedy ...]

Every variant differs from the run's own settings in one respect (`paper` and `paper_cql` in all that we do otherwise), and learns from the run's real and imagined rollouts with as many gradient steps (`short` with an eighth as many), all seeds side by side.
Rows already in the file are kept, so it can be stopped and continued. `--list` shows the variants.
"""
import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kalm.core import Rollouts, append_csv, fast_dtype, load_json, numpy_rng, read_csv
from kalm.cql import CQL
from kalm.data import symmetric
from kalm.embeddings import KalmLM
from kalm.env import Simulator
from kalm.evaluate import evaluate
from kalm.generation import GoalReader, generate, likelihood, round_trip, understand
from kalm.goals import LEVELS, goal_set, load_goals
from kalm.offline import BC, InverseDynamics, Replay, SentenceEncoder, Whitening, hindsight
from kalm.pipeline import PRESETS, commit

PIECES = 100_000   # of real rollouts, in hindsight


class Gist:
    "The sentence encoder, told what the grounded model takes each sentence to mean instead of the sentence."
    name = None
    def __init__(self, lm): self.lm, self.inner, self.said = lm, SentenceEncoder(), {}
    def encode(self, texts):
        if new := sorted(set(texts) - self.said.keys()): self.said |= zip(new, (s.strip() or t for s, t in zip(understand(self.lm, new, max_tokens=32), new)))
        return self.inner.encode([self.said[t] for t in texts])


class Data:
    "What a run left, and what is made of it once for all variants."
    def __init__(self, run: Path):
        config = load_json(run/"config.json"); old = config["settings"]; self.run, self.config = run, config["config"]
        p = self.preset = replace(PRESETS[old["name"]], seed=old["seed"]); now = json.loads(json.dumps(asdict(p)))
        if differ := [k for k in now if k != "ground" and now[k] != old.get(k)]: raise SystemExit(f"{run} was made with other settings than today's preset {p.name} ({', '.join(differ)}): make it anew")
        self.real, self.goals = Rollouts.load(run/"data"/"rollouts.npz")[:p.rl_rollouts], load_goals(run/"data"/"goals.json")
        self.imagined = {l: (Rollouts.load(run/"imagined"/l/"rollouts.npz"), load_goals(run/"imagined"/l/"goals.json")) for l in p.imagined}
    @cached_property
    def lm(self) -> KalmLM: return KalmLM.grounded(dtype=fast_dtype())
    @cached_property
    def inverse(self) -> InverseDynamics: return InverseDynamics(self.real)
    @cached_property
    def trust(self) -> dict[str, dict[str, np.ndarray]]:
        "For each level and measure of confidence a weight for each imagined rollout, 1 on average."
        out = {}
        for level, (r, goals) in self.imagined.items():
            again = generate(self.lm, goals, r.states[:, 0], r.goal, max_steps=1, temperature=1., seed=1)
            same = again.actions[:, 0] // 8 == r.actions[:, 0] // 8                  # does a second imagination begin with the same ball?
            out[level] = {k: w / max(w.mean(), 1e-6) for k, w in dict(round_trip=np.where(round_trip(self.lm, r, goals)[0], 1., .2), likelihood=np.exp(likelihood(self.lm, r, goals)), agreement=np.where(same, 1., .2)).items()}
        return out


@dataclass(frozen=True)
class Variant:
    "How a policy is made; the defaults are those of the run."
    algorithm: object = None
    hindsight: bool = False      # pieces of real rollouts as if meant for what they did on the way
    within: int | None = 2       # last steps kept of each real rollout
    imagined: int | None = None  # and of each imagined one that met its goal; None keeps all of them whole
    symmetric: bool = True
    whitening: float | None = .5
    share: float | None = None   # of a batch that is imagined, if not the run's
    part: float = 1.             # of the imagined rollouts that are there
    wordings: int = 0            # sentences of each goal of *rephrase* that are imagined, 0 all
    inverse: bool = False        # actions of imagined rollouts inferred from their states
    trust: str = ""              # weights of imagined rollouts
    encoder: str = ""            # "reader": the grounded model's hidden state; "gist": the sentence encoder, told the model's gist
    apart: bool = False          # a policy a level
    alone: bool = True           # also trained without imagination
    times: float = 1             # as many gradient steps as the others

def variants(p) -> dict[str, Variant]:
    bc, cql = p.bc, p.cql
    return dict(base=Variant(), cql=Variant(cql), greedy=Variant(replace(bc, temperature=0.)), cql_greedy=Variant(replace(cql, temperature=0.)), beta=Variant(replace(bc, beta=.5, temperature=.2)),
                paper=Variant(BC(), within=None, symmetric=False, whitening=None, share=.5), paper_cql=Variant(replace(CQL(), lr=cql.lr, target_every=cql.target_every), within=None, symmetric=False, whitening=None, share=.5),
                hindsight=Variant(hindsight=True), within_1=Variant(within=1), within_4=Variant(within=4), within_all=Variant(within=None), imagined_4=Variant(imagined=4, alone=False), imagined_won=Variant(imagined=50, alone=False), no_symmetric=Variant(symmetric=False), whitening_none=Variant(whitening=None), whitening_0=Variant(whitening=0.), whitening_25=Variant(whitening=.25), whitening_1=Variant(whitening=1.),
                apart=Variant(apart=True, alone=False), short=Variant(times=1/8), share_10=Variant(share=.1, alone=False), share_50=Variant(share=.5, alone=False), share_75=Variant(share=.75, alone=False), share_100=Variant(share=1., alone=False),
                half=Variant(part=.5, alone=False), quarter=Variant(part=.25, alone=False), wordings_1=Variant(wordings=1, alone=False), wordings_3=Variant(wordings=3, alone=False), inverse=Variant(inverse=True, alone=False),
                round_trip=Variant(trust="round_trip", alone=False), likelihood=Variant(trust="likelihood", alone=False), agreement=Variant(trust="agreement", alone=False),
                doubtful=Variant(replace(cql, alpha_imagined=2 * cql.alpha), alone=False), trusting=Variant(replace(cql, alpha_imagined=cql.alpha / 2), alone=False), reader=Variant(encoder="reader"), gist=Variant(encoder="gist"))


def real_part(d: Data, v: Variant) -> tuple:
    p, r = d.preset, d.real
    if v.hindsight: r = hindsight(r, d.goals, PIECES, p.seed, v.within)
    elif v.within: r = r.last(v.within)
    return (symmetric(r, d.goals, p.symmetric, p.seed) if v.symmetric else r), d.goals

def imagined_part(d: Data, v: Variant, level: str) -> tuple[tuple, np.ndarray | None]:
    "Rollouts and goals of a level, and their weights."
    (r, goals), weights = d.imagined[level], d.trust[level][v.trust] if v.trust else None
    if v.inverse: r = d.inverse.relabel(r)
    if v.imagined: r = r[np.flatnonzero(r.terminated)].last(v.imagined)
    keep = np.ones(len(r), bool)
    if v.part < 1: keep = numpy_rng(0, "part", level).random(len(r)) < v.part
    if v.wordings and level == "rephrase":
        place, seen = {}, {}
        for i, g in enumerate(goals): place[i] = seen.get(g.gist, 0); seen[g.gist] = place[i] + 1
        keep &= np.array([place[i] < v.wordings for i in r.goal])
    assert weights is None or len(weights) == len(r)
    return (r[keep], goals), None if weights is None else weights[keep]

def encoder_of(d: Data, v: Variant): return {"": SentenceEncoder, "reader": lambda: GoalReader(d.lm), "gist": lambda: Gist(d.lm)}[v.encoder]()

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", type=Path, default=Path("runs/quick"), help="folder of a run with data and imagined rollouts"); p.add_argument("--steps", type=int, default=20_000); p.add_argument("--episodes", type=int, default=1000); p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--only", nargs="+"); p.add_argument("--list", action="store_true"); p.add_argument("--results", type=Path, default=Path("results/policy_ablations.csv"))
    a = p.parse_args()
    if not (a.run/"config.json").exists(): p.error(f"{a.run} is not the folder of a run: `kalm run --out {a.run}` makes one")
    d = Data(a.run); every = variants(d.preset)
    if a.list: print("\n".join(f"{n}: {v}" for n, v in every.items())); return
    if unknown := set(a.only or ()) - set(every): p.error(f"unknown variants {sorted(unknown)}: one of {', '.join(every)}")
    torch.set_num_threads(1); sim = Simulator(); keys = {n: dict(preset=d.preset.name, config=d.config, steps=round(a.steps * v.times), episodes=a.episodes) for n, v in every.items()}
    done = {(r["variant"], r["method"], r["level"], r["seed"]) for r in read_csv(a.results) if all(r[k] == str(v) for k, v in keys.get(r["variant"], {"variant": ""}).items())}
    for name in a.only or every:
        v, key = every[name], keys[name]; algorithm = v.algorithm or d.preset.bc; encoder = encoder_of(d, v); levels = list(d.imagined)
        sets = [("", [])] * v.alone + ([("+kalm", [l]) for l in levels] if v.apart else [("+kalm", levels)])
        for suffix, novel in sets:
            method = algorithm.name + suffix; judged = [l for l in LEVELS if not v.apart or l in novel]
            if all((name, method, l, str(s)) in done for l in judged for s in range(a.seeds)): continue
            extra = [imagined_part(d, v, l) for l in novel]
            white = Whitening.fit(encoder.encode([g.text for l in ("offline", *levels) for g in goal_set(l)]), v.whitening) if v.whitening is not None else None
            replay = Replay([real_part(d, v), *(e[0] for e in extra)], encoder=encoder, share=d.preset.share if v.share is None else v.share, weights=[None, *(e[1] for e in extra)], whitening=white)
            policies = algorithm.fit(replay, steps=key["steps"], seed=list(range(a.seeds)))
            for level in judged:
                rates = []
                for seed, policy in enumerate(policies):
                    if (name, method, level, str(seed)) in done: continue
                    e = evaluate(replace(policy), goal_set(level), episodes=a.episodes, seed=seed, sim=sim, encoder=encoder); rates.append(e.rate)
                    append_csv(a.results, key | dict(commit=commit(), backend=d.preset.ground.backbone, variant=name, method=method, level=level, seed=seed, successes=e.successes, imagined=replay.n_imagined, real=replay.n_real))
                print(name, method, level, np.round(100 * np.array(rates), 1), flush=True)

if __name__ == "__main__": main()
