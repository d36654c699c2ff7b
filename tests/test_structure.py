"""The house: twelve rooms in an order, files of one chapter, one public surface."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rl_sparsity_tf

NAME = "rl_sparsity_tf"
FOLDER = Path(rl_sparsity_tf.__file__).parent
ROOT = FOLDER.parent

# A room imports from itself, from those before it, and from the ground floor.
ROOMS = (
    "report",
    "keras3",
    "layers",
    "data",
    "training",
    "tflite",
    "export",
    "channels",
    "allocation",
    "environment",
    "agents",
    "search",
)
GROUND = {
    "_compat",
    "callbacks",
    "checks",
    "claims",
    "console",
    "errors",
    "files",
    "randomness",
    "settings",
    "version",
}
ROOF = {"__init__", "baselines", "cli", "demo"}
FEWEST, MOST = 4, 16
LONGEST = 600
# Imports that are still to be turned.
EXCEPTIONS: set[tuple[str, str]] = set()

# The environments and the agents are written for TF-Agents; nobody else knows it.
TF_AGENTS_MODULES = {
    *("environment._tf_agents", "agents.tf_agent", "agents.dqn", "agents.ppo", "agents.slots")
}
RL_MODULES = {
    "environment.improvement_environment",
    "environment.layer_environment",
    "environment.selection_environment",
    *TF_AGENTS_MODULES,
}


def dotted(path):
    """`layers/plan.py` is `layers.plan`; a room itself, `layers`, has no code."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(parts) if parts[-1] != "__init__" or len(parts) == 1 else parts[0]


MODULES = {dotted(path): path for path in sorted(FOLDER.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported_names(nodes):
    """Dotted names that import statements bind or load."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_for_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def module_level(tree):
    """Statements that run at import: everything but functions and type-checking blocks."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            statement = isinstance(child, ast.stmt | ast.ExceptHandler)
            if statement and not inside and not is_for_type_checking(node):
                waiting.append(child)


def own(names):
    """Modules of this package among dotted names."""
    found = set()
    for name in names:
        first, _, rest = name.partition(".")
        if first == NAME:
            parts = rest.split(".")
            longest = [".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in MODULES]
            found.update(longest[:1])
    return found - set(ROOMS)


GRAPH = {name: own(imported_names(module_level(tree))) for name, tree in TREES.items()}
EVERYWHERE = {name: own(imported_names(ast.walk(tree))) for name, tree in TREES.items()}
EDGES = {(name, other) for name, others in EVERYWHERE.items() for other in others - {name}}


def reached(start):
    """Every module that importing `start` imports."""
    seen, waiting = set(), [start]
    while waiting:
        for name in GRAPH[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def room_of(module):
    return module.partition(".")[0] if "." in module else ""


def floor_of(module):
    """The later, the higher; lazy imports and those for type checking obey the order too."""
    if module in GROUND:
        return 0
    return 1 + ROOMS.index(room_of(module)) if room_of(module) else 1 + len(ROOMS)


def test_the_graph_is_what_the_files_say():
    assert {"layers.groups", "errors"} <= GRAPH["layers.operations"] | GRAPH["layers.groups"]
    assert "layers.operations" in GRAPH["layers.wrapper"]  # `from package import module`
    assert "search.compressor" not in GRAPH["__init__"]  # imported lazily
    assert "search.loop" in EVERYWHERE["search.compressor"] - GRAPH["search.compressor"]


def test_every_file_is_in_a_room_on_the_ground_or_on_the_roof():
    assert {name for name in MODULES if "." not in name} == GROUND | ROOF | set(ROOMS)
    assert {room_of(name) for name in MODULES} == {"", *ROOMS}
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(ROOMS)


def test_rooms_import_from_those_before_them():
    upward = {edge for edge in EDGES if floor_of(edge[1]) > floor_of(edge[0])}
    assert upward - EXCEPTIONS == set()
    assert EXCEPTIONS <= EDGES, "turned: take them off the list"


def test_imports_have_no_circle():
    order, waiting = [], {name: set() for name in MODULES}
    for name, other in EDGES - EXCEPTIONS:
        waiting[name].add(other)
    while waiting:
        ready = sorted(name for name, needs in waiting.items() if not needs & set(waiting))
        assert ready, f"these import each other: {sorted(waiting)}"
        order += ready
        for name in ready:
            del waiting[name]
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_a_handful_of_files(room):
    assert FEWEST <= sum(room_of(name) == room for name in MODULES) <= MOST
    assert not [path for path in (FOLDER / room).iterdir() if path.is_dir() and path.suffix]
    assert [type(node) for node in TREES[room].body] == [ast.Expr]  # a docstring: importing is free


def test_no_file_is_longer_than_a_chapter():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_every_module_says_what_it_is_for():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree) or name == "version", name


# Private attributes of Keras's layers that have the name of one of ours.
KERAS_ATTRIBUTES = {"_name", "_layers"}


def _private(name):
    return name.startswith("_") and not name.startswith("__")


def _defined_privately(tree):
    """Private names that a file defines: variables, functions, attributes and fields."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            # Of its own objects: Keras's private attributes are another matter.
            own_object = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= {node.attr} if own_object else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if _private(name)}


def test_no_private_name_crosses_the_border_of_a_file():
    everywhere = {name: _defined_privately(tree) for name, tree in TREES.items()}
    crossed = set()
    for name, tree in TREES.items():
        elsewhere = set().union(*(names for other, names in everywhere.items() if other != name))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
                private = {a.name for a in node.names if _private(a.name)}
                crossed |= {(name, one) for one in private if not own([f"{node.module}.{one}"])}
            elif isinstance(node, ast.Attribute) and _private(node.attr):
                known = everywhere[name] | KERAS_ATTRIBUTES
                of_another = node.attr in elsewhere - known
                inherited = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                crossed |= {(name, node.attr)} if of_another and not inherited else set()
    assert crossed - CROSSED == set()


CROSSED: set[tuple[str, str]] = set()


def test_names_are_imported_from_where_they_are_defined():
    stores = {
        name: {
            n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        | {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for name, tree in TREES.items()
    }
    elsewhere = {
        (name, node.module, alias.name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{NAME}.")
        for alias in node.names
        if not own([f"{node.module}.{alias.name}"]) - own([node.module])
        and alias.name not in stores[node.module.removeprefix(f"{NAME}.")]
    }
    # TF-Agents is imported in one place, for what that does to the process.
    assert {one for one in elsewhere if not one[1].endswith("._tf_agents")} == set()


def test_only_environments_and_agents_import_tf_agents():
    direct = {
        name
        for name, tree in TREES.items()
        if any(target.split(".")[0] == "tf_agents" for target in imported_names(ast.walk(tree)))
    }
    assert direct == TF_AGENTS_MODULES
    door = "environment._tf_agents"
    assert {name for name, targets in EVERYWHERE.items() if door in targets} <= RL_MODULES


@pytest.mark.parametrize(
    "name",
    "layers.wrapping layers.plan layers.rules layers.support layers.loading training.mask_training "
    "export.export environment.features environment.network search.compressor".split(),
)
def test_wrapping_plans_and_export_work_without_tf_agents(name):
    assert not reached(name) & RL_MODULES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_pickled_or_evaluated(name):
    tree = TREES[name]
    targets = {target.split(".")[0] for target in imported_names(ast.walk(tree))}
    assert not targets & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    calls = {node.func.id for node in ast.walk(tree) if _calls_a_name(node)}
    assert not calls & {"eval", "exec", "compile", "__import__"}


def _calls_a_name(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_the_package_is_cheap():
    heavy = "tensorflow tf_keras tf_agents tensorflow_datasets numpy ai_edge_litert".split()
    script = f"import sys, {NAME}; print(*[n for n in {heavy} if n in sys.modules])"
    assert run(script).split() == []


def test_the_child_process_does_not_load_keras():
    child = f"import sys, {NAME}.tflite.worker_process"
    heavy = "print(*[n for n in ('tf_keras', 'tensorflow') if n in sys.modules])"
    assert run(f"{child}; {heavy}").split() == []


@pytest.mark.slow
def test_wrapping_and_plans_do_not_load_tf_agents():
    script = (
        f"import sys, {NAME} as rls\n"
        "rls.wrap, rls.strip, rls.CompressionPlan, rls.Target, rls.Reward, rls.MaskTraining\n"
        "rls.describe_support, rls.export_tflite, rls.load_model, rls.DQN\n"
        "print('tf_agents' in sys.modules, 'tensorflow' in sys.modules)\n"
    )
    assert run(script).split() == ["False", "True"]


def test_the_public_surface_is_consistent():
    exports, modules = rl_sparsity_tf._EXPORTS, rl_sparsity_tf._MODULES
    assert rl_sparsity_tf.__all__ == sorted({*exports, *modules, "__version__"})
    assert dir(rl_sparsity_tf) == rl_sparsity_tf.__all__
    for name, module in modules.items():
        assert getattr(rl_sparsity_tf, name) is importlib.import_module(f"{NAME}.{module}")
    for name, module in exports.items():
        defined = {node.name for node in TREES[module].body if hasattr(node, "name")}
        assert name in defined, f"{module} does not define {name}"
    stub = ast.parse((FOLDER / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {
        (alias.asname, f"{node.module}.{alias.name}") for node in stub.body for alias in node.names
    }
    expected = {(name, f"{NAME}.{module}.{name}") for name, module in exports.items()}
    expected |= {(name, f"{NAME}.{module}") for name, module in modules.items()}
    assert typed == expected | {("__version__", f"{NAME}.version.__version__")}
    with pytest.raises(AttributeError, match="has no attribute 'wrapp'"):
        rl_sparsity_tf.wrapp  # noqa: B018


def test_no_room_or_roof_hides_a_public_name():
    # Importing a submodule binds it on the package, in place of a function of its name.
    assert not (set(ROOMS) | GROUND | ROOF) & set(rl_sparsity_tf._EXPORTS)


def documents():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.py")]:
        yield path.name, path.read_text(encoding="utf-8")
    for path in ROOT.glob("examples/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path.name, "\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize(("name", "text"), documents(), ids=lambda value: value[:20])
def test_documents_import_the_package_alone(name, text):
    imports = re.findall(rf"^(?:from|import) {NAME}.*$", text, re.MULTILINE)
    assert {line.partition("  #")[0] for line in imports} <= {f"import {NAME} as rls"}
