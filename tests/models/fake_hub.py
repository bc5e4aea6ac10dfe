"""A tiny model Hub on 127.0.0.1: what huggingface_hub asks for to list and download the files of a repository."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Request = tuple[str, str, str]  # method, revision, file


def commit_of(name: str) -> str:
    """A commit hash that belongs to a revision's name."""
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class FakeHub:
    """`repositories[id][revision]` is the folder of that state; `requests` logs the files that were asked for."""

    repositories: dict[str, dict[str, Path]]
    gated: frozenset[str] = frozenset()
    broken: set[str] = field(default_factory=set)  # file names that the server fails on
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """The files whose content was sent, sorted."""
        return sorted({name for method, _, name in self.requests if method == "GET"})

    def folder(self, repository: str, revision: str) -> Path | None:
        """The state that a name or a commit hash means."""
        states = self.repositories[repository]
        return next((path for name, path in states.items() if revision in (name, commit_of(name))), None)


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the Hub in a thread for the time of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            repository = (listing or file or re.fullmatch(r"(nothing)", "nothing"))[1]  # type: ignore[index]
            if repository not in hub.repositories:
                self._send(404, {"X-Error-Code": "RepoNotFound"})
            elif repository in hub.gated:
                self._send(403, {"X-Error-Code": "GatedRepo"})
            elif listing:
                self._list(repository, listing[2] or "revision", listing[3] or "main")
            elif file:
                self._file(repository, file[2], file[3])

        def _list(self, repository: str, kind: str, revision: str) -> None:
            folder = hub.folder(repository, revision)
            if folder is None:
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return
            name = next(n for n, path in hub.repositories[repository].items() if path == folder)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            if kind == "tree":
                body: Any = [
                    {
                        "type": "file",
                        "path": str(path.relative_to(folder)),
                        "size": path.stat().st_size,
                        "oid": _etag(path),
                    }
                    for path in files
                ]
            else:
                siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
                body = {"id": repository, "sha": commit_of(name), "siblings": siblings, "private": False, "tags": []}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

        def _file(self, repository: str, revision: str, name: str) -> None:
            hub.requests.append((self.command, revision, name))
            folder = hub.folder(repository, revision)
            if folder is None:
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return
            if name in hub.broken:
                self._send(403)
                return
            path = folder / name
            state = next(n for n, p in hub.repositories[repository].items() if p == folder)
            headers = {"X-Repo-Commit": commit_of(state)}
            if not path.is_file():
                self._send(404, {**headers, "X-Error-Code": "EntryNotFound"})
                return
            self._send(200, {**headers, "ETag": f'"{_etag(path)}"'}, path.read_bytes())

        def _send(self, status: int, headers: Mapping[str, str] = {}, body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
