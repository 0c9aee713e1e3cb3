"""A server on this machine that speaks the Hugging Face hub's HTTP API, as far as a download asks for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^?/]+))?/?(?:\?.*)?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class HubServer:
    """A hub.

    Attributes:
        repositories: the folder of each repository by its hub id.
        revisions: what may follow the @, and the commit that it means.
        refusals: the status and the hub's error code of repositories that are refused.
        cuts: after how many bytes the connection is closed at a file's next download, by the file's name.
        downloads: the file's name and the ``Range`` header of each download.
        address: of the server, for ``HF_ENDPOINT``.
    """

    repositories: Mapping[str, Path]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""


@contextlib.contextmanager
def running_hub(repositories: Mapping[str, Path]) -> Iterator[HubServer]:
    """A hub with these repositories, at a port that the system chooses."""
    hub = HubServer(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            api, file = API.fullmatch(self.path), FILE.fullmatch(self.path)
            name = (api or file or [None, ""])[1]
            if name in hub.refusals:
                status, code = hub.refusals[name]
                self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})
            elif name not in hub.repositories:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif api:
                self.answer_api(hub.repositories[name], api[2], api[3] or "main")
            else:
                assert file is not None
                self.answer_file(hub.repositories[name], file[2], file[3])

        def answer_api(self, folder: Path, kind: str | None, revision: str) -> None:
            commit = hub.revisions.get(revision, revision)
            if commit not in hub.revisions.values():
                self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in files]
            if kind == "tree":
                found: object = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": blob_of(path)}
                    for name, path in zip(names, files, strict=True)
                ]
            else:
                found = {"id": "", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def answer_file(self, folder: Path, commit: str, name: str) -> None:
            path = folder / name
            if not path.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content, status = path.read_bytes(), 200
            headers = {"ETag": f'"{blob_of(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if self.command == "GET":
                wanted = self.headers.get("Range")
                hub.downloads.append((name, wanted))
                if wanted is not None:
                    start = int(wanted.removeprefix("bytes=").partition("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                    content, status = content[start:], 206
            self.send(status, content, headers, hub.cuts.get(name) if self.command == "GET" else None)

        def send(self, status: int, content: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def blob_of(path: Path) -> str:
    """The name of a file's blob in the hub's cache."""
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
