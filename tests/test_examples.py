"""The examples run from flags to what they print and leave behind, on models and data that are made here."""

import json
import re

import pytest
import torch
from peft import PeftConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.hub_server import point_client_at, running_hub
from tests.models import llama
from tests.scripts import example as load


for requirement in ("datasets", "psutil", "rich", "yaml"):
    pytest.importorskip(requirement, reason="the example needs the packages of the group `demo`")

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def example():
    return load("finetune_causal_lm")


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
        assert result["reloaded: max |logit difference|"] == "0"
        assert result["held-out loss, before"] != result["held-out loss, after"]
        assert float(result["merged: max |logit difference|"]) < 1e-4
        assert (pairs_file.parent / "out" / name / "adapter_model.safetensors").is_file()
    assert results["svfit"]["trainable parameters"] == "28"  # 2 layers, 7 modules, 2 singular values
    assert "held-out perplexity, after" in capsys.readouterr().out


def test_plain_text_and_named_modules(example, model_folder, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(f"Line number {n} of this text." for n in range(12)))

    flags = ["--text-column", "text", "--method", "lora", "--target-modules", "q_proj,v_proj"]
    results = run(example, model_folder, text, *flags)

    assert results["lora"]["trainable parameters"] == "224"  # 2 layers, (16 + 16) * 2 and (16 + 8) * 2
    assert results["lora"]["reloaded: max |logit difference|"] == "0"


def test_methods_with_a_schedule(example, model_folder, pairs_file):
    results = run(example, model_folder, pairs_file, "--method", "sst,sct")

    assert {result["reloaded: max |logit difference|"] for result in results.values()} == {"0"}
    before = {name: result["held-out loss, before"] for name, result in results.items()}
    assert before["sst"] != before["sct"]  # SCT starts from a truncation of the weights


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
        (["--method", "svfit,magic"], ValueError, "--method has no magic: choose out of svfit, pissa, sst, sct, lora"),
        (["--prompt-column", "question"], ValueError, "it has prompt, answer. Name its columns with --prompt-column"),
        (["--max-length", "8"], ValueError, "raise --max-length"),
        (["--dataset", "absent.jsonl"], FileNotFoundError, "give --dataset an existing file, or a Hub id"),
    ],
)
def test_wrong_flags_say_what_to_do(example, model_folder, pairs_file, flags, error, message):
    with pytest.raises(error, match=message):
        run(example, model_folder, pairs_file, *flags)


# The other scripts, with their own stand-ins for models and data


METHODS = ["svfit", "pissa", "sst", "sct", "lora"]
SHORT = ["--max_steps", "3", "--logging_steps", "1", "--disable_tqdm", "True", "--r", "8"]


@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_is_scored_and_reloads(method, tmp_path, capsys):
    folder = str(tmp_path / "out")
    scores = load("classify_text").main([*SHORT, "--method", method, "--output_dir", folder, "--eval_strategy", "no"])

    assert 0 <= scores["eval_accuracy"] <= 1
    assert 0 <= scores["eval_f1"] <= 1
    trained, loaded = re.search(r"loss ([\d.]+) when trained, ([\d.]+) loaded", capsys.readouterr().out).groups()
    assert trained == loaded
    assert PeftConfig.from_pretrained(folder).peft_type.value.lower().removeprefix("spectral_") == method


def test_a_folder_of_texts_is_classified(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        lines = [f"{word} {word},{kind}" for word, kind in (("up", "yes"), ("down", "no")) for _ in range(4)]
        (folder / f"{split}.csv").write_text("\n".join(["sentence,answer", *lines]))
    flags = [*SHORT, "--dataset", str(folder), "--output_dir", str(tmp_path / "out"), "--eval_strategy", "no"]

    scores = load("classify_text").main([*flags, "--text_column", "sentence", "--label_column", "answer"])
    assert 0 <= scores["eval_accuracy"] <= 1
    with pytest.raises(ValueError, match=r"columns text and label .*got \{'train': \['sentence', 'answer'\]"):
        load("classify_text").main(flags)


def test_the_classifier_learns(tmp_path):
    scores = load("classify_text").main(["--output_dir", str(tmp_path), "--eval_strategy", "no"])
    assert scores["eval_accuracy"] > 0.6  # 1/3 by chance


def test_accuracy_and_macro_f1():
    metric = load("classify_text").AccuracyAndF1(keep_in_memory=True)
    scores = metric.compute(predictions=[0, 0, 1, 1], references=[0, 1, 1, 1])
    assert scores == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 4 / 5) / 2)}


@pytest.mark.parametrize("method", METHODS)
def test_sft(method, tmp_path):
    log = load("sft_trl").main([*SHORT, "--method", method, "--output_dir", str(tmp_path)])

    assert log["step"] == 3
    assert ("spectral/effective_rank" in log) == (method != "lora")
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_sft_reads_its_flags_from_a_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: pissa\nr: 4\nmax_steps: 1\nlogging_steps: 1\noutput_dir: {tmp_path / 'out'}\n")
    load("sft_trl").main(["--config", str(recipe)])
    assert PeftConfig.from_pretrained(tmp_path / "out").r == 4


def test_pushed_and_loaded_by_its_id(tmp_path, monkeypatch):
    with running_hub() as hub:
        point_client_at(hub, str(tmp_path / "cache"), monkeypatch)
        llama().push_to_hub("somebody/base")
        repos = ["--repo", "somebody/adapter", "--lora-repo", "somebody/lora"]
        differences = load("push_and_load").main([*repos, "--base", "somebody/base"])
        lora = PeftConfig.from_pretrained("somebody/lora")

    assert differences["somebody/adapter"] == 0
    assert differences["somebody/lora"] < 1e-4
    assert lora.peft_type == "LORA"
