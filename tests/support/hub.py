"""A hub on this machine: what huggingface_hub asks of the real one when it publishes and fetches.

Only HTTP is faked; huggingface_hub itself runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Hub:
    """Repositories by branch, and what was asked of them.

    Attributes:
        address: the endpoint.
        files: contents by ``(repository, branch)`` and path.
        requests: method and path, and the body where it is short.
        token: what the caller must show; None lets anybody in.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.token: str | None = None
        self._branches: dict[str, set[str]] = {}
        self._large: dict[str, bytes] = {}

    def add(self, repository: str, branch: str, folder: Path) -> None:
        """Publish a folder."""
        self.files[repository, branch] = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def environment(self, cache: Path) -> dict[str, str]:
        """What makes a process use this hub."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(cache),
            "HF_TOKEN": self.token or "hf_nobody",
        }

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, content (bytes, or plain data for JSON) and headers."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                self._branches.setdefault(name, {"main"})
                return 200, {"url": f"{self.address}/{name}"}, {}
            case "POST", ["api", "validate-yaml"]:
                return 200, {"warnings": [], "errors": []}, {}
            case "POST", ["api", "models", owner, name, "branch", branch]:
                branches = self._branches[f"{owner}/{name}"]
                status = 409 if branch in branches else 201
                branches.add(branch)
                return status, {}, {}
            case "POST", ["api", "models", owner, name, "preupload" | "commit", branch] if (
                branch not in self._branches[f"{owner}/{name}"]
            ):
                return 404, {}, {"X-Error-Code": "RevisionNotFound"}
            case "POST", ["api", "models", _, _, "preupload", _]:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("tensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return 200, {"files": files}, {}
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return 200, {"transfer": "basic", "objects": self._uploads(json.loads(body))}, {}
            case "PUT", ["large", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self._large[oid] = body
                return 200, b"", {}
            case "POST", ["api", "models", owner, name, "commit", branch]:
                self._commit(f"{owner}/{name}", branch, body)
                address = f"{self.address}/{owner}/{name}/commit/{COMMIT}"
                # read where a pull request was asked for
                pull = {"pullRequestUrl": f"{self.address}/{owner}/{name}/discussions/1"}
                return 200, {"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""} | pull, {}
            case _:
                return self._read(parts)

    def _uploads(self, asked: Any) -> list[dict[str, Any]]:
        return [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.address}/large/{one['oid']}"}},
            }
            for one in asked["objects"]
        ]

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = self.files.setdefault((repository, branch), {})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]

    def _read(self, parts: list[str]) -> tuple[int, Any, dict[str, str]]:
        match parts:
            case [owner, name, "resolve", branch, *path]:
                files = self.files.get((f"{owner}/{name}", self._branch(branch)))
                if files is None:
                    known = any(repository == f"{owner}/{name}" for repository, _ in self.files)
                    return 404, {}, {"X-Error-Code": f"{'Revision' if known else 'Repo'}NotFound"}
                content = files.get("/".join(path))
                if content is None:
                    return 404, {}, {"X-Error-Code": "EntryNotFound"}
                etag = hashlib.sha256(content).hexdigest()
                commit = self._commit_of(self._branch(branch))
                return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
            case ["api", "models", owner, name, *rest]:
                branch = self._branch(rest[1]) if len(rest) > 1 else "main"
                files = self.files.get((f"{owner}/{name}", branch))
                if files is None:
                    return 404, {}, {"X-Error-Code": "RepoNotFound"}
                if rest[:1] == ["tree"]:
                    tree = [
                        {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                        for path, data in files.items()
                    ]
                    return 200, tree, {}
                siblings = [{"rfilename": path} for path in files]
                info = {"id": f"{owner}/{name}", "sha": self._commit_of(branch)}
                return 200, {**info, "siblings": siblings}, {}
        return 404, {}, {"X-Error-Code": "RepoNotFound"}

    def _commit_of(self, branch: str) -> str:
        return hashlib.sha1(branch.encode()).hexdigest()

    def _branch(self, revision: str) -> str:
        by_commit = {self._commit_of(branch): branch for _, branch in self.files}
        return by_commit.get(revision, revision)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub while the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    def respond(request: BaseHTTPRequestHandler) -> None:
        method, path = request.command, urlsplit(request.path).path
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        told = json.loads(body) if path.endswith("create") else None
        hub.requests.append((method, request.path, told))
        # what is put carries its right to be in its address
        known = hub.token is None or method == "PUT"
        if not known and request.headers.get("Authorization") != f"Bearer {hub.token}":
            status, content, headers = 401, {"error": "Invalid username or password."}, {}
        else:
            status, content, headers = hub.answer(method, path, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if method != "HEAD":
            request.wfile.write(data)

    for method in ("GET", "HEAD", "POST", "PUT"):
        setattr(Handler, f"do_{method}", respond)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
