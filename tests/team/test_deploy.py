"""The files of `deploy/` against what they speak of: settings, commands, extras, and one another."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from flash.artifacts.store import Store
from flash.cli.main import COMMANDS, load_command
from flash.cli.output import Globals
from flash.control_plane.server_config import load_server_config, variable
from flash.control_plane.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KNOWN = {variable(name) for name in ServerSettings.model_fields} | {"FLASH_HOME"}
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVER: dict[str, Any] = COMPOSE["services"]["server"]
INSTRUCTIONS = re.findall(
    r"^([A-Z]+) (.+)$", (DEPLOY / "Dockerfile").read_text().replace("\\\n", " "), flags=re.MULTILINE
)


def instructions(name: str) -> list[str]:
    return [text for word, text in INSTRUCTIONS if word == name]


def filled(text: str) -> str:
    """As compose fills in the variables of `.env`: where one may be left out, by what is there instead."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", lambda found: found[1], text)
    return re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", lambda found: f"secretof{found[1]}", text)


def exists(command: list[str]) -> None:
    """A `flash` command line: its commands and options are there, and it parses."""
    assert command[0] == "flash"
    entry = COMMANDS[command[1]]
    found, rest = load_command(command[1], entry), command[2:]
    while hasattr(found, "commands"):
        found, rest = found.commands[rest[0]], rest[1:]
    found.make_context(" ".join(command), rest, obj=Globals())


def test_its_settings_are_sound_and_every_variable_is_one():
    given = {name: filled(value) for name, value in SERVER["environment"].items()}
    settings = load_server_config(DEPLOY / "server.toml", given)
    assert set(SERVER["environment"]) <= KNOWN
    assert (settings.database.host, settings.database.database) == ("database", "flash")
    store = Store(settings.store, settings.store_options)
    assert store.signs and settings.worker_store == "signed"
    assert settings.store_options["endpoint"] == "http://store:9000"
    assert set(settings.store_options) == {"endpoint", "allow_http", "region", "access_key_id", "secret_access_key"}
    assert settings.launcher == "local", "without LAUNCHER"
    on_ray = load_server_config(DEPLOY / "server.toml", {**given, "FLASH_SERVER_LAUNCHER": "ray"})
    assert on_ray.ray_address == "http://ray:8265" and on_ray.worker_url == f"http://server:{settings.port}"
    assert "ray" in COMPOSE["services"] and "server" in COMPOSE["services"]
    assert "secretof" not in (DEPLOY / "server.toml").read_text()


def test_files_agree_with_one_another():
    settings = load_server_config(DEPLOY / "server.toml", {})
    services, volumes = COMPOSE["services"], COMPOSE["volumes"]
    port = str(settings.port)
    assert SERVER["ports"] == [f"127.0.0.1:{port}:{port}"] and instructions("EXPOSE") == [port]
    assert f":{port}/api/ready" in SERVER["healthcheck"]["test"][-1]
    assert SERVER["volumes"] == [f"home:{settings.home}"] and instructions("VOLUME") == [str(settings.home)]
    assert instructions("ENV") == [f"FLASH_HOME={settings.home}"]
    assert any(text.startswith("useradd ") and text.endswith(f" {settings.host_user}") for text in instructions("RUN"))
    assert settings.store == "s3://flash/artifacts" and services["bucket"]["command"][0].endswith(" it/flash")
    database = services["database"]["environment"]
    assert (database["POSTGRES_USER"], database["POSTGRES_DB"]) == ("flash", "flash")
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        assert {text.partition(":")[0] for text in service.get("volumes", ())} <= set(volumes)
        assert {key for key in service.get("environment", ()) if key.startswith("FLASH_")} <= KNOWN
        if "build" in service:
            build = service["build"]
            assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert asked == set(re.findall(r"^(\w+)=$", (DEPLOY / ".env.example").read_text(), flags=re.MULTILINE))


def test_the_image_copies_files_and_installs_extras_that_there_are():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = next(text for text in instructions("ARG") if text.startswith("EXTRAS=")).removeprefix("EXTRAS=")
    wanted += "," + COMPOSE["services"]["ray"]["build"]["args"]["EXTRAS"]
    assert set(wanted.split(",")) <= set(extras)
    let_in = re.findall(r"^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE)
    for text in instructions("COPY"):
        for source in text.split()[:-1]:
            assert (ROOT / source).exists() and source in let_in
    [command] = instructions("CMD")
    exists(json.loads(command))
    assert json.loads(command)[-1] == instructions("COPY")[-1].split()[1], "the config that it starts with"


def test_commands_of_the_page_are_there():
    page = (ROOT / "docs/team-server.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    found = [line[line.index("flash ") :] for line in lines if re.search(r"(^| server )flash ", line)]
    assert len(found) >= 6
    for line in found:
        exists(shlex.split(line, comments=True))
    for name in set(re.findall(r"deploy/[\w.]+", page)) - {"deploy/.env"}:  # which is the reader's own
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("group", ["head", "cpu", "gpu"])
def test_the_ray_cluster_is_sound(group: str):
    cluster = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    groups = {"head": cluster["spec"]["headGroupSpec"]}
    groups |= {found["groupName"]: found for found in cluster["spec"]["workerGroupSpecs"]}
    assert set(groups) == {"head", "cpu", "gpu"}
    pod = groups[group]["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == COMPOSE["services"]["ray"]["image"]
    names = {entry["name"] for entry in container["env"]}
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= names, "nobody submits to it without the token"
    assert {name for name in names if name.startswith("FLASH_")} <= KNOWN
    assert {mount["name"] for mount in container.get("volumeMounts", ())} <= {
        volume["name"] for volume in pod.get("volumes", ())
    }
    if group == "gpu":
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
