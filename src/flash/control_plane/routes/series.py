"""What pages show of runs beyond `runs.py`: the table's rows, metrics thinned for charts, samples, logs, lineage.

Whatever a run's length, an answer is bounded: down-sampling, filters and search happen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from flash.control_plane.auth import Me, Plane
from flash.control_plane.estimating import cost_usd, estimated_usd
from flash.control_plane.status import run_summary
from flash.records import Event, EventKind, RunSummary
from flash.storage import runs, samples, series, views

router = APIRouter(prefix="/api", tags=["pages"])

SPARK_POINTS = 24
LOG_KINDS = (EventKind.STATE, EventKind.ATTEMPT, EventKind.PHASE, EventKind.LOG, EventKind.WARNING)
_SEARCHED = 20_000  # lines that one search looks through at most before it answers

Step = Annotated[int | None, Query(ge=0, lt=2**53)]
Seq = Annotated[int | None, Query(ge=0, lt=2**53)]


class OverviewRow(RunSummary):
    """A run in the table of all runs."""

    summary_metric: str  # what `value` and `spark` show: reward | loss
    value: float | None
    spark: list[float]
    eval: dict[str, Any] | None
    finished_at: float | None
    cost_usd: float | None
    estimated_cost_usd: float | None
    deployed_step: int | None


class Overview(BaseModel):
    runs: list[OverviewRow]


@router.get("/overview")
def overview(
    me: Me,
    plane: Plane,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    before: Annotated[str | None, Query(max_length=200)] = None,
    since: Annotated[float | None, Query(ge=0, allow_inf_nan=False)] = None,
) -> Overview:
    """Runs, newest first; with `since`, those that changed at or after that time."""
    with plane.database.read() as connection:
        if since is None:
            found = runs.list_runs(connection, org=me.org, limit=limit, before=before)
        else:
            found = views.changed_since(connection, org=me.org, since=since, limit=limit)
        names = {run.id: _summary_metric(run) for run in found}
        sparks = series.sparks(connection, names, points=SPARK_POINTS)
        live = views.live_steps(connection, list(names))
    return Overview(runs=[_row(run, names[run.id], sparks.get(run.id, []), live.get(run.id)) for run in found])


def _summary_metric(run: runs.RunRow) -> str:
    return "reward" if run.spec.get("algorithm") == "grpo" else "loss"


def _row(run: runs.RunRow, metric: str, spark: list[float], deployed: int | None) -> OverviewRow:
    value = run.metrics.get(metric)
    return OverviewRow(
        **run_summary(run).model_dump(),
        summary_metric=metric,
        value=float(value) if isinstance(value, int | float) else None,
        spark=[_brief(each) for each in spark],
        eval=run.eval,
        finished_at=run.finished_at,
        cost_usd=cost_usd(run),
        estimated_cost_usd=estimated_usd(run),
        deployed_step=deployed,
    )


# --- metrics --------------------------------------------------------------------------------------------------


class Curve(BaseModel):
    """One metric: a mean for each point (none where it was not reported), and its extremes where they differ."""

    mean: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None


class SeriesAnswer(BaseModel):
    """`steps` are the last of each point's span; `times` in UTC seconds."""

    steps: list[int]
    times: list[float]
    curves: dict[str, Curve]
    thinned: bool  # points stand for several steps each
    events: int  # metrics reports of the whole run
    last_step: int


@router.get("/runs/{run_id}/series")
def metrics(
    run_id: str,
    me: Me,
    plane: Plane,
    points: Annotated[int, Query(ge=10, le=2000)] = 300,
    first: Step = None,
    last: Step = None,
    names: Annotated[str | None, Query(max_length=2000)] = None,
) -> SeriesAnswer:
    """A run's metrics from step `first` to `last`, in about `points` points."""
    wanted = {name.strip() for name in names.split(",")} if names else None
    with plane.database.read() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        found = series.read(connection, run.id, points=points, first=first, last=last)
    known = sorted({name for span in found.spans for name in span.values})
    return SeriesAnswer(
        steps=[span.last_step for span in found.spans],
        times=[span.last_time for span in found.spans],
        curves={name: _curve(found.spans, name) for name in known if wanted is None or name in wanted},
        thinned=any(span.events > 1 for span in found.spans),
        events=found.events,
        last_step=found.last_step,
    )


def _curve(spans: Sequence[series.Span], name: str) -> Curve:
    values = [span.values.get(name) for span in spans]
    mean = [_brief(each[1] / each[0]) if each else None for each in values]
    if all(each is None or each[2] == each[3] for each in values):
        return Curve(mean=mean)
    return Curve(
        mean=mean,
        low=[_brief(each[2]) if each else None for each in values],
        high=[_brief(each[3]) if each else None for each in values],
    )


def _brief(value: float) -> float:
    """Six digits: more can't be drawn."""
    return float(f"{value:.6g}")


# --- samples --------------------------------------------------------------------------------------------------


class SampleView(BaseModel):
    seq: int
    epoch: int | None
    time: float
    step: int
    kind: str
    data: dict[str, Any]  # as the run reported it
    truncated: bool
    failed: bool


class SamplePage(BaseModel):
    samples: list[SampleView]
    found: int  # how many fit the question
    steps: list[tuple[int, int]]  # each step with samples, and how many


@router.get("/runs/{run_id}/samples")
def sample_page(
    run_id: str,
    me: Me,
    plane: Plane,
    step: Step = None,
    row: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    kind: Annotated[str | None, Query(pattern="^(rollout|eval)$")] = None,
    mark: Annotated[samples.Mark | None, Query()] = None,
    order: samples.Order = "newest",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    offset: Annotated[int, Query(ge=0, lt=2**53)] = 0,
) -> SamplePage:
    """Completions that a run kept for people to read."""
    with plane.database.read() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        page, count = samples.find(
            connection, run.id, step=step, row=row, kind=kind, mark=mark, order=order, limit=limit, offset=offset
        )
        events = samples.read(connection, run.id, [each.seq for each in page])
        steps = samples.steps(connection, run.id)
    return SamplePage(
        samples=[
            SampleView(
                seq=each.seq,
                epoch=each.epoch,
                time=events[each.seq].time,
                step=each.step,
                kind=each.kind,
                data=events[each.seq].data,
                truncated=each.truncated,
                failed=each.failed,
            )
            for each in page
        ],
        found=count,
        steps=steps,
    )


# --- logs -----------------------------------------------------------------------------------------------------


class LogPage(BaseModel):
    lines: list[Event]
    more: bool  # there are (or may be) earlier lines that fit


@router.get("/runs/{run_id}/log")
def log(
    run_id: str,
    me: Me,
    plane: Plane,
    after: Seq = None,
    before: Seq = None,
    find: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=2000)] = 500,
) -> LogPage:
    """The run's log: what follows `after`, else its end (before `before`); with `find`, the lines that say so."""
    with plane.database.read() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        if after is not None:
            lines = views.log_lines(connection, run.id, kinds=LOG_KINDS, after=after, find=find, limit=limit)
            return LogPage(lines=[line for line in lines if _says(line, find)], more=False)
        lines, looked, end = [], 0, before
        while len(lines) < limit and looked < _SEARCHED:
            page = views.log_lines(connection, run.id, kinds=LOG_KINDS, before=end, find=find, limit=limit)
            looked += len(page)
            lines = [line for line in page if _says(line, find)] + lines
            if len(page) < limit:
                return LogPage(lines=lines[-limit:], more=len(lines) > limit)
            end = page[0].seq
    return LogPage(lines=lines[-limit:], more=True)


def _says(line: Event, find: str) -> bool:
    """Whether a value of the line has the text; the query also finds it in names of keys."""
    return not find or find.lower() in " ".join(str(value) for value in line.data.values()).lower()


# --- where it comes from, what came of it ---------------------------------------------------------------------


class KinView(BaseModel):
    run_id: str
    state: str
    how: str
    step: int | None


class Lineage(BaseModel):
    """A run's config as it was sent, what it began from and what began from it."""

    config: dict[str, Any]
    environment: str
    environment_sha256: str
    init_run_id: str | None
    init_step: int | None
    retry_of: str | None
    came_of: list[KinView]
    estimate: dict[str, Any] | None
    deployed_step: int | None


@router.get("/runs/{run_id}/lineage")
def lineage(run_id: str, me: Me, plane: Plane) -> Lineage:
    with plane.database.read() as connection:
        run = runs.get_run(connection, run_id, org=me.org)
        kin = views.came_of(connection, run.id)
        live = views.live_steps(connection, [run.id])
    return Lineage(
        config=run.config,
        environment=f"{run.environment_namespace}/{run.environment_name}",
        environment_sha256=run.environment_sha256,
        init_run_id=run.init_run_id,
        init_step=run.init_step,
        retry_of=run.retry_of,
        came_of=[KinView(run_id=each.run_id, state=each.state, how=each.how, step=each.step) for each in kin],
        estimate=run.estimate,
        deployed_step=live.get(run.id),
    )


