"""The control plane's own test world serves the dashboard's tests too."""

from __future__ import annotations

from tests.control_plane.conftest import Worker, World, archive, database_url, migrated, world

__all__ = ["Worker", "World", "archive", "database_url", "migrated", "world"]
