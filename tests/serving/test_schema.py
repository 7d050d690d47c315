"""Calls made up from the host's own OpenAPI schema: never a 5xx, and every error in OpenAI's form."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.serving.sites import made_up_adapter


@pytest.mark.parametrize("examples", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_no_made_up_call_breaks_the_host(scripted, tmp_path, examples):
    site = scripted('{"a": "日本"}')
    adapter = made_up_adapter(site.store, tmp_path, 1)
    schema = schemathesis.openapi.from_dict(site.http.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == {
        "/v1/chat/completions", "/v1/completions", "/health", "/metrics",
    }  # fmt: skip
    seen: dict[int, int] = {}
    for operation in operations:
        count = examples if operation.method == "post" else 5

        @seed(11)
        @settings(
            max_examples=count, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(operation.as_strategy())
        def one(case):
            if (case.headers or {}).get("X-Flash-Adapter"):
                case.headers.update(adapter.headers)
            taken = case.as_transport_kwargs(base_url=site.url, headers=dict(site.http.headers))
            taken = {name: value for name, value in taken.items() if name in TAKEN}
            try:
                answer = site.http.request(**taken)
            except (httpx.InvalidURL, UnicodeEncodeError, httpx.LocalProtocolError):
                return  # no such request can be sent
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (taken, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        one()
    assert {200, 400} <= set(seen)
    assert site.room.traffic.in_flight == 0


TAKEN = {"method", "url", "headers", "params", "json", "content", "data", "files", "cookies"}
