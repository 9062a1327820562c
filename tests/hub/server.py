"""A small Hub on loopback: the part of the Hugging Face Hub's API that its own clients use, with faults by rule.

Repositories are folders: `models/OWNER/NAME` and `datasets/OWNER/NAME` below a root; every change of their files is
another commit. Revisions other than main, gates, private repositories, tokens and faults are attributes of the server.
"""

import hashlib
import json
import re
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SIZE = 1000  # bytes from which an uploaded file is large


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.revisions: dict[str, dict[str, Path]] = {}  # "datasets/owner/name" -> revision -> a folder with its files
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.tokens: dict[str, dict[str, Any]] = {}  # token -> what whoami says
        self.faults: list[tuple[str, str | int]] = []  # (regex of "METHOD path", silent | drop | cut | an HTTP status)
        self.requests: list[str] = []  # "METHOD path", in order
        self.sent: dict[str, int] = {}  # bytes of each file that were sent
        self.commits: list[dict[str, Any]] = []  # what was uploaded: repository and its files
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def folder(self, repository: str, revision: str) -> Path | None:
        """Of a branch, tag or commit; None where there is none."""
        main = self.root / repository
        known = {"main": main, **self.revisions.get(repository, {})}
        by_commit = {commit_of(path): path for path in known.values() if path.is_dir()}
        found = known.get(revision, by_commit.get(revision))
        return found if found and found.is_dir() else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


def files_of(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def commit_of(folder: Path) -> str:
    stamps = [f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}" for name, path in files_of(folder).items()]
    return hashlib.sha1("\n".join(stamps).encode()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """The Hub, running."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        """Nothing: `Hub.requests` has them."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path).strip("/"), parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cut = False
        self.server.requests.append(f"{self.command} {path}")
        for rule, fault in self.server.faults:
            if re.search(rule, f"{self.command} {path}"):
                if fault == "silent":
                    time.sleep(60)
                if fault in ("silent", "drop"):
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self.send(fault, {"error": "by rule"})
                    return
                self.cut = fault == "cut"
        for pattern, handler in ROUTES:
            if match := re.fullmatch(pattern, path):
                handler(self, *match.groups())
                return
        self.refuse(404, "EntryNotFound", f"no route {path}")

    # What every answer needs.

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            if self.cut:
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def user(self) -> dict[str, Any] | None:
        return self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def find(self, repository: str, revision: str) -> Path | None:
        """The revision's folder; None where the request was refused."""
        known = (self.server.root / repository).is_dir()
        if self.headers.get("Authorization") and not self.user():
            self.send(401, {"error": "Invalid credentials in Authorization header"})
        elif not known or (repository in self.server.private and not self.user()):
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif repository in self.server.gated and not (self.user() or {}).get("accepted"):
            self.refuse(403 if self.user() else 401, "GatedRepo", "Access to it is restricted.")
        elif folder := self.server.folder(repository, unquote(revision)):
            return folder
        else:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # The routes.

    def root(self) -> None:
        self.send(200, b"", {"Content-Type": "text/html"})

    def whoami(self) -> None:
        user = self.user()
        self.send(200 if user else 401, user or {"error": "Invalid username or password."})

    def info(self, repository: str, revision: str | None = None) -> None:
        if folder := self.find(repository, revision or "main"):
            card = folder / "README.md"
            names = [{"rfilename": name} for name in files_of(folder)]
            content = {
                "_id": "0", "id": repository.split("/", 1)[1], "sha": commit_of(folder), "siblings": names, "tags": [],
                "private": repository in self.server.private, "gated": False, "downloads": 0, "likes": 0,
                "lastModified": "2026-01-02T03:04:05.000Z", "createdAt": "2026-01-02T03:04:05.000Z",
                "cardData": yaml.safe_load(card.read_text().split("---")[1]) if card.exists() else None,
            }  # fmt: skip
            self.send(200, content)

    def tree(self, repository: str, revision: str, below: str | None = None) -> None:
        folder = self.find(repository, revision)
        if not folder:
            return
        prefix, recursive = f"{below}/" if below else "", self.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for name, path in files_of(folder).items():
            if name.startswith(prefix):
                first, _, rest = name.removeprefix(prefix).partition("/")
                if rest:
                    entries[prefix + first] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + first}
                if not rest or recursive:
                    entries[name] = self.entry(name, path)
        if below and not entries:
            self.refuse(404, "EntryNotFound", f"{below} does not exist")
        else:
            self.send(200, list(entries.values()))

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        etag = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "oid": etag, "size": path.stat().st_size, "path": name}

    def paths_info(self, repository: str, revision: str) -> None:
        if folder := self.find(repository, revision):
            form = json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode())
            files, wanted = files_of(folder), form["paths"]
            found = [self.entry(name, files[name]) for name in wanted if name in files]
            folders = [name for name in wanted if name not in files and any(f.startswith(f"{name}/") for f in files)]
            found += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in folders]
            self.send(200, found)

    def resolve(self, kind: str | None, repository: str, revision: str, name: str) -> None:
        repository = f"{kind or 'models'}/{repository}"
        folder = self.find(repository, revision)
        if not folder:
            return
        if not (path := folder / name).is_file():
            self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **self.commit(folder)})
            return
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes", **self.commit(folder)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.command == "GET":
            self.server.sent[name] = self.server.sent.get(name, 0) + len(data)
        self.send(status, data, {"Content-Type": "application/octet-stream", **headers})

    def commit(self, folder: Path) -> dict[str, str]:
        return {"X-Repo-Commit": commit_of(folder)}

    def create(self) -> None:
        request = json.loads(self.body)
        user = self.user()
        if not user:
            self.send(401, {"error": "Invalid username or password."})
            return
        owner = request.get("organization") or user["name"]
        if owner != user["name"] and owner not in [org["name"] for org in user.get("orgs", ())]:
            self.send(403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"})
            return
        kind = f"{request.get('type', 'model')}s"
        name = f"{owner}/{request['name'].split('/')[-1]}"
        (self.server.root / kind / name).mkdir(parents=True, exist_ok=True)
        if request.get("private"):
            self.server.private.add(f"{kind}/{name}")
        prefix = "" if kind == "models" else f"{kind}/"
        self.send(200, {"url": f"{self.server.url}/{prefix}{name}", "name": name, "id": name})

    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"].split("---")[1]
        wrong = re.search(r"^base_model: *[\"']?[./~]", text, re.MULTILINE)
        errors = [{"message": '"base_model" is not a valid model id'}] if wrong else []
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repository: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_SIZE else "regular", "shouldIgnore": False}
            for f in files
        ]
        self.send(200, {"files": modes})

    def lfs_batch(self, repository: str) -> None:
        objects = json.loads(self.body)["objects"]
        actions = [{**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}} for one in objects]
        self.send(200, {"transfer": "basic", "objects": actions}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        self.server.objects[oid] = self.body
        self.send(200)

    def write_commit(self, repository: str, revision: str) -> None:
        folder, files = self.server.root / repository, {}
        for line in map(json.loads, self.body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        card = files.get("README.md", b"").decode()
        if re.search(r"^base_model: *[\"']?[./~]", card, re.MULTILINE):
            self.send(400, {"error": '"base_model" is not a valid model id'})
            return
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        self.server.commits.append({"repository": repository, "files": files})
        address = f"{self.server.url}/{repository.removeprefix('models/')}"
        oid = commit_of(folder)
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{address}/commit/{oid}", "hookOutput": ""})


REPOSITORY = r"((?:models|datasets)/[^/]+/[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"", Handler.root),
    (r"api/whoami-v2", Handler.whoami),
    (r"api/repos/create", Handler.create),
    (r"api/validate-yaml", Handler.validate_yaml),
    (rf"api/{REPOSITORY}", Handler.info),
    (rf"api/{REPOSITORY}/revision/(.+)", Handler.info),
    (rf"api/{REPOSITORY}/tree/([^/]+)", Handler.tree),
    (rf"api/{REPOSITORY}/tree/([^/]+)/(.+)", Handler.tree),
    (rf"api/{REPOSITORY}/paths-info/(.+)", Handler.paths_info),
    (rf"api/{REPOSITORY}/preupload/(.+)", Handler.preupload),
    (rf"api/{REPOSITORY}/commit/(.+)", Handler.write_commit),
    (r"(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"lfs/(\w+)", Handler.lfs_put),
    (r"(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]
