"""How Sphinx builds the documentation: `sphinx-build -W -n docs docs/_build`."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rl_sparsity_tf as rls

project = "rl_sparsity_tf"
author = "The rl_sparsity_tf authors"
project_copyright = author
release = version = rls.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"rl_sparsity_tf {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_heading_anchors = 4
# Fenced text is no claim about a language; what is JSON or a shell says so itself.
highlight_language = "none"

autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Types of other projects, whose documentation cannot be looked up while this one is built.
nitpick_ignore_regex = [
    (r"py:.*", r"(np|numpy|tf|tensorflow|keras|tf_keras|tf_agents|types|ts|py_environment)\..*"),
    (r"py:.*", r"(os|pathlib|collections|typing|abc)\..*"),
    (
        r"py:class",
        r"(Path|Any|Callable|Mapping|Sequence|Iterable|Iterator|array|optional|PathLike)",
    ),
    # Named in signatures, for those who read the code; not part of the public surface.
    (r"py:class", r"LayerSensitivity"),
    (r"py:class", r"rl_sparsity_tf\.(layers|environment|search)\.\w+\.\w+"),
    (
        r"py:class",
        r"(AgentConfig|CompressedNetwork|Curriculum|KernelRule|KernelSettings|LayerLatency)",
    ),
    (
        r"py:class",
        r"(LoopSettings|MicroPort|Patterns|PlayLayer|RewardFunction|SavedPolicy|TensorReport)",
    ),
    (r"py:class", r"Axes"),
    (r"py:exc", r"(FileExistsRLSparsityError|MissingDependencyError|RunError)"),
]

_REFERENCE = re.compile(r"\[([^\]\[]+)\]\[([A-Za-z_.]*)\]")


def _links(app, what, name, obj, options, lines):
    """Turns `[text][target]`, and Markdown's single backticks, into what Sphinx reads."""
    inside = False
    for number, line in enumerate(lines):
        inside = line.lstrip().startswith((">>>", "...")) or (inside and bool(line.strip()))
        if inside:
            continue
        line = re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", line)
        lines[number] = _REFERENCE.sub(_reference, line)


def _reference(match):
    text, target = match.groups()
    name = (target or text).rpartition(".")[2]
    if name in rls.__all__:
        return f":py:obj:`{text} <rl_sparsity_tf.{name}>`"
    if name in rls.baselines.__all__:
        return f":py:obj:`{text} <rl_sparsity_tf.baselines.{name}>`"
    return f"``{text}``"


def setup(app):
    """Called by Sphinx."""
    # Where a public name is defined is nobody's business: types in signatures link to `rls.*`.
    for name in rls._EXPORTS:
        getattr(rls, name).__module__ = rls.__name__
    app.connect("autodoc-process-docstring", _links)
