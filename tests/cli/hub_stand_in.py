"""A local server that simulates the Hugging Face hub: clients can create repositories and upload files."""

from __future__ import annotations

import base64
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """`repositories` is {"OWNER/NAME": {"private": ..., "files": {path: bytes}}}; `refuses` is a status to answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.refuses, self.tokens = {}, None, set()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


def _is_private(asked):
    return asked.get("private") or asked.get("visibility") == "private"  # the client's versions say it so or so


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.partition("?")[0])
        if self.server.refuses is not None:
            self._answer({"error": "You don't have the rights to do that"}, self.server.refuses)
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            there = name in self.server.repositories
            self.server.repositories.setdefault(name, {"private": _is_private(given), "files": {}})
            self._answer({"url": f"{self.server.address}/{name}"}, 409 if there else 200)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif found is None:
            self._answer({"error": f"the stand-in has no {self.path}"}, 404)
        elif found[2] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._answer({"files": files})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[found[1]]["files"][line["value"]["path"]] = content
            self._answer({"commitUrl": f"{self.server.address}/{found[1]}/commit/0", "commitOid": "0" * 40})

    def _answer(self, values, status=200):
        text = b"" if self.command == "HEAD" else json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@contextmanager
def hub():
    """Run the server during a `with` block."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
