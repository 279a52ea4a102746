"""The example runs from flags to table, on a model and a text that are made here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


for requirement in ("datasets", "psutil", "rich", "yaml"):
    pytest.importorskip(requirement, reason="the example needs the packages of the group `demo`")

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune_causal_lm.py"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_causal_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # HfArgumentParser looks the types of the flags up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    letters = {token: index for index, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_cache_of_datasets_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pairs_file(tmp_path):
    rows = [{"prompt": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(example, model_folder, dataset, *flags):
    folder = dataset.parent / "out"
    fixed = ["--max_steps", "2", "--batch_size", "4", "--r", "2", "--output_dir", str(folder)]
    return example.main(["--model", str(model_folder), "--dataset", str(dataset), *fixed, *flags])


def test_pairs_in_chat_format(example, model_folder, pairs_file, capsys):
    results = run(example, model_folder, pairs_file, "--method", "svfit,pissa")

    assert list(results) == ["svfit", "pissa"]
    for name, result in results.items():
        assert result["table"]["reloaded: max |logit difference|"] == "0"
        assert result["table"]["held-out loss, before"] != result["table"]["held-out loss, after"]
        assert float(result["table"]["merged: max |logit difference|"]) < 1e-4
        assert (pairs_file.parent / "out" / name / "adapter_model.safetensors").is_file()
    assert results["svfit"]["table"]["trainable parameters"] == "28"  # 2 layers, 7 modules, 2 singular values
    assert "held-out perplexity, after" in capsys.readouterr().out


def test_plain_text_and_named_modules(example, model_folder, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(f"Line number {n} of this text." for n in range(12)))

    flags = ["--text-column", "text", "--method", "lora", "--target-modules", "q_proj,v_proj"]
    results = run(example, model_folder, text, *flags)

    assert results["lora"]["table"]["trainable parameters"] == "224"  # 2 layers, (16 + 16) * 2 and (16 + 8) * 2
    assert results["lora"]["table"]["reloaded: max |logit difference|"] == "0"


def test_labels_are_the_answer_and_its_end(example, model_folder):
    tokenizer = example.AutoTokenizer.from_pretrained(model_folder)
    row = example.encode(("Why?", "Because."), tokenizer, max_length=100)

    assert tokenizer.decode(row["input_ids"]) == "[user] Why?\n[assistant] Because.<eos>"
    learnt = [token for token in row["labels"] if token != example.IGNORED]
    assert tokenizer.decode(learnt) == "Because.<eos>"
    assert row["input_ids"][-len(learnt) :] == learnt


def test_no_prompt_is_on_both_sides(example):
    pairs = [(prompt, str(n)) for n in range(40) for prompt in (f"What is {n}?", f"what is {n}", f"What is {n}...")]
    train, held_out = example.split_by_prompt(pairs)

    assert sorted(train + held_out) == sorted(pairs)
    assert len(held_out) == 12
    assert not {answer for _, answer in train} & {answer for _, answer in held_out}


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--method", "svfit,magic"], ValueError, "--method has no magic: choose out of svfit, pissa, lora"),
        (["--prompt-column", "question"], ValueError, "it has prompt, answer. Name its columns with --prompt-column"),
        (["--max-length", "8"], ValueError, "raise --max-length"),
        (["--dataset", "absent.jsonl"], FileNotFoundError, "give --dataset an existing file, or a Hub id"),
    ],
)
def test_wrong_flags_say_what_to_do(example, model_folder, pairs_file, flags, error, message):
    with pytest.raises(error, match=message):
        run(example, model_folder, pairs_file, *flags)
