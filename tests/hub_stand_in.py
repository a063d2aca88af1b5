"""A server on this machine that takes what huggingface_hub uploads: repositories, and one commit of small files."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubStandIn:
    """Keeps the names of repositories that were made, and the files of the last commit by path."""

    def __init__(self):
        self.repositories, self.files = [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(hub.post(self.path, body, self.headers["Authorization"]))

            def do_GET(self):
                self.answer({"id": "me/tuned", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

            def answer(self, content):
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def post(self, path, body, authorization):
        assert authorization == "Bearer hf_made_up"
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.repositories.append("/".join(filter(None, (wanted.get("organization"), wanted["name"]))))
            return {"url": f"{self.address}/{self.repositories[-1]}", "name": wanted["name"]}
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
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self._server.shutdown()
        self._server.server_close()
