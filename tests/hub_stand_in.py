"""A local stand-in for the Hugging Face Hub: serves repositories, accepts uploads, and fails on request."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_made_up"
_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>(?:(?!/(?:revision|tree|paths-info)(?:/|$)).)+)(?P<rest>/.*)?"
)
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class HubStandIn:
    """A Hub with models and data sets.

    Attributes:
        repositories: Names of the repositories that were made by uploads, and ``private`` those that are private.
        files: Files of the last upload, by path.
        gated: Names of the repositories that need an accepted licence.
        broken: Names of the files whose downloads end after half of their bytes.
        requests: Method and path of every request.
    """

    def __init__(self):
        self.repositories, self.private, self.files = [], [], {}
        self.gated, self.broken, self.requests = set(), set(), []
        self._commits = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.requests.append(("POST", self.path))
                if "/paths-info/" in self.path:
                    self.read(body)
                else:
                    self.answer(hub.post(self.path, body, self.headers["Authorization"]))

            def do_GET(self):
                hub.requests.append((self.command, self.path))
                self.read()

            do_HEAD = do_GET  # noqa: N815

            def read(self, body=b""):
                path = unquote(urlsplit(self.path).path)
                if found := _FILE.fullmatch(path):
                    self.send_file(f"{found['kind'] or ''}{found['id']}", found["revision"], found["path"])
                elif found := _API.fullmatch(path):
                    id = f"{'datasets/' if found['kind'] == 'datasets' else ''}{found['id']}"
                    self.send_facts(id, *((found["rest"] or "").strip("/").split("/") + [""] * 3)[:3], body)
                else:
                    self.refuse(404, "EntryNotFound")

            def send_facts(self, id, what, revision, folder, body):
                if what == "" and id in hub.repositories:
                    return self.answer(
                        {"id": id, "sha": "0" * 40, "siblings": [], "private": id in hub.private, "tags": []}
                    )
                commit, files = self.look_up(id, revision or "main")
                if files is None:
                    return None
                if what in ("tree", "paths-info"):
                    wanted = parse_qs(body.decode()).get("paths") if body else None
                    return self.answer([_entry(p, c) for p, c in _below(files, folder, wanted).items()])
                siblings = [{"rfilename": path} for path in files]
                name = id.removeprefix("datasets/")
                facts = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
                return self.answer({**facts, "lastModified": "2026-01-01T00:00:00.000Z"})

            def send_file(self, id, revision, path):
                commit, files = self.look_up(id, revision)
                if files is None:
                    return
                content = files.get(path)
                if content is None:
                    self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
                    return
                start = int((re.match(r"bytes=(\d+)-", self.headers["Range"] or "") or [0, 0])[1])
                self.send_response(206 if start else 200)
                self.send_header("X-Repo-Commit", commit)
                self.send_header("ETag", f'"{_digest(content)}"')
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(content) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if self.command == "GET" and path in hub.broken:
                    self.wfile.write(content[start : max(start, len(content) // 2)])
                elif self.command == "GET":
                    self.wfile.write(content[start:])

            def look_up(self, id, revision):
                """The commit and the files of a revision; without them, the answer was an error."""
                commits = hub._commits.get(id)
                if commits is None:
                    self.refuse(401, "RepoNotFound")
                elif id in hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    self.refuse(401, "GatedRepo")
                else:
                    commit = list(commits)[-1] if revision == "main" else revision
                    if commit in commits:
                        return commit, commits[commit]
                    self.refuse(404, "RevisionNotFound")
                return None, None

            def answer(self, content):
                data = json.dumps(content).encode()
                self.send_response(409 if "error" in content else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def refuse(self, status, code, headers=()):
                self.send_response(status)
                for name, value in {"X-Error-Code": code, "Content-Length": "0", **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, id, files):
        """Add a commit to a repository, ``datasets/NAME`` for a data set; returns its hash."""
        commits = self._commits.setdefault(id, {})
        name = hashlib.sha1(f"{id} {len(commits)}".encode()).hexdigest()
        commits[name] = dict(files)
        return name

    def commit_folder(self, id, folder, **more):
        """Add the files of a folder as a commit; ``more`` are texts of further files, by name with ``_`` for ``.``."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.commit(id, {**files, **{name.replace("_", "."): text.encode() for name, text in more.items()}})

    def post(self, path, body, authorization):
        assert authorization == f"Bearer {TOKEN}"
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            answer = {"url": f"{self.address}/{name}", "name": wanted["name"]}
            if name in self.repositories:
                return {"error": "it exists", **answer}
            self.repositories.append(name)
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.private.append(name)
            return answer
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.address}/me/tuned/commit/1", "commitOid": "1", "hookOutput": ""}
        if "yaml" in path:
            return {"errors": [], "warnings": []}
        raise AssertionError(path)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self._server.shutdown()
        self._server.server_close()


def _digest(content):
    return hashlib.sha1(content).hexdigest()


def _entry(path, content):
    if content is None:
        return {"type": "directory", "path": path, "oid": _digest(path.encode())}
    return {"type": "file", "path": path, "oid": _digest(content), "size": len(content)}


def _below(files, folder, wanted):
    """The files below a folder, or those that are wanted, with the folders among them."""
    folders = {path.rsplit("/", number)[0]: None for path in files for number in range(1, path.count("/") + 1)}
    every = {**folders, **files}
    if wanted is not None:
        return {path: every[path] for path in wanted if path in every}
    return {path: content for path, content in every.items() if not folder or path.startswith(f"{folder}/")}
