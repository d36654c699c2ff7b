"""Model files that want more than to be a model: each made of an honest one by one change.

Every entry is a function that changes a copy of a file in place, and words that its refusal has.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tensorflow.core.protobuf import saved_model_pb2
from tf_keras.protobuf import saved_metadata_pb2

Change = Callable[[Path], None]


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


# ------------------------------------------------------------------ configurations


def layer(**changes: Any) -> Change:
    """Gives the second layer another class, module or configuration."""

    def change(config: dict[str, Any]) -> None:
        config["config"]["layers"][1].update(changes)

    return _config(change)


def setting(**changes: Any) -> Change:
    """Changes settings of the second layer."""

    def change(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["config"].update(changes)

    return _config(change)


def compiled(**changes: Any) -> Change:
    """Changes what the model is compiled with."""

    def change(config: dict[str, Any]) -> None:
        config["compile_config"] = {"optimizer": "sgd", "loss": "mse", **changes}

    return _config(change)


def _config(change: Callable[[dict[str, Any]], None]) -> Change:
    def rewrite(path: Path) -> None:
        content = members(path)
        config = json.loads(content["config.json"])
        change(config)
        content["config.json"] = json.dumps(config).encode()
        write(path, content)

    return rewrite


def thing(module: Any, name: str, config: Any = None, registered: Any = None) -> dict[str, Any]:
    """An object as Keras stores it."""
    return {
        "module": module,
        "class_name": name,
        "config": {} if config is None else config,
        "registered_name": registered,
    }


def op_layer(kind: str, **config: Any) -> dict[str, Any]:
    """A layer that holds an operation, as functional models have it."""
    return thing("tf_keras.src.layers.core.tf_op_layer", kind, {"name": "op", **config}, kind)


def node(operation: str) -> dict[str, Any]:
    return {
        "module": "tf_keras.src.engine.base_layer",
        "class_name": "TensorFlowOpLayer",
        "registered_name": "TensorFlowOpLayer",
        "config": {"name": "op", "node_def": {"name": "op", "op": operation, "input": ["x"]}},
    }


READ = node("ReadFile")
SPEC = {"class_name": "__typespec__", "registered_name": None, "config": []}

CONFIGS: dict[str, tuple[Change, str]] = {
    "a node that reads a file": (layer(**READ), "the operation 'ReadFile'"),
    "a node that writes one": (layer(**node("WriteFile")), "the operation 'WriteFile'"),
    "a node that prints": (layer(**node("PrintV2")), "the operation 'PrintV2'"),
    "a node of Python": (layer(**node("EagerPyFunc")), "the operation 'EagerPyFunc'"),
    "a node that ends the process": (layer(**node("Abort")), "the operation 'Abort'"),
    "a node that loads checkpoints": (layer(**node("RestoreV2")), "the operation 'RestoreV2'"),
    "a node of a data set": (layer(**node("TFRecordDataset")), "'TFRecordDataset'"),
    "a node that cannot be read": (
        layer(**{**READ, "config": {"name": "op", "node_def": {"op": 3}}}),
        "an operation that cannot be read",
    ),
    "a node packed as text": (
        layer(**{**READ, "config": {"name": "op", "node_def": "\n\x01x\x12\x08ReadFile"}}),
        "the operation 'ReadFile'",
    ),
    "a node in TimeDistributed": (setting(layer=READ), "the operation 'ReadFile'"),
    "a node in a model in a list": (
        setting(deep=[[{"layers": [{"config": {"forward": READ}}]}]]),
        "the operation 'ReadFile'",
    ),
    "a slice that is no slice": (
        layer(**op_layer("SlicingOpLambda", function="io.write_file")),
        "calls tf.io.write_file",
    ),
    "a raw operation": (
        layer(**op_layer("TFOpLambda", function="raw_ops.ReadFile")),
        "calls tf.raw_ops.ReadFile",
    ),
    "a function that changes settings": (
        layer(**op_layer("TFOpLambda", function="keras.backend.set_floatx")),
        "calls tf.keras.backend.set_floatx",
    ),
    "a method of a tensor's class": (
        layer(**op_layer("ClassMethod", cls_symbol="RaggedTensor", method_name="__init__")),
        "calls tf.RaggedTensor.__init__",
    ),
    "a method of a tensor": (
        layer(**op_layer("InstanceMethod", attr_name="numpy")),
        "asks a tensor for its 'numpy'",
    ),
    "an attribute of a tensor": (
        layer(**op_layer("InstanceProperty", attr_name="__class__")),
        "asks a tensor for its '__class__'",
    ),
    "a model from elsewhere": (
        layer(
            **thing("tf_keras.src.export.export_lib", "ReloadedLayer", {"filepath": "/tmp/other"})
        ),
        "loads another model",
    ),
    "a function as a class": (
        setting(activation=thing("keras.utils", "get_file")),
        "'get_file' of the module 'keras.utils'",
    ),
    "a function of TensorFlow as a class": (
        setting(activation=thing("tensorflow.python.lib.io.file_io", "delete_recursively")),
        "'delete_recursively' of the module",
    ),
    "a class of Keras that is no part of models": (
        setting(activation=thing("keras.callbacks", "CSVLogger", {"filename": "/tmp/log"})),
        "'CSVLogger' of the module 'keras.callbacks'",
    ),
    "a class of Python": (
        setting(kernel_initializer=thing("subprocess", "Popen")),
        "'Popen' of the module 'subprocess'",
    ),
    "a class within a class": (
        setting(kernel_initializer=thing("tensorflow.python.data", "Dataset.map")),
        "'Dataset.map'",
    ),
    "a name of another thing in the module": (
        setting(kernel_initializer=thing("tensorflow.python.lib.io.file_io", "x", {}, "read_file")),
        "'x' of the module",
    ),
    "a function by its registered name": (
        setting(activation=thing("tf_keras.src.backend", "function", "nothing", "clear_session")),
        "the function 'nothing' of the module",
    ),
    "a function of this package": (
        setting(activation=thing("rl_sparsity_tf.cli", "function", "main", "main")),
        "the function 'main'",
    ),
    "a function of the backend": (
        setting(activation=thing("tf_keras.src.backend", "function", "clear_session", None)),
        "the function 'clear_session'",
    ),
    "a loss of Python": (
        compiled(loss=thing("builtins", "function", "eval", "eval")),
        "the function 'eval'",
    ),
    "a metric of another module": (
        compiled(metrics=[thing("shutil", "rmtree")]),
        "'rmtree' of the module 'shutil'",
    ),
    "an optimizer that is none": (
        compiled(optimizer=thing("keras.utils", "SidecarEvaluator")),
        "'SidecarEvaluator'",
    ),
    "code as text": (setting(fn=thing(None, "__lambda__", {"value": "x"})), "is a Lambda"),
    "code behind a registered name": (
        layer(class_name="Dense", registered_name="Custom>Lambda"),
        "is a Lambda",
    ),
    "a description of another class": (
        setting(spec={**SPEC, "module": "tensorflow.python.framework", "spec_name": "TypeSpec"}),
        "'TypeSpec' of the module",
    ),
    "a description by a function": (
        setting(spec={**SPEC, "module": "tensorflow.python.lib.io.file_io", "spec_name": "copy"}),
        "'copy' of the module",
    ),
    "a description of the registry": (
        setting(spec={"class_name": "TypeSpec", "type_spec": "tf.EagerWeakTensor.Spec"}),
        "describes a tensor by the class",
    ),
    "an array of one endless letter": (
        setting(w=thing(None, "__numpy__", {"value": ["a"], "dtype": "U1000000000"})),
        "an array of the type 'U1000000000'",
    ),
    "a vocabulary from a file": (
        layer(**thing("keras.layers", "StringLookup", {"name": "l", "vocabulary": "/etc/passwd"})),
        "reads the file '/etc/passwd'",
    ),
    "a column from a file": (
        setting(
            columns=[thing(None, "VocabularyFileCategoricalColumn", {"vocabulary_file": "/etc/x"})]
        ),
        "reads the file '/etc/x'",
    ),
    "a name that clears the terminal": (
        layer(**{**READ, "config": {**READ["config"], "name": "a\x1b[2J\u202e\ud800"}}),
        r"part 'a\x1b[2J\u202e\ud800' has the operation",
    ),
}
NESTED = "config too deep"


def too_deep(path: Path) -> None:
    content = members(path)
    content["config.json"] = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    write(path, content)


# ------------------------------------------------------------------ archives


def extra(name: str, data: bytes = b"x") -> Change:
    def change(path: Path) -> None:
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, data)

    return change


def link(path: Path) -> None:
    info = zipfile.ZipInfo("assets/words.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")


def padded(path: Path) -> None:
    content = members(path)
    content["config.json"] += b" " * 2**25
    write(path, content, zipfile.ZIP_DEFLATED)


def claims(member: str, size: int) -> Change:
    """Says in the archive's directory that a member has any number of bytes."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        # Of an entry in the directory: bytes 24 to 27 are the size, the name begins at 46.
        start = data.rindex(member.encode()) - 46
        assert data[start : start + 4] == b"PK\x01\x02"
        data[start + 24 : start + 28] = size.to_bytes(4, "little")
        path.write_bytes(data)

    return change


def twice(path: Path) -> None:
    content = members(path)["config.json"]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("config.jsom", content)
    path.write_bytes(path.read_bytes().replace(b"config.jsom", b"config.json"))


ARCHIVES: dict[str, tuple[Change, str]] = {
    NESTED: (too_deep, "RecursionError"),
    "a member above": (extra("../above.txt"), "leads out of the archive"),
    "a member far above": (extra("assets/../../above.txt"), "leads out of the archive"),
    "an absolute member": (extra("/tmp/absolute.txt"), "leads out of the archive"),
    "a member on a drive": (extra("C:/absolute.txt"), "leads out of the archive"),
    "a member above, backwards": (extra("assets\\..\\..\\x"), "leads out of the archive"),
    "a member that no model has": (extra("more.bin"), "the member 'more.bin', which no model"),
    "weights as pickles": (extra("model.weights.npz"), "the member 'model.weights.npz'"),
    "a symbolic link": (link, "is a symbolic link"),
    "a configuration twice": (twice, "two members 'config.json'"),
    "a padded configuration": (padded, "config.json has 33,55"),
    "an asset of three gigabytes": (
        lambda path: (extra("assets/a")(path), claims("assets/a", 3 * 2**30)(path))[0],
        "its content claims 3,221,",
    ),
    "weights of three gigabytes": (claims("model.weights.h5", 3 * 2**30), "content claims 3,22"),
}

# ------------------------------------------------------------------ HDF5


def _external(file: h5py.File, place: str) -> None:
    shape = file[place].shape
    del file[place]
    file.create_dataset(place, shape, "f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def _soft(file: h5py.File, place: str) -> None:
    del file[place]
    file[place] = h5py.SoftLink("/other")


def _linked(file: h5py.File, place: str) -> None:
    del file[place]
    file[place] = h5py.ExternalLink("/tmp/other.h5", "/weights")


def _virtual(file: h5py.File, place: str) -> None:
    shape = file[place].shape
    del file[place]
    layout = h5py.VirtualLayout(shape, "f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "weights", shape)
    file.create_virtual_dataset(place, layout)


def _never_written(file: h5py.File, place: str) -> None:
    del file[place]
    file.create_dataset(place, (2**30,), "f4")


def _mostly_missing(file: h5py.File, place: str) -> None:
    del file[place]
    wide = file.create_dataset(place, (2**20, 512), "f4", chunks=(64, 512), compression="gzip")
    wide[:64] = 0


def _references(file: h5py.File, place: str) -> None:
    del file[place]
    file.create_dataset(place, (3,), h5py.ref_dtype)


def _lists(file: h5py.File, place: str) -> None:
    del file[place]
    file.create_dataset(place, (3,), h5py.vlen_dtype(np.int32))


def _filtered(file: h5py.File, place: str) -> None:
    del file[place]
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((4,))
    # Optional, so that writing passes without it.
    plan.set_filter(305, h5py.h5z.FLAG_OPTIONAL, (1,))
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(file.id, place.encode(), h5py.h5t.IEEE_F32LE, space, plan)


def _names(file: h5py.File, place: str) -> None:
    file[place].attrs["about"] = "x" * 2**20
    file["/"].attrs.create("names", ["a"] * 3000, dtype=h5py.string_dtype())


HDF5: dict[str, tuple[Callable[[h5py.File, str], None], str]] = {
    "external storage": (_external, "lies in the file '/etc/passwd'"),
    "a soft link": (_soft, "is a link to '/other'"),
    "a link to another file": (_linked, "is a link to '/weights' of the file '/tmp/other.h5'"),
    "a virtual data set": (_virtual, "is virtual"),
    "four gigabytes that were never written": (_never_written, "claims 4,294,967,296 bytes and"),
    "two gigabytes of missing chunks": (_mostly_missing, "claims 2,147,483,648 bytes and takes"),
    "references": (_references, "holds references or lists"),
    "lists": (_lists, "holds references or lists"),
    "a filter that has to be loaded": (_filtered, "needs the unknown filter 305"),
    "names that share a megabyte": (_names, "may claim 3,1"),
}


def in_hdf5(change: Callable[[h5py.File, str], None]) -> Change:
    """A change of the kernel's data set in an .h5 file or in the weights of a .keras file."""

    def rewrite(path: Path) -> None:
        weights = path
        if path.suffix == ".keras":
            content = members(path)
            weights = path.with_suffix(".h5")
            weights.write_bytes(content["model.weights.h5"])
        with h5py.File(weights, "r+") as file:
            places: list[str] = []
            file.visititems(
                lambda name, item: places.append(name) if isinstance(item, h5py.Dataset) else None
            )
            change(file, places[-1])
        if weights is not path:
            content["model.weights.h5"] = weights.read_bytes()
            write(path, content)

    return rewrite


# ------------------------------------------------------------------ SavedModels


def graph(change: Callable[[Any], None]) -> Change:
    def rewrite(path: Path) -> None:
        file = path / "saved_model.pb"
        saved = saved_model_pb2.SavedModel()
        saved.ParseFromString(file.read_bytes())
        change(saved.meta_graphs[0])
        file.write_bytes(saved.SerializeToString())

    return rewrite


def metadata(**changes: Any) -> Change:
    def rewrite(path: Path) -> None:
        file = path / "keras_metadata.pb"
        stored = saved_metadata_pb2.SavedMetadata()
        stored.ParseFromString(file.read_bytes())
        node = next(node for node in stored.nodes if '"Dense"' in node.metadata[:400])
        node.metadata = json.dumps({**json.loads(node.metadata), **changes})
        file.write_bytes(stored.SerializeToString())

    return rewrite


def _node(operation: str, *, inside: str = "") -> Callable[[Any], None]:
    def change(meta: Any) -> None:
        nodes = meta.graph_def.node
        for function in meta.graph_def.library.function:
            if inside and inside in function.signature.name:
                nodes = function.node_def
        nodes.add(name="hidden", op=operation)

    return change


def _saver_elsewhere(meta: Any) -> None:
    saver = meta.saver_def.restore_op_name
    stored = next(node for node in meta.graph_def.node if node.name == saver)
    meta.graph_def.library.function[0].node_def.add(name="x", op=stored.attr["f"].func.name)


def _asset(name: str) -> Callable[[Any], None]:
    def change(meta: Any) -> None:
        meta.asset_file_def.add(filename=name).tensor_info.name = "x:0"

    return change


def linked_variables(path: Path) -> None:
    place = next((path / "variables").glob("variables.data*"))
    outside = path.parent / "elsewhere"
    place.rename(outside)
    os.symlink(outside, place)


FOLDERS: dict[str, tuple[Change, str]] = {
    "a graph that reads a file": (graph(_node("ReadFile")), "the operation ReadFile (hidden)"),
    "a function that reads a file": (
        graph(_node("ReadFile", inside="layer_call_fn")),
        "the operation ReadFile (hidden)",
    ),
    "a function that saves": (
        graph(_node("SaveV2", inside="layer_call_fn")),
        "the operation SaveV2 (hidden)",
    ),
    "the saver, which reads a file": (
        graph(_node("ReadFile", inside="traced_restore")),
        "the operation ReadFile (hidden)",
    ),
    "the saver, called by a layer": (graph(_saver_elsewhere), "the operation RestoreV2"),
    "a table from a file": (
        graph(_node("InitializeTableFromTextFileV2")),
        "the operation InitializeTableFromTextFileV2",
    ),
    "an asset above": (graph(_asset("../../etc/passwd")), "lies outside the folder"),
    "an absolute asset": (graph(_asset("/etc/passwd")), "lies outside the folder"),
    "variables elsewhere": (linked_variables, "is a link out of the folder"),
    "a layer that holds a node": (
        metadata(class_name="TensorFlowOpLayer", config=READ["config"]),
        "the operation 'ReadFile'",
    ),
}
