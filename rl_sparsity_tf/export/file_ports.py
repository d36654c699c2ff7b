"""The inputs and outputs of a .tflite file by Keras's names, in Keras's order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from rl_sparsity_tf.tflite.reading import pack_model


def name_ports(file: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives a converted file's signature Keras's names, and Keras's order to its subgraph.

    The converter takes no names with capitals, spaces or letters beyond ASCII, and orders inputs
    and outputs as it likes.

    Args:
        file: A .tflite file whose signature has the inputs `input_0`, `input_1`, ... and the
            outputs `output_0`, ...; it is rewritten.
        inputs: The names of the inputs.
        outputs: The names of the outputs.
    """
    content = file.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    given, made = _numbered(signature.inputs), _numbered(signature.outputs)
    for name, entry in zip(inputs, given, strict=True):
        # What interpreters without signatures go by; other tools give it this prefix, too.
        graph.tensors[entry.tensorIndex].name = f"serving_default_{name}:0".encode()
    for names, entries in ((inputs, given), (outputs, made)):
        for name, entry in zip(names, entries, strict=True):
            entry.name = name.encode()
    graph.inputs = np.array([entry.tensorIndex for entry in given], np.int32)
    graph.outputs = np.array([entry.tensorIndex for entry in made], np.int32)
    signature.inputs, signature.outputs = given, made
    file.write_bytes(pack_model(model, content))


def _numbered(entries: Sequence[Any]) -> list[Any]:
    """A signature's entries by the number that their names end in: `input_10` after `input_2`."""
    return sorted(entries, key=lambda entry: int(entry.name.decode().rpartition("_")[2]))
