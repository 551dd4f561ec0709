"""A hub on the loopback address that speaks what huggingface_hub asks of it: listings, redirects, etags, ranges, commits, and faults."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token"
LFS_BYTES = 4096  # larger files lie behind a redirect, as on the hub


@dataclass
class Repository:
    """files: {path: bytes}. fault: a status code that every request gets; cuts: downloads of large files that end in
    the middle before one is whole."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    fault: int | None = None
    cuts: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """repositories: {"models/owner/name": Repository}. asked: (method, path) of every request; ranges: the Range headers; leaked: whether
    the storage behind redirects was shown a token."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.leaked = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], *, kind: str = "models", **options) -> Repository:
        self.repositories[f"{kind}/{name}"] = Repository(dict(files), **options)
        return self.repositories[f"{kind}/{name}"]

    def downloads(self) -> list[str]:
        """The files whose content was asked for."""
        return [path.rpartition("/resolve/")[2].partition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        for pattern, respond in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                groups = match.groupdict()
                repository = self.server.repositories.get(f"{groups.pop('kind', None) or 'models'}/{groups.pop('name')}")
                if respond is Handler.cdn or not self.refused(repository, groups.get("revision")):
                    respond(self, repository, **groups)
                return
        if path == "/api/repos/create":
            self.created(json.loads(self.body))
        elif path == "/api/validate-yaml":  # of a card
            self.json({"errors": [], "warnings": []})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def created(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        new = self.server.repositories.setdefault(f"models/{name}", Repository(private=private))
        self.json({"url": f"{self.server.url}/{name}", "private": new.private})

    def refused(self, repository, revision) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            self.reply(401 if repository else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not allowed:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif repository.fault:
            self.reply(repository.fault, b"{}")
        elif revision not in (None, "main", "v1", repository.sha):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def info(self, repository, revision=None):
        siblings = [{"rfilename": name} for name in sorted(repository.files)]
        facts = {"private": repository.private, "downloads": 0, "tags": [], "lastModified": "2026-01-01T00:00:00.000Z"}
        self.json({"id": "x/y", "sha": repository.sha, "siblings": siblings, **facts})

    def tree(self, repository, revision, folder=None):
        below = "recursive=true" in urlsplit(self.path).query.lower()
        prefix, rows, folders = f"{folder}/" if folder else "", [], set()
        for name, content in sorted(repository.files.items()):
            inside = name[len(prefix) :]
            if name.startswith(prefix) and (below or "/" not in inside):
                rows.append({"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
            elif name.startswith(prefix):
                folders.add(prefix + inside.partition("/")[0])
        rows += [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in sorted(folders)]
        if folder and not rows:
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.json(rows)

    def paths_info(self, repository, revision):
        asked = json.loads(self.body)["paths"] if self.body.startswith(b"{") else re.findall(rb"paths=([^&]+)", self.body)
        names = [unquote(name.decode()) if isinstance(name, bytes) else name for name in asked]
        rows = [
            {"type": "file", "path": name, "size": len(repository.files[name]), "oid": hashlib.sha1(repository.files[name]).hexdigest()}
            for name in names
            if name in repository.files
        ]
        self.json(rows)

    def resolve(self, repository, revision, file):
        content = repository.files.get(file)
        if content is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": repository.sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if len(content) > LFS_BYTES:
            name = self.path.split("/resolve/")[0].lstrip("/")
            location = (
                f"http://localhost:{self.server.server_address[1]}/cdn/{name}/resolve/{revision}/{file}"  # another host, as the hub's
            )
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content)), "Location": location}
            return self.reply(302, b"", {"X-Repo-Commit": repository.sha, **linked})
        self.content(repository, content, headers)

    def cdn(self, repository, revision, file):
        self.server.leaked |= "Authorization" in self.headers  # the address is signed; tokens are the hub's alone
        self.content(repository, repository.files[file], {"Accept-Ranges": "bytes"})

    def content(self, repository, content, headers):
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            self.server.ranges.append(asked)
            start = int(re.match(r"bytes=(\d+)-", asked)[1])
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if self.command == "GET" and repository.cuts and len(content) > LFS_BYTES:
            repository.cuts -= 1
            self.head(status, len(content) - start, headers)
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
            return
        self.reply(status, content[start:], headers)

    def preupload(self, repository, revision):
        self.json({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(self.body)["files"]]})

    def commit(self, repository, revision):
        for line in self.body.splitlines():
            action = json.loads(line)
            if action["key"] == "file":
                repository.files[action["value"]["path"]] = base64.b64decode(action["value"]["content"])
        self.json({"commitUrl": f"{self.server.url}/x/y/commit/{repository.sha}", "commitOid": repository.sha})

    def head(self, status, length, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, status, content, headers=None):
        self.head(status, len(content), headers or {})
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content):
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


API, NAME = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)", r"(?P<name>[^/]+/[^/]+)"
FILE = r"(?P<revision>[^/]+)/(?P<file>.+)"
ROUTES = [
    (rf"{API}(/revision/(?P<revision>[^/]+))?", Handler.info),
    (rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    (rf"{API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (rf"{API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"{API}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"/cdn/((?P<kind>datasets)/)?{NAME}/resolve/{FILE}", Handler.cdn),
    (rf"/((?P<kind>datasets)/)?{NAME}/resolve/{FILE}", Handler.resolve),
]


@contextmanager
def serving():
    """A started hub, ended with the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextmanager
def connected(monkeypatch, folder):
    """A hub that this process's huggingface_hub talks to, with a cache of its own below `folder`, and no waiting between tries."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    from fastcm.weights import hub

    with serving() as started:
        changes = {
            "ENDPOINT": started.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": started.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_TOKEN_PATH": str(folder / "token"),
            "DOWNLOAD_CHUNK_SIZE": 1000,
        }
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        hub.fetch.cache_clear()
        yield started
        hub.fetch.cache_clear()


def offline(monkeypatch):
    from huggingface_hub import constants

    from fastcm.weights import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetch.cache_clear()
