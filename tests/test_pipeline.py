"The command line from nothing to figures: whole, in stages, stopped, repeated, and given nonsense."
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kalm.data
import kalm.grounding
import kalm.offline
import kalm.pipeline as pipeline
from conftest import make_rollouts, python, same_rollouts
from kalm.core import IMAGINED, Rollouts, load_json, read_csv
from kalm.evaluate import RESULT_COLUMNS
from kalm.generation import generate, repair_unreal, verdict
from kalm.goals import LEVELS, goal_set, load_goals, motions, success_rows
from kalm.grounding import TASKS
from kalm.pipeline import PRESETS, STAGES, UNSEEN_PROMPT, assess, assess_explanations, configure, dream, home_of, imagine_stage, jobs, main, parser, seeds_of

SMOKE = ["--preset", "smoke", "--out"]
KALM = ["-c", "import sys; from kalm.pipeline import main; sys.exit(main())"]

def files(folder, *parts):
    "Content of every file below `folder` (or below its `parts`), by path; locks left out."
    roots = [folder/p for p in parts] or [folder]
    found = [f for r in roots for f in ([r] if r.is_file() else r.rglob("*")) if f.is_file() and not f.name.endswith(".lock")]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}

def only_error(capsys):
    "The single line on stderr."
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("kalm: "), lines
    return lines[0]

@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "`kalm run --preset smoke` in a process of its own."
    out = tmp_path_factory.mktemp("runs")/"first"
    return python(*KALM, "run", *SMOKE, str(out)), out

@pytest.fixture(scope="module")
def whole(first):
    done, out = first
    if done.returncode: pytest.fail(done.stderr)
    return out

@pytest.fixture
def copy(whole, tmp_path):
    "A finished run to spoil."
    return shutil.copytree(whole, tmp_path/"run")


# ---------------------------------------------------------------- end to end

def test_run_ends_well_and_says_what_it_did(first):
    done, _ = first
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert [f"[{i}/{len(STAGES)}] {name}" in done.stdout for i, name in enumerate(STAGES, 1)] == [True] * 6
    for method in ("random", "expert", "bc", "bc+kalm", "cql", "cql+kalm"): assert method in done.stdout   # the comparison table

def test_results_are_complete(whole):
    rows, p = read_csv(whole/"results.csv"), PRESETS["smoke"]
    assert tuple(rows[0]) == RESULT_COLUMNS
    methods = {"random", "expert", "lm", "dt"} | {a + s for a in p.steps for s in ("", "+kalm", "+oracle")}
    learns = lambda m: m.split("+")[0] in p.steps; at = lambda m: {str(p.steps[m.split("+")[0]] // 10 * k) for k in (9, 10)} if learns(m) else {"0"}
    assert sorted((r["method"], r["level"], r["step"]) for r in rows) == sorted((m, l, t) for m in methods for l in LEVELS for t in at(m))
    for m in filter(learns, methods):
        for l in LEVELS:   # the last policy's first episodes, success for success
            r = Rollouts.load(whole/"acted"/m/l/"rollouts.npz"); [last] = [int(x["successes"]) for x in rows if (x["method"], x["level"], x["step"]) == (m, l, str(p.steps["bc"]))]
            assert len(r) == p.episodes and r.terminated.sum() == last and (r.source == 0).all() and len(load_goals(whole/"acted"/m/l/"goals.json")) == len(goal_set(l))
    for r in rows:
        assert int(r["episodes"]) == p.episodes and 0 <= int(r["successes"]) <= p.episodes and float(r["rate"]) == pytest.approx(int(r["successes"]) / p.episodes, abs=1e-6)
        assert r["preset"] == "smoke" and r["config"] == load_json(whole/"config.json")["config"] and float(r["low"]) <= float(r["rate"]) <= float(r["high"])
    rate = {(r["method"], r["level"]): float(r["rate"]) for r in rows}
    assert rate["expert", "offline"] > .8 > .5 > rate["random", "offline"]   # the judge judges

def test_every_stage_left_its_files(whole):
    p = PRESETS["smoke"]
    config = load_json(whole/"config.json"); assert config["settings"]["name"] == "smoke" and config["versions"]["torch"] and "commit" in config
    assert len(Rollouts.load(whole/"data"/"rollouts.npz")) == p.rollouts and (whole/"data"/"goals.json").exists()
    assert {"kalm.json", "model.safetensors", "log.csv", "state.safetensors"} <= {f.name for f in (whole/"grounded").iterdir()}
    for level, n in p.imagined.items():
        folder = whole/"imagined"/level; r, counts, q = Rollouts.load(folder/"rollouts.npz"), load_json(folder/"filtered.json"), load_json(folder/"quality.json")
        assert counts["rollouts"] == q["rollouts"] == len(r) == n - counts["distrusted"] and q["imagined"] == n and q["off_table"] == 0 and (r.source == 1).all() and r.lengths.max() <= p.imagine_steps
    for algorithm, mix in jobs(p):
        for seed in seeds_of(p): home = home_of(whole, algorithm, mix, seed); assert (home/f"step-{p.steps[algorithm]}"/"policy.safetensors").exists() and read_csv(home/"curve.csv")

def test_experts_take_the_place_of_dreams(whole):
    p = PRESETS["smoke"]; real, *novel = pipeline.parts_of(whole, p, "oracle_all"); assert len(novel) == 3 and (real[0].source == 0).all() and len(real[0]) == p.symmetric and real[0].lengths.max() == p.within
    for (r, _), (r2, _) in zip(novel, pipeline.parts_of(whole, p, "all")[1:]): assert (r.source == IMAGINED).all() and r.terminated.all() and (r2.source == IMAGINED).all()

def test_no_training_after_the_deadline(whole, monkeypatch):
    def never(*a, **k): raise AssertionError("trained")
    monkeypatch.setattr(pipeline, "parts_of", never); assert pipeline.train_one(str(whole), PRESETS["smoke"], ("bc", "all"), until=time.time() - 1) == 0

def test_an_error_in_a_process_is_raised_at_once():
    began = time.monotonic(); calls = [("wrong", ("x",))] + [(k, (30.,)) for k in range(6)]
    with pytest.raises(TypeError): dict(pipeline._side_by_side(time.sleep, calls))
    assert time.monotonic() - began < 100   # what had begun is waited for, the rest is not begun

def test_processes_judge_as_one_would(whole, tmp_path, monkeypatch):
    p = replace(PRESETS["smoke"], episodes=700); monkeypatch.setattr(os, "cpu_count", lambda: 2); run = SimpleNamespace(preset=p, left=lambda: None); folder = str(home_of(whole, "bc", "all", 0)/"step-60")
    work = [(m, l, 0, 60 if f else 0, f) for m, f in (("bc+kalm", folder), ("random", "")) for l in LEVELS]; got = dict(pipeline._judged(run, work)); assert set(got) == set(work)
    for w in work[::3]:
        alone = pipeline.judge(700, *w, keep=True); np.testing.assert_array_equal(alone.success, got[w].success); assert len(alone.rollouts) == pipeline.ACTED
        assert got[w].rollouts is None if w[0] == "random" else same_rollouts(alone.rollouts, got[w].rollouts)

def test_figures_are_pictures(whole):
    pictures = [f for f in (whole/"figures").iterdir() if f.suffix in (".png", ".gif")]
    assert {"success.png", "learning.png", "curves-bc.png"} <= {f.name for f in pictures} and any(f.name.startswith("lost-bc+kalm") for f in pictures)
    for f in pictures: assert f.read_bytes()[:4] in (b"\x89PNG", b"GIF8") and f.stat().st_size > 2000

def test_nothing_half_written_lies_about(whole): assert not [f for f in whole.rglob("*") if ".tmp" in f.name or f.name.startswith(".stage")]

def test_a_second_run_does_nothing_new(whole, capsys, monkeypatch):
    work = ("data", "grounded", "imagined", "policies", "results.csv", "config.json"); before = files(whole)
    times = {f: (whole/f).stat().st_mtime_ns for f in files(whole, *work)}
    def again(*a, **k): raise AssertionError("done a second time")
    for name in ("ground", "generate", "train_one"): monkeypatch.setattr(pipeline, name, again)
    for name in ("_play", "_shards"): monkeypatch.setattr(kalm.data, name, again)
    monkeypatch.setattr("kalm.evaluate.evaluate", again)
    assert main(["run", *SMOKE, str(whole)]) == 0, capsys.readouterr().err
    assert {f: (whole/f).stat().st_mtime_ns for f in times} == times
    after = files(whole); assert after.keys() == before.keys()
    assert {f for f in after if after[f] != before[f]} <= set(files(whole, "figures"))   # figures may be drawn again


# ---------------------------------------------------------------- stages and interruptions

def test_a_stage_alone(tmp_path, capsys):
    assert main(["collect", *SMOKE, str(tmp_path/"run")]) == 0
    assert sorted(f.name for f in (tmp_path/"run").iterdir()) == ["config.json", "data", "oracle"] and "[1/1] collect" in capsys.readouterr().out

def test_a_stage_repairs_its_own_output_only(copy):
    before = files(copy); shutil.rmtree(copy/"imagined"/"easy")
    assert main(["imagine", *SMOKE, str(copy)]) == 0
    after = files(copy); assert {k: v for k, v in after.items() if "shards" not in k} == {k: v for k, v in before.items() if "shards" not in k}

def test_no_time_stops_cleanly(tmp_path, capsys):
    assert main(["run", *SMOKE, str(tmp_path/"run"), "--max-minutes", "1e-9"]) == 0
    out = capsys.readouterr().out; assert "time limit" in out and "continues" in out and list(files(tmp_path/"run")) == ["config.json"]

class Clock:
    "A clock that moves only when it is looked at, some seconds a look; the rest is `time`."
    def __init__(self, seconds): self.now, self.seconds = 0., seconds
    def monotonic(self): self.now += self.seconds; return self.now
    def __getattr__(self, name): return getattr(time, name)

class Here:
    "A pool whose processes are this one."
    def __init__(self, *a, **k): pass
    def shutdown(self, **how): pass
    def submit(self, f, *args):
        future = Future(); future.set_result(f(*args))
        return future

def comparable(out):
    "What has to be equal, whenever and however often a run was stopped."
    tensors = {str(f.relative_to(out)): load_file(f) for f in out.rglob("*.safetensors") if f.parent.name != "tensorboard"}
    tables = {str(f.relative_to(out)): [{k: v for k, v in r.items() if k not in ("seconds", "commit")} for r in read_csv(f)] for f in out.rglob("*.csv")}
    tables["results.csv"].sort(key=lambda r: (r["method"], r["level"], r["seed"], r["step"]))
    jsons = {str(f.relative_to(out)): load_json(f) for name in ("quality.json", "filtered.json", "goals.json", "kalm.json", "policy.json") for f in out.rglob(name)}
    return tensors, tables, jsons, {str(f.relative_to(out)): Rollouts.load(f) for f in out.rglob("rollouts.npz")}

def test_stopped_again_and_again_equals_undisturbed(whole, tmp_path, capsys, monkeypatch):
    out, stopped = tmp_path/"run", []
    for module, seconds in ((pipeline, 6), (kalm.data, 6), (kalm.grounding, 60), (kalm.offline, 15)): monkeypatch.setattr(module, "time", Clock(seconds))
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", Here)
    while True:
        assert main(["run", *SMOKE, str(out), "--max-minutes", "4"]) == 0, capsys.readouterr().err
        text = capsys.readouterr().out
        if "time limit" not in text: break
        stopped.append(next(name for name in reversed(STAGES) if f"] {name}" in text))
        assert len(stopped) < 60, f"no progress: {stopped[-5:]}"
    assert {"ground", "train", "evaluate"} <= set(stopped)   # in the middle of these at least
    for a, b in zip(comparable(whole), comparable(out)):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], Rollouts): assert same_rollouts(a[name], b[name]), name
            elif name.endswith(".safetensors"): assert a[name].keys() == b[name].keys() and all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name
            else: assert a[name] == b[name], name

def test_interrupted_by_hand(tmp_path, capsys, monkeypatch):
    def press(run):
        "Press Ctrl-C."
        raise KeyboardInterrupt
    monkeypatch.setitem(pipeline.STAGES, "ground", press)
    assert main(["run", *SMOKE, str(tmp_path/"run")]) == 130
    assert "continues" in capsys.readouterr().err and (tmp_path/"run"/"data"/"rollouts.npz").exists()


# ---------------------------------------------------------------- presets and options

def test_presets_are_whole():
    assert list(PRESETS) == [p.name for p in PRESETS.values()] == ["smoke", "quick", "checkpoint", "best", "night", "paper"]
    for p in PRESETS.values():
        assert set(p.imagined) <= set(LEVELS[1:]) and set(dict(p.tries)) <= set(p.imagined) and p.rl_rollouts <= p.rollouts and len(p.ground.mix) == len(TASKS) and not p.ground.start and set(p.steps) == {"bc", "cql"} and json.loads(json.dumps(asdict(p)))
    assert PRESETS["quick"].ground == replace(PRESETS["checkpoint"].ground, steps=PRESETS["quick"].ground.steps) and [n for n, p in PRESETS.items() if p.shipped] == ["quick", "best", "night"]   # what ships is what `checkpoint` makes
    paper, night = PRESETS["paper"], PRESETS["night"]; assert all(getattr(night, k) == getattr(paper, k) for k in ("bc", "cql", "together", "within", "symmetric", "share", "whitening", "seeds", "episodes"))
    assert all(getattr(night, k) == getattr(PRESETS["best"], k) for k in ("rollouts", "imagined", "imagine_steps", "tries", "parts", "ground", "seed"))   # the same rollouts, so that only offline RL differs

@pytest.mark.parametrize("argv, shipped, backbone, seed", [([], True, None, 0), (["--ground-afresh"], False, None, 0), (["--backbone", "tiny-random"], False, "tiny-random", 0), (["--seed", "7"], True, None, 7), (["--preset", "paper", "--seed", "3"], False, None, 3)], ids=str)
def test_options_change_the_preset(argv, shipped, backbone, seed):
    p = configure(parser().parse_args(["run", *argv])); base = PRESETS["paper" if "paper" in argv else "quick"]
    assert p == replace(base, shipped=shipped, seed=seed, ground=replace(base.ground, seed=seed, backbone=backbone or base.ground.backbone))


# ---------------------------------------------------------------- the imagine stage

@pytest.mark.parametrize("trusted", [[1, 0, 0, 1, 1, 0, 1, 0], [0] * 8, [1] * 8], ids=str)
def test_what_is_not_trusted_is_left_out_unless_it_is_all(trusted, tmp_path, monkeypatch, capsys):
    from kalm.env import MAX_STEP, WALLS
    run = pipeline.Run(replace(PRESETS["smoke"], imagined=dict(easy=8)), tmp_path/"run"); raw = make_rollouts(8, goals=400, steps=1, source=IMAGINED); raw = replace(raw, states=raw.states * np.float32(1.8)); goals = goal_set("easy")
    monkeypatch.setattr(pipeline, "grounded_lm", lambda run: "the model"); monkeypatch.setattr(pipeline, "_imagine_shards", lambda run, lm, level, goals, n, folder: (raw, np.array(trusted, bool)))
    imagine_stage(run); keep = np.flatnonzero(trusted) if any(trusted) else np.arange(8); folder = run.out/"imagined"/"easy"; want, counts = repair_unreal(raw[keep], goals, WALLS, MAX_STEP); assert counts["repaired"] > 0
    assert same_rollouts(Rollouts.load(folder/"rollouts.npz"), want) and load_json(folder/"filtered.json") == counts | dict(distrusted=8 - len(keep)); q = load_json(folder/"quality.json"); assert (q["imagined"], q["rollouts"]) == (8, len(keep))
    assert ("all are kept" in capsys.readouterr().out) == (not any(trusted))

@pytest.mark.parametrize("tries", [(), (("easy", 3),)])
def test_only_levels_with_tries_are_filtered(tries, lively, tmp_path, monkeypatch):
    run = pipeline.Run(replace(PRESETS["smoke"], tries=tries), tmp_path/"run"); asked, passed = [], np.array([True, False] * 3)
    monkeypatch.setattr(pipeline, "imagine_trusted", lambda lm, goals, s, index, tries, **kw: asked.append(tries) or (generate(lm, goals, s, index, **kw), passed)); goals = goal_set("easy")
    a, ok = pipeline._imagine_shards(run, lively, "easy", goals, 6, tmp_path/"x"); assert asked == [t for _, t in tries] and ok.tolist() == (passed.tolist() if tries else [True] * 6)
    monkeypatch.setattr(pipeline, "generate", None); monkeypatch.setattr(pipeline, "imagine_trusted", None); b, again = pipeline._imagine_shards(run, None, "easy", goals, 6, tmp_path/"x"); assert same_rollouts(a, b) and again.tolist() == ok.tolist()   # read, not made again
    assert len(set(a.goal)) == 6 and (a.lengths == 1).all() and (a.source == IMAGINED).all()


# ---------------------------------------------------------------- measures

@pytest.fixture(scope="module")
def expert():
    from kalm.data import collect
    return collect(goal_set("offline"), 12, policy="expert", seed=1, workers=1, progress=False)

QUALITY = {"rollouts", "match", "replay", "step_error", "still_error", "off_table", "off_table_repaired", "too_fast", "length"}
FULL = {f"{k}_{n}" for k in ("done", "trusted") for n in ("match", "replay")} | {f"filter_{n}_{k}" for n in ("match", "replay") for k in ("kept", "precision", "recall", "base")} | {"trusted"}

def share(x): return np.isnan(x) or 0 <= x <= 1

def test_dreams_are_spread_over_the_goals_and_seeded(lively):
    a, b, c = (dream(lively, "easy", 12, seed, max_steps=1) for seed in (1, 1, 2)); assert same_rollouts(a, b) and not np.array_equal(a.goal, c.goal) and len(set(a.goal)) == 12 and (a.source == IMAGINED).all()
    assert not success_rows(goal_set("easy"), a.goal, a.states[:, 0], start=a.states[:, 0]).any() and np.bincount(dream(lively, "hard", 250, max_steps=0).goal).tolist().count(1) == 150

@pytest.mark.parametrize("level", ["easy", "hard"])
def test_a_tiny_model_is_assessed(level, lively):
    pushes = level == "easy"; n, kw = 6, dict(max_steps=2, tries=2, batch_size=4); raw = dream(lively, level, n, max_steps=2, batch_size=4)
    short, full = assess(lively, level, n, full=False, **kw), assess(lively, level, n, raw=raw, **kw)
    assert set(short) == QUALITY | ({"action_match"} if pushes else set()) and set(full) == set(short) | FULL | ({"trusted_action_match"} if pushes and full["trusted"] else set()) | ({f"parts_{k}" for k in ("match", "replay", "done_match", "done_replay")} if level == "hard" else set()) and {k: full[k] for k in short} == short
    assert short["rollouts"] == n and short["off_table_repaired"] == 0 and short["length"] == raw.lengths.mean() and all(share(v) for k, v in full.items() if k not in ("rollouts", "length", "step_error", "still_error"))
    if pushes: assert short["action_match"] == np.mean([goal_set(level)[g].action_success(a[0]) for g, a in zip(raw.goal, raw.actions)])
    else: assert full["filter_match_kept"] > 0   # goals that no round trip can judge are let through

def test_real_rollouts_are_assessed_as_perfect(expert):
    row = assess(None, "offline", raw=expert, full=False); assert (row["rollouts"], row["match"], row["replay"], row["off_table"], row["off_table_repaired"], row["too_fast"]) == (12, 1, 1, 0, 0, 0) and row["length"] == expert.lengths.mean()

def test_what_ends_and_what_passes_are_counted_apart(expert, monkeypatch):
    "Real rollouts, half of them with their last step cut off, half of each distrusted."
    whole = np.arange(12) < 6; length = np.where(whole, expert.lengths, expert.lengths - 1); m = np.arange(expert.max_steps) < length[:, None]; ok = np.arange(12) % 3 > 0; passed = np.arange(12) < 8; asked = []
    done = Rollouts(np.where(np.arange(expert.max_steps + 1)[:, None] <= length[:, None, None], expert.states, 0), np.where(m, expert.actions, -1), lengths=length, goal=expert.goal)
    monkeypatch.setattr(pipeline, "generate", lambda lm, goals, s, index, **kw: asked.append(kw) or done); monkeypatch.setattr(pipeline, "round_trip", lambda lm, r, goals: (ok, [""] * 12))
    monkeypatch.setattr(pipeline, "imagine_trusted", lambda lm, goals, s, index, **kw: asked.append(kw) or (done, passed))
    row = assess(None, "offline", 12, seed=4, max_steps=9, tries=3, raw=expert); assert row["match"] == 1 and row["done_match"] == row["done_replay"] == .5 and row["trusted"] == pytest.approx(8 / 12) and row["trusted_match"] == row["trusted_replay"] == 6 / 8
    for name in ("match", "replay"): assert {k: row[f"filter_{name}_{k}"] for k in ("kept", "precision", "recall", "base")} == asdict(verdict(ok, whole))
    assert asked == [dict(stop="done", max_steps=9, seed=4, batch_size=128), dict(stop="done", max_steps=9, seed=4, batch_size=128, tries=3)]
    monkeypatch.setattr(pipeline, "imagine_trusted", lambda *a, **kw: (done, ~passed & passed)); row = assess(None, "offline", 12, raw=expert); assert row["trusted"] == row["trusted_match"] == row["trusted_replay"] == 0

EXPLAINED = {f"explained_{p}_{k}" for p in ("seen", "unseen") for k in ("balls", "order", "direction", "all", "true")} | {"understood", "described", "described_moving"}

def test_a_perfect_speaker_has_full_marks_and_a_mute_one_none(monkeypatch):
    taught, rephrase, prompts = goal_set("offline"), {g.text: g.gist for g in goal_set("rephrase")}, []
    monkeypatch.setattr(pipeline, "explain", lambda lm, r, batch_size, **kw: prompts.append(kw) or [taught[g].text for g in r.goal]); monkeypatch.setattr(pipeline, "understand", lambda lm, texts, batch_size: [rephrase[t] for t in texts])
    monkeypatch.setattr(pipeline, "describe", lambda lm, r, batch_size: [motions(*s) for s in r.states]); row = assess_explanations(None, 30); assert set(row) == EXPLAINED and set(row.values()) == {1.} and prompts == [{}, dict(prompt=UNSEEN_PROMPT)]
    for name in ("explain", "understand", "describe"): monkeypatch.setattr(pipeline, name, lambda lm, x, batch_size, **kw: [""] * len(x))
    assert set(assess_explanations(None, 30).values()) == {0.}

def test_what_a_tiny_model_says_is_assessed(lively, monkeypatch):
    few = {l: goal_set(l)[:20] for l in LEVELS}; monkeypatch.setattr(pipeline, "goal_set", few.get); row = assess_explanations(lively, 8, batch_size=16); assert set(row) == EXPLAINED and all(share(v) for v in row.values())


# ---------------------------------------------------------------- nonsense

@pytest.mark.parametrize("argv", [["run", "--preset", "huge"], ["fly"], [], ["run", "--seed", "x"], ["run", "--max-minutes", "soon"]], ids=str)
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2 and "usage: kalm" in capsys.readouterr().err

def test_an_unknown_preset_lists_the_known(capsys):
    with pytest.raises(SystemExit): main(["run", "--preset", "huge"])
    err = capsys.readouterr().err; assert all(name in err for name in PRESETS)

@pytest.mark.parametrize("options, words", [(["--seed", "-1"], "--seed -1"), (["--max-minutes", "0"], "--max-minutes 0"), (["--max-minutes", "-3"], "--max-minutes -3")], ids=str)
def test_bad_numbers_leave_no_folder(options, words, tmp_path, capsys):
    assert main(["run", *SMOKE, str(tmp_path/"run"), *options]) == 1
    assert words in only_error(capsys) and not (tmp_path/"run").exists()

@pytest.mark.parametrize("options", [["--seed", "1"], ["--preset", "quick"], ["--backbone", "other"]], ids=str)
def test_other_settings_in_the_same_folder(options, whole, capsys):
    before = files(whole)
    assert main(["run", *SMOKE, str(whole), *options]) == 1
    assert "other settings" in (line := only_error(capsys)) and "--out" in line and files(whole) == before

@pytest.mark.parametrize("stage, needs", [("ground", "collect"), ("imagine", "ground"), ("train", "collect"), ("evaluate", "train"), ("figures", "evaluate")])
def test_a_missing_earlier_stage_is_named(stage, needs, tmp_path, capsys):
    assert main([stage, *SMOKE, str(tmp_path/"run")]) == 1
    assert f"kalm {needs}" in only_error(capsys)

def test_training_without_imagination_names_the_stage(whole, tmp_path, capsys):
    shutil.copytree(whole/"data", tmp_path/"run"/"data"); shutil.copy(whole/"config.json", tmp_path/"run")
    assert main(["train", *SMOKE, str(tmp_path/"run")]) == 1
    assert "kalm imagine" in only_error(capsys)

@pytest.mark.parametrize("path, stage, redo", [
    ("data/rollouts.npz", "ground", ["grounded"]), ("data/rollouts.npz", "train", ["policies"]), ("data/goals.json", "train", ["policies"]),
    ("grounded/model.safetensors", "imagine", ["imagined"]), ("grounded/kalm.json", "imagine", ["imagined"]), ("imagined/easy/rollouts.npz", "train", ["policies"])])
def test_a_truncated_file_is_one_line_and_nothing_is_lost(path, stage, redo, copy, capsys):
    for name in redo: shutil.rmtree(copy/name)
    (copy/path).write_bytes((copy/path).read_bytes()[:150]); before = files(copy)
    assert main([stage, *SMOKE, str(copy)]) == 1
    assert path.split("/")[-1] in only_error(capsys)
    after = files(copy); assert {k: after.get(k) for k in before} == before

def test_a_truncated_policy_is_one_line(copy, capsys):
    f = next((copy/"policies").glob("cql-all-0/step-*/policy.safetensors")); f.write_bytes(f.read_bytes()[:150]); (copy/"results.csv").unlink()
    assert main(["evaluate", *SMOKE, str(copy)]) == 1
    assert "policy.safetensors" in only_error(capsys)

def test_collecting_again_mends_truncated_data(copy):
    before = files(copy); f = copy/"data"/"rollouts.npz"; f.write_bytes(f.read_bytes()[:150])
    assert main(["run", *SMOKE, str(copy)]) == 0
    after = files(copy); assert {k for k in before if after.get(k) != before[k]} <= set(files(copy, "figures"))

@pytest.mark.parametrize("content", ["{", "[]", '{"settings": 3}'])
def test_a_damaged_config_is_one_line(content, copy, capsys):
    (copy/"config.json").write_text(content); before = files(copy)
    assert main(["run", *SMOKE, str(copy)]) == 1 and "config.json" in only_error(capsys) and files(copy) == before

def test_debug_shows_where(tmp_path, capsys):
    assert main(["ground", *SMOKE, str(tmp_path/"run"), "--debug"]) == 1 and "Traceback" in capsys.readouterr().err

def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit) as e: main(["--help"])
    assert e.value.code == 0 and all(stage in capsys.readouterr().out for stage in ("run",)) and set(STAGES) == {"collect", "ground", "imagine", "train", "evaluate", "figures"}


def test_the_model_as_policy_is_judged_in_the_environment(lively):
    from kalm.env import Simulator, states_of
    from kalm.evaluate import schedule, start_physics
    goals, sim = goal_set("easy")[:8], Simulator(); e = pipeline.evaluate_lm(lively, goals, episodes=24, seed=3, sim=sim, batch_size=5); index = schedule(goals, 24, 3); physics = start_physics(sim, goals, index, 3)
    np.testing.assert_array_equal(e.goal, index); assert e.episodes == 24 and (e.length == 1).all()
    dream = pipeline.generate(lively, goals, states_of(physics), index, max_steps=1, batch_size=24); after = states_of(sim.step(physics.copy(), dream.actions[:, 0]))
    assert e.success.tolist() == [bool(goals[i].success(z, start=s)) for i, z, s in zip(index, after, states_of(physics))] and e.action_match.tolist() == [bool(goals[i].action_success(a[:1])[0]) for i, a in zip(index, dream.actions)]
    again = pipeline.evaluate_lm(lively, goal_set("offline")[:4], episodes=6, seed=1, sim=sim); assert again.action_match is None and again.length.max() <= 50 and (again.length[~again.success] == 50).all()
