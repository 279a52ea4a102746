"""Small models with random weights, saved under the names of those that PEFT's tests would download."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertForPreTraining,
    BloomConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    ConvNextImageProcessor,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    ResNetConfig,
    RobertaConfig,
    T5Config,
)


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 1024}
GROUPED = {**SIZES, "num_key_value_heads": 2}

RESNET = "peft-internal-testing/tiny-random-ResNetForImageClassification"
MODELS: dict[str, tuple[type, PretrainedConfig]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        AutoModelForCausalLM,
        OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
    ),
    "peft-internal-testing/opt-125m": (
        AutoModelForCausalLM,
        OPTConfig(**{**SIZES, "num_hidden_layers": 12}, ffn_dim=32, word_embed_proj_dim=16),
    ),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (AutoModelForCausalLM, LlamaConfig(**SIZES)),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        AutoModelForCausalLM,
        BloomConfig(hidden_size=16, n_layer=5, n_head=4, vocab_size=1024),
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (AutoModelForCausalLM, GPTNeoXConfig(**SIZES)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(**GPT)),
    "hf-internal-testing/tiny-random-gpt2": (AutoModelForCausalLM, GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (AutoModelForCausalLM, GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (AutoModelForCausalLM, GPTJConfig(**GPT, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (AutoModelForCausalLM, LlamaConfig(**SIZES)),
    "peft-internal-testing/tiny-dummy-qwen2": (AutoModelForCausalLM, Qwen2Config(**GROUPED)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        AutoModelForCausalLM,
        Gemma3TextConfig(**GROUPED, head_dim=4),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        AutoModelForSeq2SeqLM,
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=1024, decoder_start_token_id=0),
    ),
    "peft-internal-testing/tiny-random-t5": (
        AutoModelForSeq2SeqLM,
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=1024, decoder_start_token_id=0),
    ),
    "google/flan-t5-small": (
        AutoModelForSeq2SeqLM,
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=1024, decoder_start_token_id=0),
    ),
    "peft-internal-testing/tiny-clip-text-2": (CLIPTextModelWithProjection, CLIPTextConfig(**SIZES)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        AutoModelForSeq2SeqLM,
        BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=1024,
            max_position_embeddings=64,
        ),
    ),
    "peft-internal-testing/tiny-random-BertModel": (BertForPreTraining, BertConfig(**SIZES)),
    "peft-internal-testing/tiny-random-RobertaModel": (AutoModel, RobertaConfig(**SIZES)),
    "peft-internal-testing/tiny-random-DebertaModel": (AutoModel, DebertaConfig(**SIZES)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (AutoModel, DebertaV2Config(**SIZES)),
    "bert-base-uncased": (AutoModelForSequenceClassification, BertConfig(**SIZES)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        AutoModelForSequenceClassification,
        BertConfig(**SIZES),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        AutoModelForSequenceClassification,
        RobertaConfig(**SIZES),
    ),
    RESNET: (
        AutoModelForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        AutoModelForSequenceClassification,
        LlamaConfig(**GROUPED, pad_token_id=0),
    ),
}


REVISIONS = {"peft-internal-testing/tiny-random-BertModel": ("v2.0.0",)}
"""Of these there are other weights too, under this name."""
LORA, LORA_REVISION = "peft-internal-testing/tiny-opt-lora-revision", "test"
"""An adapter of another method."""


def save_models(cache: Path) -> None:
    """Saves every model as if it had been downloaded into this cache of the Hub."""
    for name, (auto, config) in MODELS.items():
        config.initializer_range = 0.1  # so that a change of the weights shows in the output
        build = auto.from_config if hasattr(auto, "from_config") else auto
        for revision in ("main", *REVISIONS.get(name, ())):
            torch.manual_seed(0 if revision == "main" else 1)
            build(config).save_pretrained(snapshot(cache, name, revision))
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(snapshot(cache, RESNET, "main"))
    LoraConfig().save_pretrained(snapshot(cache, LORA, LORA_REVISION))


def snapshot(cache: Path, name: str, revision: str) -> Path:
    """The folder of the files of a repository at a revision."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = revision.encode().hex().ljust(40, "0")
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return repository / "snapshots" / commit
