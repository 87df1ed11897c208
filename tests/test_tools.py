"The scripts in tools/: what they list, what they write, and that they do not measure twice."
import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import kalm.grounding as grounding
import kalm.pipeline as pipeline
from conftest import ROOT, liven, make_rollouts
from kalm.core import IMAGINED, Rollouts, load_json, read_csv
from kalm.data import collect
from kalm.embeddings import Adapter
from kalm.evaluate import write_result
from kalm.goals import LEVELS, goal_set, save_goals
from kalm.grounding import GroundConfig, TASKS

pytestmark = pytest.mark.usefixtures("cache")

TINY = GroundConfig(backbone="tiny-random", adapter=Adapter(rank=2), batch_tokens=128, mix=(1., 1., .5, .25, .25, .25, 0.), bf16=False)

def tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT/"tools"/f"{name}.py"); module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module

@pytest.fixture
def call(monkeypatch):
    "Run a tool as its command line would."
    def call(module, *argv): monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)]); module.main()
    return call

@pytest.fixture
def small(monkeypatch):
    "Few sentences a level and little to read."
    few = {l: goal_set(l)[:16] for l in LEVELS}; monkeypatch.setattr(pipeline, "goal_set", few.get); monkeypatch.setattr(grounding, "ordinary_text", lambda held_out=False: ["All work and no play makes Jack a dull boy. " * 20])

@pytest.mark.parametrize("name", ["ablate", "assess", "ablate_policies", "publish", "recheck"])
def test_help(name, call, capsys):
    with pytest.raises(SystemExit) as e: call(module := tool(name), "--help")
    out = " ".join(capsys.readouterr().out.split()); assert e.value.code == 0 and "usage:" in out and " ".join(module.__doc__.split("\n")[0].split()) in out and any(o in out for o in ("--rollouts", "--run", "--out", "--results"))

def test_ablations_are_listed_and_each_changes_what_it_says(call, capsys):
    ablate = tool("ablate"); base = replace(pipeline.PRESETS["checkpoint"].ground, steps=100, compose=0.); every = ablate.variants(base); call(ablate, "--list"); assert [l.split(":")[0] for l in capsys.readouterr().out.splitlines()] == list(every) and every["base"] == {}
    made = {n: replace(base, **c) for n, c in every.items()}; assert len(set(map(repr, made.values()))) == len(made)   # all valid, no two alike
    for n, c in every.items(): assert all(getattr(made[n], k) != getattr(base, k) for k in c), n
    for n, k in [("no_dynamics", 1), ("no_explain", 2), ("no_consequence", 3), ("no_describe", 4), ("no_relate", 5)]: assert [a == b for a, b in zip(made[n].mix, base.mix)] == [i != k for i in range(len(TASKS))] and made[n].mix[k] == 0
    for n, blocks in (("layers_12", 12), ("layers_20", 20)): assert made[n].layers == blocks and abs(made[n].steps * blocks - 100 * ablate.BLOCKS) < blocks
    with pytest.raises(SystemExit): call(ablate, "--only", "base", "nonsense")
    assert "nonsense" in capsys.readouterr().err

def test_an_ablation_writes_one_row(call, small, tmp_path, monkeypatch):
    ablate = tool("ablate"); monkeypatch.setattr(ablate, "PRESETS", dict(checkpoint=SimpleNamespace(ground=TINY))); monkeypatch.setattr(ablate, "variants", lambda base: dict(base={}, factored=dict(directions=8)))
    make_rollouts(24, goals=1440).save(tmp_path/"data"/"rollouts.npz"); argv = ["--data", tmp_path/"data", "--steps", 10, "--rollouts", 4, "--max-steps", 1, "--out", tmp_path/"out", "--results", tmp_path/"r.csv", "--only", "factored"]
    call(ablate, *argv); [row] = read_csv(tmp_path/"r.csv"); assert row["variant"] == "factored" and (row["steps"], row["rollouts"], row["max_steps"], row["seed"]) == ("10", "4", "1", "0") and float(row["perplexity"]) > 1 and int(row["tokens"]) > 0
    assert all(0 <= float(row[f"{l}_{k}"]) <= 1 for l in LEVELS for k in ("match", "replay", "off_table")) and 0 <= float(row["easy_action_match"]) <= 1 and "" not in row.values() and (tmp_path/"out"/"factored-10-0"/"kalm.json").exists()
    def again(*a, **k): raise AssertionError("measured twice")
    monkeypatch.setattr(ablate, "ground", again); call(ablate, *argv); assert read_csv(tmp_path/"r.csv") == [row]

def test_assessments_are_rows_and_stories(call, small, tiny, tmp_path, monkeypatch):
    tool_ = tool("assess"); liven(tiny).save_pretrained(tmp_path/"lm"); argv = ["--checkpoint", tmp_path/"lm", "--rollouts", 4, "--max-steps", 2, "--tries", 2, "--levels", "easy", "rephrase", "--out", tmp_path/"out"]; call(tool_, *argv)
    said, rows = read_csv(tmp_path/"out"/"explanations.csv"), read_csv(tmp_path/"out"/"imagination.csv"); assert [r["model"] for r in said] == ["grounded", "untrained"] and all(float(r["perplexity"]) > 1 for r in said)
    assert [(r["model"], r["level"]) for r in rows] == [(m, l) for m in ("grounded", "untrained") for l in ("easy", "rephrase")] and set(tool_.COLUMNS) < set(rows[0]) and len({r["checkpoint"] for r in rows + said}) == 1
    for r in rows: assert bool(r["done_match"]) == bool(r["trusted"]) == (r["model"] == "grounded") and bool(r["action_match"]) == (r["level"] == "easy") and 0 <= float(r["match"]) <= 1
    for level in ("easy", "rephrase"): r = Rollouts.load(tmp_path/"out"/"imagined"/f"{level}.npz"); assert len(r) == len(json.loads((tmp_path/"out"/"imagined"/f"{level}.json").read_text())["said"]) == 4
    def again(*a, **k): raise AssertionError("measured twice")
    for name in ("assess", "assess_explanations", "dream"): monkeypatch.setattr(tool_, name, again)
    before = (tmp_path/"out"/"imagination.csv").read_bytes(); call(tool_, *argv); assert (tmp_path/"out"/"imagination.csv").read_bytes() == before


# ---------------------------------------------------------------- policies

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    "What a run with the settings of `smoke` leaves, the imagined rollouts an expert's."
    out = tmp_path_factory.mktemp("run"); pipeline.Run(pipeline.PRESETS["smoke"], out); collect(goal_set("offline"), 80, policy="expert", out=out/"data", workers=1, progress=False)
    for level in LEVELS[1:]:
        goals = goal_set(level)[:24]; r = collect(goals, 48, policy="expert", seed=1, keep_failures=True, workers=1, progress=False); replace(r, source=np.full(len(r), IMAGINED)).save(out/"imagined"/level/"rollouts.npz"); save_goals(out/"imagined"/level/"goals.json", goals)
    return out

def test_policy_variants_change_one_thing(run_folder, lively, monkeypatch):
    tool_ = tool("ablate_policies"); d = tool_.Data(run_folder); d.lm = lively; every = tool_.variants(d.preset); base = tool_.Variant(); won = {l: int(r.terminated.sum()) for l, (r, _) in d.imagined.items()}; assert every["base"] == base
    for name, v in every.items(): changed = [k for k in vars(base) if k != "alone" and getattr(v, k) != getattr(base, k)]; assert len(changed) == (0 if name == "base" else 5 if name.startswith("paper") else 1), name
    p, (r, _) = d.preset, tool_.real_part(d, base); assert (base.within, base.whitening) == (p.within, p.whitening) and len(r) == p.symmetric and r.lengths.max() <= p.within and len(tool_.real_part(d, every["no_symmetric"])[0]) == p.rl_rollouts and tool_.real_part(d, every["paper"])[0] is d.real
    assert tool_.real_part(d, every["within_all"])[0].lengths.max() > p.within; monkeypatch.setattr(tool_, "PIECES", 50); assert len(tool_.real_part(d, replace(every["hindsight"], symmetric=False))[0]) == 50
    for level in d.imagined:
        (r, goals), weights = tool_.imagined_part(d, base, level); n = len(r); assert r is not None and n == len(d.imagined[level][0]) and weights is None; short = tool_.imagined_part(d, every["imagined_4"], level)[0][0]; assert len(short) == won[level] and short.terminated.all() and short.lengths.max() <= 4
        assert .2 < len(tool_.imagined_part(d, every["half"], level)[0][0]) / n < .8 and len(tool_.imagined_part(d, every["paper"], level)[0][0]) == 48
        inferred = tool_.imagined_part(d, every["inverse"], level)[0][0]; assert inferred.states.shape == r.states.shape and not np.array_equal(inferred.actions, r.actions)
        for trust in ("round_trip", "likelihood", "agreement"): w = tool_.imagined_part(d, every[trust], level)[1]; assert len(w) == n and (w >= 0).all() and w.mean() == pytest.approx(1)
    (r, goals), _ = tool_.imagined_part(d, every["wordings_1"], "rephrase"); used = [goals[i] for i in np.unique(r.goal)]; assert len({g.gist for g in used}) == len(used) < len({goals[i].text for i in d.imagined["rephrase"][0].goal})

def test_policy_ablations_write_rows_once(run_folder, call, capsys, tmp_path, monkeypatch):
    tool_ = tool("ablate_policies"); argv = ["--run", run_folder, "--steps", 30, "--episodes", 6, "--seeds", 2, "--results", tmp_path/"r.csv", "--only", "beta", "apart"]; call(tool_, *argv); rows = read_csv(tmp_path/"r.csv")
    assert sorted((r["variant"], r["method"], r["level"], r["seed"]) for r in rows) == sorted([("beta", m, l, s) for m in ("bc", "bc+kalm") for l in LEVELS for s in "01"] + [("apart", "bc+kalm", l, s) for l in LEVELS[1:] for s in "01"])
    assert all(0 <= int(r["successes"]) <= 6 and r["preset"] == "smoke" and (int(r["imagined"]) > 0) == r["method"].endswith("+kalm") for r in rows)
    (tmp_path/"r.csv").write_text("".join((tmp_path/"r.csv").read_text().splitlines(True)[:4])); call(tool_, *argv); again = read_csv(tmp_path/"r.csv"); assert sorted(map(str, again)) == sorted(map(str, rows))   # stopped and continued: the same numbers
    monkeypatch.setattr(tool_, "evaluate", None); rows = again; call(tool_, *argv); assert read_csv(tmp_path/"r.csv") == rows   # nothing is measured twice
    call(tool_, "--run", run_folder, "--list"); assert "wordings_3" in capsys.readouterr().out
    with pytest.raises(SystemExit): call(tool_, "--run", run_folder, "--only", "nonsense")
    assert "nonsense" in capsys.readouterr().err

def test_publishing_copies_whole_runs_only(run_folder, call, capsys, tmp_path):
    tool_, p = tool("publish"), pipeline.PRESETS["smoke"]; config = load_json(run_folder/"config.json")["config"]; work = pipeline.rows_of(p, run_folder)
    def write(rows, config=config):
        for method, level, seed, step, _ in rows: write_result(run_folder/"results.csv", preset="smoke", backend="-", config=config, method=method, level=level, seed=seed, step=step, episodes=12, successes=5, commit="")
    with pytest.raises(SystemExit, match=f"lacks {len(work)} rows.*kalm evaluate"): call(tool_, run_folder, "--out", tmp_path/"results")
    write(work[1:]); write(work[:1], config="another")
    with pytest.raises(SystemExit, match="lacks 1 rows"): call(tool_, run_folder, "--out", tmp_path/"results")
    write(work[:1])
    for method in ("bc+kalm", "bc"): make_rollouts(3).save(run_folder/"acted"/method/"easy"/"rollouts.npz")
    call(tool_, run_folder, "--out", tmp_path/"results"); assert "0 files" in capsys.readouterr().out and [f.name for f in tmp_path.rglob("*.*")] == ["smoke.csv"]
    call(tool_, run_folder, "--out", tmp_path/"results", "--front", "smoke", "--image", tmp_path/"s.png"); assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.*")) == ["results/acted/bc+kalm-easy.npz", "results/smoke.csv", "s.png"]
    rows = read_csv(tmp_path/"results"/"smoke.csv"); assert len(rows) == len(work) and {r["config"] for r in rows} == {config} and f"{len(work)} rows, 1 files" in capsys.readouterr().out

def test_rechecks_judge_other_starts_once(run_folder, call, tmp_path, monkeypatch):
    tool_ = tool("recheck"); asked = []; whole = pipeline.rows_of
    monkeypatch.setattr(tool_, "rows_of", lambda p, out: asked.append(p) or [w for w in whole(p, out) if not w[4]]); call(tool_, run_folder, "--results", tmp_path/"r.csv"); rows = read_csv(tmp_path/"r.csv")
    assert (asked[0].checkpoints, asked[0].baselines) == (1, ("oracle",)) and [(r["method"], r["level"], r["seed"], r["episodes"]) for r in rows] == [(m, l, "1000", "12") for m in ("random", "expert") for l in LEVELS]
    same = [tool_.judge(12, "random", l, 1000, 0, "").successes for l in LEVELS]; assert [int(r["successes"]) for r in rows[:4]] == same
    monkeypatch.setattr(tool_, "judge", None); call(tool_, run_folder, "--results", tmp_path/"r.csv"); assert read_csv(tmp_path/"r.csv") == rows
    with pytest.raises(SystemExit): call(tool_, tmp_path)
