"""The documentation is true: its snippets run, and it names everything that is public.

The fences of a page run one after the other in one namespace, in a folder of their own. A tiny Llama lies there under
the name of the model that the pages load, with a tokenizer of a few words; notes.txt is a text of these words, and
`rows` are four tokenized examples. A fence that cannot run is preceded by a comment `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import spectral_peft
import spectral_peft.linalg
import spectral_peft.pruning
import spectral_peft.stored
import spectral_peft.suggestions
import spectral_peft.verification
from tests.methods import METHODS


ROOT = Path(__file__).parents[1]
MODEL = "HuggingFaceTB/SmolLM2-135M"
NOTES = "the sky is blue\nthe grass is green\n\nthe sea is green and blue\n"
PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.*? -->\n+$", re.DOTALL)


def snippets(page: Path) -> list[tuple[int, str]]:
    """The fences of a page that run: (line of the first statement, code)."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in FENCE.finditer(text)
        if not NOT_RUN.search(text[: match.start()])
    ]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<end>", "<other>", *sorted(set(NOTES.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, "<other>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<other>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / MODEL).parent.mkdir()
    (tmp_path / MODEL).symlink_to(tiny_llama)
    (tmp_path / "notes.txt").write_text(NOTES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page, workplace):
    tokens = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    namespace = {"__name__": "snippet", "rows": [{"input_ids": row, "labels": row} for row in tokens]}
    for line, code in snippets(page):
        exec(compile("\n" * line + code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"auto(?:class|function|exception):: (?:\w+\.)*(\w+)", reference))
    constants = {"ALGORITHMS", "SKETCH_SIZE"}
    modules = (spectral_peft.stored, spectral_peft.verification, spectral_peft.suggestions, spectral_peft.pruning)
    behind_the_command = {name for module in modules for name in module.__all__}
    assert (
        set(spectral_peft.__all__) | set(spectral_peft.linalg.__all__) - constants | behind_the_command == documented
    )


PARTS = ("Formula", "When to use it", "Cost", "Measured", "Learning rates", "Differences from the paper", "Reference")


@pytest.mark.parametrize("config", sorted({method.config for method in METHODS}, key=lambda config: config.method))
def test_every_method_has_a_whole_page(config):
    page = (ROOT / "docs" / "methods" / f"{config.method}.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [part for part in PARTS if not any(title.startswith(part) for title in titles)] == []
    when = page.split("\n## When to use it\n")[1].split("\n## ")[0]
    assert re.search(r"^Not ", when, re.MULTILINE), "it says when to use it, and not when not"
    assert re.search(r"https://arxiv\.org/abs/[\d.]+", config.paper)[0] in page


def public_functions():
    """Every public function, and the public methods of every public class, by name."""
    modules = (spectral_peft, spectral_peft.linalg, spectral_peft.stored, spectral_peft.verification,
               spectral_peft.suggestions, spectral_peft.pruning)  # fmt: skip
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                assert inspect.getdoc(value), name
                for member, function in vars(value).items():
                    if inspect.isfunction(function) and not member.startswith("_"):
                        yield f"{name}.{member}", function
            elif inspect.isfunction(value):
                assert inspect.getdoc(value), name
                yield name, value


def test_docstrings_tell_arguments_and_errors():
    """What a function raises by itself is in its docstring; so are its arguments, with the shapes of tensors."""
    for name, function in public_functions():
        doc, source = inspect.getdoc(function) or "", inspect.getsource(inspect.unwrap(function))
        tree = ast.parse(textwrap.dedent(source)).body[0]
        raised = {node.exc.func.id for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None}
        told = re.findall(r"\w+", doc)
        assert raised - {*told} <= {"NotImplementedError"}, name
        if "." not in name:
            signature = source.partition('"""')[0]
            shapes = dict(re.findall(r"^ +(\w+): .*Tensor.*(# shape.*)$", signature, re.MULTILINE))
            hints = {argument: str(hint) for argument, hint in inspect.unwrap(function).__annotations__.items()}
            for argument in inspect.signature(function).parameters:
                assert argument in told or argument in shapes or argument == "model", f"{name}: {argument}"
                assert "Tensor" not in hints.get(argument, "") or argument in shapes, f"{name}: shape of {argument}"


def test_the_guide_to_checkpoints_lists_their_tensors():
    page = (ROOT / "docs" / "guides" / "checkpoints.md").read_text(encoding="utf-8")
    for method in METHODS:
        (row,) = re.findall(rf"^\| {method.config.method} \|(.*)$", page, re.MULTILINE | re.IGNORECASE)
        told = [set(re.findall(r"`(\w+)`", cell)) for cell in row.split("|")[:3]]
        weights = [{name.removesuffix(".weight") for name in names} for names in (method.trained, method.start)]
        assert told[0] == weights[0]
        assert told[1] >= weights[1]
        assert told[2] == method.counters - {"fingerprint"}


def test_the_support_matrix_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "support-matrix.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    assert named - {path.name for path in (ROOT / "tests").rglob("test_*.py")} == set()


def test_example_of_a_new_method(capsys):
    name = "add_a_method"
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    example = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(example)
        assert example.main()
    finally:
        del sys.modules[name]
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop("SPECTRAL_CORE", None)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]
