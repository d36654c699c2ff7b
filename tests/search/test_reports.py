"""What a search leaves for a report, and the reports of real runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from channel_search import compressor as channel_compressor
from channel_search import searched
from made_runs import Page
from tiny_search import (
    DQN,
    WIDE_TRAIN,
    WIDE_VALIDATION,
    StoppedError,
    compressor,
    interrupt,
    quick_search,
    search,
    trained,
    wide,
)

import rl_sparsity_tf as rls
from rl_sparsity_tf.allocation.layer_errors import kernel_errors
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.errors import FileExistsRLSparsityError
from rl_sparsity_tf.report import charts
from rl_sparsity_tf.report.reading import read_run
from rl_sparsity_tf.search import result as result_module


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_search():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A search for bytes that chooses groups and bits."""
    folder = tmp_path_factory.mktemp("runs") / "bytes"
    target = rls.Target(tflite_bytes=5_000)
    one = rls.Compressor(wide(), target, agent=DQN, directory=folder, buckets=3)
    data = {"train": WIDE_TRAIN, "validation_data": WIDE_VALIDATION}
    result = search(one, **data, episodes=2, finetune_epochs=1)
    return SimpleNamespace(folder=folder, result=result, compressor=one)


def test_a_run_has_its_report(run):
    page = Page((run.folder / "report.html").read_text(encoding="utf-8"))
    page.check_harmless()
    assert "bytes" in page.text
    assert f"{run.result.report.tflite_bytes:,}" in page.text
    assert "Left out" not in page.text
    assert "a file of at most 5,000 bytes" in page.text


def test_the_folder_says_what_the_result_does(run):
    read, held = read_run(run.folder), run.result.to_run()
    assert read["name"] == "bytes"
    for name in ("metrics", "plan", "channels", "details", "manifest"):
        assert read[name] == json.loads(json.dumps(held[name])), name
    assert charts.curve(read)["chart"] == charts.curve(held)["chart"]


def test_the_alternatives_are_what_was_measured(run):
    """Nothing is measured anew, and nothing made up: the same errors as measured by hand."""
    found = run.result.details["alternatives"]
    assert found["unit"] == "weights"
    network = run.compressor.last.plain
    kernel = network.kernels[0]
    ways = {(way["group"], way["bits"]): way for way in found["kernels"][kernel.path]}
    assert {("element", 32), ("element", 8), ("block4", 8), ("element", 4)} <= set(ways)
    limit = network.budget.goal
    measured = kernel_errors(
        network.originals[kernel.path],
        kernel.grouping("element"),
        kernel.spec,
        network.least_squares.problems[kernel.path],
        bits=[32, 8],
        density=1.0 - limit,
    )
    for bits in (32, 8):
        way = ways["element", bits]
        np.testing.assert_allclose(way["live"], measured.live[: len(way["live"])], rtol=1e-5)
        expected = measured.errors[bits][: len(way["live"])]
        # Of those that were measured, the last may be lifted by what is beyond.
        np.testing.assert_allclose(way["errors"][:-1], expected[:-1], rtol=1e-4)
        assert np.all(np.diff(way["costs"]) >= 0)
    (int4,) = ways["element", 4]["live"]
    assert int4 == kernel.size


def test_plans_from_before_the_episodes_are_noted(run):
    noted = run.result.details["considered"]
    assert {"uniform", "lamp", "dynamic_programming"} <= {one["proposed_by"] for one in noted}
    assert {one["before_episode"] for one in noted if one["what"] == "proposed"} == {0}
    points = charts.evaluated(read_run(run.folder))
    assert len(points) == len(noted) + 2
    candidate = run.result.candidate
    assert points[-1]["best"] >= candidate.value - 1e-12
    assert any(one["value"] == candidate.value for one in points)


def test_contenders_join_the_report(run, tmp_path):
    rls.compare(run.compressor, ["uniform"], verbose=0)
    run.result.save_report(tmp_path / "page.html")
    assert "uniform magnitude int8" in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(FileExistsRLSparsityError, match="pass overwrite=True"):
        run.result.save_report(tmp_path / "page.html")
    run.result.save_report(tmp_path / "page.html", overwrite=True)


def test_a_notebook_shows_headline_table_and_curve(run):
    page = Page(run.result._repr_html_())
    page.check_harmless()
    assert page.tags.count("table") == 1
    assert "value over plans evaluated" in page.page
    assert "<html" not in page.page


def test_a_report_that_fails_costs_no_result(run, tmp_path, monkeypatch):
    def fail(_):
        raise ValueError("no page today")

    monkeypatch.setattr(result_module, "render_report", fail)
    metrics = dict(run.result.metrics)
    run.result.save(tmp_path / "copy")
    assert not (tmp_path / "copy" / "report.html").exists()
    (warning,) = json.loads((tmp_path / "copy" / "metrics.json").read_text())["warnings"]
    assert warning == "report.html was not written, because it failed: ValueError: no page today"
    run.result.metrics |= {"warnings": metrics["warnings"]}


def test_a_run_that_was_cut_off_has_a_report_of_what_there_is(tmp_path, capsys):
    interrupt(compressor(trained(), directory=tmp_path / "run"), after=15)
    journal = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert main(["report", str(tmp_path / "run")]) == 0
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    page.check_harmless()
    assert "This run is not finished" in page.text
    assert f"{len(journal)} of 4 episodes played" in page.text
    # The page does not hinder the run, which writes its own in the end.
    search(compressor(trained(), directory=tmp_path / "run"))
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "not finished" not in page.text
    assert "the errors of other densities and precisions were not measured" in page.text
    assert StoppedError.__name__ not in page.text


@pytest.mark.slow
def test_channels_are_explained_by_the_cost_of_the_network(tmp_path):
    one = channel_compressor(rls.Target(macs=0.6), directory=tmp_path / "run")
    result = searched(one, episodes=1)
    found = result.details["alternatives"]
    assert found["unit"] == "channels"
    search_ = one.last
    for unit in search_.network.kernels:
        if unit.path not in found["kernels"]:  # its channels have to stay
            assert not search_.network.budget.able[search_.network.kernels.index(unit)]
            continue
        (way,) = found["kernels"][unit.path]
        assert way["live"][-1] == unit.count
        assert way["errors"][-1] == 0.0
        chosen = result.candidate.plan.kernels[unit.path]
        live = int((chosen.operations != int(rls.Operation.PRUNE)).sum())
        cost = way["costs"][way["live"].index(live)]
        macs = result.metrics["compressed"]["macs"]
        assert cost == pytest.approx(macs, rel=0.02)
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    page.check_harmless()
    assert "Channels of the original model" in page.text
