"""As much of Google Cloud Storage's JSON API as TensorStore uses, in memory, on loopback."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 50  # objects a listing gives at once: few, so that clients have to ask again


class FakeGcs:
    """A context manager: `environment` points TensorStore at it, `objects` is {"bucket/name": (content, generation)}.

    `refuse`, if set, is asked (method, "bucket/name") before each request and may give an HTTP status.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.refuse: Any = None
        self.lock = threading.Lock()
        self.generation = 1
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"gcs": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "TENSORSTORE_GCS_HTTP_VERSION": "1.1",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def __enter__(self) -> FakeGcs:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    gcs: FakeGcs
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one piece: two would wait for each other
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        key, query = self.parsed()
        if key.endswith("/"):
            return self.listing(key[:-1], query)
        with self.gcs.lock:
            found = self.gcs.objects.get(key)
        if self.refused("GET", key):
            return
        if found is None:
            return self.answer(404)
        content, generation = found
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        if "ifGenerationMatch" in query and query["ifGenerationMatch"] != str(generation):
            return self.answer(412)
        status, headers = 200, {"x-goog-generation": str(generation)}
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            end = int(last) + 1 if first and last else len(content)
            if begin >= len(content):
                return self.answer(416)
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(content)) - 1}/{len(content)}"
            status, content = 206, content[begin:end]
        self.answer(status, content, headers)

    def do_POST(self) -> None:
        key, query = self.parsed()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = f"{key.rstrip('/')}/{query['name']}"
        if self.refused("POST", key):
            return
        with self.gcs.lock:
            if self.outdated(key, query):
                return self.answer(412)
            self.gcs.generation += 1
            self.gcs.objects[key] = body, self.gcs.generation
            answer = {"name": query["name"], "generation": str(self.gcs.generation), "size": str(len(body))}
        self.answer(200, json.dumps(answer).encode())

    def do_DELETE(self) -> None:
        key, query = self.parsed()
        if self.refused("DELETE", key):
            return
        with self.gcs.lock:
            if self.outdated(key, query):
                return self.answer(412)
            gone = self.gcs.objects.pop(key, None)
        self.answer(404 if gone is None else 204)

    def parsed(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        bucket, _, name = parts.path.partition("/b/")[2].partition("/o")
        return f"{bucket}/{unquote(name.removeprefix('/'))}", query

    def outdated(self, key: str, query: dict[str, str]) -> bool:
        """Whether a change asks for another generation of the object than there is."""
        generation = str(self.gcs.objects.get(key, (b"", 0))[1])
        return query.get("ifGenerationMatch", generation) != generation

    def refused(self, method: str, key: str) -> bool:
        self.gcs.requests.append((method, key))
        status = self.gcs.refuse(method, key) if self.gcs.refuse else None
        if status:
            self.answer(status, json.dumps({"error": {"code": status, "message": "refused"}}).encode())
        return bool(status)

    def listing(self, bucket: str, query: dict[str, str]) -> None:
        if self.refused("LIST", f"{bucket}/{query.get('prefix', '')}"):
            return
        begin = max(query.get("prefix", ""), query.get("startOffset", ""), query.get("pageToken", ""))
        names = [name.partition("/")[2] for name in self.gcs.names(f"{bucket}/{query.get('prefix', '')}")]
        names = [name for name in names if name >= begin and ("endOffset" not in query or name < query["endOffset"])]
        sizes = {name: len(self.gcs.objects[f"{bucket}/{name}"][0]) for name in names[:PAGE]}
        answer: dict[str, Any] = {"items": [{"name": name, "size": str(size)} for name, size in sizes.items()]}
        if len(names) > PAGE:
            answer["nextPageToken"] = names[PAGE]
        self.answer(200, json.dumps(answer).encode())

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)
