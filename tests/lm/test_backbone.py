"Backbones are found or refused in one line, never run foreign code, and are told apart by their weights."

import json
import pickle
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import byte_tokenizer, tiny_model

from kalm.core import files
from kalm.lm.backbone import (
    Adapter,
    add_lora,
    backbone_folder,
    beginning_of_text,
    convert_gguf,
    core_of,
    grouped_attention,
    load_backbone,
    weights_id,
)
from kalm.tensors.store import torch_rng

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def no_network(monkeypatch):
    "Any attempt to connect fails the test."
    calls = []

    def refuse(self, address):
        calls.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not calls, f"tried to reach {calls}"


@pytest.fixture
def moved(tmp_path):
    "A copy of the tiny backbone elsewhere."
    return shutil.copytree(backbone_folder("tiny-random"), tmp_path / "elsewhere")


class Payload:
    "Leaves a mark when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "smollm2-136m", "", "../..", "a/b/c/d"])
def test_unknown_backbones_say_what_is_known(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="smollm2-135m.*tiny-random.*folder.*hub") as e:
        load_backbone(name)
    assert "\n" not in str(e.value)


def test_code_in_a_backbones_folder_is_not_run(moved, tmp_path, no_network):
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'owned')!r}).touch()\n"
    (moved / "evil.py").write_text(trap + "class Evil: pass\n")
    config = json.loads((moved / "config.json").read_text())
    evil = dict(
        model_type="evil",
        architectures=["Evil"],
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    )
    (moved / "config.json").write_text(json.dumps(config | evil))
    with pytest.raises(ValueError, match="no causal language model"):
        load_backbone(str(moved))
    assert not (tmp_path / "owned").exists()


def test_a_pickle_in_a_backbones_folder_is_not_opened(moved, tmp_path):
    (moved / "model.safetensors").unlink()
    (moved / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(ValueError, match="no causal language model"):
        load_backbone(str(moved))
    assert not (tmp_path / "owned").exists()


def test_two_processes_may_build_the_cache_at_once(tmp_path):
    def build(folder):
        (folder / "x").write_text("mine")
        files.publish(lambda f: (f / "x").write_text("rival"), tmp_path / "out")  # the rival finishes first

    assert (files.publish(build, tmp_path / "out") / "x").read_text() == "rival"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def broken(folder):
        (folder / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.publish(broken, tmp_path / "other")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "strange"])
def test_a_damaged_backbone_is_made_again(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path))
    path = Path(backbone_folder("tiny-random")) / "model.safetensors"
    before = path.read_bytes()
    damaged = dict(cut=before[:1000], flipped=before[:-9] + b"x" + before[-8:]).get(damage)
    if damage == "missing":
        path.unlink()
    elif damage == "strange":
        (path.parent / "more.safetensors").write_bytes(before)
    else:
        path.write_bytes(damaged)
    load_backbone("tiny-random")
    assert path.read_bytes() == before and not (path.parent / "more.safetensors").exists()
    assert not list(tmp_path.rglob(".stage*"))


# ---------------------------------------------------------------- identity


def test_the_id_does_not_depend_on_the_float_type_but_on_the_weights(moved):
    from safetensors.torch import load_file, save_file

    tiny = load_backbone("tiny-random")[0]
    assert weights_id(tiny) == "2c85301528d24bb2"  # what the code before the wings gave
    assert weights_id(load_backbone("tiny-random", torch.bfloat16)[0]) == weights_id(tiny)
    assert weights_id(load_backbone(str(moved))[0]) == weights_id(tiny)
    w = load_file(moved / "model.safetensors")
    key = next(k for k in w if "mlp" in k)
    save_file(w | {key: w[key] + 0.01}, moved / "model.safetensors", metadata={"format": "pt"})
    assert weights_id(load_backbone(str(moved))[0]) != weights_id(tiny)


def test_scratch_forgets_the_weights_and_is_seeded():
    def make(seed, global_seed):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            return dict(load_backbone("tiny-random", scratch=seed)[0].named_parameters())

    a, b, c = make(0, 1), make(0, 2), make(1, 1)
    old = dict(load_backbone("tiny-random")[0].named_parameters())
    matrices = {n for n, p in a.items() if p.dim() > 1}
    assert a.keys() == old.keys() and len(matrices) == 15
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], other[n]) for n in matrices for other in (c, old))
    for n, p in a.items():
        assert 0.9 < p.std() / 0.02 < 1.1 and p.mean().abs() < 0.002 if n in matrices else (p == 1).all()


@pytest.mark.parametrize("kind, value", [("Gemma2", 0.0), ("Qwen3", 1.0), ("Phi", 1.0)])
def test_scratch_norms_scale_by_one_in_every_architecture(kind, value):
    from kalm.lm.backbone import _forget

    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = tiny_model(kind, sizes, 50)
    _forget(model, 0)
    norms = [p for n, p in model.named_parameters() if p.dim() == 1 and n.endswith("weight")]
    assert norms and all((p == value).all() for p in norms)


# ---------------------------------------------------------------- beginnings, attention, adapters


def test_texts_begin_as_the_tokenizer_says():
    plain, begins = byte_tokenizer(False), byte_tokenizer(True)
    assert beginning_of_text(plain) == [] and beginning_of_text(begins) == [1]
    assert begins("ab").input_ids == [1, *plain("ab").input_ids]


def attention_by_hand(q, k, v, mask):
    "Head by head, element by element: scores, softmax, mean."
    B, H, L, d = q.shape
    out = np.zeros((B, L, H, d))
    q, k, v, mask = (x.double().numpy() for x in (q, k, v, mask))
    for b, h, i in np.ndindex(B, H, L):
        g = h * k.shape[1] // H
        w = np.exp([q[b, h, i] @ k[b, g, j] * 0.3 + mask[b, 0, i, j] for j in range(k.shape[2])])
        out[b, i, h] = w @ v[b, g] / w.sum()
    return out


@pytest.mark.parametrize("heads, L, M", [((4, 2), 5, 5), ((6, 2), 1, 7), ((3, 3), 4, 6), ((4, 1), 5, 5)])
def test_grouped_attention_is_that_of_a_loop(heads, L, M):
    g, (H, h) = torch_rng(0, "attention"), heads
    q, k, v = (torch.randn(shape, generator=g) for shape in ((2, H, L, 3), (2, h, M, 3), (2, h, M, 3)))
    hidden = torch.rand(2, 1, L, M, generator=g) < 0.4
    mask = torch.zeros(2, 1, L, M).masked_fill(hidden, torch.finfo(torch.float32).min)
    mask[..., 0] = 0
    for m in (mask, None):
        want = attention_by_hand(q, k, v, torch.zeros_like(mask) if m is None else m)
        np.testing.assert_allclose(grouped_attention(None, q, k, v, m, 0.3)[0], want, rtol=1e-4, atol=1e-5)


def test_adapters_are_seeded_whatever_the_global_generator():
    def make(seed, global_seed):
        model = load_backbone("tiny-random")[0]
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            add_lora(model, Adapter(rank=4), seed)
        return {n: p for n, p in model.named_parameters() if "lora_" in n}

    a, b, c = make(0, 1), make(0, 2), make(1, 1)
    assert len(a) == 28
    for n in a:
        assert torch.equal(a[n], b[n])
        assert torch.equal(a[n], c[n]) == ("lora_B" in n)  # which begin at zero


def test_a_model_without_linear_layers_is_not_adapted():
    model = load_backbone("tiny-random")[0]
    core_of(model).layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="no linear layers to adapt: use Adapter"):
        add_lora(model, Adapter())


def test_bad_ranks():
    with pytest.raises(ValueError, match="rank 0: expected a whole number, at least 1"):
        Adapter(rank=0)


def test_a_gguf_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a GGUF file"):
        convert_gguf(tmp_path/"model.gguf", tmp_path/"out")
    assert not (tmp_path/"out").exists()
