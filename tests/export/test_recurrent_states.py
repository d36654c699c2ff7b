"""Files with fused LSTM operators start every call from zero, or keep their state on request."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras as keras
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from rl_sparsity_tf.errors import ArgumentError, VerificationError
from rl_sparsity_tf.export.export import convert_traced, export_tflite
from rl_sparsity_tf.export.recurrent import kept_states, start_at_zero
from rl_sparsity_tf.export.verification import verify_calls
from rl_sparsity_tf.layers.wrapping import strip, wrap
from rl_sparsity_tf.search.finishing import all_quantized
from rl_sparsity_tf.tflite.reading import read_flat_model
from rl_sparsity_tf.tflite.worker import shared_worker

layers = keras.layers
RESOLVERS = (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)


def lively(model):
    """Large weights, so that what is left of a call before would be seen."""
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    return model


def one_lstm(**options):
    source = layers.Input((4, 3), batch_size=options.pop("batch_size", None))
    return lively(keras.Model(source, layers.Dense(2)(layers.LSTM(5, **options)(source))))


def many_kinds():
    source = layers.Input((4, 3))
    both = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(source)
    stacked = layers.LSTM(3)(layers.LSTM(3, return_sequences=True)(both))
    begun = layers.LSTM(3)(both, initial_state=[layers.Dense(3)(stacked), layers.Dense(3)(stacked)])
    looped = layers.GRU(3)(source)
    return lively(keras.Model(source, layers.Concatenate()([stacked, begun, looped])))


def rows(count, seed=0, shape=(4, 3)):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def loop(path, x, resolver):
    """What every user writes: one interpreter, row after row."""
    interpreter = Interpreter(str(path), experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    found = []
    for row in x:
        value = row[None]
        if source["dtype"] == np.int8:
            scale, zero = source["quantization"]
            value = np.clip(np.round(value / scale) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(source["index"], value)
        interpreter.invoke()
        found.append(interpreter.get_tensor(target["index"])[0].copy())
    return np.array(found)


@pytest.mark.slow
def test_an_ordinary_loop_over_rows_gives_what_keras_gives(tmp_path):
    model, path, x = many_kinds(), tmp_path / "m.tflite", rows(6)
    report = export_tflite(model, path, "none", representative_data=x)
    assert not any("state" in note for note in report.notes)
    flat = read_flat_model(path)
    assert [operator.name for operator in flat.operators].count("UNIDIRECTIONAL_SEQUENCE_LSTM") == 5
    assert not kept_states(flat)
    for resolver in RESOLVERS:
        np.testing.assert_allclose(loop(path, x, resolver), model.predict(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["plan", "int8"])
def test_integers_do_not_depend_on_the_calls_before(quantization, tmp_path):
    model, path, x = one_lstm(), tmp_path / "m.tflite", rows(64)
    plan = all_quantized(model) if quantization == "plan" else None
    model = strip(wrap(model, plan)) if plan else model
    export_tflite(model, path, quantization, plan=plan, representative_data=x)
    for resolver in RESOLVERS:
        alone = [loop(path, x[n : n + 1], resolver)[0] for n in range(3)]
        np.testing.assert_array_equal(loop(path, x[:3], resolver), alone)
        assert not np.array_equal(alone[0], alone[1])


@pytest.mark.slow
def test_a_state_is_kept_on_request(tmp_path):
    path, x = tmp_path / "m.tflite", rows(1, shape=(8, 3))
    model = one_lstm()
    report = export_tflite(model, path, "none", stateful=True)
    assert any("as stateful=True asks for: call reset_all_variables()" in n for n in report.notes)
    pieces = np.concatenate([x[:, :4], x[:, 4:]])
    keeping = one_lstm(stateful=True, batch_size=1)
    wanted = [keeping(piece[None]).numpy()[0] for piece in pieces]
    for resolver in RESOLVERS:
        np.testing.assert_allclose(loop(path, pieces, resolver), wanted, atol=1e-5)
    fresh = export_tflite(keeping, path, "none", overwrite=True)
    assert any("lstm" in n and "every call starts from zero" in n for n in fresh.notes)
    for resolver in RESOLVERS:
        expected = model.predict(pieces, verbose=0)
        np.testing.assert_allclose(loop(path, pieces, resolver), expected, atol=1e-5)
    kept = export_tflite(keeping, path, "none", overwrite=True, stateful=True)
    assert not any("starts from zero" in note for note in kept.notes)


def test_a_file_that_depends_on_the_calls_before_is_refused(tmp_path):
    file = convert_traced(one_lstm(), tmp_path, 1, stateful=True)
    assert len(kept_states(read_flat_model(file))) == 2
    worker, x = shared_worker(), [rows(2)]
    with pytest.raises(VerificationError, match="depends on the calls before"):
        verify_calls(worker, file, x, 1)
    start_at_zero(file)
    assert not kept_states(read_flat_model(file))
    verify_calls(worker, file, x, 1)
    content = file.read_bytes()
    start_at_zero(file)
    assert file.read_bytes() == content


@pytest.mark.slow
def test_float16_starts_from_zero_or_keeps_its_state_too(tmp_path):
    """The converter restores their initial states by operators that run at the first call only."""
    model, path, x = one_lstm(), tmp_path / "m.tflite", rows(6)
    export_tflite(model, path, "float16", representative_data=x)
    for resolver in RESOLVERS:
        alone = [loop(path, x[n : n + 1], resolver)[0] for n in range(6)]
        np.testing.assert_array_equal(loop(path, x, resolver), alone)
    export_tflite(model, path, "float16", representative_data=x, overwrite=True, stateful=True)
    keeping = one_lstm(stateful=True, batch_size=1)
    wanted = [keeping(row[None]).numpy()[0] for row in x]
    for resolver in RESOLVERS:
        np.testing.assert_allclose(loop(path, x, resolver), wanted, atol=2e-2)


def test_a_state_that_nothing_keeps_is_not_promised(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(ArgumentError, match=r"nothing in the file .* keeps a state"):
        export_tflite(one_lstm(), path, "none", unroll=True, stateful=True)
    with pytest.raises(ArgumentError, match="stateful='yes' cannot be used"):
        export_tflite(one_lstm(), path, "none", stateful="yes")
    assert not path.exists()
