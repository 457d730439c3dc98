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
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
    TensorDtype,
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
_NO_SCORE = -99999.0


# -- requests -------------------------------------------------------------------------------------


def parse_forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    """Raises RequestError for bytes that are not such a message."""
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
    has_spans = bool(message.model_input_spans or message.loss_fn_input_spans)
    return Datum(
        ModelInput(chunks),
        {name: _tensor(tensor, name) for name, tensor in message.loss_fn_inputs.items()},
        [_span(span) for span in message.model_input_spans] if has_spans else None,
        [_span(span) for span in message.loss_fn_input_spans] if has_spans else None,
    )


def _span(message: pb.ProvenanceSpan) -> PromptProvenanceSpan | SampledProvenanceSpan:
    kind = message.WhichOneof("span")
    if kind is None:
        raise RequestError("A provenance span says neither prompt_tokens nor sampled_tokens.")
    span = getattr(message, kind)
    create = SampledProvenanceSpan if kind == "sampled_tokens" else PromptProvenanceSpan
    return create(sequence_id=span.sequence_id, offset=span.offset, length=span.length)


def _chunk(message: pb.Chunk) -> EncodedTextChunk:
    kind = message.WhichOneof("chunk")
    if kind != "encoded_text":
        raise RequestError(
            f"The input has a chunk of kind {kind!r}, and this server's models read text only. Remove it."
        )
    return EncodedTextChunk(_from_bytes(message.encoded_text.tokens, _NUMPY[pb.DTYPE_INT32], "tokens"))


def _tensor(message: pb.Tensor, name: str) -> TensorData:
    """Returns a tensor, dense or sparse."""
    if message.dtype not in _NUMPY:
        raise RequestError(f"loss_fn_inputs[{name!r}] has dtype {message.dtype}. Use float32 or int64.")
    dtype, shape = _NUMPY[message.dtype], [*message.shape]
    kind: TensorDtype = "float32" if message.dtype == pb.DTYPE_FLOAT32 else "int64"
    try:
        if not message.HasField("sparse_csr"):
            return TensorData(_from_bytes(message.dense, dtype, name), kind, shape or None)
        if len(shape) != 2 or not 0 <= math.prod(shape) <= _LARGEST_DENSE:
            raise RequestError(
                f"a sparse matrix of shape {shape} stands for more than {_LARGEST_DENSE:,} values"
            )
        csr, index = message.sparse_csr, np.dtype("<i8")
        rows = _from_bytes(csr.crow_indices, index, name).tolist()
        columns = _from_bytes(csr.col_indices, index, name).tolist()
        return TensorData(_from_bytes(csr.values, dtype, name), kind, shape, rows, columns)
    except RequestError as error:
        error.add_note(f"in loss_fn_inputs[{name!r}]")
        raise


def _from_bytes(content: bytes, dtype: np.dtype[Any], name: str) -> np.ndarray:
    if len(content) % dtype.itemsize:
        raise RequestError(f"{name} has {len(content)} bytes: must be a multiple of {dtype.itemsize}.")
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
    if response.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(response.topk_prompt_logprobs))
    if (scores := response.target_prompt_logprobs) is not None:
        message.target_prompt_logprobs.CopyFrom(_tensor_message(scores))
    return bytes(message.SerializeToString())


def _add_sequence(message: pb.SampleResponse, sequence: SampledSequence) -> None:
    added = message.sequences.add(
        stop_reason=_STOP[sequence.stop_reason], tokens=np.asarray(sequence.tokens, "<i4").tobytes()
    )
    if sequence.logprobs is not None:
        added.logprobs = _floats(sequence.logprobs)
    if sequence.topk_logprobs is not None:
        added.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk_logprobs))


def _topk(rows: Sequence[Sequence[tuple[int, float]] | None]) -> pb.TopkLogprobs:
    """Returns the most likely tokens of each position. Missing entries are token 0 with a low score."""
    k = max((len(row) for row in rows if row), default=0)
    tokens = np.zeros((len(rows), k), "<i4")
    logprobs = np.full((len(rows), k), _NO_SCORE, "<f4")
    for number, row in enumerate(rows):
        for place, (token, logprob) in enumerate(row or ()):
            tokens[number, place], logprobs[number, place] = token, logprob
    return pb.TopkLogprobs(token_ids=tokens.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(rows))


def _tensor_message(tensor: TensorData) -> pb.Tensor:
    message = pb.Tensor(dtype=_PROTO[tensor.dtype], shape=tensor.shape)
    values = np.asarray(tensor.data, "<f4" if tensor.dtype == "float32" else "<i8").tobytes()
    if tensor.sparse_crow_indices is None:
        message.dense = values
    else:
        message.sparse_csr.values = values
        message.sparse_csr.crow_indices = np.asarray(tensor.sparse_crow_indices, "<i8").tobytes()
        message.sparse_csr.col_indices = np.asarray(tensor.sparse_col_indices, "<i8").tobytes()
    return message


def _floats(values: Iterable[float | None]) -> bytes:
    return np.array([math.nan if value is None else value for value in values], "<f4").tobytes()
