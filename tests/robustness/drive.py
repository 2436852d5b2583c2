"""A local server that plays Google Drive, with one fault at a time, over real sockets.

    with Drive(body, fault="quota") as drive:
        download_checkpoint("BYOL", folder)  # goes to the server, as if to Drive

What this process asks of Drive's hosts is caught on its way out of any requests session, so that
gdown sees Drive's own addresses and follows Drive's pages: `/uc` redirects to a page about a file
too large to scan, and its form leads to the file.
"""

import contextlib
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import requests

HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")
PAGE = {"Content-Type": "text/html; charset=utf-8"}
FILE = {"Content-Type": "application/octet-stream"}
FILE |= {"Content-Disposition": 'attachment; filename="file.ckpt"'}
CONFIRM = (  # in one line, as Drive sends it: gdown reads the page line by line
    b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
    b'<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    b'<input type="hidden" name="id" value="1"><input type="hidden" name="confirm" value="t">'
    b"</form></body></html>"
)
QUOTA = (
    b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>\n"
    b'<p class="uc-error-subcaption">Too many users have viewed or downloaded this file.</p></body>'
)
LOGIN = b'<!doctype html><html><body><form action="/signin"><input name="id"></form></body></html>'
PAGES = {status: (int(status), PAGE, LOGIN) for status in ("403", "404", "503")}
PAGES |= {"login": (200, PAGE, LOGIN), "quota": (200, PAGE, QUOTA)}
PAGES |= {"quota as file": (200, FILE, QUOTA)}


class Drive:
    """Serves `body` with one fault, which may be set to "" while it runs: it is then over.

    One of PAGES instead of the file; or the body: "cut" (the first one), "cut always", "silence" in
    the middle, one bit to "flip", or "changed" (the first one is cut, then it is another file).
    """

    def __init__(self, body: bytes, fault: str = ""):
        self.body, self.fault = body, fault
        self.requests: list[tuple[str, str]] = []  # path and range of each
        self.bodies = 0
        self.closing = threading.Event()

    def __enter__(self) -> "Drive":
        handler = type("Handler", (Handler,), {"drive": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{self.server.server_port}"
        send = requests.adapters.HTTPAdapter.send

        def redirected(adapter, request, **options):
            parts = urllib.parse.urlsplit(request.url)
            assert parts.hostname in HOSTS, f"{request.url} is not Drive's"
            local = request.copy()
            local.url = f"{address}{parts.path}?{parts.query}"
            response = send(adapter, local, **{**options, "proxies": {}})
            response.url, response.request = request.url, request
            return response

        self.patch = mock.patch.object(requests.adapters.HTTPAdapter, "send", redirected)
        self.patch.start()
        return self

    def __exit__(self, *_) -> None:
        self.patch.stop()
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request; `drive` is the Drive it belongs to."""

    protocol_version = "HTTP/1.1"
    drive: Drive
    log_message = mock.Mock()

    def do_GET(self) -> None:
        fault = self.drive.fault
        path, _, query = self.path.partition("?")
        self.drive.requests.append((path, self.headers.get("Range", "")))
        with contextlib.suppress(ConnectionError):  # the client may leave early
            if fault in PAGES:
                self.answer(*PAGES[fault])
            elif path == "/uc":
                self.answer(303, {"Location": f"https://{HOSTS[2]}/download?{query}"}, b"")
            elif path == "/download" and "confirm" not in query:
                self.answer(200, PAGE, CONFIRM)
            else:
                self.file(fault)

    def file(self, fault: str) -> None:
        self.drive.bodies += 1
        first = self.drive.bodies == 1
        body, tag, start = bytearray(self.drive.body), '"one"', 0
        if fault == "changed" and not first:
            body, tag = body[::-1], '"two"'
        if fault == "flip":
            body[len(body) // 2] ^= 1
        asked = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        if asked and self.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
        fields = {**FILE, "ETag": tag}
        if start:
            fields["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        end = len(body)
        if fault in ("silence", "cut always") or first and fault in ("cut", "changed"):
            end = (start + end) // 2
        self.answer(206 if start else 200, fields, body[start:], end - start)
        if fault == "silence":
            self.drive.closing.wait(20)

    def answer(self, status: int, fields: dict[str, str], body: bytes, sent=None) -> None:
        self.close_connection = True
        self.send_response(status)
        for name, value in {**fields, "Content-Length": len(body), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])  # all, or the first so many bytes
