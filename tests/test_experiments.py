"Experiments are no part of the library, but they must not fall behind it."

import os

from conftest import ROOT, python

SCRIPTS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py"))


def test_experiments_find_what_they_import():
    path = os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
    done = python("-c", f"import {', '.join(SCRIPTS)}", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_experiment_is_listed():
    text = (ROOT / "experiments" / "README.md").read_text()
    assert all(f"`{name}.py`" in text for name in SCRIPTS if name not in ("measures", "tables"))


def test_variants_differ_from_their_base():
    script = """if True:
        from ablate_grounding import variants
        from ablate_policies import VARIANTS
        import kalm
        from kalm.run.presets import preset
        from dataclasses import replace
        every = variants(replace(preset(kalm.domain("clevr"), "checkpoint").ground, compose=0.))
        assert len(set(map(repr, every.values()))) == len(every) > 15
        assert all(len({repr(v) for v in its.values()}) == len(its) > 5 for its in VARIANTS.values())
        print([name for its in VARIANTS.values() for name, v in its.items() if not v.alone])"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
    done = python("-c", script, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("half", "share_50", "imagined_won", "apart", "only_hard", "share_eighth"):   # alone as the base is
        assert name in done.stdout


def test_only_the_front_run_leaves_episodes(tmp_path):
    """The best run of another world keeps its rows; the episodes on show stay those of CLEVR-Robot."""
    script = """if True:
        import sys
        from pathlib import Path
        import publish as tool
        from kalm.core.domain import domain
        from kalm.run.folder import Run
        from kalm.run.presets import preset
        tool.rows_of = lambda run: []
        for name in ("clevr", "metaworld"):
            folder = Path(sys.argv[1])/name
            Run(preset(domain(name), "best"), name, folder)
            (folder/"acted"/"bc+kalm").mkdir(parents=True)
            (folder/"acted"/"bc+kalm"/f"{name}.npz").write_bytes(b"episodes")
            print(tool.publish(folder, Path(sys.argv[1])/"results", "best"))"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    done = python("-c", script, str(tmp_path), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in (tmp_path / "results").rglob("*.npz")] == ["clevr.npz"]
    assert (tmp_path / "results" / "metaworld-best.csv").exists()
