"The scripts in tools/: what they list, what they write, and that they do not measure twice."
import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import kalm.grounding as grounding
import kalm.pipeline as pipeline
from conftest import ROOT, liven, make_rollouts
from kalm.core import Rollouts, read_csv
from kalm.embeddings import Adapter
from kalm.goals import LEVELS, goal_set
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

@pytest.mark.parametrize("name", ["ablate", "assess"])
def test_help(name, call, capsys):
    with pytest.raises(SystemExit) as e: call(module := tool(name), "--help")
    out = " ".join(capsys.readouterr().out.split()); assert e.value.code == 0 and "usage:" in out and " ".join(module.__doc__.split("\n")[0].split()) in out and "--rollouts" in out

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
