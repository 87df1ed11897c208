"""Write kalm/*.py from the notebooks that export something.

`nbdev_export` would do it too, but it rewrites pyproject.toml on the way, every `name =` of other tools included.
"""
from pathlib import Path

from nbdev.export import nb_export

ROOT = Path(__file__).parents[1]

for path in sorted((ROOT / "nbs").rglob("[0-9]*.ipynb")):
    if ".ipynb_checkpoints" not in path.parts and "#| default_exp" in path.read_text(encoding="utf-8"):
        nb_export(path, lib_path=ROOT / "kalm")
