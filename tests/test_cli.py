"""The command line: what it makes, what it says, and what it refuses in one line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tf_keras as keras
from tiny_search import TEST, TRAIN, VALIDATION, quick_search, trained

import rl_sparsity_tf as rls
from rl_sparsity_tf import cli
from rl_sparsity_tf.callbacks import PHASES
from rl_sparsity_tf.cli import EXAMPLES, build_parser, main
from rl_sparsity_tf.search.arguments import SearchOptions
from rl_sparsity_tf.version import __version__

RESULTS = {"model.keras", "model.tflite", "plan.json", "metrics.json", "history.csv"}
RESULTS |= {"details.json", "report.html"}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of models and data, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    model = trained()
    for name in ("model.keras", "model.h5", "saved_model"):
        model.save(folder / name)
    keras.models.clone_model(model).save(folder / "uncompiled.keras")
    arrays = dict(zip(("x_train", "y_train"), TRAIN, strict=True))
    arrays |= dict(zip(("x_validation", "y_validation"), VALIDATION, strict=True))
    tested = dict(zip(("x_test", "y_test"), TEST, strict=True))
    np.savez(folder / "data.npz", **arrays, **tested)
    np.savez(folder / "missing.npz", **{k: arrays[k] for k in ("x_train", "y_train")})
    np.savez(folder / "wide.npz", **{k: v[..., None] for k, v in arrays.items()})
    np.savez(folder / "nan.npz", **{**arrays, "x_train": TRAIN[0] * np.nan})
    np.savez(folder / "rows.npz", **{**arrays, "y_train": TRAIN[1][:3]})
    np.savez(folder / "labels.npz", **{**arrays, "y_validation": np.eye(3)[VALIDATION[1]]})
    (folder / "bad.npz").write_text("no zip file")
    (folder / "bad.keras").write_text("no zip file")
    (folder / "model.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("years of work")
    return folder


def compress(folder: Path, *more: str, model="model.keras", data="data.npz", output="out"):
    return [
        "compress",
        str(folder / model),
        *("--data", str(folder / data)),
        *("--output", str(folder / output)),
        *more,
    ]


QUICK = (
    "--episodes 1 --finetune-epochs 1 --finalists 1 --target-sparsity 0.5 --batch-size 32".split()
)


def test_what_a_command_does_not_give_is_left_to_the_search(tmp_path):
    fields = {one.name: one.default for one in dataclasses.fields(SearchOptions)}
    parameters = inspect.signature(rls.Compressor.search).parameters
    assert fields.items() <= {name: one.default for name, one in parameters.items()}.items()
    assert set(parameters) - set(fields) == {"self", "train", "validation_data", "test_data"}
    given = cli._given(cli.build_parser().parse_args(compress(tmp_path)), *fields)
    assert given == {name: fields[name] for name in given}
    more = "--episodes 0 --batch-size 7 --finalists 1 --quantization none --unroll".split()
    given = cli._given(cli.build_parser().parse_args(compress(tmp_path, *more)), *fields)
    found = [given[name] for name in "episodes batch_size finalists quantization unroll".split()]
    assert found == [0, 7, 1, "none", True]


# -- what works ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["compress", "--help"]])
def test_help_exits_with_0(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: rl-sparsity")
    assert captured.err == ""


def test_version_exits_with_0(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"rl-sparsity {__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["model.keras", "model.h5"])
def test_compress_writes_a_run(model, files, tmp_path, capsys):
    silent = ["--verbose", "0"] if model != "model.keras" else []
    arguments = compress(files, *QUICK, *silent, model=model, output=str(tmp_path / "run"))
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert {path.name for path in (tmp_path / "run").iterdir()} >= RESULTS
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["dataset"] == "data.npz"
    assert metrics["compressed"]["sparsity"] >= 0.5
    assert metrics["compressed"]["accuracy"] is not None
    rls.load_model(tmp_path / "run" / "model.keras")
    if silent:
        assert captured.out == ""
    else:
        assert "Compressed model" in captured.out
        assert "compressed (" in captured.out
        assert f"files in {tmp_path / 'run'}" in captured.out
    if not silent:
        exported_again(tmp_path / "run", files, capsys)
    # A second call finds the finished run and leaves it alone.
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert main(arguments) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def exported_again(run: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's model as other files, of which each is what the mode says."""
    model = rls.load_model(run / "model.keras")
    for mode, tolerance, more in (
        ("float16", 0.02, ()),
        ("int8", 0.2, ("--data", str(files / "data.npz"))),
        ("plan", 0.02, ()),
    ):
        path = run.parent / f"{mode}.tflite"
        arguments = ["export", str(run), "--output", str(path), "--quantization", mode, *more]
        assert main(arguments) == 0
        assert f"{path.stat().st_size:,}" in capsys.readouterr().out
        outputs = rls.predict_tflite(path, TEST[0])
        np.testing.assert_allclose(outputs, model.predict(TEST[0], verbose=0), atol=tolerance)
        assert main(arguments) == 2
        assert "exists already" in capsys.readouterr().err
    assert (run.parent / "plan.tflite").read_bytes() == (run / "model.tflite").read_bytes()
    assert main(["export", str(run), "--output", str(run.parent / "no.tflite"), *_INT8]) == 2
    assert "representative_data" in capsys.readouterr().err
    assert not (run.parent / "no.tflite").exists()


_INT8 = ("--quantization", "int8")


def test_what_is_no_finished_run_has_nothing_to_export(files, tmp_path, capsys):
    for folder, missing in (
        ("occupied", "no model.keras and no plan.json"),
        ("none", "no model.k"),
    ):
        output = str(tmp_path / "model.tflite")
        assert_refused(main(["export", str(files / folder), "--output", output]), capsys, missing)
    (files / "half").mkdir()
    (files / "half" / "model.keras").write_text("")
    code = main(["export", str(files / "half"), "--output", str(tmp_path / "model.tflite")])
    assert_refused(code, capsys, "holds no plan.json. Expected the folder of a finished run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_demo_on_digits_compares_the_contenders(tmp_path, capsys, monkeypatch):
    # 900 steps are for a good demonstration, as is fine-tuning; a few show that it runs.
    monkeypatch.setattr("rl_sparsity_tf.demo._TRAIN_STEPS", 34)
    folder = tmp_path / "demo"
    arguments = "demo --episodes 1 --finetune-epochs 0 --agent ppo --seed 3".split()
    assert main([*arguments, "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["dataset"] == "digits"
    assert metrics["agent"] == "ppo"
    assert metrics["seed"] == 3
    names = ["uniform magnitude", "uniform magnitude int8", "random policy"]
    assert [entry["name"] for entry in metrics["baselines"]] == names
    for entry in metrics["baselines"]:
        assert entry["sparsity"] >= 0.9 - 1e-4
        assert 0 < entry["gzip_bytes"] <= entry["tflite_bytes"] * 1.1
    for text in ("digits: 1,079 images", "Compressed model", "dense int8", *names, "took "):
        assert text in printed
    assert {path.name for path in folder.iterdir()} >= RESULTS


@pytest.mark.slow
def test_the_program_keeps_standard_error_clean(files, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "PYTHONW"))}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rl_sparsity_tf.cli"),
            *compress(
                files,
                *(*QUICK, "--verbose", "2"),
                model="saved_model",
                output=str(tmp_path / "run"),
            ),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(cli.__file__).parents[1],
        timeout=600,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert lines[0] == "checking the data"
    warm = lines.index("evaluating the plans of known heuristics")
    assert lines[warm + 1] == "dqn search: 1 episodes"
    assert lines[warm + 2].startswith("episode 1/1  reward ")
    assert done.stdout.count("fine-tuning") == 1  # of one finalist


def test_the_callers_process_is_left_as_it_was(files, capsys):
    environment, filters = dict(os.environ), list(warnings.filters)
    assert main(compress(files, model="nothing.keras")) == 2
    assert dict(os.environ) == environment
    assert list(warnings.filters) == filters


def test_interrupting_is_said_in_a_line(files, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_compress", interrupted)
    assert main(compress(files)) == 130
    assert capsys.readouterr().err == "rl-sparsity compress: interrupted\n"


# -- what is refused -----------------------------------------------------------------------------

WRONG = {
    "no command": ([], "the following arguments are required: command"),
    "unknown command": (["compres"], "invalid choice: 'compres'"),
    "unknown option": (["demo", "--agnet", "dqn"], "unrecognized arguments: --agnet dqn"),
    "unknown agent": (["demo", "--agent", "sarsa"], "invalid choice: 'sarsa'"),
    "episodes": (["demo", "--episodes", "many"], "invalid int value: 'many'"),
    "demo set": (["demo", "--dataset", "digit"], "neither 'digits', nor a .npz file"),
    "demo missing file": (["demo", "--dataset", "nowhere.npz"], "does not exist"),
    "compress alone": (["compress"], "the following arguments are required"),
    "no data": (["compress", "m.keras", "--output", "o"], "one of the arguments --data --dataset"),
    "two data": (
        "compress m.keras --data a --dataset b --output o".split(),
        "not allowed with argument",
    ),
    "group": ("compress m --data a --output o --group row".split(), "invalid choice: 'row'"),
    "format": (
        "compress m --data a --output o --quantization int3".split(),
        "invalid choice: 'int3'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_said_in_one_line(case, capsys):
    arguments, message = WRONG[case]
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert_refused(code, capsys, message)


WRONG_INPUTS = {
    "no model": ({"model": "nothing.keras"}, "There is no file or folder"),
    "bad model": ({"model": "bad.keras"}, "is damaged or mislabelled"),
    "tflite": ({"model": "model.tflite"}, "seems to be a TFLite file"),
    "uncompiled": ({"model": "uncompiled.keras"}, "Pass --loss, for example --loss sparse"),
    "no npz": ({"data": "nothing.npz"}, "nothing.npz' does not exist"),
    "bad npz": ({"data": "bad.npz"}, "is not a .npz file"),
    "arrays missing": ({"data": "missing.npz"}, "missing: ['x_validation', 'y_validation']"),
    "shape": ({"data": "wide.npz"}, "train has inputs of shape (6, 1) per row"),
    "NaN": ({"data": "nan.npz"}, "NaN or infinite values in 'x_train'"),
    "rows": ({"data": "rows.npz"}, "has 96 rows in 'x_train' and 3 in 'y_train'"),
    "label shape": ({"data": "labels.npz"}, "the same shape in every split"),
    "occupied": ({"output": "occupied"}, "holds no run of this package"),
    "file in the way": ({"output": "data.npz"}, "is a file. Expected a folder"),
    "no parent": ({"output": "nowhere/run"}, "does not exist. Create it first"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs_are_said_in_one_line(case, files, capsys):
    options, message = WRONG_INPUTS[case]
    assert_refused(main(compress(files, *QUICK, **options)), capsys, message)
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-sparsity", "90"], "Target(sparsity=90.0) cannot be met. Expected a number ab"),
        (["--target-sparsity", "0.99"], "Expected a sparsity of at most 0.97"),
        (["--target-sparsity", "nan"], "Target(sparsity=nan) cannot be met"),
        (["--episodes", "0"], "episodes=0 cannot be used"),
        (["--seed", "-1"], "seed=-1 cannot be used"),
        (["--batch-size", "0"], "batch_size=0 cannot be used"),
        (["--finetune-epochs", "-1"], "finetune_epochs=-1 cannot be used"),
        (["--finalists", "0"], "finalists=0 cannot be used"),
        (["--loss", "sparse_crossentropy"], "sparse_crossentropy"),
    ],
)
def test_wrong_numbers_are_said_in_one_line(more, message, files, capsys):
    assert_refused(main(compress(files, *QUICK, *more)), capsys, message)
    assert not (files / "out").exists()


def assert_refused(code: object, capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert code == 2
    assert set(captured.out.splitlines()) <= set(PHASES.values())  # what it was about to do
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("rl-sparsity")
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_shows_examples_that_are_right(name, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out.split("examples:\n", 1)[1].splitlines()
    assert shown == [f"  {example}" for example in EXAMPLES[name]]
    for line in shown:
        program, *arguments = line.split()
        assert program == "rl-sparsity"
        assert build_parser().parse_args(arguments).command == name
