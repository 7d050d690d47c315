"""Runs come, end, are deployed, kept, retried and built upon as time passes: against a simple model of what stays."""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.team.worlds import Team

from flash.artifacts.manifests import manifest_key, object_key, verify, write_checkpoint
from flash.control_plane.cleaning import Cleaner
from flash.errors import NotFound
from flash.records import Manifest, Revision, RunState
from flash.storage import deployments, events, runs
from flash.storage.retention import DAY_S

STATE_DAYS, FILES_DAYS, EVENTS_DAYS = 2.0, 5.0, 7.0
OPEN = (RunState.QUEUED, RunState.RUNNING)
START = 1_800_000_000.0


@dataclass
class Model:
    """What a run is, by what was asked for alone."""

    run_id: str
    source: Model | None = None
    state: RunState = RunState.QUEUED
    ended_day: float | None = None
    pinned: bool = False
    ttl_days: float | None = None
    deployed: bool = False
    steps: int = 0
    has_state: bool = True
    collected: bool = False
    silenced: bool = False

    def over(self, today: float, days: float) -> bool:
        return self.ended_day is not None and not self.pinned and self.ended_day + days <= today

    @property
    def kept_days(self) -> float:
        return FILES_DAYS if self.ttl_days is None else self.ttl_days


class Keeping(RuleBasedStateMachine):
    """On SQLite and a folder, through the API where there is one; files are written as workers write them."""

    @initialize()
    def begin(self) -> None:
        self.closing = ExitStack()
        folder = self.closing.enter_context(tempfile.TemporaryDirectory(prefix="flash-keeping-"))
        self.team = self.closing.enter_context(
            Team(
                Path(folder, "home"), keep_state_days=STATE_DAYS, keep_files_days=FILES_DAYS,
                keep_events_days=EVENTS_DAYS, clean_interval_s=0.0, work_grace_s=0.0,
            )
        )  # fmt: skip
        self.plane = self.team.plane
        self.today = 0.0
        self.plane.clock = lambda: START + self.today * DAY_S
        self.key = self.team.key("acme")
        self.team.push(self.key, "acme")
        self.models: dict[str, Model] = {}
        self.manifests: dict[tuple[str, int], Manifest] = {}
        self.serial = itertools.count()

    def teardown(self) -> None:
        """Whatever was drawn, at last a week goes by."""
        if hasattr(self, "closing"):
            with self.closing:
                self.look(days=7.0)

    # --- what happens ---

    def any_run(self, data: st.DataObject, *states: RunState, deployed: bool | None = None) -> Model:
        return self.models[data.draw(st.sampled_from(self.those(*states, deployed=deployed)))]

    def those(self, *states: RunState, deployed: bool | None = None) -> list[str]:
        return [
            run_id
            for run_id, run in self.models.items()
            if (run.state in states or not states) and deployed in (None, run.deployed)
        ]

    def known(self, run_id: str, **known: Any) -> Model:
        self.models[run_id] = Model(run_id, **known)
        return self.models[run_id]

    @rule()
    def submit(self) -> None:
        self.known(self.team.run(self.key, "acme", max_steps=1))

    @precondition(lambda self: self.those(RunState.DONE))
    @rule(data=st.data())
    def warm_start(self, data: st.DataObject) -> None:
        """Welcome exactly as long as the source's adapter is there."""
        source = self.any_run(data, RunState.DONE)
        answer = self.team.submit(self.key, "acme", init_from_adapter=source.run_id)
        assert answer.status_code == (422 if source.collected else 201), answer.text
        event(f"a warm start: {answer.status_code}")
        if not source.collected:
            self.known(answer.json()["run_id"], source=source)

    def save(self, run: Model, *, final: bool) -> None:
        run.steps += 1
        with tempfile.TemporaryDirectory() as folder:
            for name in ("adapter/weights", "adapter/shared", "state/optimizer"):
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text("the same in each" if name.endswith("shared") else f"{next(self.serial)}")
            manifest, sha256 = write_checkpoint(self.plane.store, run.run_id, run.steps, Path(folder), final, {})
        with self.plane.database.write() as connection:
            runs.record_checkpoint(
                connection, manifest, epoch=1, manifest_sha256=sha256, now=self.plane.clock()
            )
        self.manifests[run.run_id, run.steps] = manifest

    @precondition(lambda self: self.those(*OPEN))
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        self.save(self.any_run(data, *OPEN), final=False)

    @precondition(lambda self: self.those(*OPEN))
    @rule(data=st.data(), state=st.sampled_from([RunState.DONE, RunState.DONE, RunState.FAILED, RunState.CANCELLED]))
    def end(self, data: st.DataObject, state: RunState) -> None:
        self.finish(self.any_run(data, *OPEN), state)

    @rule(days=st.sampled_from([0.0, 1.0, 6.0]))
    def one_is_done_meanwhile(self, days: float) -> None:
        run = self.known(self.team.run(self.key, "acme", max_steps=1))
        self.today += days
        self.finish(run, RunState.DONE)

    def finish(self, run: Model, state: RunState) -> None:
        if state is RunState.DONE:
            self.save(run, final=True)
        with self.plane.database.write() as connection:
            now = self.plane.clock()
            assert runs.transition(connection, run.run_id, source=OPEN, target=state, reason="as drawn", now=now)
        run.state, run.ended_day = state, self.today

    @precondition(lambda self: self.those(RunState.FAILED, RunState.CANCELLED))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        run = self.any_run(data, RunState.FAILED, RunState.CANCELLED)
        answer = self.team.call(self.key, "POST", f"/api/runs/{run.run_id}/retry", json={})
        stateless = run.steps > 0 and not run.has_state
        assert answer.status_code == (409 if run.collected or stateless else 201), answer.text
        event(f"a retry: {answer.status_code}{', without state' if stateless else ''}")
        if run.collected or stateless:
            return
        again = self.known(answer.json()["run_id"], source=run.source)
        if run.steps:
            again.steps = run.steps
            with self.plane.database.read() as connection:
                [found] = runs.checkpoints_of(connection, again.run_id)
                self.manifests[again.run_id, found.step] = runs.manifest_of(connection, again.run_id, found.step)

    @precondition(lambda self: self.those(RunState.DONE, deployed=False))
    @rule(data=st.data())
    def deploy(self, data: st.DataObject) -> None:
        """What a deploy does once its engine has answered."""
        run = self.any_run(data, RunState.DONE, deployed=False)
        revision = Revision(run_id=run.run_id, step=run.steps, adapter_sha256="a" * 64, model="flash/nano")
        with self.plane.database.write() as connection:
            live = deployments.find(connection, run.run_id)
            try:
                runs.manifest_of(connection, run.run_id, run.steps)
            except NotFound:
                assert run.collected
                return
            assert not run.collected
            deployments.move(
                connection, revision, org="acme", manifest_key=manifest_key(run.run_id, run.steps),
                expected=live.version if live else 0, verified=True, now=self.plane.clock(),
            )  # fmt: skip
        run.deployed = True

    @precondition(lambda self: self.those(deployed=True))
    @rule(data=st.data())
    def undeploy(self, data: st.DataObject) -> None:
        run = self.any_run(data, deployed=True)
        assert self.team.call(self.key, "DELETE", f"/api/deployments/{run.run_id}").status_code == 200
        run.deployed = False

    @precondition(lambda self: self.those())
    @rule(data=st.data(), pinned=st.booleans(), days=st.sampled_from([None, 0.0, 1.0, 20.0]))
    def keep(self, data: st.DataObject, pinned: bool, days: float | None) -> None:
        run = self.any_run(data)
        body = {"pinned": pinned, "days": days}
        answer = self.team.call(self.key, "POST", f"/api/runs/{run.run_id}/keep", json=body)
        assert answer.status_code == (409 if run.collected else 200), answer.text
        if not run.collected:
            run.pinned, run.ttl_days = pinned, days

    # --- what is left of it ---

    @precondition(lambda self: self.models)
    @rule(days=st.sampled_from([0.0, 1.0, 6.0]))
    def look(self, days: float) -> None:
        self.today += days
        cleaner = Cleaner(self.plane)
        for _ in range(len(self.models) + 1):  # a chain of warm starts goes link by link
            cleaner.clean()
            cleaner._last = None
        self.expire()
        self.judge()

    def expire(self) -> None:
        for run in self.models.values():
            run.has_state &= not run.over(self.today, STATE_DAYS)
            run.silenced |= run.over(self.today, EVENTS_DAYS)
        going = True
        while going:
            going = False
            for run in self.models.values():
                built_upon = any(
                    later.source is run and later.state is not RunState.DONE and not later.collected
                    for later in self.models.values()
                )
                if run.over(self.today, run.kept_days) and not run.collected:
                    event(f"time is over: deployed {run.deployed}, built upon {built_upon}")
                    if not (run.deployed or built_upon):
                        run.collected = going = True

    def judge(self) -> None:
        store = self.plane.store
        with self.plane.database.read() as connection:
            for run in self.models.values():
                found = runs.get_run(connection, run.run_id)
                known = runs.checkpoints_of(connection, run.run_id)
                assert (found.collected_at is not None) == run.collected, run
                assert bool(events.read(connection, run.run_id)) != run.silenced, run
                mine = [made for (run_id, _), made in self.manifests.items() if run_id == run.run_id]
                assert [one.step for one in known] == ([] if run.collected else [one.step for one in mine]), run
                expected = set()
                for manifest in [] if run.collected else mine:
                    verify(store, manifest, only=None if run.has_state else "adapter", digests=True)
                    kept = [file for file in manifest.files if run.has_state or file.path.startswith("adapter/")]
                    expected |= {object_key(run.run_id, file.sha256) for file in kept}
                    expected.add(manifest_key(run.run_id, manifest.step))
                present = set(store.list(f"runs/{run.run_id}"))
                assert present >= expected, run
                if run.ended_day is not None:  # a running one's are looked at when it ends
                    assert present == expected, run


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(
    max_examples=12, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
