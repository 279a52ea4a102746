"""A tiny model and tokenizer in the place of those of the Hub, with which the examples run without network.

With a name, `load_tokenizer` and `load_causal_lm` load what it names: a script of your own needs that one line only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, set_seed


VOCABULARY = 400
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_tokenizer(name: str | None, texts: Iterable[str]) -> Any:
    """The tokenizer of the Hub or of a folder; without a name, a byte-level BPE trained on `texts`."""
    if name:
        return AutoTokenizer.from_pretrained(name)
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def load_causal_lm(name: str | None) -> Any:
    """The causal language model of the Hub or of a folder; without a name, a Llama of two layers, always the same."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    set_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=None, **SIZES)
    return AutoModelForCausalLM.from_config(config)
