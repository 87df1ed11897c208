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
        assert len({repr(v) for v in VARIANTS.values()}) == len(VARIANTS) > 15
        print([name for name, v in VARIANTS.items() if not v.alone])"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
    done = python("-c", script, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("half", "share_50", "imagined_won", "apart"):   # as without imagination as `base` is
        assert name in done.stdout
