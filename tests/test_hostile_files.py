"""Hostile .tflite files, plans, tables, policies and data: an answer, or an error of ours."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from rich.console import Console
from rich.table import Table

import rl_sparsity_tf as rls
from rl_sparsity_tf.agents.policies import SavedPolicy
from rl_sparsity_tf.channels.latency_table import LatencyTable
from rl_sparsity_tf.cli import main
from rl_sparsity_tf.console import SearchProgress, table_lines
from rl_sparsity_tf.data.datasets import read_npz
from rl_sparsity_tf.errors import (
    ArgumentError,
    DataError,
    ExportError,
    FileExistsRLSparsityError,
    PlanError,
    PolicyFileError,
    RLSparsityError,
    one_line,
    printable,
)
from rl_sparsity_tf.files import parse_strict
from rl_sparsity_tf.layers.plan import CompressionPlan, KernelPlan
from rl_sparsity_tf.tflite.inspection import inspect_tflite
from rl_sparsity_tf.tflite.sparse_encoding import encode_sparse

HUGE = 10**400
CLEARING = "w\x1b[2J\u202e[red]"
CLEARED = r"w\x1b[2J\u202e[red]"


# ------------------------------------------------------------------ .tflite


def sparse_model(name: bytes = b"w", **changes):
    """The tables of a file of one FULLY_CONNECTED with sparse weights of shape (4, 8)."""
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    encoding = encode_sparse(np.where(values % 3 == 0, values, 0))
    weights = tensor(name, [4, 8], 1)
    weights.sparsity = encoding.parameters()
    for key, value in changes.items():
        setattr(weights, key, value)
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1, -1], [2]
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    graph = schema.SubGraphT()
    graph.tensors = [tensor(b"x", [1, 8], 0), weights, tensor(b"y", [1, 4], 0)]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [operator]
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(encoding.values.tobytes(), np.uint8)
    model = schema.ModelT()
    model.version, model.subgraphs, model.operatorCodes = 3, [graph], [code]
    model.buffers = [schema.BufferT(), buffer]
    return model


def tensor(name: bytes, shape: list[int], buffer: int):
    made = schema.TensorT()
    made.name, made.shape, made.type, made.buffer = name, shape, schema.TensorType.FLOAT32, buffer
    return made


def packed(model) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def refused(path, content: bytes, words: str) -> None:
    """A file that inspecting, timing and running refuse alike."""
    path.write_bytes(content)
    for call in (
        inspect_tflite,
        rls.benchmark_tflite,
        lambda file: rls.predict_tflite(file, np.zeros((1, 8), np.float32)),
    ):
        with pytest.raises(ExportError, match=words):
            call(path)


def test_sparse_tensors_that_claim_any_shape_are_refused_in_every_reader(tmp_path):
    path = tmp_path / "m.tflite"
    for shape in ([2**31 - 1, 8], [2**20, 2**20], [2**30] * 8):
        refused(path, packed(sparse_model(shape=shape)), r"claims [\d,]+ bytes")
    refused(path, packed(sparse_model(shape=[-4, -8])), "damaged")


def test_many_sparse_tensors_that_claim_much_together_are_refused(tmp_path):
    model = sparse_model(shape=[2**13, 2**12])
    tensors = model.subgraphs[0].tensors
    tensors += [tensors[1]] * 3
    refused(tmp_path / "m.tflite", packed(model), r"claims 536,870,912 bytes, of which")


def test_levels_of_a_sparse_tensor_that_claim_many_places_are_refused(tmp_path):
    for size in (2**26, 2**31 - 1):
        model = sparse_model(shape=[2**26, 1])
        model.subgraphs[0].tensors[1].sparsity.dimMetadata[0].denseSize = size
        refused(
            tmp_path / "m.tflite", packed(model), f" values for {size} places| {size} indices along"
        )


def test_constants_of_impossible_shapes_are_refused(tmp_path):
    for shape in ([-4, -8], [2**31 - 1] * 4, [2**16, 2**16, 2**16, 2**16]):
        content = packed(sparse_model(shape=shape, sparsity=None))
        refused(tmp_path / "m.tflite", content, "damaged or was cut off")


def test_tables_that_are_named_again_and_again_are_not_unfolded(tmp_path):
    builder = flatbuffers.Builder(2**20)
    graph = sparse_model().subgraphs[0].Pack(builder)
    schema.ModelStartSubgraphsVector(builder, 10_000)
    for _ in range(10_000):
        builder.PrependUOffsetTRelative(graph)
    graphs = builder.EndVector()
    schema.ModelStart(builder)
    schema.ModelAddSubgraphs(builder, graphs)
    builder.Finish(schema.ModelEnd(builder), file_identifier=b"TFL3")
    words = r"names [\d,]+ tables and has room for"
    refused(tmp_path / "m.tflite", bytes(builder.Output()), words)


def test_three_hundred_changed_files_end_in_an_answer_or_in_an_error_of_this_package(tmp_path):
    base, path = packed(sparse_model()), tmp_path / "m.tflite"
    chance = random.Random(0)
    errors = []
    for _ in range(300):
        path.write_bytes(mutated(base, chance))
        try:
            inspect_tflite(path).summary(lambda line: None)
        except RLSparsityError as error:
            errors.append(str(error))
    assert 20 < len(errors) < 280
    assert errors == [printable(error) for error in errors]


def mutated(base: bytes, chance: random.Random) -> bytes:
    """Changes bytes and numbers, copies pieces over each other, cuts off."""
    data = bytearray(base)
    numbers = (0, 1, 2**31 - 1, 2**32 - 1, 2**30, 2**16 - 1, len(base), 2**32 - len(base))
    for _ in range(chance.choice([1, 1, 2, 4])):
        kind, place = chance.random(), chance.randrange(8, max(len(data), 12) - 3)
        if kind < 0.4:
            data[place] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        elif kind < 0.7:
            data[place : place + 4] = struct.pack("<I", chance.choice(numbers))
        elif kind < 0.85:
            other = chance.randrange(8, len(data))
            data[place : place + 8] = data[other : other + 8]
        else:
            data = data[: place + 4]
    return bytes(data)


def test_names_in_a_file_do_nothing_to_the_terminal(tmp_path, capsys):
    path = tmp_path / "m.tflite"
    path.write_bytes(packed(sparse_model(name=CLEARING.encode())))
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert CLEARED in printed
    assert printed == printable(printed, keep="\n")
    code = main(["inspect", f"{tmp_path}/no\x1b[2J.tflite"])
    assert (code, "\x1b" in capsys.readouterr().err) == (2, False)
    with pytest.raises(SystemExit):
        main(["inspect", "a", "b\x1b[2J"])
    assert r"b\x1b[2J" in capsys.readouterr().err


# ------------------------------------------------------------------ JSON

PLAN = {"path": "d/kernel", "shape": [4, 2], "layout": "io", "group": "element", "bits": 32}
PLANS = {
    "a huge shape": ({"shape": [2**40, 2**40]}, r"has [\d,]+ groups up to 'd/kernel'\. Expected"),
    "one just too large": ({"shape": [2**15, 2**14]}, "has 536,870,912 groups"),
    "a shape without end": ({"shape": [1] * 10**5}, "do not fit together|does not fit together"),
    "a size of many digits": ({"shape": [HUGE, 1]}, "the number 1000+... has 401 digits"),
    "a layout as a list": (
        {"layout": ["i", "o"]},
        r"layout \['i', 'o'\]\. Expected a text with a letter",
    ),
    "a layout as an object": ({"layout": {}}, r"has the layout \{\}"),
    "a group as a list": ({"group": ["element"]}, r"has group \['element'\]"),
    "a group that never ends": ({"group": "e" * 10**6}, r"has group 'eee\w*\.\.\."),
    "bits as a float": ({"bits": 8.0}, r"has bits 8\.0"),
    "bits as a list": ({"bits": [8]}, r"has bits \[8\]"),
    "no operation": ({"default": None}, "has the operation None"),
    "runs beyond": ({"exceptions": [[0, 10**12, "prune"]]}, "beyond its 8 groups"),
    "runs below": ({"exceptions": [[-3, 2, "prune"]]}, "beyond its 8 groups"),
    "a run of lists": ({"exceptions": [[[0], 2, "prune"]]}, "beyond its 8 groups|the exception"),
    "a name that clears": ({"path": CLEARING, "bits": 1}, r"plan of 'w\\x1b\[2J\\u202e\[red\]'"),
    "half a character": ({"path": "\ud800", "bits": 1}, r"plan of '\\ud800'"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_hostile_plan_is_refused(case):
    changes, words = PLANS[case]
    text = json.dumps({"format_version": 1, "kernels": [{**PLAN, **changes}]})
    with pytest.raises(PlanError, match=words) as info:
        CompressionPlan.from_json(text)
    assert len(str(info.value)) < 1000


def test_kernels_that_are_too_many_together_are_refused(monkeypatch):
    monkeypatch.setattr("rl_sparsity_tf.layers.plan._MOST_GROUPS", 20)
    entries = [{**PLAN, "path": f"{index}/kernel"} for index in range(3)]
    with pytest.raises(PlanError, match="has 24 groups up to '2/kernel'"):
        CompressionPlan.from_dict({"format_version": 1, "kernels": entries})


def test_layouts_of_a_plan_made_in_python_are_checked_too():
    with pytest.raises(PlanError, match="Expected a text with a letter"):
        KernelPlan("d/kernel", (4, 2), ["i", "o"], "element", 32, np.zeros((4, 2), np.uint8))


TEXTS = {
    '{"a": NaN}': "NaN is no finite number",
    "[1, -Infinity]": "-Infinity is no finite number",
    "[1e999]": "1e999 is no finite number",
    f"[{HUGE}]": "has 401 digits",
    f"[{'9' * 10**5}]": "has 100000 digits",
    '{"a": 1, "b": {"c": 1, "c": 1}}': "the name 'c' is there twice",
}


@pytest.mark.parametrize("text", TEXTS, ids=list(TEXTS.values()))
def test_json_that_this_package_never_writes_is_refused(tmp_path, text):
    words = TEXTS[text]
    with pytest.raises(ValueError, match=words):
        parse_strict(text)
    with pytest.raises(PlanError, match=words):
        CompressionPlan.from_json(text)
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=words):
        LatencyTable.load(path)


def test_json_without_end_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 10**5)
    with pytest.raises(PlanError, match="nested too deeply"):
        CompressionPlan.load(path)
    with pytest.raises(ArgumentError, match="cannot be read"):
        LatencyTable.load(path)


def table(**changes):
    layer = {"kind": "Dense", "inputs": [1, 4], "outputs": [2], "ms": [[1], [2]], "spread": 0}
    layer |= {key: changes.pop(key) for key in set(changes) & set(layer)}
    whole = {
        **{"format_version": 1, "device": "d", "quantization": "none", "threads": 1},
        **{"xnnpack": True, "overhead_ms": 0, "spread": 0, "layers": {"d": layer}},
    }
    return {**whole, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": [1, 10**12]}, "at most 4,194,304"),
        ({"inputs": [1, HUGE]}, "Expected finite numbers"),
        ({"ms": [[HUGE], [1]]}, "Expected finite numbers"),
        ({"ms": [[float("nan")], [1]]}, "Expected finite numbers"),
        ({"overhead_ms": HUGE}, "Expected a number of at least 0"),
        ({"overhead_ms": float("inf")}, "Expected a number of at least 0"),
        ({"spread": -HUGE}, "Expected a number of at least 0"),
        ({"format_version": True}, "has format_version True"),
        ({"layers": []}, "layers is a list"),
        ({"layers": {"d": []}}, "This is not layer 'd'"),
    ],
    ids=str,
)
def test_a_hostile_latency_table_is_refused(changes, words):
    LatencyTable.from_dict(table())
    with pytest.raises(ArgumentError, match=words):
        LatencyTable.from_dict(table(**changes))


def test_a_table_prints_its_names_without_what_terminals_obey():
    values = table(device="d\x1b[31m")
    values["layers"] = {CLEARING: values["layers"]["d"]}
    lines: list[str] = []
    LatencyTable.from_dict(values).summary(lines.append)
    assert CLEARED in lines[0]
    assert lines == [printable(line) for line in lines]


# ------------------------------------------------------------------ .npz


def bomb(path, members: dict[str, int]):
    """An archive of arrays of zeros, of any size when they are unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size in members.items():
            head = io.BytesIO()
            shape = {"descr": "|u1", "fortran_order": False, "shape": (size, 1)}
            np.lib.format.write_array_header_1_0(head, shape)
            with archive.open(f"{name}.npy", "w") as file:
                file.write(head.getvalue())
                for _ in range(size // 2**20):
                    file.write(bytes(2**20))
    return path


def claiming(path, size: int):
    """An archive whose directory claims any size for its one member."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"")
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02")
    data[start + 24 : start + 28] = struct.pack("<I", size)
    path.write_bytes(data)
    return path


def test_data_that_unpack_to_gigabytes_are_refused_before(tmp_path):
    with pytest.raises(DataError, match=r"was not read: its content claims 3,221,225,472 bytes"):
        read_npz(claiming(tmp_path / "claims.npz", 3 * 2**30))
    with zipfile.ZipFile(tmp_path / "above.npz", "w") as archive:
        archive.writestr("../x_train.npy", b"")
    with pytest.raises(DataError, match=r"'\.\./x_train\.npy' leads out of the archive"):
        read_npz(tmp_path / "above.npz")


def test_a_header_that_claims_more_than_its_member_is_refused(tmp_path):
    path = bomb(tmp_path / "header.npz", {"x_train": 2**19})
    with pytest.raises(DataError, match="is damaged at 'x_train'"):
        read_npz(path)


def test_policies_hold_to_the_same_limits(tmp_path):
    with pytest.raises(PolicyFileError, match=r"claims to hold 67,108,865 bytes"):
        SavedPolicy.load(claiming(tmp_path / "policy.npz", 2**26 + 1))


# ------------------------------------------------------------------ what is printed


def test_texts_that_terminals_obey_are_written_out():
    assert printable(CLEARING) == CLEARED
    assert printable("Gewichte µ 层 \u3000 a/b:0") == "Gewichte µ 层 \u3000 a/b:0"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert printable("\ud800\u2028\x7f\x9b") == r"\ud800\u2028\x7f\x9b"
    error = FileExistsRLSparsityError(f"{CLEARING} is there")
    assert (str(error), one_line(ValueError(CLEARING))) == (
        f"{CLEARED} is there",
        f"ValueError: {CLEARED}",
    )


def test_names_are_no_markup_in_tables_and_progress():
    drawn = Table(title="[bold]t")
    drawn.add_column(":smile:")
    drawn.add_row("\x1b[31m[red]kernel[/]")
    text = "\n".join(table_lines(drawn, 60))
    assert "[bold]t" in text
    assert ":smile:" in text
    assert r"\x1b[31m[red]kernel[/]" in text
    written = io.StringIO()
    progress = SearchProgress(2, "[red]m\x1b[2J", console=Console(file=written, width=200))
    with progress.phase("episodes", "[/]title"):
        progress.update(2, reward=0.0, best=0.0, metric=0.5, sparsity=0.5)
    assert r"[red]m\x1b[2J 0.5" in written.getvalue()
    assert "[/]title" in written.getvalue()
