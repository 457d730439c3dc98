"""Converts between the messages of the Tinker protocol and this project's types.

The message classes are those that the Tinker SDK ships (package `tinker`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from cookbook.errors import RequestError
from cookbook.types import (
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LossFnOutput,
    ModelInput,
    SampledSequence,
    SampleResponse,
    TensorData,
)

_NUMPY: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}
_PROTO = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64}
_STOP = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}
_LARGEST_DENSE = 2**24
"""How many entries a sparse tensor may stand for."""


# -- requests -------------------------------------------------------------------------------------


def parse_forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    """Raises RequestError for bytes that are no such message."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise RequestError(f"The body is not a ForwardBackwardRequest in protobuf: {error}.") from error
    return message


def loss_config(message: pb.ForwardBackwardRequest) -> dict[str, float] | None:
    """Returns the settings of the loss. Raises RequestError for one that is a text: no loss takes one."""
    config = {name: float(value) for name, value in message.loss_fn_config.items()}
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise RequestError(
                f"loss_fn_config[{name!r}] is {value.text!r}, and no loss of this server takes a text there. "
                f"Losses that clients upload are not supported: run them with forward_backward_custom."
            )
        config[name] = value.number
    return config or None


def data_of(message: pb.ForwardBackwardRequest) -> list[Datum]:
    """Returns the data. Raises RequestError, with the number of the datum, for what cannot be read."""
    data = []
    for number, datum in enumerate(message.data):
        try:
            data.append(_datum(datum))
        except RequestError as error:
            error.add_note(f"in datum {number}")
            raise
    return data


def _datum(message: pb.Datum) -> Datum:
    chunks = [_chunk(chunk) for chunk in message.model_input]
    return Datum(
        ModelInput(chunks),
        {name: TensorData(_array(tensor, name)) for name, tensor in message.loss_fn_inputs.items()},
    )


def _chunk(message: pb.Chunk) -> EncodedTextChunk:
    kind = message.WhichOneof("chunk")
    if kind != "encoded_text":
        raise RequestError(
            f"The input has a chunk of kind {kind!r}, and this server's models read text only. Remove it."
        )
    return EncodedTextChunk(_from_bytes(message.encoded_text.tokens, _NUMPY[pb.DTYPE_INT32], "tokens"))


def _array(message: pb.Tensor, name: str) -> np.ndarray:
    """Returns a tensor. A sparse one is filled up with zeros."""
    if message.dtype not in _NUMPY:
        raise RequestError(f"loss_fn_inputs[{name!r}] has dtype {message.dtype}. Use float32 or int64.")
    dtype, shape = _NUMPY[message.dtype], [*message.shape]
    if message.HasField("sparse_csr"):
        return _dense(message, name, dtype, shape)
    values = _from_bytes(message.dense, dtype, name)
    if shape and math.prod(shape) != values.size:
        raise RequestError(f"loss_fn_inputs[{name!r}] has {values.size} values, and shape {shape}.")
    return values.reshape(shape) if shape else values


def _dense(message: pb.Tensor, name: str, dtype: np.dtype[Any], shape: list[int]) -> np.ndarray:
    index = np.dtype("<i8")
    values = _from_bytes(message.sparse_csr.values, dtype, name)
    rows = _from_bytes(message.sparse_csr.crow_indices, index, name)
    columns = _from_bytes(message.sparse_csr.col_indices, index, name)
    is_valid = (
        len(shape) == 2
        and 0 <= math.prod(shape) <= _LARGEST_DENSE
        and len(rows) == shape[0] + 1
        and rows[0] == 0
        and rows[-1] == len(columns) == len(values)
        and bool((np.diff(rows) >= 0).all())
        and (not len(columns) or (columns.min() >= 0 and columns.max() < shape[1]))
    )
    if not is_valid:
        raise RequestError(
            f"loss_fn_inputs[{name!r}] is not a sparse matrix in CSR of at most {_LARGEST_DENSE:,} entries: "
            f"shape {shape}, {len(rows)} row pointers, {len(columns)} columns, {len(values)} values."
        )
    dense = np.zeros(shape, dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def _from_bytes(content: bytes, dtype: np.dtype[Any], name: str) -> np.ndarray:
    if len(content) % dtype.itemsize:
        raise RequestError(f"{name} has {len(content)} bytes, which is no number of {dtype.name} values.")
    return np.frombuffer(content, dtype)


# -- results --------------------------------------------------------------------------------------


def forward_backward_output(output: ForwardBackwardOutput) -> bytes:
    """Returns the protobuf message of a pass's result."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type, metrics=output.metrics)
    for _, alike in groupby(output.loss_fn_outputs, _form):
        _add_record(message, list(alike))
    return bytes(message.SerializeToString())


def _form(output: LossFnOutput) -> list[tuple[str, str, list[int]]]:
    """Returns what the outputs of one record have in common: names, dtypes, and all axes but the first."""
    return sorted((name, tensor.dtype, tensor.shape[1:]) for name, tensor in output.items())


def _add_record(message: pb.ForwardBackwardOutput, outputs: Sequence[LossFnOutput]) -> None:
    record = message.loss_fn_outputs.add(num_datums=len(outputs))
    for name, first in outputs[0].items():
        arrays = [np.ascontiguousarray(output[name].to_numpy()) for output in outputs]
        ends = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8")
        record.fields[name].data = b"".join(array.tobytes() for array in arrays)
        record.fields[name].offsets = ends.tobytes()
        record.fields[name].dtype = _PROTO[first.dtype]
        record.fields[name].trailing_shape.extend(first.shape[1:])


def sample_response(response: SampleResponse) -> bytes:
    """Returns the protobuf message of a response. Scores that do not exist are NaN."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for sequence in response.sequences:
        _add_sequence(message, sequence)
    if response.prompt_logprobs is not None:
        message.prompt_logprobs = _floats(response.prompt_logprobs)
    return bytes(message.SerializeToString())


def _add_sequence(message: pb.SampleResponse, sequence: SampledSequence) -> None:
    added = message.sequences.add(
        stop_reason=_STOP[sequence.stop_reason], tokens=np.asarray(sequence.tokens, "<i4").tobytes()
    )
    if sequence.logprobs is not None:
        added.logprobs = _floats(sequence.logprobs)


def _floats(values: Iterable[float | None]) -> bytes:
    return np.array([math.nan if value is None else value for value in values], "<f4").tobytes()
