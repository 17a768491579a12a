"""schemathesis asks what /openapi.json describes, rightly and wrongly; no answer may be a 5xx or undocumented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

OPERATIONS = (
    "POST /v1/colorize",
    "POST /v1/colorize/stream",
    "POST /v1/corrections",
    "GET /v1/models",
    "GET /healthz",
    "GET /readyz",
)


@pytest.fixture(scope="module")
def operations(closed_app):
    """By label. Not through schemathesis' own plugin, which newer versions of pytest do not know."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", closed_app)
    return {operation.label: operation for operation in (found.ok() for found in schema.get_all_operations())}


def test_all_of_them_are_asked(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_as_described(operations, key, label):
    @given(case=operations[label].as_strategy())
    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case):
        # No schema can say how large a picture is: one of 1 px is refused with 422, as described.
        case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, excluded_checks=[positive_data_acceptance])

    check()
