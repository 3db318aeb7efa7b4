"""A hub on this machine: the part of the hub's HTTP interface that an upload uses."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What the hub has, and the requests that it got; a path in `refusals` is answered with its status."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> content
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """The status and the JSON of the answer."""
        self.requests.append(f"{method} {path}")
        for part, status in self.refusals.items():
            if part in path:
                return status, {"error": "refused by the test"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            asked = json.loads(body)["files"]
            return 200, {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            }
        name, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if action:
            return self._commit(name, body)
        return self._info(re.sub(r"/revision/.*", "", name))

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.files:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.files[name] = {".gitattributes": b""}
        self.private[name] = asked.get("private", asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}"}

    def _info(self, name: str) -> tuple[int, Any]:
        if name not in self.files:
            return 404, {"error": "Repository not found"}
        siblings = [{"rfilename": path} for path in self.files[name]]
        return 200, {"id": name, "private": self.private[name], "siblings": siblings, "sha": "0" * 40, "tags": []}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "hookOutput": ""}


@contextmanager
def local_hub() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply("GET")

        def do_POST(self) -> None:
            self._reply("POST")

        def _reply(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, answer = hub.answer(method, path, body, self.headers.get("Authorization", ""))
            content = json.dumps(answer).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
