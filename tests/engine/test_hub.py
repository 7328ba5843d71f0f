"""The hub is asked once whether it is there; without an answer its clients go offline at once."""

import os

import pytest

from bivec.engine.hub import PROXIES, prefer_offline


@pytest.fixture
def asked(monkeypatch):
    """The (host, port) pairs that were asked; none of them answers."""
    addresses = []

    def connect(address, timeout):
        addresses.append(address)
        raise OSError("unreachable")

    for name in (*PROXIES, "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the function sets
        monkeypatch.delenv(name)
    monkeypatch.setattr("socket.create_connection", connect)
    return addresses


def test_no_answer_switches_offline(asked):
    prefer_offline(["owner/model", "wikitext"])
    assert asked == [("huggingface.co", 443)] and os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("https://mirror.example", ("mirror.example", 443)),
        ("http://mirror.example", ("mirror.example", 80)),
        ("http://mirror.example:8080/hf", ("mirror.example", 8080)),
    ],
)
def test_a_mirror(endpoint, address, asked, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    prefer_offline(["owner/model"])
    assert asked == [address]


def test_local_sources_ask_nobody(asked, tmp_path):
    prefer_offline([str(tmp_path), __file__])
    assert asked == [] and "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "HF_HUB_OFFLINE"])
def test_a_proxy_or_an_earlier_choice_is_respected(name, asked, monkeypatch):
    monkeypatch.setenv(name, "1")
    prefer_offline(["owner/model"])
    assert asked == []
