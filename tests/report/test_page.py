"""The page of a run: its figures, what is left out, and that nothing in a file becomes markup."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from made_runs import METRICS, PLAN, Page, made_run, write_run

from rl_sparsity_tf.cli import main
from rl_sparsity_tf.errors import FileExistsRLSparsityError, MissingDependencyError
from rl_sparsity_tf.report import charts, content, layers, maps, page
from rl_sparsity_tf.report.page import render_fragment, render_report, write_report


def shown(**changed):
    return Page(render_report(made_run(**changed)))


def test_the_headline():
    head = content.headline(made_run())
    assert head["title"] == "Compression of a model on digits"
    assert head["target"] == "a file of at most 4,000 bytes"
    cards = {card["name"]: (card["value"], card["note"]) for card in head["cards"]}
    assert cards["smaller file"] == ("10.00\u00d7", "40,000 → 4,000 bytes")
    assert cards["smaller after gzip"] == ("12.00\u00d7", "36,000 → 3,000 bytes")
    assert cards["of test accuracy lost"] == ("3.00 points", "98.00 % → 95.00 %")
    assert cards["of the weights are zero or gone"][0] == "87.5 %"
    assert cards["proposed the plan"] == ("lamp", "the search's agent was dqn")
    assert not [name for name in cards if "faster" in name]  # not measured


@pytest.mark.parametrize(
    ("figures", "value", "note"),
    [
        ({"latency": 0.5, "latency_spread": 0.03}, "2.00\u00d7", "samples scatter by 3 %"),
        ({"latency": None, "predicted_latency": 0.8}, "1.25\u00d7", "not measured"),
    ],
)
def test_the_headline_says_how_fast_and_whether_that_was_measured(figures, value, note):
    metrics = copy.deepcopy(METRICS)
    metrics["compressed"] |= figures
    (card,) = [
        one
        for one in content.headline(made_run(metrics=metrics))["cards"]
        if one["name"] == "faster"
    ]
    assert card["value"] == value
    assert note in card["note"]


def test_a_metric_that_is_no_accuracy_and_better_when_low():
    metrics = copy.deepcopy(METRICS)
    metrics["metric"] = {"name": "mae", "higher_is_better": False}
    metrics["compressed"] |= {"validation_accuracy": None, "tflite_metric": 1.25}
    metrics["dense"]["metric"] = 1.0
    cards = content.headline(made_run(metrics=metrics))["cards"]
    (card,) = [one for one in cards if one["name"] == "of test mae lost"]
    assert (card["value"], card["note"]) == ("0.25", "1 → 1.25")


def test_the_table_and_the_pareto_front():
    found = charts.comparison(made_run())
    assert [row["name"] for row in found["rows"]] == [
        *("dense float32", "dense int8", "compressed", "uniform magnitude int8", "LAMP int8")
    ]
    # (bytes, accuracy): LAMP's is smaller than the compressed one, which is better.
    assert [row["front"] for row in found["rows"]] == [True, True, True, False, True]
    assert found["rows"][2]["cells"] == ["95.00 %", "87.5 %", "4,000", "10.00\u00d7", "3,000", "8"]
    assert found["kind"] == "tflite_bytes"


def test_files_of_one_size_are_compared_after_gzip():
    metrics = copy.deepcopy(METRICS)
    for entry in (metrics["dense_int8"], metrics["compressed"], *metrics["baselines"]):
        entry["tflite_bytes"] = 10_000
    assert charts.comparison(made_run(metrics=metrics))["kind"] == "gzip_bytes"


def test_the_curve_has_every_plan_where_it_was_evaluated():
    points = charts.evaluated(made_run())
    assert [(one["x"], one["value"], one["by"]) for one in points] == [
        (1.0, 0.5, "lamp"),
        (2.0, 0.25, "erk"),
        (3.0, 0.125, "dqn"),
        (4.0, 0.625, "dqn"),
        (5.0, 0.5, "dqn"),
        (6.5, 0.75, "lamp"),
    ]
    assert [one["best"] for one in points] == [0.5, 0.5, 0.5, 0.625, 0.625, 0.75]
    assert [one["episode"] for one in points] == [None, None, 1, 2, 3, None]


def test_values_of_other_targets_are_not_compared():
    history = made_run()["history"]
    for entry, trial in zip(history, (1, 1, 2), strict=True):
        entry["trial"] = trial
    points = charts.evaluated(made_run(history=history, details=None))
    assert [one["best"] for one in points] == [0.125, 0.625, 0.5]
    assert "2 stages of different targets" in shown(history=history).text


def test_the_layers():
    conv, dense = layers.kernels(made_run())
    assert conv["weights"] == {"keep": 0, "prune": 64, "quantize": 8, "shuffle": 0}
    assert (conv["type"], conv["before"], conv["after"]) == ("int8", 288, 72)
    # The last block of an output has 2 of the 10 inputs.
    assert dense["weights"] == {"keep": 2, "prune": 28, "quantize": 0, "shuffle": 0}
    assert (dense["type"], dense["after"]) == ("32 bits", None)


def test_why_a_kernel_became_what_it_is():
    conv, dense = layers.cards(made_run())["kernels"]
    rows = {row["name"]: row for row in conv["why"]["rows"]}
    assert rows["chosen"] == {
        **{"name": "chosen", "live": "8", "density": "11.1 %", "cost": "30"},
        **{"error": "25 %", "kind": "chosen"},
    }
    assert (rows["half as many weights"]["cost"], rows["half as many weights"]["error"]) == (
        *("20", "50 %"),
    )
    assert rows["twice as many weights"]["error"] == "10 %"
    assert rows["single weights, float32"]["cost"] == "60"
    assert rows["single weights, float32"]["error"] == "20 %"
    assert conv["why"]["sentence"] == (
        "With half as many its outputs would be off by 50 % of their energy in place of 25 %, for "
        "10 bytes less; with twice as many by 10 %, for 10 bytes more."
    )
    assert dense["why"] is None


def test_channels_are_explained_by_what_the_whole_network_costs():
    entry = PLAN["kernels"][0] | {"group": "channel", "exceptions": [[0, 2, "quantize"]]}
    run = made_run(channels={"kernels": [entry]})
    way = {"group": "channel", "bits": 8, "live": [1, 2, 4], "errors": [0.5, 0.25, 0.0]}
    run["details"]["alternatives"] = {
        "unit": "channels",
        "kernels": {"conv/kernel": [way | {"costs": [0.25, 0.5, 1.0]}]},
    }
    found = layers.cards(run)
    assert found["channels"]
    (card,) = found["kernels"]
    assert [(row["live"], row["cost"]) for row in card["why"]["rows"]] == [
        *(("2", "50.0 %"), ("1", "25.0 %"), ("4", "100.0 %"))
    ]
    assert "for 25 points of the network's cost less" in card["why"]["sentence"]
    assert "Channels of the original model" in Page(render_report(run)).text


def test_what_was_verified_is_exploited_and_can_be_repeated():
    text = shown().text
    assert "Largest difference to Keras's outputs 0.00125" in text
    assert "Rows with the same top-1 as Keras 99.8 %" in text
    assert "dense: zeros are multiplied like any number conv/kernel" in text
    assert "tensorflow 2.20.0" in text
    assert "learning_rate=0.002" in text
    arguments = dict(content.reproduction(made_run())["arguments"])
    assert arguments == {
        **{"target": "tflite_bytes=4000", "seed": "7", "episodes": "3"},
        "agent": "agent=dqn, learning_rate=0.002",
    }


def test_warnings_are_said_once_and_by_whom():
    assert content.warnings(made_run()) == [
        "the fine-tuning diverged",
        "LAMP int8: stored otherwise",
    ]
    assert "Things to know the fine-tuning diverged" in shown().text


def test_what_4_bits_would_be_worth_is_said():
    run = made_run()
    run["metrics"]["search"]["slow_int4"] = {"note": "4 bits in <conv>, too", "metric": 0.5}
    assert content.warnings(run)[-1] == "4 bits in <conv>, too"
    run["metrics"]["search"]["slow_int4"] = ["of another kind"]
    assert len(content.warnings(run)) == 2


def test_a_run_that_was_cut_off():
    text = shown(metrics=None, plan=None, details=None).text
    assert "This run is not finished" in text
    assert "3 of 3 episodes played" in text
    assert "0.6250 best value so far by dqn" in text
    assert "Left out: the figures of the models come with the end of the run." in text
    assert "Left out: there is no plan yet" in text
    assert "value over plans evaluated" in shown(metrics=None).page


def test_a_run_from_before_there_were_details():
    found = shown(details=None, manifest=None)
    assert "Left out: the errors of other densities and precisions were not measured" in found.text
    assert "Left out: nothing was written down of the file's tensors." in found.text
    assert "conv/kernel" in found.text
    assert "seed 7" in found.text


def test_the_fragment_has_headline_table_and_curve():
    found = Page(render_fragment(made_run()))
    found.check_harmless()
    assert found.tags.count("table") == 1
    assert "10.00\u00d7" in found.text
    assert [d for d in found.drawings if "value over plans evaluated" in d]


def test_nothing_is_loaded_or_run():
    found = shown()
    found.check_harmless()
    assert "default-src 'none'" in found.page


HOSTILE = (
    "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(1)>&\x1b{{7*7}}"
)


def poisoned(value):
    """Every text replaced, and every name but those that are looked for followed by markup."""
    if isinstance(value, dict):
        return {key: poisoned(one) for key, one in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    return HOSTILE if isinstance(value, str) else value


def test_texts_of_files_never_become_markup():
    for run in (poisoned(made_run()), poisoned(made_run(metrics=None))):
        found = Page(render_report(run))
        found.check_harmless()
        assert "<script>alert(1)</script>" in found.text  # as text
        assert "49" not in found.text.partition("{{7*7}}")[0][-10:]
        Page(render_fragment(run)).check_harmless()


def test_names_of_kernels_and_proposers_never_become_markup():
    run = made_run()
    for entry in run["plan"]["kernels"]:
        entry["path"] = HOSTILE + entry["path"]
    run["details"]["alternatives"]["kernels"] = {
        run["plan"]["kernels"][0]["path"]: run["details"]["alternatives"]["kernels"]["conv/kernel"]
    }
    for entry in (*run["history"], *run["details"]["considered"], *run["metrics"]["baselines"]):
        entry["proposed_by"] = entry["name"] = HOSTILE
    found = Page(render_report(run))
    found.check_harmless()
    assert layers.cards(run)["kernels"][0]["why"] is not None
    assert found.text.count("<script>") > 8


NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.sampled_from([0, -1, 1e308, 5e-324, float("nan")]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.just(HOSTILE),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, at=()):
    """The paths of everything in a document."""
    yield at
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*at, key))


PLACES = [at for at in places(made_run()) if at and at[0] not in ("problems",)]


def replaced(run, at, value):
    holder = run
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = value


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_whatever_is_in_the_files_there_is_a_page(changes):
    run = made_run()
    for at, value in changes:
        try:
            replaced(run, at, value)
        except (KeyError, TypeError, IndexError):  # gone with an earlier change
            continue
    Page(render_report(run)).check_harmless()


def test_the_command_writes_the_page_and_needs_no_tensorflow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it would raise
    folder = write_run(tmp_path / "run", made_run())
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report in {folder / 'report.html'}\n"
    Page((folder / "report.html").read_text(encoding="utf-8")).check_harmless()
    assert main(["report", str(folder)]) == 0  # its own is replaced
    other = tmp_path / "other.html"
    other.write_text("mine")
    assert main(["report", str(folder), "--output", str(other)]) == 2
    assert "exists already. Choose another name, or pass --overwrite" in capsys.readouterr().err
    assert other.read_text() == "mine"
    assert main(["report", str(folder), "--output", str(other), "--overwrite"]) == 0
    assert other.read_text() == (folder / "report.html").read_text()


def test_the_command_says_in_a_line_what_is_no_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("rl-sparsity report: The folder ")
    assert found.err.count("\n") == 1
    with pytest.raises(FileExistsRLSparsityError):
        write_report(write_run(tmp_path / "run", made_run()), tmp_path / "run" / "plan.json")


def test_without_jinja_it_is_said_what_to_install(monkeypatch):
    page._templates.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="pip install jinja2"):
        render_report(made_run())
    page._templates.cache_clear()


OLD = sorted((Path(__file__).parent.parent / "fixtures").glob("*/run"))
assert OLD, "no run of an earlier version is among the fixtures"


@pytest.mark.parametrize("folder", OLD, ids=lambda path: path.parent.name)
def test_runs_of_earlier_versions_have_a_page(folder, tmp_path):
    written = write_report(folder, tmp_path / "page.html")
    found = Page(written.read_text(encoding="utf-8"))
    found.check_harmless()
    assert "episodes played" in found.text
    assert "best value so far" in found.text


def test_kernels_are_read_as_far_as_there_is_room(monkeypatch):
    monkeypatch.setattr(maps, "_MOST_IN_ALL", 72 + 9)
    kernels = PLAN["kernels"] + [PLAN["kernels"][1] | {"path": "third/kernel"}]
    found = maps.decoded({"kernels": kernels})
    assert [one.path for one in found] == ["conv/kernel", "dense/kernel"]


def test_files_that_claim_far_too_much_are_shown_in_part():
    entry = PLAN["kernels"][0] | {"shape": [2**9, 2**8], "layout": "io", "exceptions": []}
    run = made_run(plan={"kernels": [entry] * 3_000})
    run["metrics"]["baselines"] *= 1_000
    run["metrics"]["warnings"] = [f"warning {n}" for n in range(10_000)]
    run["history"] = [run["history"][0] | {"reward": n / 50_000} for n in range(50_000)]
    rendered = render_report(run)
    assert len(rendered) < 3_000_000
    assert "the plan names 3,000 kernels, of which 2,000 are shown" in content.warnings(
        made_run(plan=run["plan"])
    )
    Page(rendered).check_harmless()
