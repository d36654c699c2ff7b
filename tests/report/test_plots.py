"""What `rls.plots` draws, number by number."""

import sys

import numpy as np
import pytest
from made_runs import made_run, write_run

from rl_sparsity_tf.errors import ArgumentError, MissingDependencyError, RunError
from rl_sparsity_tf.report import plots

DRAW = {"history": plots.history, "pareto": plots.pareto, "layers": plots.layers}
DRAW["operations"] = plots.operations


@pytest.fixture(scope="module")
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


class Made:
    """What a result gives plots."""

    def __init__(self, **changed):
        self._run = made_run(**changed)

    def to_run(self):
        return self._run


@pytest.mark.parametrize("name", DRAW)
def test_a_result_and_its_folder_look_the_same_on_axes_new_or_given(plt, tmp_path, name):
    axes = DRAW[name](Made())
    given = plt.subplots()[1]
    assert DRAW[name](write_run(tmp_path / "run", made_run()), ax=given) is given
    assert axes is not given
    for ours, theirs in zip(axes.get_lines(), given.get_lines(), strict=True):
        np.testing.assert_array_equal(ours.get_xydata(), theirs.get_xydata())
    assert axes.get_xlabel() == given.get_xlabel() != ""


def test_the_history(plt):
    best, *points = plots.history(Made()).get_lines()
    assert best.get_xydata().tolist() == [
        *([1.0, 0.5], [2.0, 0.5], [3.0, 0.5], [4.0, 0.625], [5.0, 0.625], [6.5, 0.75])
    ]
    assert best.get_drawstyle() == "steps-post"
    found = {line.get_label(): line.get_xydata().tolist() for line in points}
    assert found == {
        "lamp": [[1.0, 0.5], [6.5, 0.75]],
        "erk": [[2.0, 0.25]],
        "dqn": [[3.0, 0.125], [4.0, 0.625], [5.0, 0.5]],
    }


def test_every_stage_has_a_line_of_its_own(plt):
    history = made_run()["history"]
    for entry, share in zip(history, (0.5, 0.5, 1.0), strict=True):
        entry["stage"] = share
    first, second, *_ = plots.history(Made(history=history, details=None)).get_lines()
    assert first.get_ydata().tolist() == [0.125, 0.625]
    assert second.get_ydata().tolist() == [0.5]


def test_the_pareto_front(plt):
    axes = plots.pareto(Made())
    front, *points = axes.get_lines()
    assert front.get_xydata().tolist() == [
        *([3_900.0, 0.94], [4_000.0, 0.95], [10_000.0, 0.97], [40_000.0, 0.98])
    ]
    found = {line.get_label(): line.get_xydata().tolist() for line in points}
    assert found["compressed"] == [[4_000.0, 0.95]]
    assert found["uniform magnitude int8"] == [[4_100.0, 0.91]]
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "test accuracy"


@pytest.mark.parametrize(("show", "widths"), [("density", [8 / 72, 2 / 30]), ("bits", [8, 32])])
def test_the_layers(plt, show, widths):
    axes = plots.layers(Made(), show=show)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(widths)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv/kernel", "dense/kernel"]
    assert axes.yaxis_inverted()


def test_the_layers_bytes(plt):
    run = made_run()
    run["details"]["file"]["tensors"].append(
        {"kernel": "dense/kernel", "dtype": "float32", "bytes": 50}
    )
    axes = plots.layers(Made(details=run["details"]), show="bytes")
    assert [bar.get_width() for bar in axes.patches] == [288, 120, 72, 50]


def test_the_operations(plt):
    axes = plots.operations(Made())  # of the largest kernel
    expected = np.ones(72, int)
    expected[:6] = expected[70:] = 2
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), expected.reshape(18, 4))
    assert [one.get_text() for one in axes.get_legend().get_texts()] == ["prune", "quantize"]
    other = plots.operations(Made(), "dense/kernel").get_images()[0].get_array()
    assert other.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]


def test_what_cannot_be_drawn_is_said_and_leaves_no_figure(plt, tmp_path):
    plt.close("all")
    with pytest.raises(ArgumentError, match=r"run=3 is a int\. Expected the result of a search"):
        plots.history(3)
    with pytest.raises(ArgumentError, match=r"ax='here' is a str\. Expected matplotlib's Axes"):
        plots.history(Made(), ax="here")
    with pytest.raises(RunError, match="is no folder"):
        plots.pareto(tmp_path / "missing")
    with pytest.raises(RunError, match="no episode to draw"):
        plots.history(Made(history=[], details=None))
    with pytest.raises(RunError, match="no sizes and metrics to draw"):
        plots.pareto(Made(metrics=None))
    for draw in (plots.layers, plots.operations):
        with pytest.raises(RunError, match="no plan that can be read"):
            draw(Made(plan=None))
    with pytest.raises(RunError, match="not known how many bytes the kernels take"):
        plots.layers(Made(), show="bytes")
    with pytest.raises(ArgumentError, match="show='weight' is not known"):
        plots.layers(Made(), show="weight")
    with pytest.raises(ArgumentError, match="Did you mean 'conv/kernel'"):
        plots.operations(Made(), "conv/kernl")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", DRAW)
def test_without_matplotlib_it_is_said_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rl_sparsity_tf\[plots\]'"):
        DRAW[name](Made())
