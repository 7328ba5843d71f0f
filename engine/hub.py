"""Whether the Hugging Face hub can be reached, asked once and quickly.

Without an answer the hub's clients retry for more than a minute for every repository; in their offline mode they use
what is in the local cache and otherwise say at once that it is not there.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

PROBE_SECONDS = 5.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def prefer_offline(sources: list[str]) -> None:
    """Switches the hub's clients to their offline mode if a source is no local path and the hub does not answer.

    Does nothing behind a proxy, which only the clients know how to use. Must run before they are imported, since they
    read ``HF_HUB_OFFLINE`` at import.

    Args:
        sources: paths and hub ids of models and data.
    """
    remote = [source for source in sources if not Path(source).expanduser().exists()]
    if not remote or os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(name) for name in PROXIES):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname, port), timeout=PROBE_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
