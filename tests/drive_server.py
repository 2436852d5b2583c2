"""A local server that plays Google Drive, with one fault at a time, over real sockets.

    with DriveServer(body, fault="quota") as server, redirect_drive(server):
        download_checkpoint("BYOL", folder)             # goes to the server, as if to Drive

`redirect_drive` catches requests on their way out of any requests session of this process (gdown's
included), so that client code sees Drive's own addresses and follows Drive's pages. Without it,
`server.url` is a plain mirror address with the same body and the same fault.

Like Drive, the server answers `/uc` with a redirect to drive.usercontent.google.com, that with a
page about a file too large to scan, and its form with the file itself. It understands ranges and
If-Range, and sends ETag, Last-Modified and Content-Length unless the fault says otherwise.
"""

from __future__ import annotations

import contextlib
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import requests

DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")

# In one line, as Drive sends it: gdown reads the page line by line.
CONFIRM_PAGE = (
    "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
    '<p class="uc-warning-caption">Google Drive can\'t scan this file for viruses.</p>'
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" '
    'value="download"><input type="hidden" name="confirm" value="t"></form></body></html>'
)

QUOTA_PAGE = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head>
<body><p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>
</body></html>"""

LOGIN_PAGE = """<!doctype html><html><head><title>Sign in - Google Accounts</title></head>
<body><form action="/signin"><input name="identifier"></form></body></html>"""

PATIENCE = 20  # seconds after which a fault that keeps a client waiting ends in a lost connection

FAULTS = {
    None: "no fault",
    "quota": "a quota page with status 200",
    "quota_as_file": "a quota page with status 200, sent as an attachment of binary type",
    "login": "a login page with status 200",
    "cut_page": "the first page about large files ends in the middle",
    "partial_page": "that page is sent as the part that was asked for, with status 206",
    "403": "status 403 to everything",
    "404": "status 404 to everything",
    "304": "status 304 to everything",
    "503": "status 503 to the first two requests",
    "503_always": "status 503 to everything",
    "cut": "the first body ends in the middle; its length was announced",
    "cut_unknown": "the first body ends in the middle; no length was announced",
    "cut_always": "every body ends in the middle of what was asked for",
    "stall": "the body stops in the middle, and the connection stays open",
    "stall_once": "the same, the first time only",
    "stall_headers": "the connection is accepted and nothing is ever sent",
    "flip": "one bit of the body is wrong; its size is right",
    "no_range": "ranges are ignored; the first body is cut",
    "unsaid_range": "status 206, which promises a part, and not a word about which",
    "wrong_range": "a range that begins one byte late; the first body is cut",
    "short_range": "each answer holds three fifths of the body at most, and says so",
    "changed": "the first body is cut; from then on it is `other_body`",
    "changed_unnoticed": "the same, and the answers carry neither ETag nor Last-Modified",
    "slow": "the body takes about two seconds",
}


class DriveServer:
    """Serves `body` from 127.0.0.1 with one of FAULTS; a context manager.

    Attributes:
        url: a mirror address of the file.
        requests: (path, Range header or None) of each request, in order.
        other_body: what the file has become under the `changed` faults (default: the same bytes
            backwards, so of the same size).
        fault: may be set to None while it runs: the fault is then over.
    """

    def __init__(self, body: bytes, fault: str | None = None, other_body: bytes = b""):
        if fault not in FAULTS:
            raise ValueError(f"fault {fault!r} is not one of {list(FAULTS)}")
        self.body, self.fault = body, fault
        self.other_body = other_body or body[::-1]
        self.requests: list[tuple[str, str | None]] = []
        self.bodies_sent = 0
        self.half_sent = threading.Event()  # set when a body is half out
        self._closing = threading.Event()

    def __enter__(self) -> DriveServer:
        handler = type("Handler", (_Handler,), {"drive": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.address}/file"
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def redirect_drive(server: DriveServer) -> Iterator[None]:
    """Send what this process asks of Drive's hosts to `server`; answers look like Drive's."""
    send = requests.adapters.HTTPAdapter.send

    def redirected(adapter, request, **options):
        original = request.url
        parts = urllib.parse.urlsplit(original)
        if parts.hostname in DRIVE_HOSTS:
            request.url = f"{server.address}{parts.path}?{parts.query}"
            options["proxies"] = {}
        try:
            response = send(adapter, request, **options)
        finally:
            request.url = original
        response.url = original
        return response

    with mock.patch.object(requests.adapters.HTTPAdapter, "send", redirected):
        yield


class _Handler(BaseHTTPRequestHandler):
    """One request; `drive` is the DriveServer it belongs to."""

    protocol_version = "HTTP/1.1"
    drive: DriveServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        drive, fault = self.drive, self.drive.fault
        path, _, query = self.path.partition("?")
        drive.requests.append((path, self.headers.get("Range")))
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client may leave early
            if fault == "stall_headers":
                drive._closing.wait(PATIENCE)
            elif fault in ("403", "404", "304"):
                self._page(LOGIN_PAGE, int(fault))
            elif fault == "503_always" or (fault == "503" and len(drive.requests) <= 2):
                self._page("<html>busy</html>", 503)
            elif fault in ("quota", "login"):
                self._page(QUOTA_PAGE if fault == "quota" else LOGIN_PAGE)
            elif fault == "quota_as_file":
                self._page(QUOTA_PAGE, attachment=True)
            elif path == "/uc":
                target = f"https://{DRIVE_HOSTS[2]}/download?{query}"
                self._head(303, {"Location": target, "Content-Length": "0"})
            elif path == "/download" and "confirm" not in query:
                page = CONFIRM_PAGE.format(id=urllib.parse.parse_qs(query)["id"][0])
                first = [asked for asked, _ in drive.requests].count(path) == 1
                self._page(page, 206 if fault == "partial_page" else 200,
                           cut=fault == "cut_page" and first)
            else:
                self._file(fault)

    def _page(self, html: str, status: int = 200, attachment: bool = False,
              cut: bool = False) -> None:
        fields = {"Content-Type": "text/html; charset=utf-8"}
        if attachment:
            fields = {"Content-Type": "application/octet-stream",
                      "Content-Disposition": 'attachment; filename="file.ckpt"'}
        self._head(status, {**fields, "Content-Length": str(len(html.encode()))})
        self.wfile.write(html.encode()[: len(html) // 2 if cut else None])

    def _file(self, fault: str | None) -> None:
        drive = self.drive
        first = drive.bodies_sent == 0
        drive.bodies_sent += 1
        changed = str(fault).startswith("changed") and not first
        body, etag = (drive.other_body, '"two"') if changed else (drive.body, '"one"')
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        start = self._start(etag, fault)
        if start >= len(body):
            self._head(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            return
        start += fault == "wrong_range" and start > 0
        end = min(len(body), start + len(body) * 3 // 5) if fault == "short_range" else len(body)
        fields = {"Content-Type": "application/octet-stream"}
        fields["Content-Disposition"] = 'attachment; filename="file.ckpt"'
        if fault != "cut_unknown":
            fields["Content-Length"] = str(end - start)
        # An answer to If-Range may leave the validators out: the client is known to have them.
        if fault != "changed_unnoticed" and not (fault == "changed" and start):
            fields |= {"ETag": etag, "Last-Modified": "Mon, 14 Aug 2023 10:00:00 GMT"}
        if start or end < len(body):
            fields["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        partial = "Content-Range" in fields or fault == "unsaid_range"
        self._head(206 if partial else 200, fields)
        self._send(body[start:end], fault, first)

    def _start(self, etag: str, fault: str | None) -> int:
        """The byte that the client asks to begin at; 0 where its range does not hold."""
        asked = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        if not asked or fault in ("no_range", "cut_unknown"):
            return 0
        if self.headers.get("If-Range", etag) != etag:
            return 0
        return int(asked[1])

    def _head(self, status: int, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**fields, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, body: bytes, fault: str | None, first: bool) -> None:
        """Write the body, as far and as fast as the fault lets it."""
        drive, half = self.drive, len(body) // 2
        if fault == "slow":
            for at in range(0, len(body), step := len(body) // 20 + 1):
                self.wfile.write(body[at : at + step])
                if at >= half:
                    drive.half_sent.set()
                drive._closing.wait(0.1)
            return
        self.wfile.write(body[:half])
        drive.half_sent.set()
        cut = ("cut", "cut_unknown", "no_range", "wrong_range", "changed", "changed_unnoticed")
        if fault == "cut_always" or (first and fault in cut):
            return
        if fault == "stall" or (first and fault == "stall_once"):
            drive._closing.wait(PATIENCE)
            return
        self.wfile.write(body[half:])
