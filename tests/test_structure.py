"""The package is flat, and its imports follow the data flow."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rl_sparsity_tf

NAME = "rl_sparsity_tf"
FOLDER = Path(rl_sparsity_tf.__file__).parent
MODULES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

# The environments and the agents are written for TF-Agents; nobody else knows it.
TF_AGENTS_MODULES = {"_tf_agents", "_agent_tf", "_dqn", "_ppo"}
RL_MODULES = {"environment", "environment_check", "selection_environment", *TF_AGENTS_MODULES}
LONGEST = 600


def imported_names(nodes):
    """Dotted names that import statements bind or load, without those for type checking."""
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
        if first == NAME and rest.partition(".")[0] in MODULES:
            found.add(rest.partition(".")[0])
    return found


GRAPH = {name: own(imported_names(module_level(tree))) for name, tree in TREES.items()}


def reached(start):
    """Every module that importing `start` imports."""
    seen, waiting = set(), [start]
    while waiting:
        for name in GRAPH[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def test_the_graph_is_what_the_files_say():
    assert {"grouping", "errors"} <= GRAPH["operations"] | GRAPH["grouping"]
    assert "operations" in GRAPH["wrapper"]  # `from package import module`
    assert "rules" not in GRAPH["plan"]
    assert "search" not in GRAPH["__init__"]  # imported for type checking, and lazily


def test_the_package_is_flat():
    assert not [path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_no_module_hides_a_public_name():
    # Importing a submodule binds it on the package, in place of a function of its name.
    assert not set(MODULES) & set(rl_sparsity_tf._EXPORTS)


def test_imports_have_no_cycle():
    order, waiting = [], dict(GRAPH)
    while waiting:
        ready = sorted(name for name, needs in waiting.items() if not needs & set(waiting))
        assert ready, f"these import each other: {sorted(waiting)}"
        order += ready
        for name in ready:
            del waiting[name]
    assert set(order) == set(MODULES)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("operations", "wrapper"),
        ("wrapper", "wrapping"),
        ("wrapping", "network"),
        ("plan", "rules"),
        ("network", "environment"),
        ("candidates", "search"),
        ("agents", "search"),
        ("export", "finishing"),
        ("finishing", "search"),
        ("errors", "files"),
    ],
)
def test_imports_follow_the_data_flow(earlier, later):
    assert earlier in reached(later)
    assert later not in reached(earlier)


def test_only_environments_and_agents_import_tf_agents():
    everywhere = {name: list(imported_names(ast.walk(tree))) for name, tree in TREES.items()}
    direct = {
        name
        for name, targets in everywhere.items()
        if any(target.split(".")[0] == "tf_agents" for target in targets)
    }
    assert direct == TF_AGENTS_MODULES
    through_the_door = {
        name for name, targets in everywhere.items() if "_tf_agents" in own(targets)
    }
    assert through_the_door <= RL_MODULES


@pytest.mark.parametrize(
    "name",
    "wrapping plan rules export support model_files mask_training state network search".split(),
)
def test_wrapping_plans_and_export_work_without_tf_agents(name):
    assert not reached(name) & RL_MODULES


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_every_module_says_what_it_is_for():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree) or name == "version", name


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


def test_wrapping_and_plans_do_not_load_tf_agents():
    script = (
        f"import sys, {NAME} as rls\n"
        "rls.wrap, rls.strip, rls.CompressionPlan, rls.Target, rls.Reward, rls.MaskTraining\n"
        "rls.describe_support, rls.export_tflite, rls.load_model, rls.DQN\n"
        "print('tf_agents' in sys.modules, 'tensorflow' in sys.modules)\n"
    )
    assert run(script).split() == ["False", "True"]


def test_the_public_surface_is_consistent():
    exports = rl_sparsity_tf._EXPORTS
    modules = rl_sparsity_tf._MODULES
    assert set(rl_sparsity_tf.__all__) == {*exports, *modules, "__version__"}
    for name in modules:
        assert getattr(rl_sparsity_tf, name) is importlib.import_module(f"{NAME}.{name}")
    assert dir(rl_sparsity_tf) == sorted(rl_sparsity_tf.__all__)
    for name, module in exports.items():
        defined = {node.name for node in TREES[module].body if hasattr(node, "name")}
        passed_on = {target.rpartition(".")[2] for target in imported_names(TREES[module].body)}
        assert name in defined | passed_on, f"{module}.py has no {name}"
    blocks = [node for node in TREES["__init__"].body if is_for_type_checking(node)]
    typed = {
        (alias.name, node.module) for block in blocks for node in block.body for alias in node.names
    }
    expected = {(name, f"{NAME}.{module}") for name, module in exports.items()}
    assert typed == expected | {(name, NAME) for name in modules}
    with pytest.raises(AttributeError, match="has no attribute 'wrapp'"):
        rl_sparsity_tf.wrapp  # noqa: B018
