"""The Open Inference Protocol's requests: what they ask for, and what is refused with the field's name."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opd.inference import grpc_service_pb2 as pb

from opd_mesh.errors import InvalidInputError, SignalNotOfferedError, TokenizerMismatchError, TooLongError
from opd_mesh.models.tokenizer import TokenizerRoles
from teacher_server import inference_service
from teacher_server.engine import EngineFacts, HeadFacts, Signal
from teacher_server.inference_service import AskedOutput, asked_outputs

VOCAB, WIDTH = 50, 4
FINGERPRINT = "f" * 64


def facts_of(signals: tuple[Signal, ...] = tuple(Signal), dtype: str = "bfloat16", note: str = "") -> EngineFacts:
    return EngineFacts(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        dtype=dtype,
        teacher_digest="d" * 64,
        head=HeadFacts("e" * 64, VOCAB, WIDTH, dtype, False, 1.0, None),
        head_error=0.0,
        signals=signals,
        note=note,
        batch_layout="lone",
        tokenizer_fingerprint=FINGERPRINT,
        tokenizer_roles=TokenizerRoles(1, 2, 0, None),
        vocabulary={},
    )


def request_of(ids: list[int], *outputs: str, shape: list[int] | None = None, **parameters: Any) -> Any:
    """A request with raw INT64 ids."""
    request = pb.ModelInferRequest(model_name="math", raw_input_contents=[struct.pack(f"<{len(ids)}q", *ids)])
    request.inputs.add(name="input_ids", datatype="INT64", shape=[len(ids)] if shape is None else shape)
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in parameters.items():
        set_parameter(request.parameters, name, value)
    return request


def set_parameter(parameters: Any, name: str, value: object) -> None:
    kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
    setattr(parameters[name], kind, value)


def asked(request: Any, facts: EngineFacts | None = None, max_tokens: int = 16) -> list[AskedOutput]:
    return asked_outputs(request, facts or facts_of(), max_tokens=max_tokens)


# --- what is asked for -------------------------------------------------------------------------------------------
def test_logits_of_every_position_in_the_teachers_dtype_are_the_default() -> None:
    (output,) = asked(request_of([3, 4, 5]))
    assert (output.name, output.shape, output.num_bytes) == ("logits", (3, VOCAB), 3 * VOCAB * 2)
    job = output.job
    assert job.token_ids == (3, 4, 5)
    assert job.predicting_positions == (0, 1, 2)  # the last one, too: what would come next
    assert (job.signal, job.dtype) == (Signal.LOGITS, "bfloat16")
    assert asked(request_of([3]))[0].shape == (1, VOCAB)


def test_outputs_come_in_the_order_asked_for() -> None:
    hidden, logprobs, logits = asked(request_of([3, 4, 5], "hidden_states", "logprobs", "logits"))
    assert (hidden.name, hidden.shape, hidden.job.signal) == ("hidden_states", (3, WIDTH), Signal.HIDDEN_STATES)
    assert (logits.name, logits.shape) == ("logits", (3, VOCAB))
    # No token follows the last position, so it has no log-probability.
    assert (logprobs.shape, logprobs.job.predicting_positions, logprobs.job.dtype) == ((2,), (0, 1), "float32")


def test_a_batch_of_one_comes_back_as_one() -> None:
    hidden, logprobs = asked(request_of([3, 4, 5], "hidden_states", "logprobs", shape=[1, 3]))
    assert (hidden.shape, logprobs.shape) == ((1, 3, WIDTH), (1, 2))
    assert hidden.num_bytes == 3 * WIDTH * 2


@given(num_tokens=st.integers(1, 8), start=st.integers(-2, 9), end=st.integers(-2, 9))
def test_positions_are_those_asked_for_or_refused(num_tokens: int, start: int, end: int) -> None:
    request = request_of(list(range(num_tokens)), position_start=start, position_end=end)
    if 0 <= start < end <= num_tokens:
        (output,) = asked(request)
        assert output.job.predicting_positions == tuple(range(num_tokens))[start:end]
        assert output.shape == (end - start, VOCAB)
    else:
        with pytest.raises(InvalidInputError, match=r"parameters\.position_start"):
            asked(request)


def test_either_end_of_the_positions_may_be_left_out() -> None:
    assert asked(request_of([1, 2, 3, 4], position_start=2))[0].job.predicting_positions == (2, 3)
    assert asked(request_of([1, 2, 3, 4], position_end=1))[0].job.predicting_positions == (0,)
    assert asked(request_of([1, 2, 3, 4], "logprobs", position_start=2))[0].job.predicting_positions == (2,)
    request = request_of([1, 2])
    request.parameters["position_start"].uint64_param = 1
    assert asked(request)[0].job.predicting_positions == (1,)


@pytest.mark.parametrize(("ids", "end"), [([1, 2, 3], 3), ([1], 1)])
def test_the_last_position_has_no_logprob(ids: list[int], end: int) -> None:
    with pytest.raises(InvalidInputError, match="that have logprobs"):
        asked(request_of(ids, "logprobs", position_end=end))


@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", "float32"), ("BF16", "bfloat16"), ("FP16", "float16")])
def test_the_dtype_of_an_output_goes_before_that_of_the_request(datatype: str, dtype: str) -> None:
    request = request_of([1, 2], "logits", "hidden_states", dtype=datatype)
    assert [output.job.dtype for output in asked(request)] == [dtype, dtype]
    set_parameter(request.outputs[0].parameters, "dtype", "FP32")
    assert [output.job.dtype for output in asked(request)] == ["float32", dtype]


@pytest.mark.parametrize(
    ("datatype", "field", "dtype"), [("INT64", "int64_contents", "<i8"), ("INT32", "int_contents", "<i4")]
)
def test_ids_are_raw_or_typed_of_64_or_32_bits(datatype: str, field: str, dtype: str) -> None:
    request = request_of([1, 2, 49])
    request.inputs[0].datatype = datatype
    request.raw_input_contents[0] = np.array([1, 2, 49], dtype).tobytes()
    assert asked(request)[0].job.token_ids == (1, 2, 49)
    del request.raw_input_contents[:]
    getattr(request.inputs[0].contents, field).extend([1, 2, 49])
    assert asked(request)[0].job.token_ids == (1, 2, 49)


def test_a_tokenizer_is_checked_where_it_is_named() -> None:
    assert asked(request_of([1], tokenizer_fingerprint=FINGERPRINT))
    with pytest.raises(TokenizerMismatchError, match=r"aaaa….*'math'.*ffff…") as caught:
        asked(request_of([1], tokenizer_fingerprint="a" * 64))
    assert caught.value.metadata["teacher_fingerprint"] == FINGERPRINT


def test_hints_for_other_servers_change_nothing() -> None:
    request = request_of([1, 2], "logits", content_type="np")
    set_parameter(request.inputs[0].parameters, "content_type", "np")
    set_parameter(request.outputs[0].parameters, "content_type", "np")
    assert asked(request) == asked(request_of([1, 2], "logits"))


# --- what is refused ---------------------------------------------------------------------------------------------
def refused(change: Any, field: str, match: str, error: type[Exception] = InvalidInputError) -> None:
    request = request_of([1, 2, 3], "logits")
    change(request)
    with pytest.raises(error, match=match) as caught:
        asked(request)
    assert caught.value.field == field  # type: ignore[attr-defined]


def _second_input(request: Any) -> None:
    request.inputs.add(name="attention_mask", datatype="INT64", shape=[3])
    request.raw_input_contents.append(b"\1" * 24)


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no input": (lambda r: r.ClearField("inputs"), "inputs", "expected one input, 'input_ids'; got none"),
    "another name": (lambda r: setattr(r.inputs[0], "name", "ids"), "inputs", "got 'ids'"),
    "a second input": (_second_input, "inputs", "got 'input_ids', 'attention_mask'"),
    "floats": (lambda r: setattr(r.inputs[0], "datatype", "FP32"), "inputs[0].datatype", "INT64 or INT32"),
    "no shape": (lambda r: r.inputs[0].ClearField("shape"), "inputs[0].shape", r"\[\]; expected \[N\]"),
    "a batch": (lambda r: r.inputs[0].shape.insert(0, 2), "inputs[0].shape", "One sequence a request"),
    "three dimensions": (lambda r: r.inputs[0].shape.extend([1, 1]), "inputs[0].shape", r"\[3, 1, 1\]"),
    "no tokens": (lambda r: r.inputs[0].shape.__setitem__(0, 0), "inputs[0].shape", "at least one"),
    "a negative size": (lambda r: r.inputs[0].shape.__setitem__(0, -3), "inputs[0].shape", "at least one"),
    "too few bytes": (
        lambda r: r.inputs[0].shape.__setitem__(0, 4),
        "raw_input_contents[0]",
        r"24 bytes, but shape \[4\] of INT64 has 32",
    ),
    "too many raw elements": (lambda r: r.raw_input_contents.append(b""), "raw_input_contents", "2 elements for 1"),
    "raw and typed": (
        lambda r: r.inputs[0].contents.int64_contents.extend([1, 2, 3]),
        "raw_input_contents",
        "exclude each other",
    ),
    "no data": (lambda r: r.ClearField("raw_input_contents"), "inputs[0].contents", "0 values in int64_contents"),
    "an id too high": (
        lambda r: r.raw_input_contents.__setitem__(0, struct.pack("<3q", 1, 50, 3)),
        "input_ids",
        "token id 50 at position 1 is outside the vocabulary of 50",
    ),
    "a negative id": (
        lambda r: r.raw_input_contents.__setitem__(0, struct.pack("<3q", 1, 2, -1)),
        "input_ids",
        "token id -1 at position 2",
    ),
    "an unknown output": (
        lambda r: setattr(r.outputs[0], "name", "probs"),
        "outputs[0].name",
        "no output 'probs'; there are logits, hidden_states, logprobs",
    ),
    "an output twice": (lambda r: r.outputs.add(name="logits"), "outputs", "named twice"),
    "an unknown dtype": (
        lambda r: set_parameter(r.parameters, "dtype", "INT8"),
        "parameters.dtype",
        "'INT8'; expected FP32, BF16, FP16",
    ),
    "an unknown dtype of an output": (
        lambda r: set_parameter(r.outputs[0].parameters, "dtype", "bf16"),
        "outputs[0].parameters.dtype",
        "'bf16'",
    ),
    "a dtype that is no text": (
        lambda r: set_parameter(r.parameters, "dtype", 16),
        "parameters.dtype",
        "expected a string_param, got int64_param",
    ),
    "a position that is no integer": (
        lambda r: set_parameter(r.parameters, "position_start", 1.0),
        "parameters.position_start",
        "expected an int64_param, got double_param",
    ),
    "an empty parameter": (
        lambda r: r.parameters["position_end"].SetInParent(),
        "parameters.position_end",
        "got None",
    ),
    "a misspelt parameter": (
        lambda r: set_parameter(r.parameters, "position_begin", 1),
        "parameters.position_begin",
        "known are position_start, position_end",
    ),
    "priorities": (lambda r: set_parameter(r.parameters, "priority", 1), "parameters.priority", "no parameter"),
    "shared memory in": (
        lambda r: set_parameter(r.inputs[0].parameters, "shared_memory_region", "x"),
        "inputs[0].parameters.shared_memory_region",
        "known are none",
    ),
    "a classification": (
        lambda r: set_parameter(r.outputs[0].parameters, "classification", 3),
        "outputs[0].parameters.classification",
        "known are dtype",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_with_the_fields_name(case: str) -> None:
    refused(*REFUSED[case])


def test_typed_ids_belong_into_the_field_of_their_datatype() -> None:
    def change(request: Any) -> None:
        request.ClearField("raw_input_contents")
        request.inputs[0].contents.int_contents.extend([1, 2, 3])

    refused(change, "inputs[0].contents", "INT64 belongs into int64_contents, got int_contents")


def test_a_long_sequence_is_refused_before_its_ids_are_read() -> None:
    request = request_of([1, 2, 3])
    request.inputs[0].shape[0] = 1 << 40  # the bytes do not fit either
    with pytest.raises(TooLongError, match="at most 16 are accepted"):
        asked(request)


def test_what_a_teacher_does_not_offer_is_refused_with_its_note() -> None:
    facts = facts_of(signals=(Signal.LOGITS, Signal.TOKEN_LOGPROBS), note="hidden states are not offered: no proof")
    assert asked(request_of([1]), facts)
    with pytest.raises(
        SignalNotOfferedError, match=r"offers logits, logprobs, not hidden_states\. .*no proof"
    ) as caught:
        asked(request_of([1], "hidden_states"), facts)
    assert caught.value.field == "outputs[0].name"


# --- the size of an answer ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("outputs", [("logits",), ("logits", "hidden_states", "logprobs")])
@pytest.mark.parametrize("num_tokens", [2, 9])
def test_the_limit_is_that_of_the_message_itself(outputs: tuple[str, ...], num_tokens: int) -> None:
    request = request_of(list(range(num_tokens)), *outputs)
    request.id = "x" * 100
    wanted = asked(request)
    response = inference_service._answer_without_data(request, facts_of(), wanted)
    full = pb.ModelInferResponse()
    full.CopyFrom(response)
    full.raw_output_contents.extend(bytes(output.num_bytes) for output in wanted)
    spare = inference_service.TENSOR_FRAME_BYTES * len(wanted)
    inference_service._check_fits(response, wanted, full.ByteSize() + spare)
    with pytest.raises(TooLongError) as caught:
        inference_service._check_fits(response, wanted, full.ByteSize() - 1)
    assert caught.value.field == "outputs"


def test_a_refused_answer_says_how_many_rows_would_fit() -> None:
    request = request_of(list(range(10)), dtype="FP32")
    wanted = asked(request)
    response = inference_service._answer_without_data(request, facts_of(), wanted)
    limit = 1500
    with pytest.raises(
        TooLongError, match=r"10 rows and 2000 bytes, but a message holds 1500: (\d+) rows fit"
    ) as caught:
        inference_service._check_fits(response, wanted, limit)
    assert "TeacherService" in str(caught.value)
    fitting = int(str(caught.value).split(": ")[2].split()[0])
    for rows, fits in ((fitting, True), (fitting + 1, False)):
        request = request_of(list(range(10)), dtype="FP32", position_end=rows)
        fewer = asked(request)
        smaller = inference_service._answer_without_data(request, facts_of(), fewer)
        if fits:
            inference_service._check_fits(smaller, fewer, limit)
        else:
            with pytest.raises(TooLongError):
                inference_service._check_fits(smaller, fewer, limit)
