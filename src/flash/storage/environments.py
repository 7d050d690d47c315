"""The environment hub's records: names, versions by digest, which one is current.

Owns the rows. The archives themselves lie in the artifact store, addressed by the same digest; a deleted name
keeps its rows, since runs stay pinned to their versions. A version that leaves keeps its row until its archive is gone,
and while it does nobody can record the same content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from flash.errors import InvalidInput, NotFound, Unavailable
from flash.records import EnvironmentVersion
from flash.storage import schema

_table = schema.environment_versions
LEAVING = -1  # instead of the number of a push


def push(
    connection: Connection,
    *,
    org: str,
    namespace: str,
    name: str,
    sha256: str,
    size: int,
    files: Sequence[str],
    now: float,
) -> EnvironmentVersion:
    """Records a push and makes it the current version. The same content gives the same version again."""
    _refuse_leaving(connection, sha256)
    same_name = (_table.c.namespace == namespace) & (_table.c.name == name)
    latest = connection.execute(select(func.max(_table.c.push)).where(same_name)).scalar()
    number = max(int(latest or 0), 0) + 1
    again = connection.execute(
        update(_table)
        .where(same_name, _table.c.sha256 == sha256)
        .values(push=number, deleted_at=None)
        .returning(*_table.c)
    ).first()
    if again is not None:
        return _version(again)
    values = {
        "namespace": namespace,
        "name": name,
        "sha256": sha256,
        "org_id": org,
        "size": size,
        "files": list(files),
        "created_at": now,
        "push": number,
    }
    return _version(connection.execute(insert(_table).values(**values).returning(*_table.c)).one())


def current(connection: Connection, *, org: str) -> list[EnvironmentVersion]:
    """The current version of each of the org's environments, by id."""
    newest: dict[str, EnvironmentVersion] = {}
    rows = connection.execute(
        select(_table).where(_table.c.org_id == org, _table.c.deleted_at.is_(None)).order_by(_table.c.push)
    )
    for row in rows:
        version = _version(row)
        newest[version.id] = version
    return [newest[key] for key in sorted(newest)]


def resolve(
    connection: Connection, *, org: str, namespace: str, name: str, version: str | None = None
) -> EnvironmentVersion:
    """The version that `namespace/name[@prefix]` names: the current one, or that of the digest."""
    query = select(_table).where(
        _table.c.org_id == org,
        _table.c.namespace == namespace,
        _table.c.name == name,
        _table.c.deleted_at.is_(None),
    )
    rows = connection.execute(query.order_by(_table.c.push.desc())).all()
    if not rows:
        raise NotFound(
            f"no environment {namespace}/{name}",
            remedy="`flash env list` shows what there is; `flash env push` publishes one",
        )
    if version is None:
        return _version(rows[0])
    found = [row for row in rows if row.sha256.startswith(version.lower())]
    if not found:
        raise NotFound(
            f"{namespace}/{name} has no version {version}", remedy="leave out @version for the newest"
        )
    if len(found) > 1:
        raise InvalidInput(
            f"{namespace}/{name}@{version} fits {len(found)} versions",
            remedy="write more digits of the digest",
        )
    return _version(found[0])


def keep(
    connection: Connection,
    *,
    org: str,
    namespace: str,
    name: str,
    sha256: str,
    size: int,
    files: Sequence[str],
    now: float,
) -> EnvironmentVersion:
    """Records a version that runs may pin but the hub doesn't offer: one fetched from elsewhere."""
    _refuse_leaving(connection, sha256)
    same = (_table.c.namespace == namespace) & (_table.c.name == name) & (_table.c.sha256 == sha256)
    row = connection.execute(select(_table).where(same)).first()
    if row is not None:
        return _version(row)
    values = {
        "namespace": namespace,
        "name": name,
        "sha256": sha256,
        "org_id": org,
        "size": size,
        "files": list(files),
        "created_at": now,
        "push": 0,
        "deleted_at": now,  # as if taken off the hub: only `pinned` and `kept` find it
    }
    return _version(connection.execute(insert(_table).values(**values).returning(*_table.c)).one())


def kept(connection: Connection, *, org: str, namespace: str, name: str) -> EnvironmentVersion | None:
    """What `keep` recorded under this name, if anything."""
    query = select(_table).where(
        _table.c.org_id == org, _table.c.namespace == namespace, _table.c.name == name, _table.c.push == 0
    )
    row = connection.execute(query.order_by(_table.c.created_at.desc())).first()
    return _version(row) if row is not None else None


def pinned(connection: Connection, *, namespace: str, name: str, sha256: str) -> EnvironmentVersion:
    """Exactly this version, deleted or not: what a run was submitted with."""
    row = connection.execute(
        select(_table).where(
            _table.c.namespace == namespace, _table.c.name == name, _table.c.sha256 == sha256
        )
    ).first()
    if row is None:
        raise NotFound(f"no environment {namespace}/{name}@{sha256[:12]}")
    return _version(row)


def delete(connection: Connection, *, org: str, namespace: str, name: str, now: float) -> None:
    """Takes the name off the hub. Runs that pinned one of its versions keep it."""
    gone = connection.execute(
        update(_table)
        .where(
            _table.c.org_id == org,
            _table.c.namespace == namespace,
            _table.c.name == name,
            _table.c.deleted_at.is_(None),
        )
        .values(deleted_at=now)
    )
    if gone.rowcount == 0:
        raise NotFound(f"no environment {namespace}/{name}", remedy="`flash env list` shows what there is")


def leave(connection: Connection, *, namespace: str, name: str, sha256: str) -> None:
    """Takes a version that nobody needs out of use. Where another one has the same archive, its row is all there is."""
    same = (_table.c.namespace == namespace) & (_table.c.name == name) & (_table.c.sha256 == sha256)
    others = select(_table.c.sha256).where(_table.c.sha256 == sha256, _table.c.push != LEAVING, ~same)
    if connection.execute(others).first() is not None:
        connection.execute(_table.delete().where(same))
    else:
        connection.execute(update(_table).where(same).values(push=LEAVING))


def leaving(connection: Connection) -> list[str]:
    """Digests of the archives that are to go."""
    return list(connection.execute(select(_table.c.sha256).where(_table.c.push == LEAVING).distinct()).scalars())


def forget(connection: Connection, sha256: str) -> None:
    """Removes what left: its archive is gone."""
    connection.execute(_table.delete().where(_table.c.sha256 == sha256, _table.c.push == LEAVING))


def _refuse_leaving(connection: Connection, sha256: str) -> None:
    query = select(_table.c.sha256).where(_table.c.sha256 == sha256, _table.c.push == LEAVING)
    if connection.execute(query).first() is not None:
        raise Unavailable(
            "the same files are just being removed from the store: they were kept long enough",
            remedy="try again in a minute",
        )


def _version(row: Any) -> EnvironmentVersion:
    return EnvironmentVersion(
        namespace=row.namespace,
        name=row.name,
        sha256=row.sha256,
        size=row.size,
        files=tuple(row.files),
        created_at=row.created_at,
    )
