"""The benchmarks run, choose, go on and print, on models and texts that are made here."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import run as harness
from benchmarks.experiment import (
    EXPERIMENTS,
    RESULTS,
    DivergenceError,
    Experiment,
    ExperimentError,
    claim,
    find,
    read_json,
    result_file,
    write_json,
)
from benchmarks.metrics import Accuracy, MacroF1, Perplexity
from benchmarks.table import SHOWN, TABLES, table


TRAINING = {"learning_rate": [0.1, 0.2, 0.3], "seeds": [0, 1, 2]}


def experiment(name="ours", peft_type="SPECTRAL_SVFIT", **training):
    return Experiment("toy", name, {"peft_type": peft_type}, {**TRAINING, **training})


def outcome(validation, loss=1.0):
    """A result with all its figures."""
    cost = ("peak_memory_bytes", "train_cpu_seconds", "init_cpu_seconds", "checkpoint_bytes", "trainable_parameters")
    return {
        "validation": validation,
        "quality": {"loss": loss},
        "forgetting": {"loss_rise": 0.5},
        "curve": [],
        "cost": dict.fromkeys(cost, 1.0),
    }


class Runs:
    """A run that notes what it was asked for; the rate 0.2 is the best."""

    def __init__(self, fail_at=None):
        self.made, self.fail_at = [], fail_at

    def __call__(self, experiment, rate, seed):
        if (rate, seed) == self.fail_at:
            raise KeyboardInterrupt
        self.made.append((experiment.name, rate, seed))
        return outcome(abs(rate - 0.2), loss=1 + rate + seed / 10)


@pytest.fixture
def arguments(tmp_path):
    return harness.parsed(["--task", "causal", "--results", str(tmp_path)])


def sweep(runs, arguments, *experiments):
    harness.Sweep(experiments or [experiment()], runs, arguments, arguments.results)()
    return runs.made


def test_every_rate_then_the_other_seeds_at_the_best(arguments):
    expected = [("ours", 0.1, 0), ("ours", 0.2, 0), ("ours", 0.3, 0), ("ours", 0.2, 1), ("ours", 0.2, 2)]

    assert sweep(Runs(), arguments) == expected
    assert sweep(Runs(), arguments) == []  # everything is there


def test_an_interrupted_sweep_has_something_of_each_experiment(arguments):
    with pytest.raises(KeyboardInterrupt):
        sweep(Runs(fail_at=(0.2, 1)), arguments, experiment("one"), experiment("two"))

    assert len(list(arguments.results.rglob("lr*-seed0.json"))) == 6


def test_an_interrupted_sweep_goes_on(arguments):
    with pytest.raises(KeyboardInterrupt):
        sweep(Runs(fail_at=(0.3, 0)), arguments)

    assert sweep(Runs(), arguments) == [("ours", 0.3, 0), ("ours", 0.2, 1), ("ours", 0.2, 2)]


def test_a_rate_that_diverges_is_not_chosen(arguments):
    def run(experiment, rate, seed):
        if rate == 0.2:
            raise DivergenceError("in step 3")
        return outcome(rate)

    harness.Sweep([experiment()], run, arguments, arguments.results)()

    assert read_json(result_file(experiment(), 0.2, 0, results=arguments.results))["diverged"] == "in step 3"
    assert not result_file(experiment(), 0.2, 1, results=arguments.results).exists()
    assert result_file(experiment(), 0.1, 2, results=arguments.results).exists()


def test_a_method_that_always_diverges_is_told(arguments):
    def run(experiment, rate, seed):
        raise DivergenceError("in step 1")

    harness.Sweep([experiment()], run, arguments, arguments.results)()

    assert "Diverged at every rate: ours." in table([experiment()], arguments.results)


def test_results_of_other_settings_are_refused(arguments):
    sweep(Runs(), arguments)

    with pytest.raises(ExperimentError, match="another training_params"):
        sweep(Runs(), arguments, experiment(max_steps=7))


def test_what_another_process_is_at_is_left_to_it(arguments, monkeypatch):
    runs, held = Runs(), claim(result_file(experiment(), 0.1, 0, results=arguments.results))
    assert held.__enter__()

    def other_process_finishes(seconds):
        assert [rate for _, rate, _ in runs.made] == [0.2, 0.3]
        file = result_file(experiment(), 0.1, 0, results=arguments.results)
        write_json(file, outcome(0.1) | {"run": harness.described_run(experiment(), 0.1, 0, arguments)})
        held.__exit__(None, None, None)

    monkeypatch.setattr(harness.time, "sleep", other_process_finishes)

    assert ("ours", 0.1, 0) not in sweep(runs, arguments)
    assert len(list(arguments.results.rglob("*.json"))) == 5


def test_the_table_tells_where_this_project_loses(arguments):
    better = experiment("lora", "LORA")
    sweep(Runs(), arguments, experiment())
    harness.Sweep([better], lambda e, r, s: outcome(r, loss=0.5 + s / 100), arguments, arguments.results)()

    lines = table([experiment(), better, experiment("absent")], arguments.results).splitlines()

    assert lines[2].startswith("| lora | **0.1**, 0.2, 0.3 (edge) | 3 | 0.510 ± 0.010 |")
    assert lines[3].startswith("| **ours** | 0.1, **0.2**, 0.3 | 3 | 1.300 ± 0.100 | +0.500 ± 0.000 |")
    assert "| **ours** | **lora** | none | none | none | none | none |" in lines
    assert lines[-1] == "Runs that are still to be made: absent (5)."


def test_times_are_those_of_the_plain_lora(arguments):
    """A LoRA of another rank, however good, is not what the others are divided by."""

    def run(experiment, rate, seed):
        plain = experiment.name == "lora"
        return outcome(abs(rate - 0.2), loss=2.0 if plain else 1.0) | {
            "cost": {"train_cpu_seconds": 10.0 if plain else 20.0}
        }

    both = [experiment("lora", "LORA"), experiment("lora-r1", "LORA")]
    harness.Sweep(both, run, arguments, arguments.results)()

    found = [line.rpartition("|")[0].split(" | ") for line in table(both, arguments.results).splitlines()[2:4]]
    assert [(cells[0], cells[-1].strip()) for cells in found] == [("| lora-r1", "2.0"), ("| lora", "1.0")]


def losses(arguments, own, theirs):
    """The last row of the table, for losses of the seeds by experiment; None is a run that diverged."""

    def run(experiment, rate, seed):
        loss = {"ours": own, "theirs": theirs}[experiment.name][seed]
        if loss is None:
            raise DivergenceError
        return outcome(abs(rate - 0.2), loss=loss) | ({"cost": {}} if experiment.name == "theirs" else {})

    both = [experiment(), experiment("theirs", "LORA")]
    harness.Sweep(both, run, arguments, arguments.results)()
    return table(both, arguments.results).splitlines()


def test_a_loss_is_beyond_noise_where_the_seeds_agree_on_it(arguments, tmp_path):
    """Seeds share their batches: 0.1 with every seed is beyond noise, however far the seeds are from each other."""
    lines = losses(arguments, own=[1.1, 2.11, 3.12], theirs=[1.0, 2.0, 3.0])
    assert lines[-1].startswith("| **ours** | **theirs** | none |")
    arguments.results = tmp_path / "other"
    lines = losses(arguments, own=[1.3, 2.0, 3.0], theirs=[1.0, 2.0, 3.0])
    assert lines[-1].startswith("| **ours** | theirs | none |")


def test_what_was_not_measured_is_not_counted_as_worse(arguments):
    lines = losses(arguments, own=[1.0, 1.0, 1.0], theirs=[1.1, 1.1, 1.1])
    assert lines[-1] == "| **ours** | none | none |"
    assert lines[-3] == "|  | loss | forgetting |"  # the costs, which nobody else has, say nothing

    third = experiment("third", "LORA")
    harness.Sweep([third], lambda e, r, s: outcome(r), arguments, arguments.results)()
    both = [experiment(), experiment("theirs", "LORA"), third]
    assert "| none (1 not measured) |" in table(both, arguments.results).splitlines()[-1]


def test_a_seed_that_diverged_is_said(arguments):
    lines = losses(arguments, own=[1.0, None, 2.0], theirs=[3.0, 3.0, 3.0])
    assert lines[2].startswith("| **ours** | 0.1, **0.2**, 0.3 | 2, 1 diverged | 1.500 ±")
    assert "still to be made" not in lines[-1]


def test_each_budget_has_a_table_of_its_own(arguments):
    longer = experiment("longer", max_steps=7000)
    sweep(Runs(), arguments, longer, experiment("absent", max_steps=70))

    parts = table([longer, experiment("absent", max_steps=70)], arguments.results).split("\n\n")

    assert [part for part in parts if part.startswith("**")] == ["**7,000 steps**", "**70 steps**"]


def test_the_tables_of_the_documentation_are_those_of_the_results():
    for task in SHOWN:
        assert (TABLES / f"{task}.md").read_text() == table(find(task), RESULTS) + "\n", "python -m benchmarks.table"


@pytest.mark.parametrize("task", SHOWN)
def test_the_guide_counts_the_runs(task):
    guide = (TABLES.parents[1] / "guides" / "benchmarks.md").read_text()
    runs = sum(len(e.training["learning_rate"]) + len(e.training["seeds"]) - 1 for e in find(task))
    assert re.search(rf"\b{runs} (runs )?of `{task}`", guide)


def test_nothing_is_written_half_or_as_nan(tmp_path):
    write_json(tmp_path / "a" / "result.json", {"validation": float("nan"), "curve": [{"loss": float("inf")}]})

    assert json.loads((tmp_path / "a" / "result.json").read_text()) == {"validation": None, "curve": [{"loss": None}]}
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["result.json"]


def test_metrics():
    truth, found = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 1]

    assert Accuracy().compute(predictions=found, references=truth)["accuracy"] == pytest.approx(1 / 2)
    assert MacroF1().compute(predictions=found, references=truth)["macro_f1"] == pytest.approx((0.8 + 0.4 + 0) / 3)
    assert Perplexity().compute(predictions=[0.0, 2.0])["perplexity"] == pytest.approx(torch.e)


@pytest.mark.parametrize("task", [folder.name for folder in sorted(EXPERIMENTS.iterdir())])
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_can_be_read(task, quick):
    for found in find(task, quick=quick):
        assert found.training["learning_rate"] == sorted(found.training["learning_rate"])
        if found.adapter is not None and found.adapter["peft_type"] != "ADALORA":
            found.config()


def test_unknown_names_are_told(tmp_path):
    (tmp_path / "toy" / "one").mkdir(parents=True)
    write_json(tmp_path / "toy" / "default_training_params.json", TRAINING)
    write_json(tmp_path / "toy" / "one" / "training_params.json", {"lr": 1})

    with pytest.raises(ExperimentError, match="lr"):
        find("toy", folder=tmp_path)
    with pytest.raises(ExperimentError, match="there are one"):
        find("toy", "two*", folder=tmp_path)
    with pytest.raises(ExperimentError, match="there are some of toy"):
        find("toys", folder=tmp_path)
    with pytest.raises(ExperimentError, match="svd_rank"):
        replace(experiment(), adapter={"peft_type": "SPECTRAL_SVFIT", "svd_rank": 2}).config()


# The tasks, on tiny models

LETTERS = {token: index for index, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama, a tiny BERT, and entries of four subjects."""
    root = tmp_path_factory.mktemp("benchmarks")
    tokenizer = Tokenizer(models.BPE(vocab=LETTERS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(LETTERS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_key_value_heads=2)).save_pretrained(root / "causal")
    BertModel(BertConfig(**sizes, **heads)).save_pretrained(root / "classification")
    for task in ("causal", "classification"):
        fast.save_pretrained(root / task)
    rows = [
        {"term": f"word {n}", "text": f"the number {n}", "label": f"subject {n % 4}", "split": split}
        for n in range(8)
        for split in ("train", "validation", "test")
    ]
    (root / "entries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


SMALL = {"max_steps": 2, "batch_size": 2, "max_length": 16, "held_out": 4, "other_texts": 4, "seeds": [0]}
CHOSEN = "full,lora,adalora,osf,svfit-r128,sst-pool,sct"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["causal", "classification"])
def test_a_run_of_each_task(folders, task, tmp_path, monkeypatch, capsys):
    quick = tmp_path / "experiments"
    monkeypatch.setattr(harness, "find", lambda *given, **options: find(*given, **options, folder=quick))
    shutil.copytree(EXPERIMENTS / task, quick / task)
    length = {"other_length": 16} if task == "causal" else {}
    write_json(quick / task / "quick_training_params.json", SMALL | length)
    # Not in processes of their own, which could not start after this one has used the threads of torch.
    monkeypatch.setattr(harness, "in_own_process", lambda run: run)
    flags = ["--data", folders / "entries.jsonl", "--model", folders / task, "--results", tmp_path / "out"]
    flags = ["--task", task, "--quick", "--only", CHOSEN, *map(str, flags)]

    harness.main(flags)
    printed = capsys.readouterr().out
    harness.main(flags)

    assert "learning rate" not in capsys.readouterr().out.split("|")[0]  # nothing is run a second time
    results = [read_json(file) for file in sorted((tmp_path / "out" / task).rglob("*.json"))]
    assert {result["run"]["name"] for result in results} == set(CHOSEN.split(","))
    for result in results:
        assert result["validation"] > 0
        assert result["forgetting"]["loss_rise"] != 0
        assert result["curve"][-1]["step"] == 2
        assert result["cost"]["checkpoint_bytes"] > 0
        assert result["run"]["data"].startswith("entries.jsonl ")
        assert str(tmp_path) not in json.dumps(result)
    assert all(f"| {name} |" in printed or f"| **{name}** |" in printed for name in CHOSEN.split(","))
    assert "Where this project loses" in printed


def test_a_run_has_a_process_of_its_own(capfd):
    result = harness.in_own_process(lambda *given: {"process": os.getpid(), "given": given})(experiment(), 0.1, 2)

    assert result["process"] != os.getpid()
    assert result["given"] == (experiment(), 0.1, 2)
    assert result["versions"]["peft"]
    assert result["machine"]["cpus"]

    with pytest.raises(ExperimentError, match=r"toy/ours at 0\.1 ended with exit code 1"):
        harness.in_own_process(lambda *given: 1 / 0)(experiment(), 0.1, 0)
    assert "ZeroDivisionError" in capfd.readouterr().err

    def diverges(*given):
        raise DivergenceError("in step 4")

    with pytest.raises(DivergenceError, match="in step 4"):
        harness.in_own_process(diverges)(experiment(), 0.1, 0)
