"""A Hub on 127.0.0.1: as much of its HTTP interface as huggingface_hub needs to push and to load models.

Files are kept in memory. Safetensors files go the way of large files (LFS: batch, upload, verify), others are part of
the commit. Front matter is checked for what the Hub refuses: a base model that is a path.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import transformers.utils.hub
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        url: Where it listens.
        repos: The commits of each repository, oldest first: (hash, files by path).
        large: The large files by their SHA256.
        verified: The SHA256 of the large files whose upload the client had verified.
    """

    url: str = ""
    repos: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{repo} {len(self.repos.get(repo, []))}".encode()).hexdigest()
        self.repos.setdefault(repo, []).append((oid, files))
        return oid

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        commits = self.repos.get(repo, [])
        if not commits:
            raise RefusalError(404, "RepoNotFound")
        for oid, files in commits:
            if oid == revision:
                return oid, files
        if revision != "main":
            raise RefusalError(404, "RevisionNotFound")
        return commits[-1]


class RefusalError(Exception):
    def __init__(self, status: int, code: str = "", body: Any = None) -> None:
        super().__init__(code)
        self.status, self.code, self.body = status, code, body or {"error": code}


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815

    def answer(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for wanted, pattern, view in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == wanted:
                    return self.send(200, *view(self, **match.groupdict()))
            raise RefusalError(501, f"{method} {path}")
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code}
            return self.send(refusal.status, json.dumps(refusal.body).encode(), headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> tuple[bytes, dict[str, str]]:
        return json.dumps(value).encode(), {"Content-Type": "application/json"}

    # Uploads

    def create(self) -> tuple[bytes, dict[str, str]]:
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or 'somebody'}/{asked['name']}"
        if repo in self.hub.repos:
            raise RefusalError(409, "RepoExists", {"url": f"{self.hub.url}/{repo}", "name": repo})
        self.hub.commit(repo, {".gitattributes": b""})
        return self.json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def whoami(self) -> tuple[bytes, dict[str, str]]:
        return self.json({"name": "somebody", "type": "user", "orgs": []})

    def validate_yaml(self) -> tuple[bytes, dict[str, str]]:
        front = FRONT_MATTER.match(json.loads(self.body)["content"])
        base = (yaml.safe_load(front[1]) if front else {}).get("base_model")
        try:
            validate_repo_id(base or "some/model")
        except ValueError:
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            raise RefusalError(400, "", {"errors": [{"message": message}], "warnings": []}) from None
        return self.json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> tuple[bytes, dict[str, str]]:
        self.hub.at(repo, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {True: "lfs", False: "regular"}
        return self.json(
            {"files": [{"path": p, "uploadMode": modes[is_large(p)], "shouldIgnore": False} for p in paths]}
        )

    def batch(self, repo: str) -> tuple[bytes, dict[str, str]]:
        objects = json.loads(self.body)["objects"]
        for file in objects:
            if file["oid"] not in self.hub.large:
                file["actions"] = {
                    "upload": {"href": f"{self.hub.url}/large/{file['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
        return self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> tuple[bytes, dict[str, str]]:
        if sha256(self.body) != oid:
            raise RefusalError(400, "BadChecksum")
        self.hub.large[oid] = self.body
        return b"", {}

    def verify(self) -> tuple[bytes, dict[str, str]]:
        asked = json.loads(self.body)
        if len(self.hub.large[asked["oid"]]) != asked["size"]:
            raise RefusalError(400, "BadSize")
        self.hub.verified.add(asked["oid"])
        return self.json({})

    def commit(self, repo: str, revision: str) -> tuple[bytes, dict[str, str]]:
        files = dict(self.hub.at(repo, revision)[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = self.hub.commit(repo, files)
        return self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    # Downloads

    def info(self, repo: str, revision: str = "main") -> tuple[bytes, dict[str, str]]:
        oid, files = self.hub.at(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        return self.json({"id": repo, "modelId": repo, "sha": oid, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> tuple[bytes, dict[str, str]]:
        _, files = self.hub.at(repo, revision)
        rows = []
        for path, data in files.items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": sha256(data)[:40]}
            if is_large(path):
                row["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            rows.append(row)
        return self.json(rows)

    def resolve(self, repo: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        oid, files = self.hub.at(repo, revision)
        if path not in files:
            raise RefusalError(404, "EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{sha256(data)[:40]}"'}
        if is_large(path):
            headers |= {"X-Linked-ETag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        return data, headers


ROUTES = [
    ("POST", r"/api/repos/create", Handler.create),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/large/(?P<oid>\w{64})", Handler.upload),
    ("POST", r"/verify", Handler.verify),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on a free port, as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_client_at(hub: Hub, cache: str, monkeypatch: Any) -> None:
    """Has huggingface_hub speak to this Hub, with an empty cache."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it notes the endpoint that it finds first
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
