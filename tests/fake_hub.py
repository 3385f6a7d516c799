"""A small stand-in for the Hugging Face Hub on loopback: the clients that talk to it are the real ones."""

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


USER = "someone"
LFS_SUFFIXES = {".bin", ".parquet", ".png", ".pt", ".safetensors"}

API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate_yaml",
    rf"GET {API}(?:/revision/(?P<revision>[^/]+))?": "info",
    rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?": "tree",
    rf"POST {API}/paths-info/(?P<revision>[^/]+)": "paths_info",
    rf"POST {API}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"POST {API}/commit/(?P<revision>[^/]+)": "commit",
    rf"POST {GIT}\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": "lfs_put",
    rf"(?:GET|HEAD) {GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}


@dataclass(frozen=True)
class HubFile:
    """A file as the clients know it: they compare its hash with that of theirs, which is another one for LFS."""

    content: bytes = field(repr=False)
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class HubCommit:
    """A commit, with all files of the repository."""

    oid: str
    message: str
    files: dict[str, HubFile]


class HubError(Exception):
    """Status and code, from which the clients make exceptions of their own."""


@dataclass
class FakeHub:
    """What is on the Hub. A repository has one branch, `main`, and its commits can be pinned."""

    url: str
    env: dict[str, str]
    repos: dict[str, list[HubCommit]] = field(default_factory=dict, repr=False)
    large_files: dict[str, bytes] = field(default_factory=dict, repr=False)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list, repr=False)

    def commits(self, repo_id: str, repo_type: str = "model") -> list[HubCommit]:
        """Commits of a repository, oldest first."""
        return self.repos[f"{repo_type}s/{repo_id}"]

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """Files of a repository at its newest commit."""
        return {path: file.content for path, file in self.commits(repo_id, repo_type)[-1].files.items()}

    def find(self, repo: str, revision: str) -> HubCommit:
        if repo not in self.repos:
            raise HubError(404, "RepoNotFound")
        commits = {commit.oid: commit for commit in self.repos[repo]}
        if revision != "main" and revision not in commits:
            raise HubError(404, "RevisionNotFound")
        return commits.get(revision, self.repos[repo][-1])

    def add_commit(self, repo: str, message: str, files: dict[str, HubFile]) -> HubCommit:
        commits = self.repos.setdefault(repo, [])
        commits.append(HubCommit(hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest(), message, files))
        return commits[-1]


class Handler(BaseHTTPRequestHandler):
    """The routes that the clients use. What a route returns is sent as JSON."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer takes 40 ms
    wbufsize = -1
    hub: FakeHub
    lock: threading.Lock

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.hub.requests.append(f"{self.command} {address.path}")
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        matches = [(re.fullmatch(route, f"{self.command} {address.path}"), name) for route, name in ROUTES.items()]
        match, name = next((pair for pair in matches if pair[0]), (None, ""))
        try:
            if match is None:
                raise HubError(404, "NoSuchRoute")
            # An upload to the large file storage goes to a signed address, without a token; so may a card that is only
            # checked.
            if self.command == "POST" and not self.has_token and name != "validate_yaml":
                raise HubError(401, "Unauthorized")
            groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            if "repo" in groups:
                groups["repo"] = f"{groups.pop('kind', 'models')}/{groups['repo']}"
                # Without a token a private repository looks as if it were not there.
                if groups["repo"] in self.hub.private and not self.has_token:
                    raise HubError(401, "RepoNotFound")
            with self.lock:
                answer = getattr(self, name)(**groups)
            if name != "resolve":
                self.send(200, json.dumps(answer).encode())
        except HubError as error:
            self.send(error.args[0], b"", {"X-Error-Code": error.args[1]})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    @property
    def has_token(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.hub.env['HF_TOKEN']}"

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def whoami(self) -> dict[str, Any]:
        return {"type": "user", "name": USER, "orgs": []}

    def create(self) -> dict[str, Any]:
        asked = json.loads(self.body)
        repo = f"{asked.get('type', 'model')}s/{asked.get('organization') or USER}/{asked['name']}"
        if repo not in self.hub.repos:
            self.hub.add_commit(repo, "initial commit", {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
        return {"url": f"{self.hub.url}/{repo.removeprefix('models/')}"}

    def validate_yaml(self) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def info(self, repo: str, revision: str = "main") -> dict[str, Any]:
        commit = self.hub.find(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        private = repo in self.hub.private
        return {"id": repo.partition("/")[2], "sha": commit.oid, "private": private, "tags": [], "siblings": siblings}

    def paths_info(self, repo: str, revision: str) -> list[dict[str, Any]]:
        wanted = parse_qs(self.body.decode())["paths"]
        return [entry for entry in self.entries(repo, revision, "", recursive=True) if entry["path"] in wanted]

    def tree(self, repo: str, revision: str, folder: str = "") -> list[dict[str, Any]]:
        return self.entries(repo, revision, folder, recursive=self.query.get("recursive") == ["true"])

    def entries(self, repo: str, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        start = f"{folder}/" if folder else ""
        entries = {}
        for path, file in self.hub.find(repo, revision).files.items():
            for name in [path, *map(str, PurePosixPath(path).parents)][:-1]:
                if name.startswith(start) and (recursive or "/" not in name.removeprefix(start)):
                    entries[name] = {"type": "directory", "path": name, "oid": "0" * 40}
            if path in entries:
                size = len(file.content)
                entries[path] = {"type": "file", "path": path, "oid": file.oid[:40], "size": size}
                if file.lfs:
                    entries[path]["lfs"] = {"oid": file.oid, "size": size, "pointerSize": 134}
        if folder and not entries:
            raise HubError(404, "EntryNotFound")
        return list(entries.values())

    def preupload(self, repo: str, revision: str) -> dict[str, Any]:
        known = self.hub.find(repo, revision).files
        answers = []
        for path in [file["path"] for file in json.loads(self.body)["files"]]:
            mode = "lfs" if PurePosixPath(path).suffix in LFS_SUFFIXES else "regular"
            oid = known[path].oid if path in known else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, repo: str) -> dict[str, Any]:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.large_files:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict[str, Any]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "ChangedWhileUploaded")
        self.hub.large_files[oid] = self.body
        return {}

    def commit(self, repo: str, revision: str) -> dict[str, Any]:
        files, message = dict(self.hub.find(repo, revision).files), ""
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = HubFile(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    files[value["path"]] = HubFile(self.hub.large_files[value["oid"]], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise HubError(400, other)
        oid = self.hub.add_commit(repo, message, files).oid
        return {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.removeprefix('models/')}/commit/{oid}"}

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.hub.find(repo, revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
        # A streamed dataset reads its files in parts.
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            part = file.content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
            headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(file.content)}"
            self.send(206, part, headers)
        else:
            self.send(200, file.content, headers)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """
    Starts an empty Hub. Its `env` is for other processes (`tests.processes.Script`): huggingface_hub reads the address
    when it is imported.
    """
    with tempfile.TemporaryDirectory() as home, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        env = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_fake", "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
        hub = FakeHub(url, {**env, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})
        server.RequestHandlerClass = type("HubHandler", (Handler,), {"hub": hub, "lock": threading.Lock()})
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
