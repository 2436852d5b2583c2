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
CONFIRM = (  # in one line, as Drive sends it: gdown reads the page line by line
    "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="confirm" value="t">'
    "</form></body></html>"
)
QUOTA = (
    "<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>\n"
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file.</p></body>'
)
LOGIN = '<!doctype html><html><body><form action="/signin"><input name="id"></form></body></html>'


class Drive:
    """Serves `body` with one fault, which may be set to "" while it runs: it is then over.

    Pages instead of the file: "quota", "quota as file" (an attachment), "login", a status as text.
    The body: "cut" (the first one), "cut always", "silence" in the middle, one bit to "flip", or
    "changed" (the first one is cut, then it is another file).
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
        address = f"http://127.0.0.1:{self.server.server_address[1]}"
        send = requests.adapters.HTTPAdapter.send

        def redirected(adapter, request, **options):
            original = request.url
            parts = urllib.parse.urlsplit(original)
            assert parts.hostname in HOSTS, f"{original} is not Drive's"
            request.url = f"{address}{parts.path}?{parts.query}"
            options["proxies"] = {}
            try:
                response = send(adapter, request, **options)
            finally:
                request.url = original
            response.url = original
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

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.drive.fault
        path, _, query = self.path.partition("?")
        self.drive.requests.append((path, self.headers.get("Range", "")))
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client may leave early
            if fault in ("403", "404", "503"):
                self.page(LOGIN, int(fault))
            elif fault.startswith("quota"):
                self.page(QUOTA, attachment=fault.endswith("file"))
            elif fault == "login":
                self.page(LOGIN)
            elif path == "/uc":
                target = f"https://{HOSTS[2]}/download?{query}"
                self.head(303, {"Location": target, "Content-Length": "0"})
            elif path == "/download" and "confirm" not in query:
                self.page(CONFIRM.format(id=urllib.parse.parse_qs(query)["id"][0]))
            else:
                self.file(fault)

    def page(self, html: str, status: int = 200, attachment: bool = False) -> None:
        fields = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(html))}
        if attachment:
            fields["Content-Type"] = "application/octet-stream"
            fields["Content-Disposition"] = 'attachment; filename="file.ckpt"'
        self.head(status, fields)
        self.wfile.write(html.encode())

    def file(self, fault: str) -> None:
        first = self.drive.bodies == 0
        self.drive.bodies += 1
        body, tag = self.drive.body, '"one"'
        if fault == "changed" and not first:
            body, tag = body[::-1], '"two"'
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        asked = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        start = 0
        if asked and self.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
        fields = {"Content-Type": "application/octet-stream", "ETag": tag}
        fields["Content-Disposition"] = 'attachment; filename="file.ckpt"'
        fields["Content-Length"] = str(len(body) - start)
        if start:
            fields["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.head(206 if start else 200, fields)
        half = start + (len(body) - start) // 2
        self.wfile.write(body[start:half])
        if fault == "silence":
            self.drive.closing.wait(20)
        elif fault != "cut always" and not (first and fault in ("cut", "changed")):
            self.wfile.write(body[half:])

    def head(self, status: int, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**fields, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
