"""What a server tells Prometheus: the format, the numbers, and to whom."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cloud
from cloud.server.metrics import Metrics
from tests.server.running import RunningServer

_SAMPLE = re.compile(r'([a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*\})? ([0-9.e+-]+|\+Inf)')


def samples(text: str) -> dict[str, float]:
    """Every sample; fails for a line that is none."""
    found: dict[str, float] = {}
    typed = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", text, re.MULTILINE))
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) [a-z_]+ .+", line), line
            continue
        match = _SAMPLE.fullmatch(line)
        assert match, line
        assert re.sub("_(bucket|sum|count)$", "", match[1]) in typed or match[1] in typed, line
        assert line.rpartition(" ")[0] not in found, f"twice: {line}"
        found[line.rpartition(" ")[0]] = float(match[3])
    assert text.endswith("\n")
    return found


def group(number: int, counts: list[int]) -> Any:
    return SimpleNamespace(
        number=number,
        store=SimpleNamespace(figures=lambda: {"ended": [0, 0, 0, 5, 1, 0, 0], "n_commits": 3, "commit_s": 0.5}),
        backend=SimpleNamespace(overview=lambda: {"counts": counts, "n_slots": 4, "n_used": 2, "n_workers": 3}),
    )


def test_the_numbers() -> None:
    metrics = Metrics(n_slots=8)
    for duration_s in (0.0004, 0.02, 0.02, 100.0):
        metrics.answered("/v1/jobs", "POST", 200, duration_s)
    metrics.answered("", "BREW", 404, 0.001)
    metrics.answered("", "\n", 404, 0.001)
    metrics.refused(401)
    found = samples(metrics.text([group(1, [0, 7, 2, 5, 1, 0, 0])], n_slots_used=2, n_open=1))
    assert found['cloud_jobs{workgroup="1",state="queued"}'] == 7
    assert found['cloud_jobs_ended_total{workgroup="1",state="done"}'] == 5
    assert found['cloud_requests_total{route="/v1/jobs",method="POST",status="200"}'] == 4
    assert found['cloud_requests_total{route="",method="",status="404"}'] == 2
    assert found['cloud_sign_ins_refused_total{status="401"}'] == 1
    buckets = [
        value for name, value in found.items() if name.startswith('cloud_request_seconds_bucket{route="/v1/jobs"')
    ]
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[-2], buckets[-1]) == (1, 3, 4)
    assert found['cloud_request_seconds_count{route="/v1/jobs"}'] == 4
    assert found['cloud_request_seconds_sum{route="/v1/jobs"}'] == pytest.approx(100.0404)
    assert (found["cloud_slots"], found["cloud_slots_used"], found["cloud_requests_open"]) == (8, 2, 1)
    assert found['cloud_store_commits_total{workgroup="1"}'] == 3


def test_without_workgroups_it_is_still_a_page() -> None:
    assert samples(Metrics(n_slots=1).text([], n_slots_used=0, n_open=0))["cloud_slots"] == 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("metrics") / "data") as server:
        yield server


def get(server: RunningServer, **headers: str) -> tuple[int, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{server.url}/metrics", headers=named)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


@pytest.mark.usefixtures("closed_after")
def test_a_server_counts_what_it_does(server: RunningServer) -> None:
    before = samples(get(server)[1])
    cloud.setkey(server.api_key, server.api_secretkey, server.url)
    jids = cloud.map(abs, range(10))
    cloud.join([*jids, cloud.call(abs, "x")], ignore_errors=True)
    after = samples(get(server)[1])
    own = 'workgroup="1",state="{}"'

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert after[f"cloud_jobs{{{own.format('done')}}}"] == 10
    assert grown(f"cloud_jobs_ended_total{{{own.format('error')}}}") == 1
    assert grown('cloud_requests_total{route="/v1/maps",method="POST",status="200"}') == 1
    assert grown('cloud_store_commits_total{workgroup="1"}') >= 2
    assert after["process_resident_memory_bytes"] > 1e6
    cloud.delete(list(jids))
    last = samples(get(server)[1])
    assert last[f"cloud_jobs{{{own.format('done')}}}"] == 0
    assert last[f"cloud_jobs_ended_total{{{own.format('done')}}}"] >= 10


def test_what_a_proxy_hands_on_needs_a_key(server: RunningServer) -> None:
    assert get(server)[0] == 200
    assert get(server, X_Forwarded_For="127.0.0.1")[0] == 401
    assert get(server, Forwarded="for=127.0.0.1")[0] == 401
    assert get(server, Authorization="Bearer 1:wrong")[0] == 401
    refused = samples(get(server)[1])
    assert refused['cloud_sign_ins_refused_total{status="401"}'] >= 3


def test_an_administrator_sees_its_own_workgroup(server: RunningServer) -> None:
    key, secret = server.new_group()
    server_wide = get(server)[1]
    assert 'workgroup="1"' in server_wide
    status, text = get(server, Authorization=f"Bearer {key}:{secret}")
    assert status == 200
    assert 'workgroup="1"' not in text
    status, text = get(server, Authorization=f"Bearer {server.api_key}:{server.api_secretkey}")
    assert 'cloud_jobs{workgroup="1",state="done"}' in text


def test_a_key_without_scope_admin_is_refused(server: RunningServer) -> None:
    from cloud.resources.accounts import AccountStore

    store = AccountStore(str(server.data))
    try:
        key = store.create_key("admin", scopes=["read", "submit"])
    finally:
        store.close()
    assert get(server, Authorization=f"Bearer {key.api_key}:{key.api_secretkey}")[0] == 403


def test_a_server_for_other_machines_asks_everyone_for_a_key(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data", "--host", "0.0.0.0", "--insecure") as server:
        server.url = f"http://127.0.0.1:{server.port}"
        assert get(server)[0] == 401
        assert get(server, Authorization=f"Bearer {server.api_key}:{server.api_secretkey}")[0] == 200
