"Rooms and their doors: imports point downwards, exported code is safe, notebooks and package are in step."
import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

from conftest import ROOT, python

NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
cells = lambda nb: [c for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]]
source = lambda cell: "".join(cell["source"])

def module_of(nb: Path) -> str | None:
    "What a notebook exports to."
    names = [line.split()[-1] for c in cells(nb) for line in source(c).splitlines() if line.replace(" ", "").startswith("#|default_exp")]
    return names[0] if names else None

LEVEL = {module_of(nb): int(nb.name[:2]) for nb in NOTEBOOKS if nb.name[:2].isdigit() and module_of(nb)}
MODULES = {p.stem: p for p in sorted((ROOT/"kalm").glob("*.py")) if p.stem not in ("__init__", "_modidx")}
each_module = pytest.mark.parametrize("name", MODULES)
each_notebook = pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda p: p.stem)


# ---------------------------------------------------------------- imports

def imported(tree: ast.AST, package: str = "kalm") -> set[str]:
    "Dotted names of everything imported in `tree`; relative imports belong to `package`."
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {base} | ({f"{base}.{a.name}" for a in node.names} if base == package else set())
    return names

def siblings(names: set[str]) -> set[str]: return {n.split(".")[1] for n in names if n.startswith("kalm.")} & set(LEVEL)

def on_import(tree: ast.Module) -> list[ast.stmt]:
    "Statements that run when the module is imported: everything outside functions."
    out, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        out.append(node); todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return [n for n in out if isinstance(n, (ast.Import, ast.ImportFrom))]

def code(nb: Path) -> ast.Module:
    "All code cells of a notebook; lines for IPython left out."
    lines = [line for c in cells(nb) if c["cell_type"] == "code" for line in source(c).splitlines() + [""] if not line.lstrip().startswith(("%", "!"))]
    return ast.parse("\n".join(lines))

def test_every_module_has_its_notebook():
    assert set(MODULES) == set(LEVEL)
    assert {"core", "goals", "env", "data", "embeddings", "grounding", "generation", "offline", "cql", "evaluate", "plots", "pipeline"} <= set(LEVEL)
    assert len(set(LEVEL.values())) == len(LEVEL)

@each_module
def test_modules_import_lower_modules_only(name):
    used = siblings(imported(ast.parse(MODULES[name].read_text(encoding="utf-8"))))
    assert used or name in ("core", "goals", "env")
    assert all(LEVEL[other] < LEVEL[name] for other in used), f"{name} imports {sorted(o for o in used if LEVEL[o] >= LEVEL[name])}"

@each_notebook
def test_notebooks_import_lower_modules_only(nb):
    level = int(nb.name[:2]) if nb.name[:2].isdigit() else 100
    high = sorted(other for other in siblings(imported(code(nb))) if LEVEL[other] > level)   # its own module it may show off
    assert not high, f"{nb.name} imports {high}"

@each_notebook
def test_no_star_imports_between_siblings(nb):
    stars = [n.module for n in ast.walk(code(nb)) if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]
    assert not [m for m in stars if m and m.startswith("kalm")]

PURE = ("core", "goals", "embeddings", "grounding", "generation", "offline", "cql")  # run on a machine that only has torch

@pytest.mark.parametrize("name", PURE)
def test_training_code_does_not_reach_the_simulator(name):
    seen, outside, todo = set(), set(), [name]
    while todo:
        module = todo.pop(); seen.add(module)
        names = imported(ast.Module(on_import(ast.parse(MODULES[module].read_text(encoding="utf-8"))), []))
        outside |= {n.split(".")[0] for n in names}; todo += siblings(names) - seen
    assert not outside & {"mujoco", "gymnasium", "imageio", "OpenGL", "glfw"} and not seen & {"env", "data", "evaluate"}

@pytest.mark.parametrize("name", ["embeddings", "grounding", "generation", "offline", "cql"])
def test_training_code_never_mentions_the_environment(name):
    used = imported(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    assert not {n for n in used if n.split(".")[0] in ("mujoco", "gymnasium") or n.startswith(("kalm.env", "kalm.data"))}

def test_training_code_imports_where_no_simulator_is_installed():
    script = "import sys; sys.modules.update(mujoco=None, gymnasium=None, matplotlib=None, nbdev=None)\n"
    script += "\n".join(f"import kalm.{n}" for n in PURE) + "\nprint('fine')\ntry: import kalm.env\nexcept ImportError: print('and the simulator is really missing')"
    done = python("-c", script)
    assert done.stdout.splitlines() == ["fine", "and the simulator is really missing"], done.stderr


# ---------------------------------------------------------------- what exported code must not do

LEGACY = {"seed", "rand", "randn", "randint", "random", "random_sample", "ranf", "sample", "choice", "shuffle", "permutation", "normal", "uniform", "standard_normal",
          "get_state", "set_state", "RandomState", "binomial", "poisson", "beta", "exponential"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like", "randint_like"}
FILLS = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_"}

def dotted(node: ast.AST) -> str:
    "'np.random.rand' for the attribute chain of `node`, '' for anything else."
    if isinstance(node, ast.Name): return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""

def faults(tree: ast.AST) -> list[str]:
    "What in `tree` could run foreign code or use a generator that nobody passed."
    out = []
    for node in ast.walk(tree):
        name = dotted(node)
        if name.startswith(("np.random.", "numpy.random.")) and name.split(".")[2] in LEGACY: out.append(f"{node.lineno}: {name} uses the global generator")
        if name.endswith("manual_seed") and name.startswith("torch."): out.append(f"{node.lineno}: {name} seeds the global generator")
        if name in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec", "os.system"): out.append(f"{node.lineno}: {name}")
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            out += [f"{node.lineno}: import {n}" for n in imported(node) if n.split(".")[0] in ("random", "pickle", "cPickle", "dill", "joblib", "shelve", "marshal")]
        if isinstance(node, ast.Call):
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            for key, bad in dict(allow_pickle=True, trust_remote_code=True, weights_only=False, use_safetensors=False, shell=True).items():
                if key in given and given[key] == bad: out.append(f"{node.lineno}: {key}={bad}")
            last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if (name_of := dotted(node.func)) == f"torch.{last}" and last in DRAWS or last in FILLS:
                if "generator" not in {k.arg for k in node.keywords}: out.append(f"{node.lineno}: {name_of or last} without generator=")
    return out

@each_module
def test_exported_code_is_safe_and_seeded(name):
    assert not faults(ast.parse(MODULES[name].read_text(encoding="utf-8")))

@pytest.mark.parametrize("line", ["np.random.seed(0)", "x = np.random.rand(3)", "torch.manual_seed(0)", "torch.cuda.manual_seed(0)", "np.load(f, allow_pickle=True)", "import random",
                                  "from pickle import load", "AutoModel.from_pretrained(n, trust_remote_code=True)", "torch.load(f)", "f(weights_only=False)", "torch.randn(3)", "w.normal_(0, 1)"])
def test_the_check_sees(line):
    assert len(faults(ast.parse(line))) == 1

def test_the_check_lets_pass():
    assert not faults(ast.parse("rng = np.random.default_rng([1]); g = torch.Generator().manual_seed(3); np.load(f, allow_pickle=False); torch.rand(3, generator=g); rng.normal(); w.normal_(0, 1, generator=g)"))


# ---------------------------------------------------------------- notebooks and package in step

def test_exporting_the_notebooks_changes_nothing(tmp_path):
    pytest.importorskip("nbdev")
    for name in ("nbs", "kalm"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__", "assets", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT/name, tmp_path/name)
    for path in (tmp_path/"kalm").glob("*.py"):
        if path.stem in MODULES: path.unlink()
    done = python("-c", f"import os; os.chdir({str(tmp_path)!r}); from nbdev.export import nb_export\nfor nb in sorted(os.listdir('nbs')):\n    if nb.endswith('.ipynb'): nb_export('nbs/' + nb, lib_path='kalm')")
    assert done.returncode == 0, done.stderr
    lines = lambda p: p.read_text(encoding="utf-8").splitlines()
    made = {p.stem: lines(p) for p in (tmp_path/"kalm").glob("*.py") if p.stem not in ("__init__", "_modidx")}
    assert set(made) == set(MODULES)
    assert not [n for n in made if made[n] != lines(MODULES[n])], "run nbdev_export (and never edit kalm/*.py by hand)"

@each_notebook
def test_notebooks_open_with_a_title_and_a_purpose(nb):
    first = cells(nb)[0]; text = source(first).splitlines()
    assert first["cell_type"] == "markdown" and text[0].startswith("# ") and any(line.startswith("> ") for line in text[:4])

@each_notebook
def test_notebooks_store_fresh_outputs_without_errors(nb):
    outputs = [o for c in cells(nb) if c["cell_type"] == "code" for o in c["outputs"]]
    assert outputs, "no stored output: execute it"
    assert not [o for o in outputs if o["output_type"] == "error"]
    noise = [t for o in outputs if o.get("name") == "stderr" for t in o["text"] if "it/s" in t or "Traceback" in t]
    assert not noise

@each_notebook
def test_stored_outputs_are_small(nb):
    size = sum(len(json.dumps(c["outputs"])) for c in cells(nb) if c["cell_type"] == "code")
    assert size < (1_000_000 if nb.stem == "index" or nb.name >= "20" else 200_000)
