from typing import Any

from tritonclient.grpc import service_pb2

from dlrm.serve.messages import MESSAGES, METHODS, SERVICE


def described(descriptor: Any) -> dict[str, Any]:
    """The fields of a message: name to number, type, repetition, alternatives, and what is within.

    What another program knows besides, such as fields of its own, is left out.
    """
    fields = {}
    for field in descriptor.fields:
        within = described(field.message_type) if field.message_type else None
        of = field.containing_oneof.name if field.containing_oneof else None
        fields[field.name] = (field.number, field.type, field.is_repeated, of, within)
    return fields


def test_messages_are_those_that_a_client_of_others_has() -> None:
    theirs = service_pb2.DESCRIPTOR
    for method in theirs.services_by_name["GRPCInferenceService"].methods:
        if method.name in METHODS:
            for kind, descriptor in (
                ("Request", method.input_type),
                ("Response", method.output_type),
            ):
                ours = MESSAGES[f"{method.name}{kind}"].DESCRIPTOR
                assert described(ours) == described(descriptor), method.name
    known = {method.name for method in theirs.services_by_name["GRPCInferenceService"].methods}
    assert set(METHODS) <= known
    assert SERVICE == theirs.services_by_name["GRPCInferenceService"].full_name
