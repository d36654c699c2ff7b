"""What the README, the script and the notebook say is run, and compared with the code."""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tf_keras as keras
from channel_search import table_for
from layer_rows import HEADER, layer_rows
from nbclient import NotebookClient

import rl_sparsity_tf as rls
from rl_sparsity_tf.cli import build_parser
from rl_sparsity_tf.data.datasets import load_digits_data
from rl_sparsity_tf.environment.features import FEATURES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# In the order in which their code builds on each other's.
PAGES = [
    ROOT / "docs" / f"{name}.md"
    for name in (
        "installation guide/command_line guide/plans guide/comparing guide/report guide/layers "
        "guide/targets guide/callbacks concepts/search concepts/recovery "
        "concepts/reward_and_state concepts/agents guide/export guide/channels guide/latency "
        "guide/microcontrollers measurements index benchmarks contributing/map guide/keras_3 "
        "guide/coming_from_tfmot guide/sensitivity"
    ).split()
]
DOCUMENTS = README + "\n" + "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
COMMANDS = (ROOT / "docs" / "guide" / "command_line.md").read_text(encoding="utf-8")
BENCHMARKS = ROOT / "benchmarks"
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SCRIPT = ROOT / "examples" / "quickstart.py"


# The environment of a short run that finds the package and reaches no network.
QUICK = {
    "RL_SPARSITY_QUICK": "1",
    "PYTHONPATH": str(ROOT),
    "PIP_NO_INDEX": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


ALL = """
import runpy, sys
runpy.run_path({script!r}, run_name="__main__")
print({mark!r}, flush=True)
runpy.run_path("documents.py")
print({mark!r}, flush=True)
from rl_sparsity_tf.cli import main
sys.exit(main({command!r}))
"""
MARK = "-- here ends a part --"


def ran_in(folder):
    """The folder after the script, the documents' code and their command were run, and what each
    printed: in one process, as most of the time goes into libraries that are loaded.
    """
    code = "\n".join(blocks("python"))
    short, count = re.subn(r"\b(episodes|(?:finetune_)?epochs)=\d+", r"\1=1", code)
    assert count == 18
    short = short.replace("episodes=1,\n", "episodes=1, finalists=1,\n")
    (folder / "documents.py").write_text(short, encoding="utf-8")
    command = re.search(r"^rl-sparsity (compress model.*)$", COMMANDS, re.MULTILINE)
    arguments = command.group(1).replace("--episodes 24", "--episodes 1").split()
    arguments += ["--finetune-epochs", "1", "--finalists", "1"]
    (folder / "script.py").write_text(of_one_finalist(SCRIPT.read_text("utf-8")), "utf-8")
    parts = ALL.format(script="script.py", mark=MARK, command=arguments)
    (folder / "all.py").write_text(parts, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        script, documents, _ = run_python(folder, "all.py").split(MARK + "\n")
    return folder, script, documents


def of_one_finalist(code):
    """The code of an example, whose search finishes one plan where it would several."""
    short, count = re.subn(r"\bepisodes=1 if quick else 12,", r"\g<0> finalists=1,", code)
    assert count == 1
    return short


def run_python(folder, *arguments):
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def litert_outputs(path, rows):
    """Runs a file without any of the package's own code."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], rows.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], rows)
    interpreter.invoke()
    return interpreter.get_tensor(wanted["index"])


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENTS, re.MULTILINE | re.DOTALL)


def table_rows(title):
    """The cells of the table whose head begins with a title, without the marks of code."""
    table = DOCUMENTS.split(f"| {title} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in table]
    return [[cell.strip().strip("`").replace("\\|", "|") for cell in row] for row in rows]


# ---------------------------------------------------------------------- the examples


@pytest.mark.slow
def test_script_documents_and_command_do_what_they_say(tmp_path):
    """One test: in two processes the fixture of three would be made twice."""
    ran = ran_in(tmp_path)
    check_the_script_writes_the_file_it_talks_about(ran)
    check_the_code_of_the_documents_runs_in_its_order(ran)
    check_the_command_of_the_documents_writes_what_they_say(ran)


def check_the_script_writes_the_file_it_talks_about(ran):
    folder, output, _ = ran
    data = load_digits_data()
    outputs = litert_outputs(folder / "digits.tflite", data.x_test)
    accuracy = np.mean(outputs.argmax(axis=1) == data.y_test)
    size = (folder / "digits.tflite").stat().st_size
    assert output.splitlines()[-1] == (
        f"digits.tflite: {size:,} bytes, test accuracy {accuracy:.4f}"
    )
    # The target is a bound from below.
    sparsity = float(re.search(r"^sparsity (0\.\d+) of all weights", output, re.MULTILINE)[1])
    assert 0.9 <= sparsity < 0.905


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.reads(of_one_finalist(NOTEBOOK.read_text("utf-8")), as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "pip install" in cells[0].source
    assert cells[0].outputs == []  # nothing was installed
    printed = [
        "".join(part.text for part in cell.outputs if part.get("name") == "stdout")
        for cell in cells
    ]
    assert "after:  [-0.91    0.3     0.      0.62   -0.4371  0.77  ]" in "".join(printed)
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.tflite")}
    assert set(sizes) == {"dense", "by_hand", "searched"}
    for size in sizes.values():
        assert f"{size:,} bytes" in printed[-1]


def test_the_notebook_is_stored_without_outputs_and_opens_in_colab():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    badge = notebook.cells[0].source.splitlines()[0]
    assert badge in README
    assert badge.endswith(
        "/github/rl-sparsity-tf/rl_sparsity_tf/blob/main/examples/quickstart.ipynb)"
    )


# ---------------------------------------------------------------------- README and docs


def check_the_code_of_the_documents_runs_in_its_order(ran):
    folder, _, printed = ran
    assert "Compressed model" in printed
    data = load_digits_data()
    for name in ("model", "by_hand"):
        assert litert_outputs(folder / f"{name}.tflite", data.x_test).shape == (359, 10)


def check_the_command_of_the_documents_writes_what_they_say(ran):
    metrics = json.loads((ran[0] / "run" / "metrics.json").read_text(encoding="utf-8"))
    # Weights that round to 0 on the integer grid come on top.
    assert 0.9 <= metrics["compressed"]["sparsity"] < 0.91


def test_the_code_about_latency_runs_but_for_the_measurement(tmp_path, monkeypatch):
    (code,) = blocks("py")
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, name="classes"),
        ]
    )
    call = inspect.signature(rls.measure_latency)

    def measure(*arguments, **options):
        call.bind(*arguments, **options)
        return table_for(model, options["quantization"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rls, "measure_latency", measure)
    # Two of the four channels: it counts the weights of the last layer, too.
    plan = rls.baselines.uniform(model, sparsity=0.03, group="channel", exclude="classes")
    names = {"rls": rls, "model": model, "wrapped": rls.wrap(model, plan)}
    *statements, prediction = code.strip().splitlines()
    exec("\n".join(statements), names)
    assert eval(prediction, names) < 1
    assert names["small"].get_layer("conv").filters < 4
    assert names["table"].quantization == "int8"


def test_the_two_commands_for_a_fresh_machine_are_each_one_line():
    start = "python3 -m venv .venv-uv && .venv-uv/bin/pip install -q uv && .venv-uv/bin/uv run "
    lines = README.splitlines()
    assert lines.count(start + "rl-sparsity demo") == 1
    assert lines.count(start + 'pytest -m "not slow"') == 1


def test_the_features_of_the_state_are_listed_as_they_are():
    expected = [
        [str(index), feature.name, f"[{feature.low:g}, 1]", feature.meaning]
        for index, feature in enumerate(FEATURES)
    ]
    assert table_rows("# | feature | range | meaning") == expected


def test_the_layers_are_listed_as_the_package_reports_them():
    head = " | ".join(HEADER)
    assert table_rows(head) == layer_rows()


def test_every_public_name_in_the_documents_exists():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = DOCUMENTS + SCRIPT.read_text(encoding="utf-8")
    text += "\n".join(cell.source for cell in notebook.cells)
    names = set(re.findall(r"\brls\.(\w+)", text))
    assert len(names) > 10
    assert names - set(rls.__all__) == set()


def test_the_documents_name_every_option_of_the_command_line():
    section = COMMANDS.split("\n## ", 1)[0]
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    options = {
        option
        for parser in commands.choices.values()
        for option in parser._option_string_actions
        if option.startswith("--") and option != "--help"
    }
    assert {option for option in options if option not in section} == set()
    mentioned = set(re.findall(r"--[a-z][a-z0-9-]+", section))
    assert mentioned - options == set()


def test_the_plan_of_the_documents_is_a_plan():
    (text,) = blocks("json")
    plan = rls.CompressionPlan.from_json(text)
    assert list(plan.kernels) == ["conv/kernel", "classes/kernel", "*"]
    assert plan.kernels["classes/kernel"].weights_under(rls.Operation.KEEP) == 64


def anchors_of(text):
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_the_links_of_the_documents_lead_somewhere():
    looked_at = 0
    for path in (ROOT / "README.md", BENCHMARKS / "README.md", *PAGES):
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if not link.startswith("https://"):
                file, _, anchor = link.partition("#")
                place = path.parent / file if file else path
                assert place.exists(), f"{path.name}: {link}"
                text = place.read_text(encoding="utf-8") if anchor else ""
                assert not anchor or anchor in anchors_of(text), f"{path.name}: {link}"
                looked_at += 1
    assert looked_at > 50


def test_every_page_is_among_those_that_are_run():
    written = set((ROOT / "docs").rglob("*.md")) - set((ROOT / "docs" / "_build").rglob("*"))
    assert {page for page in written if page.parent.name != "reference"} == set(PAGES)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_the_table_of_measurements_lists_every_benchmark():
    listed = re.findall(r"^\| \[(\w+\.py)\]", (BENCHMARKS / "README.md").read_text(), re.MULTILINE)
    runnable = [p for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text(encoding="utf-8")]
    assert sorted(listed) == sorted(path.name for path in runnable)
