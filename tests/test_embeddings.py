"The backbone stays what it was, checkpoints come back as they went, and what does not belong is refused."
import json
import shutil
import socket

import numpy as np
import pytest
import torch

from conftest import liven, make_rollouts
from kalm.core import sha256, torch_rng
from kalm.embeddings import ACTION, PAD, STATE, TEXT, Adapter, KalmLM, Normaliser, backbone_folder, fingerprint, load_backbone

pytestmark = pytest.mark.usefixtures("cache")

SENTENCES = ["Move the red ball behind the blue ball.", "Short.", "Could you, if it is no trouble, bring the cyan ball round to the left of the green one?"]

def sequence(lm, seed=0, steps=3, text="Goal: x Rollout:"):
    "One unpadded mixed sequence: kind (L,), ids (L,), states (L, S)."
    g = torch_rng(seed, "sequence"); ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    kind = torch.tensor([TEXT] * len(ids) + [STATE, ACTION] * steps + [STATE])
    id_ = torch.cat([torch.tensor(ids), torch.randint(0, 40, (2 * steps + 1,), generator=g)])
    return kind, id_, torch.rand(len(kind), 10, generator=g) - .5

def hidden(lm, kind, ids, states, **kw):
    with torch.no_grad(): return lm(kind[None], ids[None], states[None], **kw)[0]

def own(lm): return {n: p.detach().clone() for n, p in lm.own_parameters().items()}

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- parity on plain text

def text_parity(lm, backbone):
    for text in SENTENCES:
        ids = lm.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            want = backbone(input_ids=ids).logits
            got = lm.text_logits(lm(torch.full_like(ids, TEXT), ids, torch.zeros(*ids.shape, 10)))
        if not torch.equal(got, want): return False
    return True

def test_plain_text_gives_the_backbones_logits_exactly(tiny):
    backbone = load_backbone("tiny-random")[0]
    assert text_parity(tiny, backbone)
    tiny.adapt(Adapter(rank=4)); assert text_parity(tiny, backbone)    # a new adapter changes nothing
    with tiny.merged(): assert text_parity(tiny, backbone)
    with torch.no_grad(): next(p for n, p in tiny.named_parameters() if "lora_B" in n).fill_(.1)
    assert not text_parity(tiny, backbone)                             # a trained one does

def test_full_tuning_starts_at_the_backbone(tiny):
    tiny.adapt(Adapter(full=True))
    assert text_parity(tiny, load_backbone("tiny-random")[0]) and all(p.requires_grad for p in tiny.parameters()) and len(own(tiny)) == len(list(tiny.named_parameters()))

def test_only_our_weights_learn(tiny):
    tiny.adapt(Adapter(rank=4)); names = set(tiny.own_parameters())
    for n, p in tiny.named_parameters(): assert p.requires_grad == (n in names) == (("lora_" in n) or not n.startswith("backbone."))

def test_every_own_weight_gets_a_gradient(lively):
    kind, ids, states = sequence(lively)
    h = lively(kind[None], ids[None], states[None])[0]
    (lively.action_logits(h[kind == STATE], states[kind == STATE]).logsumexp(-1).sum() + lively.next_states(h[kind == ACTION], states[kind == ACTION]).pow(2).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lively.own_parameters().values())
    assert all(p.grad is None for n, p in lively.named_parameters() if n not in lively.own_parameters())

def test_embeddings_are_at_the_scale_of_the_tokens(tiny):
    rms = lambda x: x.detach().pow(2).mean().sqrt()
    tokens = rms(tiny.backbone.get_input_embeddings().weight)
    s = torch.rand(200, 10, generator=torch_rng(0)) - .5
    assert .5 < rms(tiny.state_embed(tiny.standard(s))) / tokens < 2.5 and .8 < rms(tiny.action_embed.weight) / tokens < 1.25


# ---------------------------------------------------------------- what the model reads

def test_each_kind_reads_its_own_column_only(lively):
    kind, ids, states = sequence(lively); h = hidden(lively, kind, ids, states)
    other = states.clone(); other[kind != STATE] = 9.
    assert torch.equal(hidden(lively, kind, ids, other), h)
    noise = ids.clone(); noise[kind == STATE] = 3
    assert torch.equal(hidden(lively, kind, noise, states), h)
    for k in (TEXT, ACTION):
        changed = ids.clone(); at = (kind == k).nonzero()[0, 0]; changed[at] = (changed[at] + 1) % 40
        new = hidden(lively, kind, changed, states)
        assert torch.equal(new[:at], h[:at]) and not torch.allclose(new[at:], h[at:])   # and nobody sees the future

def padded(rows, left):
    "Stack unpadded (kind, ids, states); padding is garbage that must not matter."
    L = max(len(k) for k, _, _ in rows); B = len(rows)
    kind, ids, states = torch.full((B, L), PAD), torch.full((B, L), 5), torch.full((B, L, 10), 3.)
    for b, (k, i, s) in enumerate(rows):
        at = slice(L - len(k), L) if left else slice(0, len(k))
        kind[b, at], ids[b, at], states[b, at] = k, i, s
    return kind, ids, states

def test_left_padded_equals_right_padded_equals_alone(lively):
    rows = [sequence(lively, seed=i, steps=n, text=t) for i, (n, t) in enumerate([(1, "a"), (4, SENTENCES[0]), (2, SENTENCES[2])])]
    alone = [hidden(lively, *r) for r in rows]
    with torch.no_grad():
        right = lively(*padded(rows, left=False))
        kind, ids, states = padded(rows, left=True); attend = (kind != PAD).long()
        left = lively(kind, ids, states, positions=(attend.cumsum(1) - 1).clamp(min=0), attend=attend)
    for b, h in enumerate(alone):
        torch.testing.assert_close(right[b, :len(h)], h, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(left[b, -len(h):], h, atol=1e-5, rtol=1e-4)
    with torch.no_grad(): wrong = lively(kind, ids, states)   # the comparison can fail
    assert not torch.allclose(wrong[0, -len(alone[0]):], alone[0], atol=1e-3)

def test_cache_equals_one_pass(lively):
    kind, ids, states = sequence(lively); h = hidden(lively, kind, ids, states); past, pieces = None, []
    for part in (slice(0, 9), slice(9, 10), slice(10, None)):
        n = len(kind[:part.stop])
        with torch.no_grad(): out, past = lively(kind[None, part], ids[None, part], states[None, part], past=past, positions=torch.arange(n)[None, part], attend=torch.ones(1, n, dtype=torch.long), use_cache=True)
        pieces.append(out[0])
    torch.testing.assert_close(torch.cat(pieces), h, atol=1e-5, rtol=1e-4)

def test_heads_speak_in_metres_and_actions(lively):
    lively.normalise(Normaliser((.1,) * 10, (.2,) * 10, step=.05)); kind, ids, states = sequence(lively); h = hidden(lively, kind, ids, states)
    with torch.no_grad():
        torch.testing.assert_close(lively.next_states(h, states), states + .05 * lively.state_head(h, (states - .1) / .2))
        assert lively.action_logits(h, states).shape == (len(kind), 41) and lively.done == 40
    with pytest.raises(ValueError, match="9 numbers"): lively.normalise(Normaliser.default(9))

def test_normaliser_by_hand():
    r = make_rollouts(30, steps=6, least=0); n = Normaliser.fit(r)
    s = np.concatenate([one.states[:-1] for one in r]).astype(float); d = np.concatenate([np.diff(one.states, axis=0) for one in r]).astype(float)
    np.testing.assert_allclose(n.mean, s.mean(0), atol=1e-6); np.testing.assert_allclose(n.std, s.std(0) + 1e-3, atol=1e-6)
    np.testing.assert_allclose([n.step, n.jump], [d.std() + 1e-3, np.std([one.states[-1].astype(float) - one.states[0] for one in r]) + 1e-3], atol=1e-6)
    with pytest.raises(ValueError, match="empty"): Normaliser.fit(r[:0])


# ---------------------------------------------------------------- merging

def test_merged_computes_the_same_and_gives_the_weights_back(lively):
    row = sequence(lively); before = {n: p.detach().clone() for n, p in lively.named_parameters()}; h = hidden(lively, *row)
    with lively.merged():
        merged = hidden(lively, *row)
        assert any(not torch.equal(p, before[n]) for n, p in lively.named_parameters())
    torch.testing.assert_close(merged, h, atol=1e-4, rtol=1e-3)
    assert equal(before, dict(lively.named_parameters())) and torch.equal(hidden(lively, *row), h)

def test_merged_gives_the_weights_back_after_an_error(lively):
    before = {n: p.detach().clone() for n, p in lively.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        with lively.merged(): raise KeyboardInterrupt
    assert equal(before, dict(lively.named_parameters()))


# ---------------------------------------------------------------- seeds

def test_seeds_decide_the_initial_weights_whatever_the_global_generator():
    def make(seed, global_seed):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            return own(KalmLM.from_pretrained("tiny-random", seed=seed).adapt(Adapter(rank=4), seed=seed))
    a, b, c = make(0, 1), make(0, 2), make(1, 1)
    assert equal(a, b)
    random = {n for n in a if ("weight" in n and "norm" not in n and "lora_B" not in n)}
    assert random and not any(torch.equal(a[n], c[n]) for n in random)

@pytest.mark.parametrize("make, message", [(lambda lm: Adapter(rank=0), "rank 0"), (lambda lm: lm.adapt().adapt(), "already")])
def test_bad_adapters(make, message, tiny):
    with pytest.raises(ValueError, match=message): make(tiny)


# ---------------------------------------------------------------- save and load

@pytest.fixture
def saved(lively, tmp_path):
    lively.normalise(Normaliser(tuple(i / 10 for i in range(10)), (.2,) * 10, step=.07, jump=.4))
    lively.save_pretrained(tmp_path/"lm", dtype=None)
    return lively, tmp_path/"lm"

def test_float32_comes_back_exactly(saved):
    lm, folder = saved; back = KalmLM.from_pretrained(folder); row = sequence(lm)
    assert equal(own(lm), own(back)) and back.normaliser == lm.normaliser and back.adapter == lm.adapter and torch.equal(hidden(lm, *row), hidden(back, *row))

def test_bfloat16_comes_back_close_and_smaller(saved, tmp_path):
    lm, folder = saved; lm.save_pretrained(tmp_path/"half"); back = KalmLM.from_pretrained(tmp_path/"half")
    for a, b in zip(own(lm).values(), own(back).values()): torch.testing.assert_close(b, a, rtol=2**-8, atol=0); assert b.dtype == torch.float32
    row = sequence(lm); torch.testing.assert_close(hidden(lm, *row), hidden(back, *row), rtol=.1, atol=.1)
    assert (tmp_path/"half"/"model.safetensors").stat().st_size < .6 * (folder/"model.safetensors").stat().st_size

def test_full_tuning_comes_back(tiny, tmp_path):
    tiny.adapt(Adapter(full=True))
    with torch.no_grad():
        for p in tiny.parameters(): p.add_(.01)
    tiny.save_pretrained(tmp_path, dtype=None); row = sequence(tiny)
    assert torch.equal(hidden(KalmLM.from_pretrained(tmp_path), *row), hidden(tiny, *row))

def test_other_state_and_action_spaces_come_back(tmp_path):
    lm = KalmLM(*load_backbone("tiny-random"), "tiny-random", state_dim=4, n_actions=7, hidden=32); lm.save_pretrained(tmp_path)
    back = KalmLM.from_pretrained(tmp_path)
    assert back.shape == dict(state_dim=4, n_actions=7, hidden=32) and back.done == 7 and len(back.normaliser.mean) == 4

def test_a_shortened_backbone_comes_back(tmp_path):
    lm = liven(KalmLM.from_pretrained("tiny-random", layers=1)); lm.save_pretrained(tmp_path, dtype=None); back = KalmLM.from_pretrained(tmp_path)
    assert len(back.backbone.model.layers) == 1 and torch.equal(hidden(lm, *sequence(lm)), hidden(back, *sequence(lm)))
    with pytest.raises(ValueError, match="3 layers"): KalmLM.from_pretrained("tiny-random", layers=3)

@pytest.fixture
def moved(tmp_path):
    "A copy of the tiny backbone elsewhere."
    return shutil.copytree(backbone_folder("tiny-random"), tmp_path/"elsewhere")

def test_a_backbone_that_moved_is_accepted_and_a_changed_one_is_not(saved, moved):
    from safetensors.torch import load_file, save_file
    lm, folder = saved
    assert equal(own(KalmLM.from_pretrained(folder, backbone=str(moved))), own(lm))
    w = load_file(moved/"model.safetensors"); key = next(k for k in w if "mlp" in k)
    save_file(w | {key: w[key] + .01}, moved/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trained on backbone 'tiny-random'"): KalmLM.from_pretrained(folder, backbone=str(moved))

def test_fingerprint_does_not_depend_on_the_float_type(tiny):
    assert fingerprint(load_backbone("tiny-random", torch.bfloat16)[0]) == fingerprint(load_backbone("tiny-random")[0]) == tiny.backbone_id

def resign(path): path.with_name(path.name + ".sha256").write_text(sha256(path) + "\n")

def test_damaged_weights_are_refused(saved):
    folder = saved[1]; f = folder/"model.safetensors"; whole = f.read_bytes()
    f.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:])
    with pytest.raises(ValueError, match="checksum"): KalmLM.from_pretrained(folder)
    for bad in (whole[:-100], b"", b"\xff" * 50):
        f.write_bytes(bad); resign(f)
        with pytest.raises(ValueError, match="model.safetensors"): KalmLM.from_pretrained(folder)
    f.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): KalmLM.from_pretrained(folder)

def test_a_pickle_in_disguise_is_not_opened(saved, tmp_path):
    from test_core import Payload
    folder = saved[1]; torch.save(Payload(tmp_path/"owned"), folder/"model.safetensors"); resign(folder/"model.safetensors")
    with pytest.raises(ValueError, match="safetensors"): KalmLM.from_pretrained(folder)
    assert not (tmp_path/"owned").exists()

def test_weights_of_another_shape_or_name_are_refused(saved):
    from safetensors.torch import load_file, save_file
    folder = saved[1]; f = folder/"model.safetensors"; w = load_file(f)
    for change, message in [({"action_embed.weight": torch.zeros(41, 64)}, r"action_embed.weight has shape \(41, 64\), expected \(40, 64\)"), ({"stranger": torch.zeros(1)}, "stranger")]:
        save_file(w | change, f); resign(f)
        with pytest.raises(ValueError, match=message): KalmLM.from_pretrained(folder)
    save_file({k: v for k, v in w.items() if k != "action_embed.weight"}, f); resign(f)
    with pytest.raises(ValueError, match="action_embed"): KalmLM.from_pretrained(folder)

REMOVE = "(removed)"

@pytest.mark.parametrize("change", [
    dict(format="kalm-lm-0"), dict(format=REMOVE), dict(backbone=REMOVE), dict(backbone="../../etc"), dict(backbone="/etc"), dict(backbone="evil/model"), dict(backbone=7), dict(backbone_id=REMOVE),
    dict(backbone_id="0" * 16), dict(state_dim=11), dict(hidden=256), dict(hidden="512"), dict(n_actions=REMOVE), dict(layers="two"), dict(layers=99), dict(adapter="lora"), dict(adapter=dict(rank=4, code="x")),
    dict(adapter=dict(rank=8)), dict(adapter=None), dict(normaliser=REMOVE), dict(normaliser=dict(mean=[0])), dict(normaliser=dict(mean=["x"] * 10, std=[1] * 10, step=1, jump=1))], ids=str)
def test_a_header_that_was_tampered_with_is_refused(change, saved, no_network):
    path = saved[1]/"kalm.json"; c = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in c.items() if v != REMOVE}))
    with pytest.raises(ValueError): KalmLM.from_pretrained(saved[1])

@pytest.mark.parametrize("content", ["", "[]", "null", '"kalm-lm-1"', "{", "kalm"])
def test_a_header_that_is_no_header_is_refused(content, saved):
    (saved[1]/"kalm.json").write_text(content)
    with pytest.raises(ValueError, match="kalm.json"): KalmLM.from_pretrained(saved[1])

def test_unknown_keys_in_a_header_do_nothing(saved, tmp_path):
    path = saved[1]/"kalm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(trust_remote_code=True, auto_map={"AutoModel": "evil.py"}, path=str(tmp_path))))
    assert equal(own(KalmLM.from_pretrained(saved[1])), own(saved[0]))

@pytest.mark.parametrize("fail", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint(fail, saved, monkeypatch):
    import kalm.core as core
    lm, folder = saved; old = own(lm)
    with torch.no_grad(): lm.action_embed.weight.add_(1)
    def full(*a): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(core.os, fail, full)
        with pytest.raises(OSError): lm.save_pretrained(folder, dtype=None)
    assert equal(own(KalmLM.from_pretrained(folder)), old) and not list(folder.glob(".*"))


# ---------------------------------------------------------------- backbones

@pytest.fixture
def no_network(monkeypatch):
    "Any attempt to connect fails the test."
    calls = []
    def refuse(self, address): calls.append(address); raise OSError("no network in tests")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not calls, f"tried to reach {calls}"

@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "smollm2-136m", "", "../..", "a/b/c/d"])
def test_unknown_backbones_say_what_is_known(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="smollm2-135m.*tiny-random.*folder.*hub"): KalmLM.from_pretrained(name)

def test_code_and_pickles_in_a_backbones_folder_are_not_run(moved, tmp_path, no_network):
    from test_core import Payload
    trap = f"from pathlib import Path\nPath({str(tmp_path/'owned')!r}).touch()\n"
    (moved/"evil.py").write_text(trap + "class Evil: pass\n")
    config = json.loads((moved/"config.json").read_text())
    (moved/"config.json").write_text(json.dumps(config | dict(model_type="evil", architectures=["Evil"], auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})))
    with pytest.raises(ValueError): KalmLM.from_pretrained(moved)
    (moved/"config.json").write_text(json.dumps(config)); (moved/"model.safetensors").unlink(); torch.save(Payload(tmp_path/"owned"), moved/"pytorch_model.bin")
    with pytest.raises(ValueError): KalmLM.from_pretrained(moved)
    assert not (tmp_path/"owned").exists()

def test_two_processes_may_build_the_cache_at_once(tmp_path, monkeypatch):
    from kalm.embeddings import _publish
    def build(folder):
        (folder/"x").write_text("mine")
        (tmp_path/"out").mkdir(exist_ok=True); (tmp_path/"out"/"x").write_text("rival")   # the rival finishes first
    assert (_publish(build, tmp_path/"out")/"x").read_text() == "rival" and [p.name for p in tmp_path.iterdir()] == ["out"]
    def broken(folder): (folder/"x").write_text("half"); raise OSError(28, "No space left on device")
    with pytest.raises(OSError): _publish(broken, tmp_path/"other")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

def test_the_shipped_checkpoint_is_named_when_missing(monkeypatch, tmp_path):
    import kalm.embeddings as embeddings
    monkeypatch.setattr(embeddings, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="kalm ground"): KalmLM.grounded()
