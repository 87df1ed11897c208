"""Train variants of the policies and judge each: results/policy_ablations.csv, a row a variant, method, level and seed.

    kalm run --preset quick --out runs/quick
    python experiments/ablate_policies.py [--run runs/quick] [--steps 20000] [--episodes 1000] [--only base greedy ...]

A variant differs in one respect from the preset of the run (`paper` and `paper_cql` in everything that we do otherwise)
and learns from the run's real and imagined rollouts, with as many gradient steps (`short` with an eighth as many).
On CLEVR-Robot policies are told sentences, as the paper's are, except those of `told_*`, which go to results/told.csv.
The table of a run in another domain has its name before `policy_ablations`:

    python experiments/ablate_policies.py --run runs/metaworld-best --steps 15000 --episodes 100
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tables import add, there

import kalm
from kalm.core.files import load_json, numpy_rng
from kalm.core.rollouts import Rollouts
from kalm.rl.bc import BC
from kalm.rl.cql import CQL
from kalm.rl.td3bc import TD3BC
from kalm.run.folder import Run, commit, need
from kalm.run.policies import Job, datasets, encoder_of, evaluate_policy, jobs, rows_of, train_job
from kalm.run.presets import GOALS, METAWORLD_CQL, METAWORLD_MIXING, Mixing, Training, metaworld_trainings, preset
from kalm.run.presets import OURS as PRESETS
from kalm.run.workers import in_processes

OUR_BC, OUR_CQL = BC(beta=0., temperature=1.), CQL(lr=1e-3, target_every=1000, temperature=1.)
PAPERS = Mixing()
OURS = replace(PRESETS, goals="sentence")   # most rows are about policies that are told sentences


def some(share: float) -> Callable[[Rollouts, str], Rollouts]:
    "A part of the imagined rollouts."
    return lambda r, level: r[numpy_rng(0, "part", level).random(len(r)) < share]


def first_wordings(n: int) -> Callable[[Rollouts, str], Rollouts]:
    "Only rollouts for the first `n` sentences of each goal of *rephrase*."
    def choose(r: Rollouts, level: str) -> Rollouts:
        if level != "rephrase":
            return r
        place, seen = np.zeros(len(r.goals), int), {}
        for i, goal in enumerate(r.goals):
            meant = str(goal.task)
            place[i] = seen[meant] = seen.get(meant, -1) + 1
        return r[place[r.goal] < n]
    return choose


@dataclass(frozen=True)
class Variant:
    "How policies are made; the defaults are those of the presets."
    algorithm: BC | CQL | TD3BC = OUR_BC
    mixing: Mixing = OURS
    imagined: Callable | None = None  # what is made of a level's imagined rollouts
    times: float = 1.                 # as many gradient steps as the others
    levels: tuple = ()                # that are judged; all, if none is named

    @property
    def alone(self) -> bool:
        "Whether policies without imagined rollouts can differ from those of the first variant of their world."
        def real(v: Variant) -> tuple:
            m = v.mixing
            return v.algorithm, v.times, m.last_steps, m.augment, m.whitening, m.goals
        first = [next(iter(its.values())) for its in VARIANTS.values()]
        return self in first or real(self) not in map(real, first)


def mixed(**change) -> Variant:
    return Variant(mixing=replace(OURS, **change))


def told(algorithm: BC | CQL, goals: str, whitening: float) -> Variant:
    return Variant(algorithm, replace(OURS, goals=goals, whitening=whitening))


CLEVR = dict(
    base=Variant(), cql=Variant(OUR_CQL), paper=Variant(BC(), PAPERS),
    paper_cql=Variant(CQL(lr=OUR_CQL.lr, target_every=OUR_CQL.target_every), PAPERS),
    greedy=Variant(replace(OUR_BC, temperature=0.)), cql_greedy=Variant(replace(OUR_CQL, temperature=0.)),
    beta=Variant(BC(beta=.5, temperature=.2)),
    within_1=mixed(last_steps=1), within_4=mixed(last_steps=4), within_all=mixed(last_steps=0),
    no_symmetric=mixed(augment=0), whitening_none=mixed(whitening=0.),
    whitening_half=mixed(whitening=.5),
    **{f"told_{goals}": mixed(goals=goals) for goals in GOALS if goals != OURS.goals},
    told_meaning_half=mixed(goals="meaning", whitening=.5), cql_told_meaning=told(OUR_CQL, "meaning", .01),
    cql_told_meaning_half=told(OUR_CQL, "meaning", .5), cql_told_both=told(OUR_CQL, "both", .01),
    apart=mixed(policy_per_level=True),
    imagined_4=Variant(imagined=lambda r, level: r[r.success].last(4)),
    imagined_won=Variant(imagined=lambda r, level: r[r.success]),
    half=Variant(imagined=some(.5)), quarter=Variant(imagined=some(.25)),
    wordings_1=Variant(imagined=first_wordings(1)), wordings_3=Variant(imagined=first_wordings(3)),
    share_10=mixed(imagined_fraction=.1), share_50=mixed(imagined_fraction=.5),
    share_75=mixed(imagined_fraction=.75), share_100=mixed(imagined_fraction=1.), short=Variant(times=1/8))

BY_BC, BY_TD3BC = (training.algorithm for training in metaworld_trainings(1))


def arm(algorithm: BC | CQL | TD3BC, times: float = 1., levels: tuple = (), **change) -> Variant:
    "A variant of Meta-World's policies."
    return Variant(replace(algorithm, **change), METAWORLD_MIXING, times=times, levels=levels)


def short_cql(**change) -> Variant:
    "CQL as its settings were chosen: fewer steps, judged on taught sentences."
    return arm(METAWORLD_CQL, 4 / 15, ("offline",), **change)


def only(level: str) -> Callable[[Rollouts, str], Rollouts]:
    "The imagined rollouts of one level."
    return lambda r, its: r if its == level else r[:0]


METAWORLD = dict(
    bc=arm(BY_BC), bc_last=arm(BY_BC, averaging=0.), td3bc=arm(BY_TD3BC), td3bc_last=arm(BY_TD3BC, averaging=0.),
    cql_short=short_cql(), cql_last=short_cql(averaging=0.), cql_slow=short_cql(lr=3e-4, actor_lr=1e-4),
    **{f"cql_alpha_{alpha}": short_cql(alpha=float(alpha)) for alpha in (1, 5, 50, 100)},
    **{f"only_{level}": replace(arm(BY_BC), imagined=only(level)) for level in ("rephrase", "easy", "hard")},
    **{f"share_{name}": replace(arm(BY_BC), mixing=replace(METAWORLD_MIXING, imagined_fraction=share))
       for name, share in (("eighth", .125), ("half", .5))})

VARIANTS = dict(clevr=CLEVR, metaworld=METAWORLD)


def open_variant(base: Run, name: str, v: Variant, a: argparse.Namespace) -> Run:
    "A run folder of its own: the base's rollouts, other policies."
    p = replace(base.preset, name=f"{base.preset.name}-{name}", mixing=v.mixing, seeds=a.seeds, episodes=a.episodes,
                trainings=(Training(v.algorithm, round(a.steps * v.times)),), checkpoints=1, baselines=())
    run = Run(p, base.domain.name, a.out / name)
    links = ["data", "grounded"] if v.imagined else ["data", "grounded", "imagined"]
    for folder in links:
        if not (run.out / folder).exists():
            (run.out / folder).symlink_to((base.out / folder).resolve())
    for level in p.imagined if v.imagined else ():
        made = Rollouts.load(need(base.out / "imagined" / level / "rollouts.npz", "imagine"))
        v.imagined(made, level).save(run.out / "imagined" / level / "rollouts.npz")
    return run


def counted(run: Run, job: Job) -> tuple[int, int]:
    "Imagined and real transitions that a job learns from."
    real, *imagined = [int(r.lengths.sum()) for r in datasets(run, job)]
    return sum(imagined), real


def measure(base: Run, name: str, v: Variant, a: argparse.Namespace) -> None:
    "Train and judge one variant, and add its rows."
    run = open_variant(base, name, v, a)
    todo = [job for job in jobs(run.preset) if v.alone or job.source]
    encoder_of(run)   # reads sentences once, for all jobs
    list(in_processes(run, train_job, [(job, (job,)) for job in todo]))
    sizes = {job.method: counted(run, job) for job in todo}
    judged = v.levels or run.domain.levels
    rows = [row for row in rows_of(run) if row.folder and row.method in sizes and row.level in judged]
    for row, e in in_processes(run, evaluate_policy, [(row, (row,)) for row in rows]):
        imagined, real = sizes[row.method]
        about = dict(preset=base.preset.name, config=base.config, steps=row.step, commit=commit(), variant=name,
                     backend=base.preset.ground.backbone, method=row.method, level=row.level, seed=row.seed,
                     imagined=imagined, real=real)
        kinds = {kind: counts for kind, counts in e.per_kind().items() if kind}
        for kind, (k, n) in {"": (e.successes, e.episodes), **kinds}.items():
            add(a.results, about | dict(kind=kind, successes=k, episodes=n))


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", type=Path, default=Path("runs/quick"), help="folder of a run with imagined rollouts")
    p.add_argument("--steps", type=int, default=20_000)
    p.add_argument("--episodes", type=int, default=1000)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--only", nargs="+", help="variants")
    p.add_argument("--list", action="store_true", help="show the variants")
    p.add_argument("--out", type=Path)
    p.add_argument("--results", type=Path)
    return p.parse_args()


def main() -> None:
    a = arguments()
    if a.list:
        return print("\n".join(f"{domain}: {', '.join(its)}" for domain, its in VARIANTS.items()))
    settings = load_json(need(a.run / "config.json", "run"))
    domain = settings["domain"]
    if domain not in VARIANTS:
        raise SystemExit(f"{a.run} is a run in {domain}, which has no variants: expected one in {', '.join(VARIANTS)}")
    variants, table = VARIANTS[domain], ("" if domain == "clevr" else f"{domain}_") + "policy_ablations"
    a.out, a.results = a.out or Path("runs") / table, a.results or Path("results") / f"{table}.csv"
    unknown = set(a.only or ()) - set(variants)
    if unknown:
        raise SystemExit(f"unknown variants {', '.join(sorted(unknown))}: expected some of {', '.join(variants)}")
    base = Run(preset(kalm.domain(domain), settings["name"]).with_seed(settings["seed"]), domain, a.run)
    for name in a.only or variants:
        v = variants[name]
        steps = round(a.steps * v.times)
        if not there(a.results, config=base.config, variant=name, steps=steps, episodes=a.episodes):
            measure(base, name, v, a)


if __name__ == "__main__":
    main()
