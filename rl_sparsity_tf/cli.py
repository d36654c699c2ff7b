"""The command line: `rl-sparsity demo`, `compress`, `report`, `export`, `inspect`, `benchmark`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_sparsity_tf.console import quiet_libraries
from rl_sparsity_tf.errors import ArgumentError, RLSparsityError, one_line, printable
from rl_sparsity_tf.version import __version__

if TYPE_CHECKING:
    from rl_sparsity_tf.allocation.target import Target
    from rl_sparsity_tf.callbacks import Callback
    from rl_sparsity_tf.search.result import Result
    from rl_sparsity_tf.tflite.inspection import FileInspection
    from rl_sparsity_tf.tflite.timing import Timing

_GROUPS = ("element", "block4", "block16", "channel", "auto")
_SMALLEST = {"episodes": 1, "seed": 0, "batch_size": 1, "finetune_epochs": 0, "finalists": 1}
_QUANTIZATIONS = ("plan", "none", "dynamic", "int8", "float16")
_RECOVERIES = ("least_squares", "finetune", "none")
_DEFAULT_SPARSITY = 0.9
NO_FILE = 3
"""Exit code of a search that ended without a .tflite file; all else of its result is saved."""
_SIGPIPE = 13
# Rows that say what activations range over.
_CALIBRATED = 512


EXAMPLES = {
    "demo": ("rl-sparsity demo", "rl-sparsity demo --dataset fashion_mnist --compare"),
    "compress": (
        "rl-sparsity compress model.keras --data data.npz --output run --target-bytes 50000",
        "rl-sparsity compress model.keras --dataset digits --output run --max-accuracy-drop 0.01",
        "rl-sparsity compress model.keras --data data.npz --output run --import my_layers",
    ),
    "export": (
        "rl-sparsity export run --output model.tflite --quantization float16",
        "rl-sparsity export run --output model.tflite --quantization int8 --data data.npz",
    ),
    "inspect": ("rl-sparsity inspect model.tflite", "rl-sparsity inspect model.tflite --json"),
    "benchmark": ("rl-sparsity benchmark small.tflite --against dense.tflite --runs 100",),
    "report": ("rl-sparsity report run", "rl-sparsity report run --output page.html"),
}
"""What the help of every command shows."""


class _Parser(argparse.ArgumentParser):
    def show(self, examples: Sequence[str]) -> None:
        """Has examples printed below the help."""
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples)

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line instead of the usage and a line."""
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="rl-sparsity",
        description="Compress trained Keras models by reinforcement learning, export TFLite.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    demo = commands.add_parser("demo", help="train a small network, compress it, compare")
    demo.add_argument(
        "--dataset", default="digits", help="digits, or a TFDS image classification set"
    )
    demo.add_argument(
        "--memory-limit-mb", type=float, default=2048, help="what the data set may take"
    )
    demo.add_argument("--output", help="folder for the run")
    demo.add_argument(
        "--finetune-epochs", type=int, help="epochs of every fine-tuning (about 1,500 steps)"
    )
    _add_search_arguments(demo)

    compress = commands.add_parser("compress", help="compress a model of your own")
    compress.add_argument(
        "model",
        help=".keras file of Keras 3 or tf_keras; .h5 file or SavedModel folder of tf_keras",
    )
    data = compress.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data", help=".npz with x_train, y_train, x_validation, y_validation[, x_test, y_test]"
    )
    data.add_argument("--dataset", help="digits, or a TFDS image classification set")
    compress.add_argument(
        "--memory-limit-mb", type=float, default=2048, help="what a TFDS data set may take"
    )
    compress.add_argument("--output", required=True, help="folder for the run")
    compress.add_argument(
        "--group",
        choices=_GROUPS,
        help="unit of decision (element; channel for targets of macs and latency; auto, which also "
        "chooses 8 or 4 bits, for --target-bytes)",
    )
    compress.add_argument(
        "--shuffle",
        choices=("neighbours", "channels"),
        default="neighbours",
        help="swap groups, or permute channels before the search (blocks only)",
    )
    compress.add_argument(
        "--int4",
        choices=("all", "fast", "none"),
        help="kernels that --group auto may store in 4 bits (fast: no convolutions)",
    )
    for name, what in (
        ("include", "compress only this layer (or path or pattern); frozen ones only so"),
        ("exclude", "leave this layer (or path or pattern) as it is"),
    ):
        compress.add_argument(
            f"--{name}", action="append", metavar="NAME", help=f"{what}; repeatable"
        )
    compress.add_argument("--latency-table", help="JSON of layers' times (else measured)")
    compress.add_argument("--hierarchy", action="store_true", help="let an agent order the layers")
    compress.add_argument(
        "--strategy",
        choices=("construct", "improve"),
        default="construct",
        help="episodes that build a plan, or moves from the best one (construct)",
    )
    compress.add_argument("--quantization", choices=_QUANTIZATIONS, help="how to export")
    compress.add_argument(
        "--recovery",
        choices=_RECOVERIES,
        help="how plans recover before they are evaluated (least_squares where layers allow it)",
    )
    compress.add_argument("--batch-size", type=int, help="rows in a training batch")
    compress.add_argument(
        "--finetune-epochs", type=int, help="epochs of the final fine-tuning (about 1,500 steps)"
    )
    compress.add_argument("--finalists", type=int, help="plans fine-tuned at the end (3)")
    compress.add_argument(
        "--unroll", action="store_true", help="export recurrent layers without a loop"
    )
    compress.add_argument(
        "--loss", help="loss to compile the model with, if it is saved uncompiled"
    )
    _add_loading_arguments(compress)
    compress.add_argument(
        "--policy", metavar="FILE", help="what an agent has learned before, to begin with"
    )
    compress.add_argument(
        "--save-policy", metavar="FILE", help="where to write what the agent has learned (.npz)"
    )
    compress.add_argument(
        "--patience",
        type=int,
        help="episodes without a better value, after which there are no more",
    )
    compress.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="time after which episodes end"
    )
    compress.add_argument(
        "--tensorboard", metavar="FOLDER", help="where to write event files for TensorBoard"
    )
    compress.add_argument("--overwrite", action="store_true", help="replace a run in --output")
    compress.add_argument(
        "--any-versions",
        action="store_true",
        help="continue a run in --output that was begun with other versions of libraries",
    )
    _add_search_arguments(compress, sizes=True)

    report = commands.add_parser("report", help="make a page of a run, finished or cut off")
    report.add_argument("directory", help="folder of the run")
    report.add_argument("--output", help="file to write (report.html in the folder)")
    report.add_argument("--overwrite", action="store_true", help="replace the file at --output")

    export = commands.add_parser("export", help="write the model of a finished run as another file")
    export.add_argument("directory", help="folder of the run")
    export.add_argument("--output", required=True, help=".tflite file to write")
    export.add_argument(
        "--quantization", choices=_QUANTIZATIONS, default="plan", help="how it is stored (plan)"
    )
    rows = export.add_mutually_exclusive_group()
    rows.add_argument(
        "--data", help=".npz file whose x_train says what int8 activations range over"
    )
    rows.add_argument("--dataset", help="the same of digits, or of a data set of TFDS")
    export.add_argument("--batch-size", type=int, help="rows of every call of the file")
    export.add_argument("--overwrite", action="store_true", help="replace the file at --output")
    _add_loading_arguments(export)

    inspect = commands.add_parser("inspect", help="say what a .tflite file stores, and how")
    inspect.add_argument("file", help="any .tflite file")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    benchmark = commands.add_parser("benchmark", help="time .tflite files in LiteRT")
    benchmark.add_argument("file", help="any .tflite file")
    benchmark.add_argument("--against", help="a second file, timed in turns with the first")
    benchmark.add_argument("--runs", type=int, default=50, help="samples of each file")
    benchmark.add_argument("--threads", type=int, default=1, help="threads of LiteRT")
    benchmark.add_argument("--no-xnnpack", action="store_true", help="time without XNNPACK")
    benchmark.add_argument("--batch-size", type=int, help="rows, if the files leave it open")
    benchmark.add_argument("--json", action="store_true", help="print JSON")
    for name, examples in EXAMPLES.items():
        commands.choices[name].show(examples)
    parser.show([one for examples in EXAMPLES.values() for one in examples[:1]])
    return parser


def _add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module, from the current folder too, for the model's classes; repeatable",
    )
    parser.add_argument(
        "--trusted", action="store_true", help="open files that contain code of their own"
    )


def _add_search_arguments(parser: argparse.ArgumentParser, *, sizes: bool = False) -> None:
    parser.add_argument("--agent", choices=("dqn", "ppo"), help="who decides (dqn)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--target-sparsity", type=float, help="share of weights to become zero (default 0.9)"
    )
    if sizes:
        target.add_argument("--target-bytes", type=int, help="bytes of the .tflite file at most")
        target.add_argument(
            "--target-gzip-bytes", type=int, help="bytes of the gzipped file at most"
        )
        target.add_argument(
            "--target-macs", type=float, help="share of the dense model's multiplications at most"
        )
        target.add_argument(
            "--target-latency", type=float, help="share of the dense file's time at most"
        )
        target.add_argument(
            "--max-accuracy-drop",
            type=float,
            help="the smallest file whose validation metric is at most so much worse",
        )
    parser.add_argument(
        "--curriculum",
        choices=("constant", "linear", "staged"),
        default="constant",
        help="how the target rises over the episodes",
    )
    parser.add_argument("--episodes", type=int, help="passes over all layers")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    parser.add_argument(
        "--compare", action="store_true", help="run all contenders under the same conditions"
    )
    parser.add_argument(
        "--verbose", type=int, choices=(0, 1, 2), default=1, help="0 silent, 2 a line an episode"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program's name; by default the process's.

    Returns:
        0, or 2 for wrong use, bad input, or what the system refuses, which is said in one line on
        standard error; 3 where a search ended and no .tflite file of its result could be verified;
        130 after Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    commands = {
        "demo": _demo,
        "compress": _compress,
        "report": _report,
        "export": _export,
        "inspect": _inspect,
        "benchmark": _benchmark,
    }
    # TensorFlow takes seconds to load, and only these need it.
    heavy = options.command in ("demo", "compress", "export")
    try:
        with quiet_libraries() if heavy else contextlib.nullcontext():
            _check_numbers(options)
            ended = commands[options.command](options)
            sys.stdout.flush()
    except RLSparsityError as error:
        message = _in_options(" ".join(str(error).split()), options)
        print(f"rl-sparsity {options.command}: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads what is printed has seen enough: `... | head`
        _print_no_more()
        return 128 + _SIGPIPE
    except OSError as error:
        _print_no_more()
        print(f"rl-sparsity {options.command}: {one_line(error)}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"rl-sparsity {options.command}: {_interrupted(error, options)}", file=sys.stderr)
        return 130
    return ended or 0


def _without_file(result: Result, options: argparse.Namespace) -> int:
    """Says that a search has made no file, if it has not; returns the exit code."""
    if result.report is not None:
        return 0
    kept = f"; all else is in {options.output}" if options.output else ""
    reason = printable(" ".join(result.metrics["warnings"][-1].split()))
    print(f"rl-sparsity {options.command}: {reason}{kept}", file=sys.stderr)
    return NO_FILE


def _print_no_more() -> None:
    """Lets Python end without another try to print what could not be printed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted(error: KeyboardInterrupt, options: argparse.Namespace) -> str:
    """What Ctrl-C has ended, and how to go on."""
    episodes = getattr(error, "episodes", None)
    message = "interrupted" + ("" if episodes is None else f" after episode {episodes}")
    folder = getattr(options, "output", None)
    if not folder or not os.path.isfile(os.path.join(folder, "manifest.json")):
        return message
    if os.path.exists(os.path.join(folder, "metrics.json")):
        return f"{message}; the result is in {folder}"
    without = " without --overwrite" if getattr(options, "overwrite", False) else ""
    return f"{message}; the same command{without} goes on from {folder}"


def _check_numbers(options: argparse.Namespace) -> None:
    from rl_sparsity_tf.checks import check_count

    # The search checks them as well, but after data and models are loaded, and trained by the demo.
    for name, smallest in _SMALLEST.items():
        value = getattr(options, name, None)
        if name == "episodes" and getattr(options, "policy", None):
            smallest = 0
        if value is not None:
            check_count(name, value, smallest)


def _in_options(message: str, options: argparse.Namespace) -> str:
    """Says of arguments that can be passed how to pass them here; the demo has fewer of them."""
    for name in ("overwrite", "trusted", "any_versions"):
        if hasattr(options, name):
            message = message.replace(f"{name}=True", f"--{name.replace('_', '-')}")
        else:
            message = re.sub(rf",? (or )?pass {name}=True[^,.]*", "", message)
    registering = r"import what registers (yours|them) \(@[\w.]+\)( before loading)?"
    message = re.sub(registering, r"pass --import MODULE, the module that has \1", message)
    return message.replace("import it before loading", "pass --import MODULE")


def _check_loss(name: str) -> None:
    import tf_keras as keras

    try:
        keras.losses.get(name)
    except ValueError as error:
        known = [loss for loss in dir(keras.losses) if loss.islower() and loss[0] != "_"]
        # Only misspellings: a half-remembered name is closer to that of another loss.
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ArgumentError(
            f"--loss {name} is not known. Expected the name of one of Keras's losses, such as "
            f"sparse_categorical_crossentropy or mse.{hint}"
        ) from error


def _target(options: argparse.Namespace) -> Target:
    from rl_sparsity_tf.allocation.target import Target

    given = {
        "sparsity": options.target_sparsity,
        "tflite_bytes": getattr(options, "target_bytes", None),
        "gzip_bytes": getattr(options, "target_gzip_bytes", None),
        "macs": getattr(options, "target_macs", None),
        "latency": getattr(options, "target_latency", None),
        "max_accuracy_drop": getattr(options, "max_accuracy_drop", None),
    }
    given = {name: value for name, value in given.items() if value is not None}
    return Target(**(given or {"sparsity": _DEFAULT_SPARSITY}))


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments of those names that the command line gives; others have their defaults."""
    found = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _callbacks(options: argparse.Namespace) -> list[Callback]:
    """The callbacks that the command line asks for."""
    from rl_sparsity_tf.callbacks import EarlyStopping, TensorBoard, TimeLimit

    makers: dict[str, Callable[[Any], Callback]] = {
        "patience": EarlyStopping,
        "time_limit": TimeLimit,
        "tensorboard": TensorBoard,
    }
    return [makers[name](value) for name, value in _given(options, *makers).items()]


def _demo(options: argparse.Namespace) -> int:
    from rl_sparsity_tf.demo import run_demo
    from rl_sparsity_tf.search.run_directory import check_unfinished

    # Before the demo trains the network that is to be compressed.
    target = _target(options)
    if options.output is not None:
        check_unfinished(options.output)
    result = run_demo(
        options.dataset,
        output=options.output,
        seed=options.seed,
        sparsity=target.value,
        curriculum=options.curriculum,
        memory_limit_mb=options.memory_limit_mb,
        contenders="all" if options.compare else None,
        **_given(options, "agent", "episodes", "finetune_epochs", "verbose"),
    )
    return _without_file(result, options)


def _compress(options: argparse.Namespace) -> int:
    from rl_sparsity_tf.layers.loading import user_modules

    with user_modules(options.imports):
        return _compress_known(options)


def _compress_known(options: argparse.Namespace) -> int:
    from rl_sparsity_tf.agents.policies import check_policy_path
    from rl_sparsity_tf.data.datasets import load_dataset, load_npz
    from rl_sparsity_tf.demo import search_data
    from rl_sparsity_tf.errors import ArgumentError, ModelError
    from rl_sparsity_tf.layers.loading import load_model
    from rl_sparsity_tf.search.arguments import SearchOptions
    from rl_sparsity_tf.search.comparison import compare, comparison_table
    from rl_sparsity_tf.search.compressor import Compressor
    from rl_sparsity_tf.search.run_directory import check_directory, check_free

    check_free(check_directory(options.output))
    target = _target(options)
    callbacks = _callbacks(options)
    if options.save_policy is not None:
        check_policy_path(options.save_policy, overwrite=options.overwrite)
        if options.hierarchy:
            raise ArgumentError(
                "--save-policy cannot be used with --hierarchy: of its two agents none can decide "
                "alone. Leave one of the two out."
            )
    if options.loss is not None:
        _check_loss(options.loss)
    model = load_model(options.model, trusted=options.trusted)
    if options.loss is not None:
        model.compile(loss=options.loss)
    elif getattr(model, "optimizer", None) is None:
        raise ModelError(
            f"{options.model} is saved without a loss, so neither training nor validation is "
            "possible. Pass --loss, for example --loss sparse_categorical_crossentropy, or save "
            "the model compiled."
        )
    compressor = Compressor(
        model,
        target,
        agent=options.agent,
        group=options.group,
        directory=options.output,
        seed=options.seed,
        recovery=options.recovery,
        latency_table=options.latency_table,
        shuffle=options.shuffle,
        int4=options.int4,
        curriculum=options.curriculum,
        policy=options.policy,
        hierarchy=options.hierarchy,
        strategy=options.strategy,
        include=options.include,
        exclude=options.exclude,
    )
    data = (
        load_npz(options.data)
        if options.data is not None
        else load_dataset(
            options.dataset, seed=options.seed, memory_limit_mb=options.memory_limit_mb
        )
    )
    given = _given(options, *(field.name for field in dataclasses.fields(SearchOptions)))
    result = compressor.search(
        **search_data(data), **{**given, "dataset": data.name}, callbacks=callbacks
    )
    if options.save_policy is not None:
        result.save_policy(options.save_policy, overwrite=options.overwrite)
    if options.compare:
        # The result is on the disk by now; only its list of baselines was empty.
        compare(compressor, "all", options.verbose)
        result.save(options.output, overwrite=True)
    if options.verbose:
        result.summary()
        comparison_table(result.metrics)
        print(printable(f"files in {options.output}"))
    return _without_file(result, options)


def _report(options: argparse.Namespace) -> None:
    from rl_sparsity_tf.report.page import write_report

    path = write_report(options.directory, options.output, overwrite=options.overwrite)
    print(printable(f"report in {path}"))


def _export(options: argparse.Namespace) -> None:
    from rl_sparsity_tf.data.datasets import load_dataset, load_npz
    from rl_sparsity_tf.export.export import export_tflite
    from rl_sparsity_tf.layers.loading import load_model, user_modules
    from rl_sparsity_tf.layers.plan import CompressionPlan

    folder = Path(options.directory)
    missing = [name for name in ("model.keras", "plan.json") if not (folder / name).is_file()]
    if missing:
        raise ArgumentError(
            f"{options.directory} holds no {' and no '.join(missing)}. Expected the folder of a "
            "finished run: what rl-sparsity compress wrote to --output."
        )
    rows = None
    if options.data is not None or options.dataset is not None:
        data = load_npz(options.data) if options.data else load_dataset(options.dataset)
        rows = data.x_train[:_CALIBRATED]
    with user_modules(options.imports):
        model = load_model(folder / "model.keras", trusted=options.trusted)
    by_plan = options.quantization == "plan"
    export_tflite(
        model,
        options.output,
        options.quantization,
        plan=CompressionPlan.load(folder / "plan.json") if by_plan else None,
        representative_data=rows,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    ).summary()


def _inspect(options: argparse.Namespace) -> None:
    from rl_sparsity_tf.tflite.inspection import inspect_tflite

    _print(inspect_tflite(options.file), options)


def _benchmark(options: argparse.Namespace) -> None:
    from rl_sparsity_tf.tflite.timing import benchmark_tflite

    timing = benchmark_tflite(
        options.file,
        options.against,
        runs=options.runs,
        threads=options.threads,
        xnnpack=not options.no_xnnpack,
        batch_size=options.batch_size,
    )
    _print(timing, options)


def _print(found: FileInspection | Timing, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        found.summary()


if __name__ == "__main__":
    sys.exit(main())
