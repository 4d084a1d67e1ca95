"""A stand-in for the Hugging Face Hub's HTTP API: what `push` calls, with its files in memory."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """url; files: name -> bytes; made: bodies of create; commits, and the tokens that were sent.

    Repositories are public by default, and one that is there stays what it is, as on the Hub.
    """

    def __init__(self, files: dict[str, bytes], refuses: bool, fails: int | None) -> None:
        self.files, self.refuses, self.fails = dict(files), refuses, fails
        self.made: list[dict[str, Any]] = []
        self.private: bool | None = None  # of the repository; None before there is one
        self.commits: list[list[str]] = []
        self.tokens: set[str | None] = set()
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing: a test's output is its own."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        hub = self.hub
        hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            hub.made.append(asked := json.loads(body))
            if hub.private is None:
                hub.private = asked.get("private", asked.get("visibility") == "private")
            self.json({"url": f"{hub.url}/someone/adapter"})
        elif self.path.endswith("/validate-yaml"):
            self.json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.json({"files": [{"path": path, **plain} for path in paths]})
        elif "/commit/" in self.path and not hub.refuses:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            hub.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            hub.commits.append(sorted(file["path"] for file in files))
            url = f"{hub.url}/someone/adapter/commit/{'1' * 40}"
            self.json({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self.answer(403, b'{"error": "no"}')

    def json(self, found: Any) -> None:
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.fails is not None:
            return self.answer(self.hub.fails)
        if self.path == "/api/models/someone/adapter":
            return self.json({"id": "someone/adapter", "private": bool(self.hub.private)})
        name = self.path.rpartition("/resolve/main/")[2] or self.path.rpartition("/")[2]
        found = self.hub.files.get(name)
        if found is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        self.answer(200, found, ETag=f'"{hash(found)}"', X_Repo_Commit="0" * 40)


@contextmanager
def serving(
    files: dict[str, bytes] | None = None, *, refuses: bool = False, fails: int | None = None
) -> Iterator[Hub]:
    """A hub whose repository someone/adapter has these files; `refuses` every commit, and answers
    with the status `fails` who asks for a file.
    """
    hub = Hub(files or {}, refuses, fails)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
