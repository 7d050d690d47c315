"""The forms of `environment.id`."""

from __future__ import annotations

import pytest

from flash.config.environment_id import EnvironmentRef, parse_environment_id
from flash.config.load import parse_config

SHA = "0123456789abcdef" * 4


def github(ref=None, path=None, owner="acme", repo="envs"):
    return EnvironmentRef("github", owner=owner, repo=repo, ref=ref, path=path)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("acme/arith", EnvironmentRef("hub", namespace="acme", name="arith")),
        ("A.b_c-1/x.y", EnvironmentRef("hub", namespace="A.b_c-1", name="x.y")),
        ("acme/arith@0123AB", EnvironmentRef("hub", namespace="acme", name="arith", version="0123ab")),
        (f"acme/arith@{SHA}", EnvironmentRef("hub", namespace="acme", name="arith", version=SHA)),
        ("github:acme/envs", github()),
        ("github:acme/envs@v1.2", github("v1.2")),
        ("github:acme/envs:games/chess", github(path="games/chess")),
        ("github:acme/envs@feature/x:games/chess/", github("feature/x", "games/chess")),
        ("https://github.com/acme/envs", github()),
        ("https://github.com/acme/envs.git", github()),
        ("https://github.com/acme/envs/", github()),
        ("https://github.com/acme/envs/tree/main", github("main")),
        ("https://github.com/acme/envs/tree/main/a/b?tab=readme", github("main", "a/b")),
        ("https://github.com/acme/envs/blob/main/a%20b/environment.py#L3", github("main", "a b/environment.py")),
    ],
)
def test_valid_forms(text, ref):
    assert parse_environment_id(text) == ref
    assert parse_environment_id(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        "", "noslash", "a b/c", "a/..x/../..", "../x/y", "./x", "a/..", "a/", "/a", "acme/arith@", "acme/arith@xyz1",
        "acme/arith@12", f"acme/arith@{SHA}0", "github:acme", "github:acme/envs@", "github:acme/envs:",
        "github:acme/envs:../up", "github:acme/envs:/abs", "github:acme/envs:a//b", "github:acme/envs@-x",
        "github:acme/envs@a..b", "github:-bad/envs", "github:acme/..", "http://github.com/acme/envs",
        "https://gitlab.com/acme/envs", "https://github.com/acme", "https://github.com/acme/envs/issues/3",
        "https://github.com/acme/envs/tree/main/%2e%2e/x", "github.com/acme/envs", "https://github.com/a/b/tree/main/x\x07",
    ],
)  # fmt: skip
def test_refused_forms(text, problems):
    [line] = problems(lambda: parse_config({"model": "flash/nano", "environment": {"id": text}}))
    assert line.startswith("environment.id = ")
    assert ";" in line


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("./my-env", "flash env push --name my-env ./my-env"),
        ("envs/deep/Math Env", "flash env push --name math-env 'envs/deep/Math Env'"),
        ("/home/me/arith/environment.py", "flash env push --name arith /home/me/arith/environment.py"),
        ("reward.py", "flash env push --name reward reward.py"),
        ("~/arith", "flash env push --name arith '~/arith'"),
        ("C:\\envs\\arith", "flash env push --name arith 'C:\\envs\\arith'"),
        ("arith", "flash env push --name arith arith"),
        ("..", "flash env push --name my-env .."),
    ],
)
def test_a_local_path_shows_the_push_command(text, command):
    with pytest.raises(ValueError) as caught:
        parse_environment_id(text)
    assert f"`{command}`" in str(caught.value)
