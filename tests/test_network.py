"""The four real addresses on Google Drive. Needs the internet: `make test-network` runs it.

Only the first bytes of each file are read. What they show: the link of the authors' README still
leads to a file of PyTorch's, and Drive tells enough for a broken download to be taken up again.
"""

from __future__ import annotations

import pytest
import requests

import medssl_utils as medssl

pytestmark = pytest.mark.network
each_method = pytest.mark.parametrize("method", medssl.METHODS)
BEGINNINGS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # torch >= 1.6, before


def ask(method: str, have: int = 0, known: dict | None = None) -> tuple[int, dict, bytes]:
    """Ask Drive for the file from byte `have` on: (first byte sent, its origin, first bytes)."""
    url = medssl.CHECKPOINTS[method].url
    try:
        with medssl._request(url, have, known or {}, timeout=60) as response:
            return *medssl._origin(response, url), response.raw.read1(512)
    except requests.RequestException as error:
        problem = error
    pytest.fail(f"Google Drive could not be asked for the {method} file; this test needs the "
                f"internet. {problem}", pytrace=False)


@each_method
def test_the_address_leads_to_a_file_of_pytorchs(method):
    start, origin, head = ask(method)
    assert start == 0 and head.startswith(BEGINNINGS), head
    # A ResNet50's 318 float32 tensors alone are 94 MB.
    assert origin["size"] > 94e6, origin


@each_method
def test_a_broken_download_can_be_taken_up_again(method):
    _, origin, _ = ask(method)
    assert origin["validator"], origin
    start, same, _ = ask(method, 1000, origin)
    assert start == 1000 and same == origin
