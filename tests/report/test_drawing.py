"""Axes, marks and maps: where things are drawn."""

import itertools
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from made_runs import PLAN

from rl_sparsity_tf.report import maps
from rl_sparsity_tf.report.charts import pareto
from rl_sparsity_tf.report.drawing import Axis, compact, frame, labelled, linear_ticks, log_ticks
from rl_sparsity_tf.report.layers import Way


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (-0.001, "0"), (-0.5, "-0.5"), (10.0, "10"), (1.255, "1.25")]
)
def test_numbers_are_short(value, text):
    assert compact(value) == text


@hypothesis.given(st.floats(-1e15, 1e15), st.floats(1e-9, 1e15))
def test_ticks_are_few_and_within(low, span):
    high = low + span
    hypothesis.assume(high > low)
    ticks = linear_ticks(low, high)
    room = 1e-6 * max(span, 1e-6 * abs(low))
    assert len(ticks) <= 18
    assert all(low - room - span * 1e-6 <= one <= high + room + span * 1e-6 for one in ticks)


@hypothesis.given(st.floats(1e-9, 1e15), st.floats(1.01, 1e12))
def test_log_ticks_are_few_ascending_and_within(low, factor):
    ticks = log_ticks(low, low * factor)
    assert len(ticks) <= 18
    assert all(a < b for a, b in itertools.pairwise(ticks))
    assert all(0.999 * low <= one <= 1.001 * low * factor for one in ticks)


def test_ticks_of_powers_of_ten():
    assert log_ticks(1.0, 1e6) == [1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0, 1e6][::2]


def test_an_axis_puts_its_ends_where_they_belong():
    axis = Axis(10.0, 1000.0, 100.0, 300.0, log=True)
    assert (axis.at(10), axis.at(100), axis.at(1000)) == pytest.approx((100, 200, 300))
    turned = Axis(0.0, 1.0, 300.0, 100.0)
    assert (turned.at(0.0), turned.at(0.25)) == (300.0, 250.0)


def test_equal_values_still_have_an_axis():
    for log in (False, True):
        axis = Axis.over([5.0, 5.0], 0.0, 10.0, log)
        assert axis.low < 5.0 < axis.high
        assert 0 < axis.at(5.0) < 10


def test_no_tick_is_above_what_there_can_be():
    words = {"x_name": "x", "y_name": "y", "x_text": str, "y_text": str}
    chart = frame([(1.0, 0.98), (2.0, 1.0)], **words, y_most=1.0)
    assert chart.y.high > 1.0
    assert max(chart.y.ticks) == 1.0


def test_labels_do_not_lie_on_each_other():
    words = {"x_name": "x", "y_name": "y", "x_text": str, "y_text": str}
    chart = frame([(0.0, 0.0), (1.0, 1.0)], **words)
    drawn = labelled([(200.0, 150.0, "1"), (201.0, 150.0, "2"), (200.0, 151.0, "3")], chart)
    places = [tuple(map(float, re.findall(r'[xy]="([\d.]+)"', one))) for one in drawn]
    for (ax, ay), (bx, by) in itertools.combinations(places, 2):
        assert abs(ax - bx) >= 7 or abs(ay - by) >= 15


@hypothesis.given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_what_is_on_the_front_is_beaten_by_none(pairs):
    rows = [{"bytes": size, "value": value} for size, value in pairs]
    front = pareto(rows)
    for row in rows:
        beaten = [
            one
            for one in rows
            if one["bytes"] <= row["bytes"] and one["value"] >= row["value"] and one != row
        ]
        assert (row in front) == (not beaten)


def test_a_way_is_read_between_what_was_measured():
    way = Way("element", 8, [1.0, 100.0], [0.8, 0.2], [10.0, 109.0])
    assert way.error(10.0) == pytest.approx(0.5)  # halfway in the logarithm
    assert way.cost(50.5) == pytest.approx(59.5)
    assert way.error(0.5) == 0.8
    assert way.error(1e3) == 0.2
    assert (way.reaches(0.5), way.reaches(100.0), way.reaches(200.0)) == (False, True, False)


@pytest.mark.parametrize(
    "changed",
    [
        {"live": [2, 1]},
        {"live": [0, 1]},
        {"errors": [-1, 0]},
        {"errors": [0.5]},
        {"costs": [1]},
        {"group": 3},
        {"bits": None},
        {"live": "ab"},
    ],
)
def test_what_is_no_way_is_left_out(changed):
    good = {"group": "element", "bits": 8, "live": [1, 2], "errors": [0.5, 0.2], "costs": None}
    assert Way.of(good) is not None
    assert Way.of(good | changed) is None


# ---------------------------------------------------------------------- maps


def test_operations_are_those_of_the_plan():
    conv, dense = maps.decoded(PLAN)
    expected = np.ones(72, int)
    expected[:6] = expected[70:] = 2
    np.testing.assert_array_equal(conv.operations, expected.reshape(18, 4))
    assert dense.operations.shape == (3, 3)
    assert conv.weights == (0, 64, 8, 0)
    assert dense.weights == (2, 28, 0, 0)
    assert (conv.exported_bits, dense.exported_bits) == (8, 32)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [3, 3, 2, 0]},
        {"shape": [2**40, 2**40, 1, 1]},
        {"shape": "abcd"},
        {"layout": "io"},
        {"layout": "abcd"},
        {"group": "block7"},
        {"group": ["element"]},
        {"bits": "8"},
        {"default": "burn"},
        {"default": {}},
        {"exceptions": [[0, 100, "keep"]]},
        {"exceptions": [[0, 72, "keep"], [0, 72, "keep"]]},
        {"exceptions": [[0, 0, "keep"]]},
        {"exceptions": [[10**30, 1, "keep"]]},
        {"exceptions": [[True, 1, "keep"]]},
        {"exceptions": [[-1, 1, "keep"]]},
        {"exceptions": [[0, 1, []]]},
        {"exceptions": [3]},
        {"path": None},
    ],
)
def test_an_entry_that_is_none_is_left_out(changed):
    assert maps.decode(PLAN["kernels"][0] | changed) is None
    assert len(maps.decoded({"kernels": [PLAN["kernels"][0] | changed, PLAN["kernels"][1]]})) == 1


def areas(drawing):
    """Pixels under each operation of a map."""
    found = {}
    for name, path in re.findall(r'class="op-(\w+)"[^>]* d="([^"]+)"', drawing):
        boxes = re.findall(r"M[\d.]+ [\d.]+h([\d.]+)v([\d.]+)", path)
        found[name] = found.get(name, 0.0) + sum(float(w) * float(h) for w, h in boxes)
    return found


def test_a_map_has_a_cell_for_every_group():
    drawing = maps.draw(maps.decoded(PLAN)[0]).drawing
    assert 'viewBox="0 0 360 80"' in drawing  # 18 x 4 groups, the inputs lie
    assert areas(drawing) == {"quantize": 8 * 20.0 * 20.0}


def entry_of(operations, group="element"):
    rows, outputs = operations.shape
    runs = [[n, 1, maps.OPERATIONS[one]] for n, one in enumerate(operations.ravel()) if one != 1]
    shape = [rows if group == "element" else 9, outputs]
    return {
        **{"path": "k", "shape": shape, "layout": "io", "group": group, "bits": 8},
        **{"default": "prune", "exceptions": runs},
    }


def test_a_large_kernel_has_cells_of_blocks_as_strong_as_much_of_them_lives():
    operations = np.ones((256, 512), np.uint8)
    operations[:64, :128] = 2  # all quantized
    operations[128, 0] = 0  # one kept, alone
    picture = maps.draw(maps.decode(entry_of(operations)), cells=2048)
    assert picture.note.startswith("a cell is 8 x 8 groups")
    found = areas(picture.drawing)
    side = 7.0  # 64 cells across, at most 460 pixels
    assert found == {"quantize": 8 * 16 * side**2, "keep": side**2}
    assert re.search(r'class="op-keep" fill-opacity="0\.32"', picture.drawing)
    assert not re.search(r'class="op-quantize" fill-opacity', picture.drawing)


def test_whole_channels_are_a_strip():
    operations = np.array([[2, 1, 1, 2, 2]], np.uint8)
    picture = maps.draw(maps.decode(entry_of(operations, "channel")))
    assert picture.note == "one cell per channel"
    assert areas(picture.drawing) == {"quantize": 3 * 20.0 * 22.0}


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(1, 3000), st.integers(1, 3000))
@hypothesis.example(181, 181)
def test_a_map_is_never_large(rows, outputs):
    operations = np.ones((rows, outputs), np.uint8)
    operations[::3, ::2] = 2
    kernel = maps.Decoded("k", (rows, outputs), "element", 8, operations, (0, 1, 1, 0))
    drawing = maps.draw(kernel, cells=2048).drawing
    assert len(drawing) < 150_000
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing).groups())
    assert width <= 600
    assert height <= 520
