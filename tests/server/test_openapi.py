"""The OpenAPI document: whole, valid, and what the server keeps to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastjsonschema import compile as compiled
from hypothesis import HealthCheck, Phase, given, settings

from cloud.server.messages import STATUSES
from cloud.server.openapi import document
from cloud.wire import API, MESSAGE_TYPE, pack_message
from tests.server.raw import TABLE, ask, bearer, example, of_server, request
from tests.server.running import RunningServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("openapi") / "data") as server:
        yield server


def test_every_operation_is_told() -> None:
    told = document()["paths"]
    for operation in TABLE.values():
        one = told[API + operation.path][operation.method.lower()]
        assert one["operationId"] == operation.name
        assert {"200", "400", "401", "403", "429", *map(str, STATUSES.values())} <= one["responses"].keys()
        assert ("parameters" in one) == operation.changes
    assert len(told) == len({operation.path for operation in TABLE.values()}) + 1


def test_references_lead_somewhere() -> None:
    whole = document()

    def follow(part: Any) -> None:
        if isinstance(part, dict):
            if "$ref" in part:
                found = whole
                for name in part["$ref"].removeprefix("#/").split("/"):
                    found = found[name]
            for each in part.values():
                follow(each)
        elif isinstance(part, list):
            for each in part:
                follow(each)

    follow(whole)
    assert json.loads(json.dumps(whole)) == whole


def test_the_served_document_is_this_one(server: RunningServer) -> None:
    reply = request(server, "GET", "/openapi.json", headers={"Authorization": of_server(server)})
    assert reply.content == document()


def test_replies_are_as_told(server: RunningServer) -> None:
    whole = document()
    error = compiled(whole["components"]["schemas"]["Error"])
    for operation in TABLE.values():
        reply = ask(server, operation.name, *example(operation), authorization=bearer(*server.new_group()))
        told = whole["paths"][API + operation.path][operation.method.lower()]["responses"]
        assert str(reply.status) in told, (operation.name, reply.content)
        if reply.status == 200:
            compiled(told["200"]["content"]["application/json"]["schema"])(reply.content)
            assert bool(operation.reply_blobs) or not reply.blobs
        else:
            error(reply.content)


def test_schemathesis_finds_nothing(server: RunningServer) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    checks = pytest.importorskip("schemathesis.checks")
    openapi = pytest.importorskip("schemathesis.specs.openapi.checks")

    @schemathesis.serializer(MESSAGE_TYPE)
    def message(context: Any, value: Any) -> bytes:
        name = next(name for name, operation in TABLE.items() if API + operation.path == context.case.path)
        n_blobs = len(example(TABLE[name])[1])
        if isinstance(value, dict):
            n_blobs += sum(len(each) for each in (value.get("chunks"), value.get("contents")) if isinstance(each, list))
        return b"".join(pack_message(value if isinstance(value, dict) else {}, [b"x"] * n_blobs))

    schema = schemathesis.openapi.from_dict(document())
    schema.config.base_url = server.url
    header = {"Authorization": of_server(server)}
    asked = [
        checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]

    @settings(
        max_examples=12,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and "timeout_s" in case.body:
            case.body["timeout_s"] = 0
        response = case.call(headers={**(case.headers or {}), **header}, timeout=20)
        assert b"Traceback" not in response.content
        assert str(server.data).encode() not in response.content
        case.validate_response(response, checks=asked)
        refused = case.call(headers={"Authorization": "Bearer 1:x"}, timeout=20)
        assert refused.status_code in (400, 401, 411, 429) or case.path == "/healthz"

    n = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        given(case=operation.as_strategy())(check)()
        n += 1
    assert n == len(TABLE) + 1
