"Tiny random language models of many architectures, with a tokenizer made on the spot."
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from kalm.core.actions import DiscreteActions
from kalm.lm.model import KalmLM
from kalm.tensors.store import torch_rng

WINDOW = 16  # elements that a sliding-window layer sees

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512)
HEADS = dict(head_dim=8)
SCALES = dict(query_pre_attn_scalar=8)

# name -> (configuration class of transformers without "Config", settings, whether every text begins with <s>)
ARCHITECTURES = {
    "llama": ("Llama", dict(SIZES, tie_word_embeddings=True), False),
    "llama-bos": ("Llama", dict(SIZES, tie_word_embeddings=False), True),
    "qwen2": ("Qwen2", dict(SIZES, tie_word_embeddings=True), False),
    "qwen2-window": ("Qwen2", dict(SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1), False),
    "qwen3": ("Qwen3", dict(SIZES, **HEADS, tie_word_embeddings=False), False),
    "gemma2": ("Gemma2", dict(SIZES, **HEADS, **SCALES, sliding_window=WINDOW, final_logit_softcapping=2.,
                              attn_logit_softcapping=5.), True),
    "gemma3": ("Gemma3Text", dict(SIZES, **HEADS, **SCALES, sliding_window=WINDOW,
                                  layer_types=["sliding_attention", "full_attention"]), True),
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=512), False),
    "gpt-neox": ("GPTNeoX", SIZES, False),
    "phi": ("Phi", dict(SIZES, partial_rotary_factor=.5), False),
    "mistral": ("Mistral", dict(SIZES, sliding_window=None), True),
    "mistral-window": ("Mistral", dict(SIZES, sliding_window=WINDOW), True),
    "mixtral": ("Mixtral", dict(SIZES, num_local_experts=2, num_experts_per_tok=1), False),
    "cohere": ("Cohere", dict(SIZES, logit_scale=.25), False),
    "granite": ("Granite", dict(SIZES, logits_scaling=2., embedding_multiplier=3.), False),
    "opt": ("OPT", dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                        max_position_embeddings=512), True),
}

REFUSED = {  # name -> (as above, what the refusal says)
    "bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4), "does not take embeddings with positions and masks"),
    "mpt": ("Mpt", dict(d_model=32, n_layers=2, n_heads=4), "positions and attention masks"),
    "gpt-neo": ("GPTNeo", dict(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=512,
                               attention_types=[[["global", "local"], 1]]), "layers of kind local"),
    "mamba": ("Mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=4), "layers of kind linear_attention"),
    "bert": ("Bert", dict(SIZES, num_key_value_heads=4, is_decoder=True), "reads token embeddings otherwise"),
}


def byte_tokenizer(begins: bool):
    "A token a byte, and three special ones; if it `begins`, every text starts with <s> unless asked otherwise."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    words = ["<unk>", "<s>", "</s>"] + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B",
                                                                 special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                                eos_token="</s>", pad_token="</s>")


def tiny_model(kind: str, settings: dict, vocab_size: int):
    "A seeded random model whose every weight matters: matrices, biases and norms alike."
    settings = dict(settings, vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    config = getattr(transformers, kind + "Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    g = torch_rng(0, "tiny architecture")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (.05 if p.dim() == 1 else .15))
    return model.eval()


def tiny_backbone(arch: str, folder: str | Path) -> str:
    "Save a random model of `ARCHITECTURES` or `REFUSED` and its tokenizer to `folder`; the folder as a name."
    kind, settings, begins = {**ARCHITECTURES, **REFUSED}[arch]
    tokenizer = byte_tokenizer(begins is True)
    tiny_model(kind, settings, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_lm(arch: str, folder: str | Path | None = None, **spec) -> KalmLM:
    """A fresh `KalmLM` on such a backbone, which stays in `folder` if one is given (a checkpoint needs it later).

    `spec` as for `KalmLM`: states of two numbers and three actions if not given."""
    spec = dict(state_dim=2, codec=DiscreteActions(3)) | spec
    with TemporaryDirectory() as elsewhere:
        return KalmLM.from_pretrained(tiny_backbone(arch, folder or elsewhere), **spec)
