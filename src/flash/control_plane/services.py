"""What the routes and the reconciler share: settings, database, store, vault, launcher, clocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from flash.artifacts.store import Store
from flash.control_plane.counting import Requests
from flash.control_plane.followers import Followers
from flash.control_plane.leading import Alone, Elected, Lead
from flash.control_plane.links import Links
from flash.control_plane.readiness import Readiness
from flash.control_plane.settings import ServerSettings
from flash.control_plane.stopwatches import Stopwatches
from flash.control_plane.tailing import Tails
from flash.control_plane.tickets import seal_ticket
from flash.control_plane.traffic import Traffic
from flash.launching.launcher import Launcher
from flash.launching.local import LocalLauncher
from flash.launching.preload import Preloaded
from flash.launching.ray import RayLauncher
from flash.storage.database import Database
from flash.storage.vault import Vault


@dataclass
class Services:
    settings: ServerSettings
    database: Database
    store: Store
    vault: Vault
    launcher: Launcher
    stopwatches: Stopwatches
    traffic: Traffic
    lead: Lead = field(default_factory=Alone)
    requests: Requests = field(default_factory=Requests)
    followers: Followers = field(default_factory=Followers)
    links: Links = field(default_factory=Links)  # into the dashboard
    wake: threading.Event = field(default_factory=threading.Event)  # asks the reconciler to look now
    stopping: threading.Event = field(default_factory=threading.Event)  # someone asked the server to stop
    fetches: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(4))  # from GitHub
    clock: Callable[[], float] = time.time  # the database's, for what people and records see; it may jump
    api_url: str = ""  # as workers reach this server; known once it listens

    def __post_init__(self) -> None:
        self.tails = Tails(self.database, self.settings.stream_poll_s)
        self.database.on_commit(self.tails.touch)
        self.database.on_commit(self.followers.notify)
        self.readiness = Readiness(self.database, self.store, self.stopping)

    @property
    def signs_for_workers(self) -> bool:
        """Whether workers reach the bucket by signed addresses rather than with its keys."""
        return self.settings.worker_store == "signed" and self.store.signs

    def close(self) -> None:
        self.followers.close()
        self.database.close()


def open_services(
    settings: ServerSettings,
    *,
    launcher: Launcher | None = None,
    preloaded: Preloaded | None = None,
    stopwatches: Stopwatches | None = None,
) -> Services:
    """Opens (and at first makes) everything under the settings' home."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(settings.database)
    vault = Vault.open(settings.vault_key)
    watches = stopwatches or Stopwatches()
    return Services(
        settings=settings,
        database=database,
        store=Store(settings.store, settings.store_options),
        vault=vault,
        launcher=launcher or _launcher(settings, vault, preloaded),
        stopwatches=watches,
        traffic=Traffic(watches, settings.max_requests),
        fetches=threading.BoundedSemaphore(settings.github_fetches),
        lead=Elected(database.url, settings.leader_lease_s) if database.shared else Alone(),
        clock=database.clock,
        api_url=settings.worker_url or f"http://{settings.host}:{settings.port}",
    )


def _launcher(settings: ServerSettings, vault: Vault, preloaded: Preloaded | None) -> Launcher:
    if settings.launcher == "local":
        return LocalLauncher(
            settings.home / "work",
            devices=settings.devices,
            preloaded=preloaded,
            store_keys=settings.worker_store == "keys",
        )
    return RayLauncher(
        settings.ray_address or "",
        settings.ray_token.get_secret_value() if settings.ray_token else None,
        owner=vault.mac(b"ray")[:16],  # the same for every server of this database, and for no other's
        ticket=partial(seal_ticket, vault),
        cpus=settings.ray_cpus,
        kinds=settings.devices,
        pip=settings.ray_pip,
        timeout_s=settings.ray_timeout_s,
        lost_s=settings.ray_lost_s,
    )
