"""Write kalm/*.py from the notebooks that export something.

`nbdev_export` would do it too, but it rewrites pyproject.toml on the way, every `name =` of other tools included, and
leaves what stands beside a parameter where `help()` does not find it.
"""
import sys
from pathlib import Path

from nbdev.export import nb_export

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from docstrings import with_parameters  # noqa: E402


def export(lib: Path) -> None:
    "Write the package into the folder `lib`."
    for path in sorted((ROOT / "nbs").rglob("[0-9]*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if ".ipynb_checkpoints" not in path.parts and "#| default_exp" in text:
            nb_export(path, lib_path=lib)
    for path in lib.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py", "_modidx.py"):
            path.write_text(with_parameters(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    export(ROOT / "kalm")
