"""Plans and rules: their JSON, their errors, and what applying them does."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zoo import ZOO

import rl_sparsity_tf as rls
from rl_sparsity_tf.errors import FileExistsRLSparsityError, PlanError
from rl_sparsity_tf.layers.groups import GROUPS, Grouping
from rl_sparsity_tf.layers.kernels import count_weights, find_kernels, sparsity_of
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan, KernelRule
from rl_sparsity_tf.layers.rules import prune_by_magnitude, resolve, uniform_plan
from rl_sparsity_tf.layers.wrapping import plan_of

KEEP, PRUNE, QUANTIZE, SHUFFLE = rls.Operation
modest = settings(max_examples=40, deadline=None)


@st.composite
def kernel_plans(draw, path="dense/kernel"):
    group = draw(st.sampled_from(GROUPS))
    shape = draw(st.tuples(st.integers(1, 21), st.integers(1, 3)))
    grid = Grouping(group, *shape).shape
    operations = draw(
        hnp.arrays(np.uint8, grid, elements=st.integers(0, 3)).filter(
            lambda array: not (array == PRUNE).all()
        )
    )
    bits = draw(st.sampled_from([8, 4]))
    return KernelPlan(path, shape, "io", group, bits, operations)


@st.composite
def rules(draw, path="*"):
    return KernelRule(
        path,
        draw(st.floats(0, 1, exclude_max=True)),
        group=draw(st.sampled_from(GROUPS)),
        quantize=draw(st.booleans()),
        bits=draw(st.sampled_from([8, 4])),
    )


def kernel_plan(operations, bits=8, group="element", path="dense/kernel"):
    operations = np.asarray(operations)
    return KernelPlan(path, operations.shape, "io", group, bits, operations)


def entry(**changes):
    """A well-formed entry of format 1, with some fields changed (None: left out)."""
    fields = {
        "path": "dense/kernel",
        "shape": [4, 2],
        "layout": "io",
        "group": "element",
        "bits": 8,
        "default": "keep",
        "exceptions": [[0, 2, "prune"], [5, 1, "quantize"]],
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not None}


# ---------------------------------------------------------------------------- JSON


@modest
@given(kernel_plans("a"), kernel_plans("b/c"), rules("*"), rules("d?"))
def test_plan_to_json_and_back_is_the_same_plan(one, other, rule, pattern):
    plan = CompressionPlan([one, rule, other, pattern])
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert list(again.kernels) == ["a", "*", "b/c", "d?"]
    assert CompressionPlan.from_dict(plan.to_dict()) == plan
    assert json.loads(plan.to_json()) == plan.to_dict()
    assert again.to_json() == plan.to_json()


def test_golden_json():
    plan = CompressionPlan(
        [
            kernel_plan([[0, 1], [1, 1], [2, 3]], path="first/kernel"),
            KernelPlan("conv/kernel", (1, 1, 8, 2), "iiio", "block4", 8, [[0, 0], [0, 1]]),
            KernelRule("*", 0.8, quantize=True, bits=4),
        ]
    )
    assert plan.to_json() == (
        "{\n"
        '  "format_version": 1,\n'
        '  "kernels": [\n'
        '    {"path": "first/kernel", "shape": [3, 2], "layout": "io", "group": "element", '
        '"bits": 8, "default": "prune", "exceptions": [[0, 1, "keep"], [4, 1, "quantize"], '
        '[5, 1, "shuffle"]]},\n'
        '    {"path": "conv/kernel", "shape": [1, 1, 8, 2], "layout": "iiio", "group": "block4", '
        '"bits": 32, "default": "keep", "exceptions": [[3, 1, "prune"]]},\n'
        '    {"path": "*", "sparsity": 0.8, "method": "magnitude", "group": "element", '
        '"quantize": true, "bits": 4}\n'
        "  ]\n"
        "}\n"
    )
    assert CompressionPlan().to_json() == '{\n  "format_version": 1,\n  "kernels": []\n}\n'


def test_entries_written_by_hand():
    plan = KernelPlan.from_dict(entry())
    np.testing.assert_array_equal(
        plan.operations, [[PRUNE, PRUNE], [KEEP, KEEP], [KEEP, QUANTIZE], [KEEP, KEEP]]
    )
    assert KernelPlan.from_dict(entry(exceptions=None, default=None)).sparsity == 0
    later = entry(default="Quantize", exceptions=[[0, 6, "PRUNE"], [1, 2, "Keep"]])
    np.testing.assert_array_equal(
        KernelPlan.from_dict(later).operations.reshape(-1), [1, 0, 0, 1, 1, 1, 2, 2]
    )
    rule = CompressionPlan.from_dict(
        {"format_version": 1, "kernels": [{"path": "*", "sparsity": 0.8}]}
    )
    assert rule == CompressionPlan([KernelRule("*", 0.8)])
    assert not rule.is_resolved
    assert repr(rule) == "CompressionPlan(1 entries, with rules)"


# ---------------------------------------------------------------------------- what a plan says


@modest
@given(kernel_plans("a"), kernel_plans("b"))
def test_figures_of_a_plan(one, other):
    plan = CompressionPlan([one, other])
    counts = plan.count_operations()
    assert list(counts) == ["keep", "prune", "quantize", "shuffle"]
    assert sum(counts.values()) == one.size + other.size
    zeros = sum(
        int((kernel.grouping.expand_numpy(kernel.operations) == PRUNE).sum())
        for kernel in (one, other)
    )
    assert counts["prune"] == zeros
    assert plan.sparsity == pytest.approx(zeros / (one.size + other.size))
    assert repr(plan) == f"CompressionPlan(2 kernels, sparsity {plan.sparsity:.3f})"


def test_empty_plans_have_figures_too():
    assert CompressionPlan().sparsity == 0
    assert set(CompressionPlan().count_operations().values()) == {0}


@pytest.mark.parametrize(
    ("operations", "bits", "stored", "exported"),
    [
        ([[KEEP, KEEP]], 8, 32, 32),  # nothing quantized: bits falls back to 32
        ([[KEEP, PRUNE]], 4, 32, 32),
        ([[SHUFFLE, PRUNE]], 8, 32, 32),
        ([[QUANTIZE, PRUNE]], 8, 8, 8),
        ([[QUANTIZE, SHUFFLE]], 4, 4, 4),  # a shuffled group counts as quantized
        ([[QUANTIZE, KEEP]], 8, 8, 32),  # one kept group keeps the tensor float
        ([[QUANTIZE, PRUNE]], 4, 4, 4),
    ],
)
def test_exported_bits(operations, bits, stored, exported):
    plan = kernel_plan(operations, bits)
    assert (plan.bits, plan.exported_bits) == (stored, exported)


def test_plans_are_frozen():
    operations = np.array([[KEEP, PRUNE]], np.uint8)
    kernel = kernel_plan(operations)
    plan = CompressionPlan([kernel])
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernel.bits = 4
    with pytest.raises(ValueError, match="read-only"):
        kernel.operations[0, 0] = PRUNE
    operations[0, 0] = PRUNE  # the caller's array stays the caller's
    assert kernel.operations[0, 0] == KEEP
    with pytest.raises(AttributeError, match="is frozen"):
        plan.kernels = {}
    with pytest.raises(AttributeError, match="Make a new one"):
        plan._kernels = {}
    with pytest.raises(TypeError):
        plan.kernels["other"] = kernel
    with pytest.raises(dataclasses.FrozenInstanceError):
        KernelRule("*", 0.5).sparsity = 0.4
    with pytest.raises(TypeError, match="unhashable"):
        hash(plan)


def test_equality_looks_at_every_field():
    base = kernel_plan([[QUANTIZE, PRUNE]])
    assert base == kernel_plan([[QUANTIZE, PRUNE]])
    others = [
        kernel_plan([[QUANTIZE, PRUNE]], path="other"),
        kernel_plan([[QUANTIZE, PRUNE]], bits=4),
        kernel_plan([[QUANTIZE, PRUNE]], group="channel"),
        kernel_plan([[PRUNE, QUANTIZE]]),
        KernelPlan("dense/kernel", (2, 1), "oi", "element", 8, [[QUANTIZE, PRUNE]]),
    ]
    for other in others:
        assert base != other
        assert CompressionPlan([base]) != CompressionPlan([other])
    assert base != "plan"
    assert CompressionPlan([base]) != [base]


# ---------------------------------------------------------------------------- files


def test_save_load_and_overwrite(tmp_path):
    path = tmp_path / "plan.json"
    plan = CompressionPlan([kernel_plan([[KEEP, PRUNE]]), KernelRule("*", 0.5)])
    plan.save(path)
    assert CompressionPlan.load(path) == plan
    with pytest.raises(FileExistsRLSparsityError, match=r"exists already.*overwrite=True"):
        CompressionPlan().save(path)
    assert CompressionPlan.load(str(path)) == plan
    CompressionPlan().save(path, overwrite=True)
    assert CompressionPlan.load(path) == CompressionPlan()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_files_that_cannot_be_read_or_written(tmp_path):
    plan = CompressionPlan()
    with pytest.raises(rls.ArgumentError, match=r"does not exist. Create it first"):
        plan.save(tmp_path / "missing" / "plan.json")
    with pytest.raises(rls.ArgumentError, match=r"is a folder. Expected the name of a file"):
        plan.save(tmp_path)
    with pytest.raises(PlanError, match="cannot be read"):
        CompressionPlan.load(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PlanError, match=r"Expected a JSON file written by plan.save"):
        CompressionPlan.load(tmp_path / "latin.json")


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": None}, r"lacks \['shape'\].*or write a rule"),
        ({"bits": None, "group": None}, r"lacks \['bits', 'group'\]"),
        ({"exception": []}, "unknown field 'exception'.*Did you mean 'exceptions'"),
        ({"path": 3}, "Expected an object with the path of a kernel"),
        ({"shape": "4x2"}, "has shape '4x2'. Expected a list of positive integers"),
        ({"shape": [4, 0]}, r"has shape \[4, 0\]"),
        ({"shape": [4, True]}, r"has shape \[4, True\]"),
        ({"shape": [4, 2, 1]}, "does not fit together.*describes 2 axes"),
        ({"layout": "iq"}, "does not fit together.*one letter per axis"),
        ({"layout": 5}, "does not fit together"),
        ({"group": "block5"}, "has group 'block5'.*Did you mean 'block"),
        ({"group": ["element"]}, r"has group \['element'\]"),
        ({"bits": 16}, "has bits 16. Expected 32, 8 or 4"),
        ({"bits": True}, "has bits True"),
        ({"bits": "8"}, "has bits '8'"),
        ({"bits": [8]}, r"has bits \[8\]"),
        ({"bits": 32}, "quantizes groups.*says bits=32. Expected 8 or 4"),
        ({"default": "pruned"}, "has the operation 'pruned'.*Did you mean 'prune'"),
        ({"default": 1}, "has the operation 1"),
        ({"exceptions": [[0, 2]]}, r"has the exception \[0, 2\].*for example"),
        ({"exceptions": [[0, 0, "keep"]]}, r"has the exception \[0, 0, 'keep'\]"),
        ({"exceptions": ["prune"]}, "has the exception 'prune'"),
        ({"exceptions": [[7, 2, "keep"]]}, "beyond its 8 groups. Expected groups 0 to 7"),
        ({"exceptions": [[-1, 2, "keep"]]}, "beyond its 8 groups"),
        ({"exceptions": [["0", 2, "keep"]]}, "beyond its 8 groups"),
        ({"exceptions": [[0, 2, "kept"]]}, "has the operation 'kept'.*Did you mean 'keep'"),
        ({"exceptions": 3}, "has exceptions 3. Expected a list"),
        ({"exceptions": {"0": 1}}, "has exceptions .*Expected a list"),
        ({"default": "prune", "exceptions": None}, "prunes every group.*Leave at least one"),
    ],
)
def test_malformed_entries(changes, message):
    document = {"format_version": 1, "kernels": [entry(**changes)]}
    with pytest.raises(PlanError, match=message):
        CompressionPlan.from_dict(document)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, "has sparsity 1.0. Expected a number of at least 0 and below 1"),
        ({"sparsity": -0.1}, "has sparsity -0.1"),
        ({"sparsity": float("nan")}, "has sparsity nan"),
        ({"sparsity": "0.8"}, "has sparsity '0.8'"),
        ({"sparsity": True}, "has sparsity True"),
        ({"method": "l1"}, "has method 'l1'. Expected one of 'magnitude'"),
        ({"method": ["magnitude"]}, "has method"),
        ({"group": "chanel"}, "has group 'chanel'.*Did you mean 'channel'"),
        ({"quantize": "yes"}, "quantize='yes' and bits=8. Expected true or false"),
        ({"bits": 32}, "bits=32. Expected true or false, and 8 or 4"),
        ({"quantise": True}, "unknown field 'quantise'.*Did you mean 'quantize'"),
        ({"path": None}, "Expected an object with the path of a kernel"),
    ],
)
def test_malformed_rules(changes, message):
    fields = {"path": "*", "sparsity": 0.8, **changes}
    with pytest.raises(PlanError, match=message):
        CompressionPlan.from_dict({"format_version": 1, "kernels": [fields]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 1,\n "kernels": [}', r"not valid JSON \(line 2, column 14"),
        ("[]", r"not a compression plan.*received \[\]"),
        ('{"format_version": 1}', "Expected an object with format_version and kernels"),
        ('{"a": "' + "b" * 100 + '"}', r"received \{'a': 'b+\.\.\.\.$"),
        ('{"format_version": 2, "kernels": []}', "format_version 2. Expected 1; a newer"),
        ('{"kernels": []}', "format_version None"),
        ('{"format_version": 1, "kernels": [], "kernel": 1}', "unknown field 'kernel'"),
        ('{"format_version": 1, "kernels": {}}', r"kernels are \{\}. Expected a list"),
        ('{"format_version": 1, "kernels": ["dense"]}', "has the entry 'dense'"),
        ('{"format_version": 1, "kernels": [{}]}', r"has the entry \{\}"),
    ],
)
def test_malformed_documents(text, message):
    with pytest.raises(PlanError, match=message):
        CompressionPlan.from_json(text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CompressionPlan([KernelRule("*", 0.5)] * 2), "two entries for '\\*'"),
        (lambda: CompressionPlan([KernelRule("*", 0.5)]).sparsity, "plan holds rules"),
        (lambda: CompressionPlan([KernelRule("*", 0.5)]).count_operations(), "rls.wrap"),
        (
            lambda: KernelPlan("k", (2, 2), "io", "element", 8, np.zeros((2, 1), int)),
            r"operations of shape \(2, 1\). Expected \(2, 2\)",
        ),
        (
            lambda: KernelPlan("k", (2, 2), "io", "element", 8, np.full((2, 2), 4)),
            r"holds the operation 4.*0 \(KEEP\).*3 \(SHUFFLE\)",
        ),
        (
            lambda: KernelPlan("k", (2, 2), "io", "element", 8, np.full((2, 2), 256)),
            "holds the operation 256",
        ),
        (
            lambda: KernelPlan("k", (2, 2), "io", "element", 8, np.full((2, 2), 0.5)),
            "operations of type float64. Expected integers",
        ),
        (
            lambda: KernelPlan("k", (2, 2), "io", "element", 8, np.full((2, 2), -1)),
            "holds the operation -1",
        ),
        (lambda: KernelRule(3, 0.5), "rule has the path 3. Expected a text"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(PlanError, match=message):
        call()


# ---------------------------------------------------------------------------- rules on a model


def test_exact_paths_go_before_patterns_and_first_patterns_before_later_ones():
    model = ZOO["separable"]()
    paths = [kernel.path for kernel in find_kernels(model)]
    plan = CompressionPlan(
        [
            KernelRule("*depthwise*", 0.5, group="block4"),
            KernelRule("*", 0.25, quantize=True, bits=4),
            KernelRule("dense/kernel", 0.75),
        ]
    )
    resolved = resolve(plan, model)
    assert resolved.is_resolved
    assert list(resolved.kernels) == paths  # in the order of the model
    groups = {path: kernel.group for path, kernel in resolved.kernels.items()}
    assert [path for path in paths if groups[path] == "block4"] == [
        path for path in paths if "depthwise" in path
    ]
    assert resolved.kernels["dense/kernel"].sparsity == 0.75
    pointwise = resolved.kernels["separable_conv2d/pointwise_kernel"]
    assert (pointwise.bits, pointwise.exported_bits) == (4, 4)
    assert resolve(resolved, model) == resolved


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ([KernelRule("dens/kernel", 0.5)], "names the kernel 'dens/kernel'.*Did you mean 'dense/"),
        ([kernel_plan([[0, 1]], path="lstm/kernel")], "names the kernel 'lstm/kernel'"),
        ([kernel_plan([[0, 1]])], r"has shape \(1, 2\).*the model's has \(13, 17\)"),
        (
            [KernelPlan("dense/kernel", (13, 17), "oi", "element", 8, np.zeros((17, 13), int))],
            "layout 'oi'.*Use a plan made for this model",
        ),
        ([KernelRule("conv*", 0.5)], r"'conv\*' matches no kernel.*'dense/kernel'"),
    ],
)
def test_plans_that_do_not_fit_the_model(kernels, message):
    with pytest.raises(PlanError, match=message):
        resolve(CompressionPlan(kernels), ZOO["dense"]())


@modest
@given(
    st.sampled_from(GROUPS),
    st.integers(1, 37),
    st.integers(1, 4),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 99),
)
def test_pruning_by_magnitude_reaches_the_share_with_the_fewest_smallest_groups(
    group, inputs, outputs, sparsity, seed
):
    matrix = np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)
    grouping = Grouping(group, inputs, outputs)
    live = prune_by_magnitude(matrix, grouping, sparsity)
    assert live.any()
    means = np.sqrt(grouping.sum_numpy(np.square(matrix, dtype=np.float64)) / grouping.sizes)
    if not live.all():
        assert means[~live].max() <= means[live].min()
    pruned, wanted = grouping.sizes[~live].sum(), sparsity * matrix.size
    assert pruned >= wanted - 1e-5 or live.sum() == 1
    if not live.all():  # without the last one it would be missed
        last = np.unravel_index(np.where(live, -1, means).argmax(), means.shape)
        assert pruned - grouping.sizes[last] < wanted


@pytest.mark.parametrize("name", ["dense", "residual", "nested"])
def test_uniform_plan_counts_skipped_layers(name):
    model = ZOO[name]()
    plan = uniform_plan(model, 0.7)
    stripped = rls.strip(rls.wrap(model, plan))
    assert 0.7 <= sparsity_of(stripped) < 0.7 + len(plan.kernels) / count_weights(model)[1]


def test_uniform_plan_out_of_reach():
    import tf_keras as keras

    class Table(keras.layers.Embedding):
        """Not registered, so skipped."""

    model = keras.Sequential([keras.layers.Input((3,)), Table(50, 4), keras.layers.Flatten()])
    model.add(keras.layers.Dense(2))
    with pytest.raises(PlanError, match=r"only 24 are in layers.*Expected a sparsity below 0.107"):
        uniform_plan(model, 0.5)
    with pytest.raises(PlanError, match="Expected a sparsity"):
        uniform_plan(model, -0.5)


@pytest.mark.parametrize("group", GROUPS)
def test_a_saved_plan_gives_the_same_zeros_without_any_search(tmp_path, group):
    model = ZOO["residual"]()
    rule = CompressionPlan([KernelRule("*", 0.4, group=group, quantize=True)])
    wrapped = rls.wrap(model, rule)
    plan_of(wrapped).save(tmp_path / "plan.json")
    stripped = rls.strip(wrapped)
    again = rls.strip(rls.wrap(model, CompressionPlan.load(tmp_path / "plan.json")))
    for one, other in zip(stripped.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sparsity_of(again) > 0.3
