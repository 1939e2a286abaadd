"""Download one large file of a hub into the hub library's own cache, so that a killed download goes on later.

huggingface_hub resumes only within one process; this keeps the partial file, hashes while writing, and
enters the file into that library's cache only when its sha256 is the promised one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgelm.errors import DownloadError
from edgelm_models.partial import PartialFile

_ATTEMPTS = 5
_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of a repository with what the hub promises about it."""

    repo: str
    file: str
    size_bytes: int
    sha256: str


def download(blob: Blob, target: Path, came: Callable[[int], None]) -> None:
    """Write the checked bytes of `blob` to `target` by one rename; `came` is told how many bytes there are.

    Goes on where an earlier attempt stopped. Raises `DownloadError` if the connection keeps failing or the
    digest is wrong (the file is then kept aside), and the hub library's errors if the hub refuses.
    """
    partial = target.with_name(f"{target.name}.edgelm.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    kept_bytes = min(partial.stat().st_size, blob.size_bytes) if partial.exists() else 0
    with PartialFile(partial, kept_bytes) as out:
        came(out.size_bytes)
        _complete(blob, out, came)
        out.check(blob.sha256, f"{blob.repo}/{blob.file}")
    os.replace(partial, target)


def _complete(blob: Blob, out: PartialFile, came: Callable[[int], None]) -> None:
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # public, re-exported silently

    client = get_session()
    # huggingface_hub 1.x speaks through httpx, 2.x through httpx2: the same names in another module.
    transport_error = sys.modules[type(client).__module__.partition(".")[0]].TransportError
    failure: Exception | None = None
    for attempt in range(_ATTEMPTS):
        if out.size_bytes >= blob.size_bytes:
            break
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            _append(client, blob, out, came)
        except transport_error as error:
            failure = error
    if out.size_bytes != blob.size_bytes:
        reason = f" ({failure or 'the connection closed early'})"
        raise DownloadError(
            f"{blob.file} stopped at {out.size_bytes} of {blob.size_bytes} bytes{reason}; "
            "check the network and pull again: what arrived is kept"
        )


def _append(client: Any, blob: Blob, out: PartialFile, came: Callable[[int], None]) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(blob.repo, blob.file)
    location = get_hf_file_metadata(url).location  # asked again at each attempt: signed addresses expire
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    if out.size_bytes:
        headers["Range"] = f"bytes={out.size_bytes}-"
    with client.stream("GET", location, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if out.size_bytes and response.status_code != 206:
            out.restart()  # a server that ignores ranges sends the file from its beginning
        # In pieces as they come: asked for larger ones, httpx drops what it has gathered when the connection breaks.
        for chunk in response.iter_raw():
            out.append(chunk)
            came(out.size_bytes)
            if out.size_bytes > blob.size_bytes:
                break
