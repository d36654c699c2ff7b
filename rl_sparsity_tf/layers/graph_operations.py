"""Which TensorFlow operations a file may bring: those that compute, none that reach outside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

# Python; files and what reads or writes them; networks and other devices; whatever ends or stops
# the process; and operations that carry a program of their own.
_REACHING_OUT = re.compile(
    r"PyFunc|File(?!name|spec)|Reader|Record|Dataset|Iterator|Snapshot|LMDB|Sql|BigQuery|CSV"
    r"|Save|Restore|Checkpoint|LoadAndRemap|Vocab|Print|Summary|ImportEvent|Debug|Dump"
    r"|Rpc|DataService|Remote|Recv|Send|Collective|Nccl|TPU|Tpu|DTensor|Heartbeat|Session"
    r"|Abort|Sleep|Proto|CustomCall|CustomAggregator|Xla|BoostedTrees"
)
# What writes and reads a SavedModel's own variables, on request only.
_OF_SAVERS = {"SaveV2", "RestoreV2", "MergeV2Checkpoints"}


def reaches_out(operation: str) -> bool:
    """Whether an operation touches files, networks, Python or the process.

    Example:
        >>> reaches_out("ReadFile"), reaches_out("MatMul")
        (True, False)
    """
    return bool(_REACHING_OUT.search(operation))


def forbidden_nodes(meta_graphs: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Operation and name of every node of a SavedModel that reaches out, its functions included.

    Args:
        meta_graphs: `MetaGraphDef` messages.
    """
    for meta in meta_graphs:
        graph = meta.graph_def
        saving = _saver_functions(meta)
        for node in graph.node:
            if reaches_out(node.op):
                yield node.op, node.name
        for function in graph.library.function:
            saves = function.signature.name in saving
            for node in function.node_def:
                if reaches_out(node.op) and not (saves and node.op in _OF_SAVERS):
                    yield node.op, node.name


def _saver_functions(meta: Any) -> set[str]:
    """Functions that only a SavedModel's saver calls: loading in Keras never runs them."""
    saver = meta.saver_def
    own = {name.partition(":")[0] for name in (saver.save_tensor_name, saver.restore_op_name)}
    called: set[str] = set()
    elsewhere = set(meta.object_graph_def.concrete_functions)
    for node in meta.graph_def.node:
        names = called if node.name in own else elsewhere
        names.update(_functions_of(node))
    for function in meta.graph_def.library.function:
        for node in function.node_def:
            elsewhere.update(_functions_of(node))
    return called - elsewhere


def _functions_of(node: Any) -> Iterator[str]:
    yield node.op
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)
