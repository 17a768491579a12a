"""schemathesis asks what /openapi.json describes, rightly and wrongly; no answer may be a 5xx or undocumented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings


@pytest.fixture(scope="module")
def schema(closed_app, key):
    return schemathesis.openapi.from_asgi("/openapi.json", closed_app)


api = schemathesis.pytest.from_fixture("schema")


@api.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case, key):
    case.call_and_validate(headers={"Authorization": f"Bearer {key}"})
