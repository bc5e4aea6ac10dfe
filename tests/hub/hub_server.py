"""A model Hub on 127.0.0.1: what huggingface_hub asks for to create repositories, commit to them and read them.

Files whose names end in .safetensors go through the large-file endpoints, all others through the commit itself, as on
the real Hub. There is no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

NOTHING: Mapping[str, str] = {}
OWNER, READER = "hf_TheTokenOfTheOwner", "hf_TheTokenOfAReader"


@dataclass
class Repository:
    """Its branches as lists of commits, the last of which is the newest; a commit maps names to contents."""

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b""}]})

    def commit(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The hash and the files of a branch or of a commit by its hash."""
        if revision in self.branches:
            files = self.branches[revision][-1]
            return hash_of(files), files
        known = {hash_of(files): files for branch in self.branches.values() for files in branch}
        return (revision, known[revision]) if revision in known else None


@dataclass
class Hub:
    """What it holds, what it was asked, and how it misbehaves.

    `failing` maps a part of a request's line (`POST /api/…`) to the status that it gets; `cut` are names of files that
    are sent incompletely.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    failing: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    makes_public: bool = False  # whatever is asked for
    url: str = ""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch's newest commit."""
        return self.repositories[repo].branches[branch][-1]


def hash_of(files: dict[str, bytes]) -> str:
    """A commit hash: 40 hex digits."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request. `hub` is set on a subclass."""

    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        failure = next((status for part, status in self.hub.failing.items() if part in line), None)
        if failure is not None:
            self._send(failure)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/lfs/(\w{64})", path):
            self.hub.stored[match[1]] = body
            self._send(200 if hashlib.sha256(body).hexdigest() == match[1] else 422)
        elif match := re.fullmatch(r"(?:/api/models)?/([\w.\-]+/[\w.\-]+?)(?:\.git/info/lfs|/|$)(.*)", path):
            self._of_repository(match[1], match[2], body)
        else:
            self._send(404)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._token() == OWNER:
            return True
        self._send(403 if self._token() == READER else 401)
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._send(409)
            return
        private = "private" in (asked.get("visibility"), asked.get("private") and "private")
        self.hub.repositories[name] = Repository(private and not self.hub.makes_public)
        self._json({"url": f"{self.hub.url}/{name}"})

    def _of_repository(self, name: str, rest: str, body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() not in (OWNER, READER)):
            self._send(404 if self._token() else 401, {"X-Error-Code": "RepoNotFound"})
        elif match := re.fullmatch(r"(?:revision/(.+))?", rest):
            self._info(name, repository, match[1] or "main")
        elif match := re.fullmatch(r"tree/(.+)", rest):
            self._tree(repository, match[1])
        elif match := re.fullmatch(r"resolve/([^/]+)/(.+)", rest):
            self._file(repository, match[1], match[2])
        elif self._may_write():
            self._write(name, repository, rest, body)

    def _write(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        if match := re.fullmatch(r"branch/(.+)", rest):
            repository.branches[match[1]] = list(repository.branches["main"])
            self._send(200)
        elif rest.startswith("preupload/"):
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answers = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
            self._json({"files": answers})
        elif rest == "/objects/batch":
            objects = [self._instructions(each) for each in json.loads(body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"commit/(.+)", rest):
            self._commit(name, match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._send(404)

    def _instructions(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}?X-Amz-Signature=secret", "header": {}}
        return {"oid": asked["oid"], "size": asked["size"], "actions": {"upload": upload}}

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        commits = self.hub.repositories[name].branches[branch]
        files = dict(commits[-1])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    if value.get("parentCommit") not in (None, hash_of(commits[-1])):
                        self._send(412)
                        return
                    self.hub.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.stored[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commits.append(files)
        digest = hash_of(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{digest}", "commitOid": digest, "success": True})

    def _info(self, name: str, repository: Repository, revision: str) -> None:
        found = repository.commit(revision)
        if found is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": file} for file in sorted(found[1])]
        self._json({"id": name, "sha": found[0], "siblings": siblings, "private": repository.private, "tags": []})

    def _tree(self, repository: Repository, revision: str) -> None:
        found = repository.commit(revision)
        files = found[1].items() if found is not None else ()
        self._json([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files])

    def _file(self, repository: Repository, revision: str, name: str) -> None:
        found = repository.commit(revision)
        if found is None or name not in found[1]:
            code = "RevisionNotFound" if found is None else "EntryNotFound"
            self._send(404, {"X-Error-Code": code})
            return
        content = found[1][name]
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._send(200, headers, content, keep=len(content) // 2 if name in self.hub.cut else None)

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(
        self, status: int, headers: Mapping[str, str] = NOTHING, body: bytes = b"", keep: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:keep])


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the Hub in a thread for the time of the block."""
    handler = type("HandlerOfHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
