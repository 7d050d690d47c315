from __future__ import annotations

import pytest

from flash.client import settings
from flash.errors import InvalidInput


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))
    monkeypatch.delenv("FLASH_API_URL", raising=False)
    monkeypatch.delenv("FREESOLO_API_KEY", raising=False)
    return tmp_path


def test_nothing_set_means_the_local_server(home):
    assert settings.load() == settings.Settings(home=home)


def test_the_environment_names_the_server_and_the_key(monkeypatch):
    monkeypatch.setenv("FLASH_API_URL", "https://flash.example.org/")
    monkeypatch.setenv("FREESOLO_API_KEY", " fslo_key ")
    found = settings.load()
    assert (found.api_url, found.api_key) == ("https://flash.example.org", "fslo_key")


def test_a_server_without_a_key_is_an_error_that_says_how(monkeypatch):
    monkeypatch.setenv("FLASH_API_URL", "https://flash.example.org")
    with pytest.raises(InvalidInput, match="flash login"):
        settings.load()


def test_login_is_saved_for_its_owner_only_and_forgotten(home):
    path = settings.save_login(home, "https://a.example.org", "fslo_a")
    assert path.stat().st_mode & 0o077 == 0
    assert settings.load().api_key == "fslo_a"
    assert settings.forget_login(home)
    assert not settings.forget_login(home)
    assert settings.load().api_url is None


def test_a_saved_key_is_never_sent_to_another_server(home, monkeypatch):
    settings.save_login(home, "https://a.example.org", "fslo_a")
    monkeypatch.setenv("FLASH_API_URL", "https://b.example.org")
    with pytest.raises(InvalidInput, match="no API key"):
        settings.load()


@pytest.mark.parametrize("text", ["[1]", "{", '{"api_url": 3}'])
def test_a_damaged_file_is_one_clear_error(home, text):
    (home / "config.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        settings.load()


@pytest.mark.parametrize("url", ["flash.example.org", "ftp://x", "http://", " "])
def test_an_address_must_be_http(url):
    with pytest.raises(InvalidInput, match="URL"):
        settings.normalise_url(url)
