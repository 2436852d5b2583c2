"""download_checkpoint against a local server that plays Google Drive (drive_server.py).

Tests are named after the faults D1 to D13 of the list of download faults that the workbook
promises to survive; the ones after them are about checksums and files that are already there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import drive_server
import faulty_checkpoints as files
import papermill
import pytest
import torch
from drive_server import DriveServer, redirect_drive
from notebook_cells import run_cells

import medssl_utils as medssl
from medssl_utils import CheckpointError, download_checkpoint

try:
    import resource
except ImportError:  # Windows
    resource = None

NAME = medssl.CHECKPOINTS["BYOL"].filename
NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "01_download_checkpoints.ipynb"


def checkpoint_bytes(seed: int, values: int = 100_000) -> bytes:
    """A small file in the format of torch.save (400 kB: small for speed)."""
    buffer = io.BytesIO()
    noise = torch.randn(values, generator=torch.Generator().manual_seed(seed))
    torch.save({"state_dict": {"weight": noise}}, buffer)
    return buffer.getvalue()


BODY, OTHER = checkpoint_bytes(0), checkpoint_bytes(1, 90_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextlib.contextmanager
def drive(fault=None, body=BODY):
    """A server with `fault` in the place of Google Drive."""
    with DriveServer(body, fault, OTHER) as server, redirect_drive(server):
        yield server


def fetch(folder, **options):
    """Download the BYOL file; what arrives must be one of the two bodies, whole."""
    path = download_checkpoint("BYOL", folder, quiet=True, **{"timeout": 5, **options})
    assert path == Path(folder) / NAME
    return path.read_bytes()


def names(folder):
    """The files in `folder`, but for the lock."""
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix != ".lock")


def put_partial(folder, **options):
    """Leave half of BODY in `folder`, as an interrupted call does."""
    with drive("cut"), pytest.raises(CheckpointError, match="the next call goes on"):
        fetch(folder, retries=0, **options)
    assert names(folder) == [NAME + ".origin", NAME + ".part"]
    assert (folder / f"{NAME}.part").read_bytes() == BODY[: len(BODY) // 2]


def test_a_download_follows_drives_page_for_large_files(tmp_path):
    with drive() as server:
        assert fetch(tmp_path / "new" / "folder") == BODY
    assert [path for path, _ in server.requests] == ["/uc", "/download", "/download"]
    assert names(tmp_path / "new" / "folder") == [NAME]


@pytest.mark.parametrize("fault", ["quota", "quota_as_file", "login"])
def test_D1_a_web_page_with_status_200_is_not_taken_for_the_file(tmp_path, fault):
    with drive(fault) as server, pytest.raises(CheckpointError, match="a web page, not the") as e:
        fetch(tmp_path)
    assert medssl.CHECKPOINTS["BYOL"].url in str(e.value)  # the manual way
    assert str(tmp_path / NAME) in str(e.value)
    assert names(tmp_path) == [] and len(server.requests) == 1


def test_D1_the_reason_that_drive_gives_is_passed_on(tmp_path):
    with drive("quota"), pytest.raises(CheckpointError, match="Too many users have viewed"):
        fetch(tmp_path)


def test_D1_a_page_that_gdown_cannot_read_is_still_a_web_page(tmp_path, monkeypatch):
    monkeypatch.setattr("drive_server.CONFIRM_PAGE", '<form id="download-form"></form>')
    with drive(), pytest.raises(CheckpointError, match="a web page, not the file.*\nBy hand"):
        fetch(tmp_path)


@pytest.mark.parametrize("fault", ["cut_page", "partial_page"])
def test_D1_drives_page_about_large_files_may_be_cut_or_called_a_part(tmp_path, fault):
    with drive(fault) as server:
        assert fetch(tmp_path, retries=1) == BODY
    assert server.bodies_sent == 1


def test_D1_a_web_page_does_not_cost_the_partial_file(tmp_path):
    put_partial(tmp_path)
    with drive("quota_as_file"), pytest.raises(CheckpointError, match="a web page"):
        fetch(tmp_path)
    with drive() as server:
        assert fetch(tmp_path) == BODY
    assert server.requests[-1][1] == f"bytes={len(BODY) // 2}-"


def test_D1_a_mirror_may_send_a_web_page_too(tmp_path):
    with drive("login") as server, pytest.raises(CheckpointError, match="a web page, not the file"):
        fetch(tmp_path, url=server.url)
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", ["403", "404", "304"])
def test_D2_a_refusal_names_address_and_status_and_is_not_repeated(tmp_path, fault):
    with drive(fault) as server, pytest.raises(CheckpointError, match=f"status {fault}") as e:
        fetch(tmp_path)
    assert f"{medssl.CHECKPOINTS['BYOL'].url} answered" in str(e.value)
    assert len(server.requests) == 1 and names(tmp_path) == []


def test_D3_a_busy_server_is_asked_again(tmp_path):
    with drive("503") as server:
        assert fetch(tmp_path) == BODY
    assert [path for path, _ in server.requests][:3] == ["/uc"] * 3


def test_D3_a_server_that_stays_busy_is_named_after_the_last_attempt(tmp_path):
    with drive("503_always") as server, pytest.raises(CheckpointError, match="status 503"):
        fetch(tmp_path, retries=1)
    assert len(server.requests) == 2


def test_D4_a_cut_connection_is_taken_up_again_by_itself(tmp_path):
    with drive("cut") as server:
        assert fetch(tmp_path, retries=1) == BODY
    assert server.requests[-1][1] == f"bytes={len(BODY) // 2}-"


def test_D4_the_next_call_goes_on_where_the_last_one_was_cut(tmp_path):
    put_partial(tmp_path)
    with drive() as server:
        assert fetch(tmp_path) == BODY
    assert {asked for _, asked in server.requests} == {f"bytes={len(BODY) // 2}-"}
    assert names(tmp_path) == [NAME]


def test_D4_an_answer_that_holds_less_than_was_asked_for_is_continued(tmp_path):
    with drive("short_range") as server:
        with pytest.raises(CheckpointError, match=f"ended before its {len(BODY):,} bytes"):
            fetch(tmp_path, retries=0)
        assert fetch(tmp_path) == BODY
    assert server.requests[-1][1] == f"bytes={len(BODY) * 3 // 5}-"


def test_D4_a_rest_that_begins_as_a_web_page_does_is_none(tmp_path):
    body = BODY[: len(BODY) // 2] + b"<" + BODY[len(BODY) // 2 + 1 :]
    with drive("cut", body):
        assert fetch(tmp_path, sha256=hashlib.sha256(body).hexdigest()) == body


def test_D5_a_cut_file_of_unknown_length_is_not_taken_for_whole(tmp_path):
    with drive("cut_unknown"):
        with pytest.raises(CheckpointError, match="damaged or cut off.* set aside as"):
            fetch(tmp_path)
        assert NAME not in names(tmp_path)
        assert fetch(tmp_path) == BODY


def test_D6_a_server_that_stalls_is_asked_again_and_goes_on(tmp_path):
    with drive("stall_once") as server:
        assert fetch(tmp_path, timeout=0.3) == BODY
    assert server.requests[-1][1] == f"bytes={len(BODY) // 2}-"


def test_D6_a_server_that_keeps_stalling_ends_in_an_error_that_keeps_the_partial(tmp_path):
    with drive("stall"), pytest.raises(CheckpointError, match="timed out.* after 1 attempts"):
        fetch(tmp_path, timeout=0.3, retries=0)
    assert (tmp_path / f"{NAME}.part").read_bytes() == BODY[: len(BODY) // 2]
    with drive() as server:
        assert fetch(tmp_path) == BODY
    assert server.requests[-1][1] == f"bytes={len(BODY) // 2}-"


def test_D6_a_server_that_never_answers_ends_in_an_error(tmp_path):
    with drive("stall_headers"), pytest.raises(CheckpointError, match="timed out.*timeout=0.3"):
        fetch(tmp_path, timeout=0.3, retries=1)
    assert NAME not in names(tmp_path)


def test_D7_one_wrong_bit_is_noticed_by_the_recorded_checksum(tmp_path):
    (tmp_path / "checksums.json").write_text(json.dumps({NAME: {"sha256": SHA, "size": len(BODY)}}))
    expected = f"sha256 is [0-9a-f]{{64}}, expected {SHA}"
    with drive("flip"), pytest.raises(CheckpointError, match=expected):
        fetch(tmp_path)
    assert names(tmp_path) == [NAME + ".bad", "checksums.json"]
    with drive():
        assert fetch(tmp_path) == BODY


def test_D7_one_wrong_bit_is_noticed_by_a_checksum_that_is_given(tmp_path):
    with drive("flip"), pytest.raises(CheckpointError, match=f"expected {SHA}.* set aside as"):
        fetch(tmp_path, sha256=SHA.upper())
    assert names(tmp_path) == [NAME + ".bad"]


def test_D7_one_wrong_bit_is_noticed_without_any_checksum(tmp_path):
    with drive("flip"), pytest.raises(CheckpointError, match="record .* is damaged"):
        fetch(tmp_path)
    assert names(tmp_path) == [NAME + ".bad"]


def test_D7_a_checksum_in_capitals_is_the_same(tmp_path):
    entry = {"sha256": SHA.upper(), "size": len(BODY)}
    (tmp_path / "checksums.json").write_text(json.dumps({NAME: entry}))
    with drive():
        assert fetch(tmp_path) == BODY


def test_D7_a_checksum_that_is_none_costs_no_good_file(tmp_path):
    (tmp_path / NAME).write_bytes(BODY)
    with pytest.raises(ValueError, match="'sha256:ef02' is none: 64 hexadecimal digits"):
        fetch(tmp_path, sha256="sha256:ef02")
    assert names(tmp_path) == [NAME]


BAD_FILES = {
    "a web page": b"<!DOCTYPE html><html>quota</html>",
    "no file of PyTorch's": b"\x00" * 1000,
    "empty": b"",
    "cut": BODY[:-1000],
    "one bit wrong": BODY[: len(BODY) // 2] + bytes([BODY[len(BODY) // 2] ^ 1])
    + BODY[len(BODY) // 2 + 1 :],
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_D8_a_bad_file_in_the_folder_is_set_aside_and_fetched_again(tmp_path, what):
    (tmp_path / NAME).write_bytes(BAD_FILES[what])
    with drive(), pytest.warns(UserWarning, match="set aside as .*bad"):
        assert fetch(tmp_path) == BODY
    assert (tmp_path / f"{NAME}.bad").read_bytes() == BAD_FILES[what]


def test_D8_another_good_file_is_set_aside_where_a_checksum_is_recorded(tmp_path):
    (tmp_path / NAME).write_bytes(BODY)
    medssl._record_checksum(tmp_path / NAME, SHA)
    (tmp_path / NAME).write_bytes(OTHER)
    with drive(), pytest.warns(UserWarning, match=f"expected {SHA}"):
        assert fetch(tmp_path) == BODY


def test_D9_a_server_that_ignores_the_range_is_read_from_the_beginning(tmp_path):
    with drive("no_range") as server:
        assert fetch(tmp_path, retries=1) == BODY
    assert server.requests[-1][1] == f"bytes={len(BODY) // 2}-"  # asked for, and ignored


def test_D9_an_answer_with_another_range_is_not_joined(tmp_path):
    with drive("wrong_range") as server:
        assert fetch(tmp_path, retries=2) == BODY
    assert server.requests[-1][1] == "bytes=0-"


def test_D9_a_part_of_which_nothing_is_said_is_not_joined(tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(BODY[: len(BODY) // 2])
    with drive("unsaid_range"), pytest.raises(CheckpointError, match="byte 0 of .* was asked for"):
        fetch(tmp_path, retries=0)
    assert names(tmp_path) == []


def test_D9_a_range_of_5000_digits_is_none():
    digits = "9" * 5000
    answer = SimpleNamespace(status_code=206, headers={
        "Content-Range": f"bytes {digits}-{digits}/{digits}"})
    start, origin = medssl._origin(answer, "url")
    assert (start, origin["size"]) == (-1, None)


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"url": "x", "validator": "y"}'])
def test_D9_a_partial_file_with_a_damaged_note_is_not_joined(tmp_path, note):
    put_partial(tmp_path)
    (tmp_path / f"{NAME}.origin").write_text(note)
    with drive() as server:
        assert fetch(tmp_path) == BODY
    assert server.requests[-1][1] == "bytes=0-"


def test_D10_a_remote_file_that_changed_is_never_joined_but_fetched_anew(tmp_path):
    with drive("changed"):
        with pytest.raises(CheckpointError, match='changed on the way: .*"one".*"two"'):
            fetch(tmp_path, retries=1)
        assert NAME not in names(tmp_path)
        assert fetch(tmp_path) == OTHER


def test_D10_a_change_since_the_first_load_is_named_with_the_way_to_accept_it(tmp_path):
    (tmp_path / NAME).write_bytes(BODY)
    medssl._record_checksum(tmp_path / NAME, SHA)
    (tmp_path / NAME).unlink()
    with drive(body=OTHER), pytest.raises(CheckpointError, match="delete its entry in checksums"):
        fetch(tmp_path)
    assert NAME not in names(tmp_path)


def test_D10_a_change_of_the_same_size_is_noticed(tmp_path):
    with DriveServer(BODY, "changed", other_body=BODY[::-1]) as server:
        with pytest.raises(CheckpointError, match='changed on the way: .*"one".*"two"'):
            fetch(tmp_path, url=server.url, retries=1)
    assert NAME not in names(tmp_path)


def test_D10_a_change_between_two_calls_is_noticed(tmp_path):
    put_partial(tmp_path)
    with drive(body=OTHER), pytest.raises(CheckpointError, match="changed on the way"):
        fetch(tmp_path, retries=0)
    with drive(body=OTHER):
        assert fetch(tmp_path) == OTHER


def test_D10_without_validators_nothing_is_resumed(tmp_path):
    with drive("changed_unnoticed") as server:
        assert fetch(tmp_path) == OTHER
    assert server.requests[-1][1] == "bytes=0-"


def test_D10_a_partial_file_from_another_address_is_not_joined(tmp_path):
    put_partial(tmp_path)
    with DriveServer(OTHER) as mirror:
        assert fetch(tmp_path, url=mirror.url) == OTHER


fork = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(fork is None, reason="needs os.fork")


@needs_fork
def test_D11_after_kill_9_there_is_no_final_name_and_the_next_call_goes_on(tmp_path):
    with drive("slow") as server:
        process = fork.Process(target=fetch, args=(tmp_path,))
        process.start()
        assert server.half_sent.wait(20)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert names(tmp_path) == [NAME + ".origin", NAME + ".part"]
        server.fault = None
        assert fetch(tmp_path) == BODY
    assert server.requests[-1][1] != "bytes=0-"
    assert names(tmp_path) == [NAME]


def test_D11_killed_before_the_rename_nothing_is_fetched_twice(tmp_path):
    put_partial(tmp_path)
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    with drive("404") as server:
        assert fetch(tmp_path) == BODY
    assert server.requests == []


@needs_fork
def test_D12_two_downloads_at_once_both_end_with_the_right_file(tmp_path):
    with drive("slow") as server:
        processes = [fork.Process(target=fetch, args=(tmp_path,)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / NAME).read_bytes() == BODY
    assert server.bodies_sent == 1  # the second one waited


def test_D13_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with drive(), pytest.raises(CheckpointError, match=r"1,000 bytes free; \d+,\d+ are needed"):
        fetch(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
def test_D13_a_write_that_fails_is_named_and_leaves_no_final_name(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BODY) // 2, limits[1]))  # stands for a full disk
    try:
        with drive(), pytest.raises(CheckpointError, match="part: .*large"):
            fetch(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert NAME not in names(tmp_path)
    with drive():
        assert fetch(tmp_path) == BODY


@pytest.fixture
def read_only_folder():
    """A folder that the process cannot write to; root becomes another user meanwhile."""
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "checkpoints")
        folder.mkdir()
        yield folder
        folder.chmod(0o755)


@contextlib.contextmanager
def locked(folder):
    """Take the right to write to `folder`, from root too."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@needs_fork
def test_D13_a_read_only_folder_is_named(read_only_folder):
    with drive() as server, locked(read_only_folder):
        with pytest.raises(CheckpointError, match=f"Permission denied.*{read_only_folder}"):
            fetch(read_only_folder)
    assert names(read_only_folder) == [] and server.requests == []


@needs_fork
def test_D13_a_good_file_in_a_read_only_folder_is_used(read_only_folder):
    (read_only_folder / NAME).write_bytes(BODY)
    with locked(read_only_folder):
        assert fetch(read_only_folder) == BODY


def test_D13_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with drive(), pytest.raises(CheckpointError, match="checkpoints is a file; a folder is needed"):
        fetch(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints").read_text() == "a file"


def test_D13_a_folder_where_the_file_should_be_is_named(tmp_path):
    (tmp_path / NAME).mkdir()
    with drive(), pytest.raises(CheckpointError, match=f"Is a directory.*{NAME}"):
        fetch(tmp_path)


def test_D13_spaces_and_other_scripts_in_the_path_are_fine(tmp_path):
    with drive("cut"):
        assert fetch(tmp_path / "my files" / "Prüfpunkte 检查点") == BODY


def test_a_good_file_is_used_without_a_request(tmp_path):
    (tmp_path / NAME).write_bytes(BODY)
    with drive() as server:
        assert fetch(tmp_path) == BODY
    assert server.requests == []


def test_a_file_of_the_old_torch_format_is_accepted(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / NAME, _use_new_zipfile_serialization=False)
    with drive() as server:
        fetch(tmp_path)
    assert server.requests == []


def test_a_file_that_the_user_has_is_copied(tmp_path):
    (tmp_path / "mine.ckpt").write_bytes(BODY)
    with drive() as server:
        assert fetch(tmp_path / "new", from_file=tmp_path / "mine.ckpt") == BODY
    assert server.requests == [] and (tmp_path / "mine.ckpt").exists()


def test_a_users_file_that_is_a_web_page_is_refused(tmp_path):
    (tmp_path / "mine.ckpt").write_text("<html>Sign in</html>")
    with pytest.raises(CheckpointError, match="mine.ckpt: it is a web page"):
        fetch(tmp_path, from_file=tmp_path / "mine.ckpt")
    assert NAME not in names(tmp_path)


def test_an_archive_that_holds_the_file_is_not_taken_for_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:  # stored, as Drive packs a folder
        archive.writestr("folder/mine.ckpt", BODY)
    with pytest.raises(CheckpointError, match=r"a zip archive .* holds folder/mine\.ckpt"):
        fetch(tmp_path / "new", from_file=tmp_path / "mine.zip")
    assert not (tmp_path / "new").exists()


def test_a_copy_that_is_not_whole_gets_no_name(tmp_path, monkeypatch):
    (tmp_path / "mine.ckpt").write_bytes(BODY)
    monkeypatch.setattr("shutil.copyfile", lambda _, copy: Path(copy).write_bytes(BODY[:-1]))
    with pytest.raises(CheckpointError, match="copy of .*mine.ckpt is not whole: its sha256 is"):
        fetch(tmp_path / "new", from_file=tmp_path / "mine.ckpt")
    assert names(tmp_path / "new") == []


def test_an_error_shows_no_terminal_codes_of_a_file(tmp_path):
    files.write_zip(tmp_path / "mine.ckpt", [("\x1b[2K", b"")] * 2)
    with pytest.raises(CheckpointError, match=r"record archive/\\x1b\[2K twice"):
        fetch(tmp_path, from_file=tmp_path / "mine.ckpt")


def test_a_users_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="mine.ckpt: there is no such file"):
        fetch(tmp_path, from_file=tmp_path / "mine.ckpt")


def test_a_users_file_replaces_another_one_which_is_kept(tmp_path):
    (tmp_path / "mine.ckpt").write_bytes(OTHER)
    (tmp_path / NAME).write_bytes(BODY)
    with pytest.warns(UserWarning, match="set aside"):
        assert fetch(tmp_path, from_file=tmp_path / "mine.ckpt") == OTHER
    assert (tmp_path / f"{NAME}.bad").read_bytes() == BODY


def test_a_mirror_address_is_used_instead_of_drive(tmp_path):
    with DriveServer(BODY) as mirror:
        assert fetch(tmp_path, url=mirror.url) == BODY
    assert [path for path, _ in mirror.requests] == ["/file"]


def test_an_address_that_is_none_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no-address cannot be fetched"):
        fetch(tmp_path, url="no-address")


@pytest.mark.parametrize(("target", "words"), [
    ("/file", "Exceeded 30 redirects"), ("http://[::1", "Invalid IPv6"),
    ("file:///etc/hosts", "No connection adapters")])
def test_a_mirror_that_leads_astray_is_named_once(target, words, tmp_path, monkeypatch):
    monkeypatch.setattr("drive_server._Handler._file", lambda handler, fault: handler._head(
        302, {"Location": target, "Content-Length": "0"}))
    with (DriveServer(BODY) as mirror,
          pytest.raises(CheckpointError, match=f"{words}.*\nBy hand")):
        fetch(tmp_path, url=mirror.url)
    assert len(mirror.requests) == (31 if target == "/file" else 1) and names(tmp_path) == []


@pytest.mark.parametrize("stated", [-1000, 1000])
def test_a_mirror_that_states_another_length_gives_no_wrong_file(stated, tmp_path, monkeypatch):
    head = drive_server._Handler._head

    def lying(handler, status, fields):
        length = int(fields["Content-Length"]) + stated
        head(handler, status, {**fields, "Content-Length": str(length)})
    with monkeypatch.context() as patch, DriveServer(BODY) as mirror:
        patch.setattr(drive_server._Handler, "_head", lying)
        with pytest.raises(CheckpointError, match="cut off" if stated < 0 else "10[0-9]{2} more"):
            fetch(tmp_path, url=mirror.url, retries=0)
    assert NAME not in names(tmp_path)
    with DriveServer(BODY) as mirror:
        assert fetch(tmp_path, url=mirror.url) == BODY


def test_a_negative_number_of_retries_means_none(tmp_path):
    with drive("503_always") as server, pytest.raises(CheckpointError, match="after 1 attempts"):
        fetch(tmp_path, retries=-1)
    assert len(server.requests) == 1


def test_a_misspelt_method_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'SwAV'"):
        download_checkpoint("swav", tmp_path)


def test_a_checksum_is_recorded_once(tmp_path):
    (tmp_path / NAME).write_bytes(BODY)
    assert medssl._checksums(tmp_path) == {}
    medssl._record_checksum(tmp_path / NAME, SHA)
    medssl._record_checksum(tmp_path / NAME, "0" * 64)
    assert medssl._checksums(tmp_path) == {
        NAME: {"sha256": SHA, "size": len(BODY), "allow_extra": ()}}


def test_recording_keeps_the_other_entries(tmp_path):
    for name in ("b.ckpt", "a.ckpt"):
        (tmp_path / name).write_bytes(name.encode())
        medssl._record_checksum(tmp_path / name, SHA)
    assert list(json.loads((tmp_path / "checksums.json").read_text())) == ["a.ckpt", "b.ckpt"]


@pytest.mark.parametrize("text", [
    "{", "[]", "[" * 99_999, '{"%s": 3}' % NAME, '{"%s": {"size": 1}}' % NAME,
    '{"%s": {"sha256": "ef02", "size": 1}}' % NAME,
    '{"%s": {"sha256": "%s", "size": Infinity}}' % (NAME, SHA),
    '{"%s": {"sha256": "%s", "size": 1, "allow_extra": [["a"]]}}' % (NAME, SHA)])
def test_a_list_of_checksums_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match="checksums.json is not a list of checksums"):
        fetch(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_checksums_may_be_saved_as_editors_of_windows_do(encoding, tmp_path):
    text = json.dumps({NAME: {"sha256": SHA, "size": len(BODY)}})
    (tmp_path / "checksums.json").write_text(text, encoding)
    assert medssl._checksums(tmp_path)[NAME]["sha256"] == SHA


@needs_fork
def test_a_checksum_that_cannot_be_recorded_is_a_warning(read_only_folder):
    (read_only_folder / NAME).write_bytes(BODY)
    with locked(read_only_folder), pytest.warns(UserWarning, match="could not be recorded"):
        medssl._record_checksum(read_only_folder / NAME, SHA)


def test_a_download_writes_nothing_into_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with drive():
        fetch(tmp_path / "checkpoints")
    assert names(tmp_path / "home") == []


def test_notebook_01_does_not_choose_between_two_sources(tmp_path):
    with pytest.raises(ValueError, match="not both"):
        run_cells("01_download_checkpoints", weights="published", checkpoints_dir=str(tmp_path),
                  from_dir="downloads", mirror="http://127.0.0.1:9")
    assert names(tmp_path) == []


@pytest.mark.slow
def test_notebook_01_fetches_published_files_and_compares_them(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    entry = {"sha256": SHA, "size": len(BODY)}
    listing = tmp_path / "checkpoints" / "checksums.json"
    listing.write_text(json.dumps({NAME: entry}), "utf-8-sig")  # as some editors save it
    with DriveServer(BODY) as mirror:
        executed = medssl.run_notebook(NOTEBOOK, tmp_path / "01.ipynb", {
            "weights": "published", "methods": ["BYOL", "SwAV"], "mirror": mirror.address,
            "checkpoints_dir": str(tmp_path / "checkpoints")})
    assert [path for path, _ in mirror.requests] == [
        f"/{medssl.CHECKPOINTS[method].filename}" for method in ("BYOL", "SwAV")]
    assert "1 unchanged since their first verified load, 1 not recorded" in executed.read_text()


@pytest.mark.slow
def test_notebook_01_names_every_file_that_could_not_be_had(tmp_path):
    every = "(?s)" + ".*404.*".join(medssl.METHODS) + ".*404"
    with (DriveServer(BODY, "404") as mirror,
          pytest.raises(papermill.PapermillExecutionError, match=every)):
        medssl.run_notebook(NOTEBOOK, tmp_path / "01.ipynb", {
            "weights": "published", "mirror": mirror.address, "checkpoints_dir": str(tmp_path)})
    assert len(mirror.requests) == 4
