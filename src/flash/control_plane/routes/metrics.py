"""`GET /metrics`: the caller's org and this server's engines, for the server's owner the whole server too, in
Prometheus' text form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import psutil
from fastapi import APIRouter, Response

from flash.control_plane.auth import Me, Plane
from flash.control_plane.services import Services
from flash.control_plane.traffic import BUCKETS_S
from flash.storage import deployments, engines, runs
from flash.storage.identity import Role

router = APIRouter(tags=["server"])

Sample = tuple[str, Mapping[str, str], float]  # suffix of the name, labels, value


@router.get("/metrics", response_class=Response)
def metrics(me: Me, plane: Plane) -> Response:
    lines = [*_lines(plane, me.org), *(_server_lines(plane) if me.role is Role.OWNER else ())]
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _lines(plane: Services, org: str) -> Iterator[str]:
    with plane.database.read() as connection:
        by_state = runs.count_by_state(connection, org=org)
        live = engines.live(connection)
        names = len(deployments.list_live(connection, org=org))
    yield from _metric(
        "flash_runs", "gauge", "Runs by state.", (("", {"state": state}, n) for state, n in by_state.items())
    )
    yield from _metric("flash_deployments", "gauge", "Run names that are live.", [("", {}, names)])
    states = Counter((engine.model, engine.state.value) for engine in live)
    yield from _metric(
        "flash_engines", "gauge", "Engines by base and state.",
        (("", {"model": model, "state": state}, n) for (model, state), n in states.items()),
    )  # fmt: skip
    answers = plane.traffic.answers(org)
    yield from _metric(
        "flash_requests_total", "counter", "Requests to /v1 that were answered.",
        (("", {"path": path, "status": str(status)}, n) for (path, status), n in sorted(answers.items())),
    )  # fmt: skip
    yield from _metric(
        "flash_request_seconds", "histogram", "From a request's arrival to the end of its answer.", _seconds(plane, org)
    )
    for stat in sorted({stat for engine in live for stat in engine.stats}):
        kind = "counter" if stat.endswith("_total") else "gauge"
        yield from _metric(
            f"flash_engine_{_clean(stat)}", kind, "As the engine's last heartbeat told.",
            (
                ("", {"engine": engine.id, "model": engine.model}, engine.stats[stat])
                for engine in live
                if stat in engine.stats
            ),
        )  # fmt: skip


def _server_lines(plane: Services) -> Iterator[str]:
    """What is everybody's together: for the owner alone."""
    with plane.database.read() as connection:
        everyone = runs.count_everyones(connection)
        oldest = runs.oldest_queued(connection)
    waited = 0.0 if oldest is None else max(0.0, plane.clock() - oldest)
    process = psutil.Process()
    yield from _metric(
        "flash_server_runs", "gauge", "Every org's runs by state.",
        (("", {"org": org, "state": state}, n) for (org, state), n in sorted(everyone.items())),
    )  # fmt: skip
    yield from _metric("flash_server_queue_seconds", "gauge", "Since the oldest queued run came.", [("", {}, waited)])
    leads = 1 if plane.lead.term else 0
    yield from _metric("flash_server_leads", "gauge", "Whether this server is the one that acts.", [("", {}, leads)])
    yield from _metric("flash_server_followers", "gauge", "Open event streams.", [("", {}, plane.followers.count)])
    counts = sorted(plane.requests.counts().items())
    yield from _metric(
        "flash_http_requests_total", "counter", "Requests by route.",
        (("", _marks(key), number) for key, (number, _) in counts),
    )  # fmt: skip
    yield from _metric(
        "flash_http_request_seconds_total", "counter", "Seconds that they took, streams included.",
        (("", _marks(key), seconds) for key, (_, seconds) in counts),
    )  # fmt: skip
    memory = process.memory_info().rss
    yield from _metric("process_resident_memory_bytes", "gauge", "Memory of this server.", [("", {}, memory)])
    files = _files(process)
    yield from _metric("process_open_fds", "gauge", "Open files and sockets of this server.", [("", {}, files)])
    started = process.create_time()
    yield from _metric("process_start_time_seconds", "gauge", "When this server started.", [("", {}, started)])


def _marks(key: tuple[str, str, int]) -> dict[str, str]:
    return {"method": key[0], "route": key[1], "status": str(key[2])}


def _files(process: psutil.Process) -> int:
    try:
        return int(process.num_fds())
    except (psutil.Error, AttributeError):  # not a thing everywhere
        return 0


def _seconds(plane: Services, org: str) -> Iterator[Sample]:
    for path, found in sorted(plane.traffic.seconds(org).items()):
        bounds = [*(f"{bound:g}" for bound in BUCKETS_S), "+Inf"]
        for bound, count in zip(bounds, accumulate(found.counts), strict=True):
            yield "_bucket", {"path": path, "le": bound}, count
        yield "_sum", {"path": path}, found.total_s
        yield "_count", {"path": path}, sum(found.counts)


def _metric(name: str, kind: str, words: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} {kind}"
    for suffix, labels, value in samples:
        if value is not None and math.isfinite(value):
            marks = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
            yield f"{name}{suffix}{f'{{{marks}}}' if marks else ''} {value:.12g}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _clean(name: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "_" for letter in name)
