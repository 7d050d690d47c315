"""The schema's history. `HEAD` names the newest revision, so that a start at head needs no Alembic import."""

HEAD = "0008"
