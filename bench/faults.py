"""What happens at each fault of downloading (D) and loading (L): ours, and others beside it.

    make faults                                  all of it, some minutes on two cores
    python bench/faults.py --rows L1 L6          some rows
    python bench/faults.py --match "zip in a"    the cases whose name holds this
    python bench/faults.py --summary             the totals alone
    python bench/faults.py --workers 1           one case at a time (as many as cores, else)

Every case runs in a process of its own, forked from this one, with a limit on memory and time.
A case counts as survived only if
  - a good outcome is right bit for bit, or the refusal says the right thing,
  - a refusal is our own kind of error (ours only), and does not advise to switch protection off,
  - no code from the file ran, nothing half-written stayed,
  - the good twin of the same file (or the same download without the fault) works.
A row is survived if all its cases are. The others are asked the same questions: the snippet of the
authors' README, plain `torch.load(weights_only=True)`, and for downloads gdown alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torchvision  # noqa: E402

torch.set_num_threads(1)  # before any work: a fork must not meet a pool of threads

import drive_faults  # noqa: E402
import faulty_checkpoints as files  # noqa: E402

import medssl_utils as medssl  # noqa: E402

MEMORY = 1 << 30  # bytes that a case may claim beyond what the process began with
SPENT = 512  # MB that a file of 94 MB may cost before it is refused or loaded (L6, L7)
SECONDS = 30.0  # a case may take
# Files of 94 MB are written by the hundred: into memory where the system has such a folder.
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
BAD_ADVICE = re.compile(r"weights_only\W+(set to\W+)?False")


@dataclass
class Outcome:
    """What a reader did: "loaded", "refused", or how its process ended."""

    what: str
    text: str = ""
    kind: str = ""  # class of the error
    effect: str = ""  # a trace of code that ran
    right: bool = False  # the loaded tensors are the expected ones, bit for bit
    megabytes: int = 0  # claimed beyond the start
    seconds: float = 0.0


@dataclass
class Result:
    """One case under each tool: survived or not, and why in a few words."""

    row: str
    name: str
    survived: dict[str, bool] = field(default_factory=dict)
    harmless: dict[str, bool] = field(default_factory=dict)  # the same, words not judged
    words: dict[str, str] = field(default_factory=dict)
    harms: bool | None = None  # an unprotected reader runs its code; None: it holds none to run


# =============================================================================
# A process for each case
# =============================================================================


def isolated(work: Callable[[], Outcome], seconds: float = SECONDS) -> Outcome:
    """Run `work` in a forked process with limits; say how it ended if it does not answer."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(work, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        outcome = receiver.recv() if receiver.poll(seconds) else Outcome("hung", f"{seconds:.0f} s")
    except EOFError:
        process.join()
        outcome = Outcome("died", f"exit status {process.exitcode}")
    if process.is_alive():
        process.kill()
    process.join()
    outcome.seconds = time.perf_counter() - start
    return outcome


def _child(work: Callable[[], Outcome], sender) -> None:
    os.setsid()  # a signal that a case sends to its group ends here
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = work()
    outcome.megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    sender.send(outcome)


# =============================================================================
# L: files
# =============================================================================

Tensors = dict[str, torch.Tensor]


def read_ours(case: files.Case, path: Path, allow_extra: tuple[str, ...]) -> tuple[Tensors, str]:
    """`load_backbone`, which keeps a converted copy beside the file only where it is trusted."""
    model, report = medssl.load_backbone(
        case.method, path, allow_extra=allow_extra, cache=case.trusted)
    return model.state_dict(), str(report)


@functools.cache
def fresh_network() -> torch.nn.Module:
    """A ResNet50 as torchvision begins it; drawn once, each case's process has its own copy."""
    return torchvision.models.resnet50()


def read_snippet(case: files.Case, path: Path, allow_extra: tuple[str, ...]) -> tuple[Tensors, str]:
    """The snippet of the authors' README in our words; `torch.load` as this torch does it."""
    model = fresh_network()
    content = torch.load(path)
    if "module" in content:
        content = content["module"]
    if "state_dict" in content:
        content = content["state_dict"]
    removed = {"SparK": "model."}.get(case.method, files.PREFIX[case.method])
    content = {key.replace(removed, ""): value for key, value in content.items()}
    return model.state_dict(), str(model.load_state_dict(content, strict=False))


def read_plain(case: files.Case, path: Path, allow_extra: tuple[str, ...]) -> tuple[Tensors, str]:
    """`torch.load(weights_only=True)` on the CPU, the prefix cut where it stands at the start."""
    model = fresh_network()
    content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "module"):
        if wrapper in content:
            content = content[wrapper]
    prefix = files.PREFIX[case.method]
    content = {key.removeprefix(prefix): value for key, value in content.items()}
    return model.state_dict(), str(model.load_state_dict(content, strict=False))


def read_unprotected(case: files.Case, path: Path, allow_extra: tuple[str, ...]):
    """What every reader did before PyTorch 2.6: shows that a harmful file is harmful."""
    return torch.load(path, map_location="cpu", weights_only=False), ""


READERS = {"ours": read_ours, "README snippet": read_snippet, "weights_only": read_plain}


def attempt(reader: Callable, case: files.Case, path: Path, allow_extra: tuple[str, ...],
            folder: Path) -> Outcome:
    """Read one file with one reader; for the process of the case."""
    warnings.simplefilter("ignore")
    try:
        tensors, text = reader(case, path, allow_extra)
        outcome = Outcome("loaded", text)
        outcome.right = reader is not read_unprotected and same(tensors, case.expected())
    except BaseException as error:  # a file may also try to end the process
        outcome = Outcome("refused", str(error) or type(error).__name__, type(error).__name__)
    outcome.effect = files.side_effect(folder)
    return outcome


def same(tensors: Tensors, expected: Tensors) -> bool:
    """True if each expected tensor is there with the same type, shape and bits."""
    return all(key in tensors and tensors[key].dtype == value.dtype
               and torch.equal(tensors[key], value) for key, value in expected.items())


@contextlib.contextmanager
def built(case: files.Case) -> Iterator[tuple[Path, Path]]:
    """Build the file of a case in a folder of its own; yield (path, folder), delete both."""
    folder = Path(tempfile.mkdtemp(prefix="fault-", dir=FOLDER))
    try:
        if case.trusted:
            trust(case, folder)
        path = case.build(folder)
        if case.trusted:
            path = path.replace(folder / medssl.CHECKPOINTS[case.method].filename)
        yield path, folder
    finally:
        shutil.rmtree(folder)


def trust(case: files.Case, folder: Path) -> None:
    """Load the good file as the published one, so that its checksum is recorded."""
    case.good(folder).replace(folder / medssl.CHECKPOINTS[case.method].filename)
    medssl.load_backbone(case.method, weights="published", folder=folder, cache=False)


@functools.cache
def twin_works(reader: Callable, case: files.Case) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="twin-", dir=FOLDER))
    try:
        path = case.good(folder)
        outcome = isolated(
            functools.partial(attempt, reader, case, path, case.twin_allow_extra, folder))
        return outcome.what == "loaded" and outcome.right
    finally:
        shutil.rmtree(folder)


def twin_of(case: files.Case) -> files.Case:
    """The case that stands for all cases with the same good file (each is tried once)."""
    key = case.twin, case.method, case.twin_allow_extra
    return _TWINS.setdefault(key, files.Case(
        case.row, "twin", case.method, case.build, twin=case.twin,
        twin_allow_extra=case.twin_allow_extra))


_TWINS: dict[tuple, files.Case] = {}


def wrong_outcome(case: files.Case, outcome: Outcome) -> str:
    """Say what is wrong with what happened, "" if it is what must happen."""
    if outcome.effect:
        return f"CODE RAN ({outcome.effect})"
    if outcome.what in ("hung", "died"):
        return f"{outcome.what} ({outcome.text})"
    if case.row in ("L6", "L7") and outcome.megabytes > SPENT:
        return f"spent {outcome.megabytes} MB"
    if outcome.what == "loaded" and not outcome.right:
        return "ACCEPTED, other weights" if case.must == "loads" else "ACCEPTED"
    if outcome.what == "loaded" and case.must == "refused":
        return "ACCEPTED"
    if outcome.what == "refused" and case.must == "loads":
        return f"refused: {first_line(outcome)}"
    return ""


def wrong_words(case: files.Case, outcome: Outcome, ours: bool) -> str:
    """Say what is wrong with the words, "" if they say the right thing."""
    if outcome.what == "loaded":
        silent = ours and not re.search(case.reports, outcome.text, re.I | re.S)
        return f"loaded without a word of {case.reports}" if silent else ""
    if ours and (len(outcome.text) > 50_000 or not plain(outcome.text)):
        return f"refused, with {len(outcome.text)} characters that a terminal may obey"
    if BAD_ADVICE.search(outcome.text):
        return "refused, advises weights_only=False"
    if ours and outcome.kind != "CheckpointError":
        return f"refused by accident: {first_line(outcome)}"
    if not re.search(case.says, outcome.text, re.I | re.S):
        return f"refused, says only: {first_line(outcome)}"
    return ""


def plain(text: str) -> bool:
    """True if a terminal shows the text as it is: nothing is hidden, moved or broken."""
    return all(letter.isprintable() for letter in text)


def first_line(outcome: Outcome) -> str:
    return f"{outcome.kind}: {' '.join(outcome.text.split())}"


def load_fault(number: int) -> Result:
    """Case `number` of files.CASES (L1 to L16) under each reader."""
    case = files.CASES[number]
    result = Result(case.row, case.name)
    with built(case) as (path, folder):
        for tool, reader in READERS.items():
            outcome = isolated(
                functools.partial(attempt, reader, case, path, case.allow_extra, folder))
            outcome.effect = outcome.effect or files.side_effect(folder)
            files.marker(folder).unlink(missing_ok=True)
            wrong = wrong_outcome(case, outcome)
            result.harmless[tool] = not wrong
            wrong = wrong or wrong_words(case, outcome, tool == "ours")
            if not wrong and not twin_works(reader, twin_of(case)):
                wrong = "so far right, but the good twin is refused"
            good = "loads" if outcome.what == "loaded" else f"refused: {first_line(outcome)}"
            result.survived[tool] = not wrong
            result.words[tool] = (wrong or good).replace(f"{folder}/", "")
        if case.runs:
            outcome = isolated(
                functools.partial(attempt, read_unprotected, case, path, (), folder), 10)
            result.harms = bool(outcome.effect or files.side_effect(folder))
    return result


# =============================================================================
# D: downloads
# =============================================================================


def _download(case: drive_faults.Case, tool: str, folder: Path) -> Outcome:
    return Outcome("done", *case.run(tool, folder))


def download_fault(number: int) -> Result:
    """Case `number` of D1 to D13 under `download_checkpoint`, and under gdown alone."""
    case = drive_faults.CASES[number]
    result = Result(case.row, case.name)
    for tool in drive_faults.TOOLS:
        folder = Path(tempfile.mkdtemp(prefix="fault-", dir=FOLDER))
        try:
            outcome = isolated(functools.partial(_download, case, tool, folder))
        finally:
            shutil.rmtree(folder)
        wrong = outcome.text if outcome.what == "done" else f"{outcome.what} ({outcome.text})"
        result.survived[tool] = result.harmless[tool] = not wrong
        result.words[tool] = (wrong or outcome.kind).replace(str(folder), "")
    return result


# =============================================================================
# The table
# =============================================================================

SECTIONS = {"D": (drive_faults.CASES, download_fault), "L": (files.CASES, load_fault)}


def table(results: Iterable[Result]) -> str:
    """Rows survived and cases survived, for each row and tool, as a markdown table."""
    results = list(results)
    tools = list(dict.fromkeys(tool for result in results for tool in result.survived))
    rows = sorted({result.row for result in results}, key=lambda row: int(row[1:]))
    lines = [f"| row | {' | '.join(tools)} |", "|---" * (len(tools) + 1) + "|"]
    for row in rows:
        of_row = [r for r in results if r.row == row]
        cells = [f"{sum(r.survived[t] for r in of_row)} of {len(of_row)}" for t in tools]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    cells = [f"**{sum(r.survived[t] for r in results)} of {len(results)}**" for t in tools]
    lines.append(f"| cases | {' | '.join(cells)} |")
    if any(r.harmless != r.survived for r in results):
        cells = [f"{sum(r.harmless[t] for r in results)} of {len(results)}" for t in tools]
        lines.append(f"| cases, words not judged | {' | '.join(cells)} |")
    whole = [sum(all(r.survived[t] for r in results if r.row == row) for row in rows)
             for t in tools]
    cells = [f"**{n} of {len(rows)}**" for n in whole]
    lines.append(f"| rows, all cases right | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(result: Result) -> None:
    print(f"{result.row:4} {result.name}")
    for tool, words in result.words.items():
        print(f"     {'ok  ' if result.survived[tool] else 'LOST'} {tool:14} {words[:160]}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[], help="such as D L6; default: all")
    parser.add_argument("--match", default="", help="only cases whose name matches this")
    parser.add_argument("--summary", action="store_true", help="print the totals alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cases at a time")
    options = parser.parse_args(arguments)

    def select(row: str, name: str) -> bool:
        wanted = not options.rows or row in options.rows or row.rstrip("0123456789") in options.rows
        return wanted and bool(re.search(options.match, name))

    if not Path("/proc/self/statm").exists():
        print("The limits on memory need Linux; nothing was run.")
        return 0
    files.weights(), files.weights(1), fresh_network()  # made once, shared by all processes
    lost = 0
    for cases, fault in SECTIONS.values():
        numbers = [i for i, case in enumerate(cases) if select(case.row, case.name)]
        if not numbers:
            continue
        start, results = time.perf_counter(), []
        # forked, as each case's own process is: what was made above is not made again
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            for result in pool.map(fault, numbers):
                results.append(result)
                if not options.summary:
                    show(result)
        lost += sum(not result.survived["ours"] for result in results)
        print(f"\n{table(results)}\n({time.perf_counter() - start:.0f} s)")
        if harms := [result.harms for result in results if result.harms is not None]:
            print(f"A reader without protection runs the code of {sum(harms)} of {len(harms)} "
                  "harmful files.")
        print(flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
