"""A server that speaks the Hugging Face hub's protocol as far as publishing and reading need it; everything in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the server holds, and what tests let it do wrong."""

    token: str = "hf_test"
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    """Of the one repository: branch to commit."""
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Commit to `title`, `parent` and `files` (path to bytes)."""
    large: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by sha256."""
    requests: list[str] = field(default_factory=list)
    damage: str = ""
    """The name of a file that is stored with another byte."""
    overtake: bool = False
    """Somebody else commits just before the next commit."""
    url: str = ""

    def files(self, branch: str) -> dict[str, bytes]:
        return dict(self.commits[self.branches.get(branch, branch)]["files"])

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid] = {"title": title, "parent": parent, "files": files}
        self.branches[branch] = oid
        return oid


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _do(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        body = self._body()
        hub.requests.append(f"{self.command} {path}")
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer({"error": "Invalid username or password."}, 401)
            return
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if hub.branches:
                self._answer({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}, 409)
                return
            hub.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            hub.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._answer({"url": f"{hub.url}/{repo}", "id": repo, "name": repo})
        elif path.startswith("/lfs/"):
            hub.large[parts[1]] = body
            self._answer({})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._object(each) for each in json.loads(body)["objects"]]})
        elif "resolve" in parts:
            self._resolve(parts[parts.index("resolve") + 1], "/".join(parts[parts.index("resolve") + 2 :]))
        elif parts[:2] == ["api", "models"]:
            self._models(parts[4:], body)
        else:
            self._answer({"error": f"{path} is not spoken here"}, 404)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _do

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.state.large:
            answer["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{asked['oid']}"}}
        return answer

    def _models(self, parts: list[str], body: bytes) -> None:
        hub = self.state
        if not parts:
            self._info(hub.branches["main"])
            return
        what = parts[0]
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in hub.branches.items()]
            self._answer({"branches": branches, "converts": [], "tags": []})
        elif what == "branch" and self.command == "POST":
            hub.branches[parts[1]] = hub.branches["main"]
            self._answer({})
        elif what == "branch":
            del hub.branches[parts[1]]
            self._answer({})
        elif what == "preupload":
            large = [each["path"].endswith((".safetensors", ".gguf")) for each in json.loads(body)["files"]]
            files = [
                {"path": each["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                for each, lfs in zip(json.loads(body)["files"], large, strict=True)
            ]
            self._answer({"files": files})
        elif what == "commit":
            self._commit(parts[1], body)
        elif what == "tree":
            self._answer([self._entry(path, data) for path, data in sorted(hub.files(parts[1]).items())])
        elif what == "commits":
            self._answer(list(self._history(parts[1])))
        elif what == "revision":
            self._info(hub.branches.get(parts[1], parts[1]))
        else:
            self._answer({"error": f"{what} is not spoken here"}, 404)

    def _info(self, oid: str) -> None:
        repo, private = next(iter(self.state.private.items()))
        self._answer({"id": repo, "modelId": repo, "sha": oid, "private": private, "tags": [], "siblings": []})

    def _commit(self, branch: str, body: bytes) -> None:
        hub, title, files = self.state, "", self.state.files(branch)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
                if hub.overtake:
                    hub.commit(branch, "Regraft export of somebody else", files)
                    hub.overtake = False
                if value.get("parentCommit") not in (None, hub.branches[branch]):
                    self._answer({"error": "the head is another commit by now"}, 412)
                    return
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            if hub.damage and entry["key"] != "header" and value["path"] == hub.damage:
                data = files[value["path"]]
                files[value["path"]] = data[:-1] + bytes([data[-1] ^ 1])
        oid = hub.commit(branch, title, files)
        self._answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{next(iter(hub.private))}/commit/{oid}"}
        )

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith((".safetensors", ".gguf")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _history(self, branch: str) -> Iterator[dict[str, Any]]:
        oid: str | None = self.state.branches[branch]
        while oid is not None:
            commit = self.state.commits[oid]
            yield {
                "id": oid,
                "title": commit["title"],
                "message": "",
                "date": "2026-01-01T00:00:00.000Z",
                "authors": [],
            }
            oid = commit["parent"]

    def _resolve(self, revision: str, path: str) -> None:
        oid = self.state.branches.get(revision, revision)
        data = self.state.commits[oid]["files"].get(path)
        if data is None:
            self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": oid})
