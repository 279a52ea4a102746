"""Configuration of the documentation: sphinx-build -W -n -q docs docs/_build/html."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from peft import PeftConfig


sys.path.insert(0, str(Path(__file__).parents[1]))

import spectral_peft


project = "spectral_peft"
author = "the spectral_peft authors"
copyright = author
release = version = spectral_peft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "results/tables"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Single backticks in docstrings are names, most of them of other libraries: set as code and not looked up.
default_role = "code"
napoleon_custom_sections = [("Shapes", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

# The pages are built without network, so the inventories of torch and PEFT are not at hand to link to.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|peft|transformers|huggingface_hub|collections|contextlib|pathlib|typing)\..*"),
    ("py:class", r"Tensor|nn\.Parameter"),
    ("py:class", r"spectral_peft\.model\.Config"),  # a type variable
]

html_theme = "furo"
html_title = f"spectral_peft {release}"


def escape_bars(app, what, name, obj, options, lines):
    """Norms are written ||A|| in docstrings, where reStructuredText would look for a substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def shapes_of_tensors(app, what, name, obj, options, lines):
    """The shapes that stand beside the arguments in the source, `A: Tensor,  # shape: (m, n)`, and of what returns."""
    if what != "function":
        return
    signature = inspect.getsource(inspect.unwrap(obj)).partition('"""')[0]
    arguments = re.findall(r"^ +(\w+): .*# shape: (.*)$", signature, re.MULTILINE)
    returned = re.findall(r"^\) ->.*:  # shape: (.*)$", signature, re.MULTILINE)
    if arguments or returned:
        shapes = [*arguments, *(("the result", shape) for shape in returned)]
        lines += ["", "Shapes:", *(f"    {argument}: {shape}" for argument, shape in shapes), ""]


def fields_of_config(app, what, name, obj, options, signature, return_annotation):
    """A config is shown with its own fields and their defaults, not with those of every PEFT config."""
    if what != "class" or not issubclass(obj, PeftConfig):
        return None
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(obj) if field.name not in inherited]
    shown = [f"{field.name}={'{}' if field.default is dataclasses.MISSING else repr(field.default)}" for field in own]
    return f"({', '.join(shown)})", None


def setup(app):
    app.connect("autodoc-process-signature", fields_of_config)
    app.connect("autodoc-process-docstring", shapes_of_tensors, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", escape_bars, priority=900)  # after napoleon
