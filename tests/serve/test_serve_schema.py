"""The OpenAPI document is true: nothing that it allows is answered with a 5xx, and it describes every status."""

import warnings

import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.checks")

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
SHORT = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3, "n": 2}
"""Greater lengths would only take time."""


def shortened(body):
    for name, most in SHORT.items():
        value = body.get(name)
        if value is None or (type(value) is int and value > most):
            body[name] = most
    return body


def test_schemathesis_finds_nothing(server):
    checks.load_all_checks()
    selected = checks.CHECKS.get_by_names(CHECKS)
    warnings.simplefilter("ignore")
    tested = set()
    for result in schemathesis.openapi.from_url(server.url + "/openapi.json").get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=30, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def tried(case):
            if isinstance(case.body, dict) and case.path.startswith("/v1/"):
                case.body = shortened(case.body)
            case.call_and_validate(checks=selected, timeout=60)

        tried()
        tested.add(operation.label)
    assert {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "GET /v1/models",
        "POST /tokenize",
    } <= tested
    assert server.settles()
