"""Kill small runs at random moments, damage their files, hand nonsense to every door: results/attacks.json.

    python experiments/attack_runs.py kills [--kills 200] [--domains worlds:discrete_line ...] [--cores 1 2] [--seed 0]
    python experiments/attack_runs.py damage [--damages 300] [--domains ...] [--seed 0]

`kills`: the preset `smoke` in several worlds, in one process and with workers. A run is killed (SIGKILL; its workers
have to end by themselves) after a random time, started again by the same command, killed again, and at last left to
end. Its files have to be those of a run that nobody disturbed, to the byte, and so does every row of its results.

`damage`: a file of a finished run is removed, emptied, cut, filled with noise, has a bit flipped at one of several
places, or (JSON) holds a value of another kind. The same commands have to give the same files again (archives: the same
rollouts), or one line that names the file; no file but the damaged one may be lost. So many pairs of a file and a
damage are drawn.

Rows are stored as soon as they are there, and replace older ones of the same world (and cores).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kalm.core.files import save_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/"results"/"attacks.json"
WORLDS = ("clevr", "worlds:discrete_line", "worlds:continuous_line", "worlds:cart_pole")
COMPARED = ("data/rollouts.npz", "data/request.json", "grounded/kalm.json", "grounded/model.safetensors",
            "grounded/log.csv", "imagined/*/rollouts.npz", "imagined/*/quality.json", "policies/*/curve.csv",
            "policies/*/step-*/policy.safetensors", "acted/*/*.npz", "config.json")


def in_child(args: list[str], cores: int, log: Path, cache: str) -> int:
    "Fork, since importing takes longer than the run; `kalm ARGS` in the child, its words into `log`."
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ["KALM_CACHE"] = cache
    os.cpu_count = lambda: cores
    code = 70
    try:
        code = main_of_kalm(args)
    except BaseException as e:   # what must not get this far
        print(f"TRACEBACK {type(e).__name__}: {e}", flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main_of_kalm(args: list[str]) -> int:
    "`kalm ARGS`; for `all` in place of a command, every stage but the figures, which are drawn anew each time."
    from kalm.run.command import STAGES, main
    if args[0] != "all":
        return main(args)
    return next((code for stage in list(STAGES)[:-1] if (code := main([stage, *args[1:]]))), 0)


def ended(pid: int, seconds: float | None = None) -> int | None:
    "The exit code, None if it still runs after so many seconds."
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(.02)
    return None


def contents(out: Path) -> dict[str, bytes]:
    "What has to be the same, by path; rows of results without their order, and without the commit that made them."
    found = {str(p.relative_to(out)): without_clock(p) for pattern in COMPARED for p in sorted(out.glob(pattern))}
    rows = (out/"results.csv").read_text().splitlines() if (out/"results.csv").exists() else []
    rows = [row.rpartition(",")[0] for row in rows]
    return found | {"results.csv": "\n".join(sorted(rows)).encode()}


def without_clock(path: Path) -> bytes:
    "The log of grounding says how many seconds it took; all else has to be equal."
    if path.name != "log.csv":
        return path.read_bytes()
    rows = [line.split(",") for line in path.read_text().splitlines()]
    clock = rows[0].index("seconds")
    return "\n".join(",".join(row[:clock] + row[clock + 1:]) for row in rows).encode()


def whole_run(spec: str, out: Path, cache: str) -> dict[str, bytes]:
    log = out.with_suffix(".log")
    code = ended(in_child(["run", "--domain", spec, "--preset", "smoke", "--out", str(out)], 1, log, cache))
    assert code == 0, log.read_text()
    return contents(out)


def kills(specs: list[str], cores: list[int], n: int, rng: random.Random, work: Path, cache: str
          ) -> Iterator[list[dict]]:
    "Rows: world, cores, kills, restarts, files compared and files that differ."
    for spec in specs:
        began = time.monotonic()
        whole = whole_run(spec, work/f"{spec.replace(':', '-')}-whole", cache)
        longest = time.monotonic() - began
        for c in cores:
            each = -(-n // (len(cores) * len(specs)))
            yield [killed_often(spec, c, each, longest, whole, rng, work, cache)]


def killed_often(spec: str, cores: int, n: int, longest: float, whole: dict[str, bytes], rng: random.Random, work: Path,
                 cache: str) -> dict:
    out, log = work/f"{spec.replace(':', '-')}-{cores}", work/"killed.log"
    args, done, runs, orphans = ["run", "--domain", spec, "--preset", "smoke", "--out", str(out)], 0, 0, 0
    stages, lost = Counter(), []
    while done < n:
        pid = in_child(args, cores, log, cache)
        # workers import everything anew before they begin: with them a run takes longer
        code = ended(pid, rng.uniform(0, longest * (1 if cores == 1 else 2)))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
            said = [line for line in log.read_text().splitlines() if line.startswith("[")]
            stages[said[-1].split()[1] if said else "start"] += 1
            orphans += outlived(pid)
            continue
        assert code == 0, log.read_text()
        runs += 1
        lost += compared(whole, contents(out))
        shutil.rmtree(out)   # it came to its end: once more from the beginning
    assert ended(in_child(args, cores, log, cache)) == 0, log.read_text()
    lost += compared(whole, contents(out))
    return dict(world=spec, cores=cores, kills=done, during=dict(stages), finished=runs + 1, files=len(whole),
                different=sorted({*lost}), orphans=orphans)


def outlived(group: int) -> int:
    "1 if a worker of a killed run is there half a minute later (one that was just importing needs some seconds)."
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return 0
        time.sleep(.05)
    os.killpg(group, signal.SIGKILL)
    return 1


def compared(whole: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return [name for name in whole | found if whole.get(name) != found.get(name)]


OTHERS = ("[]", "{}", "3", "null", '"x"', '{"format": 7}', "[" * 5000)   # JSON of another kind


def damages(path: Path, rng: random.Random) -> dict[str, bytes | None]:
    "Names and new contents; None: removed."
    old = path.read_bytes()
    out = {"removed": None, "emptied": b"", "cut": old[:len(old) // 2], "noise": rng.randbytes(len(old) or 10)}
    for share in (.1, .5, .95):
        flipped = bytearray(old or b"\0")
        flipped[int(share * len(flipped))] ^= 1 << rng.randrange(8)
        out[f"flipped at {share:.0%}"] = bytes(flipped)
    if path.suffix == ".json":
        out |= {f"holds {text[:9]}": text.encode() for text in OTHERS}
    return out


def alike(a: Path, b: Path) -> bool:
    "Whether two files hold the same rollouts; a zip archive has bits that say nothing, such as its time of day."
    from kalm.core.rollouts import Rollouts
    return a.suffix == ".npz" and a.exists() and Rollouts.load(a).digest() == Rollouts.load(b).digest()


def damage(specs: list[str], n: int, rng: random.Random, work: Path, cache: str) -> Iterator[list[dict]]:
    "Rows: world, file, damage, and what came of it: `same`, `refused` (in one line), or what went wrong."
    for spec in specs:
        rows, base = [], work/f"{spec.replace(':', '-')}-base"
        whole = whole_run(spec, base, cache)
        files = sorted(p for p in base.rglob("*") if p.is_file() and p.suffix != ".png")
        cases = [(path, what, new) for path in files for what, new in damages(path, rng).items()]
        for path, what, new in rng.sample(cases, min(len(cases), -(-n // len(specs)))):
            name = str(path.relative_to(base))
            outcome = damaged(spec, base, name, new, whole, work, cache)
            rows.append(dict(world=spec, file=name, damage=what, outcome=outcome))
            if outcome not in ("same", "refused"):
                print(rows[-1], flush=True)
        yield rows


def damaged(spec: str, base: Path, name: str, new: bytes | None, whole: dict[str, bytes], work: Path, cache: str
           ) -> str:
    out, log = work/"damaged", work/"damaged.log"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out)
    (out/name).unlink() if new is None else (out/name).write_bytes(new)
    code = ended(in_child(["all", "--domain", spec, "--preset", "smoke", "--out", str(out)], 1, log, cache))
    said = [line for line in log.read_text().splitlines() if line.startswith(("kalm:", "TRACEBACK", "Traceback"))]
    if code == 0:
        lost = [n for n in compared(whole, contents(out)) if not alike(out/n, base/n)]
        return "same" if not lost else f"different: {', '.join(lost)[:200]}"
    others = [p for p in base.rglob("*") if p.is_file() and str(p.relative_to(base)) != name]
    gone = [str(p.relative_to(base)) for p in others if not (out/p.relative_to(base)).exists()]
    if code == 1 and len(said) == 1 and said[0].startswith("kalm:") and name in said[0] and not gone:
        return "refused"
    return f"code {code}, lost {gone[:3]}, said {said[:2]}"[:400]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("kills", "damage"))
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--damages", type=int, default=300)
    p.add_argument("--domains", nargs="+", default=list(WORLDS))
    p.add_argument("--cores", nargs="+", type=int, default=[1, 2], help="of a killed run: one process, or workers")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=RESULTS)
    a = p.parse_args()
    sys.path.insert(0, str(ROOT/"tests"))   # the small worlds
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT/"tests")])
    os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    import kalm.run.command  # noqa: F401 (before the first fork)
    torch.set_num_threads(1)
    cache = os.environ.get("KALM_CACHE", "") or str(Path.home()/".cache"/"kalm")
    rng = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as work:
        made = (kills(a.domains, a.cores, a.kills, rng, Path(work), cache) if a.what == "kills"
                else damage(a.domains, a.damages, rng, Path(work), cache))
        for rows in made:
            print(Counter(row["outcome"] for row in rows) if a.what == "damage" else rows[0], flush=True)
            store(a.out, a.what, rows, a.seed)


def store(path: Path, what: str, rows: list[dict], seed: int) -> None:
    "Put rows in place of older ones of the same world and cores."
    found = json.loads(path.read_text()) if path.exists() else {}
    about = [(row["world"], row.get("cores")) for row in rows]
    kept = [row for row in found.get(what, []) if (row["world"], row.get("cores")) not in about]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found[what] = kept + [row | dict(seed=seed, commit=commit.stdout.strip()) for row in rows]
    save_json(path, found)


if __name__ == "__main__":
    main()
