"""Interrupts jobs at every point where files change, and holds what comes out against a clean run.

    python scripts/fault_injection.py FOLDER [--model digits] [--ranks 1,2] [--each]

Three kinds of faults. `killed before` and `killed after`: SIGKILL at every mkdir, rename, unlink,
rmdir and fsync under the job's folder, one run per point, each going on with what the last one
left, until one comes through. With --each the run after a kill starts from nothing instead, and the
one after that must come through. `disk full`: ENOSPC at each of these and in each file's own
writing (`killed before or full` has the latter alone). `random moments`: SIGKILL, SIGINT or SIGTERM
at a random moment of each named stage.

At the end the folder must hold the files of an uninterrupted run and no others: the same bytes, but
for the seconds in the manifest. Children are forked from one process that has imported everything.
Results are kept in FOLDER/results.json; what is in it is not run again.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPERATIONS = ("mkdir", "replace", "rename", "rmdir", "unlink", "remove", "fsync")
"""Where the names or the lasting bytes of files change."""

FILLED = ("mkdir", "replace", "rename", "fsync")
"""Of these, where a full disk is noticed."""

TENSORS = ".safetensors.partial"

STAGES = {
    "sampling": ("pipeline", "collect_states"),
    "walk": ("pipeline", "quantize_model"),
    "modulation": ("pipeline", "quantize_adaln"),
    "folding": ("export_files", "fold_smoothing"),
    "writing": ("export_files", "export_onnx"),
    "verifying": ("export_files", "verify_file"),
    "naming": ("export_files", "_install"),
}
"""Stage of an export -> the function of the package that it is."""

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
MOST_LATE = 20
REFUSED, INTERRUPTED = 2, (130, 143, -signal.SIGKILL)

Job = Callable[[Path, Any], None]
"""Does the work in a folder, on one of the ranks."""

Visit = Callable[[str, str], None]
"""Called with before or after, and the name of a point."""


@dataclass(slots=True)
class Fault:
    """What happens to one rank of a run: nothing, unless it is told."""

    rank: int = 0
    visit: Visit | None = None
    fills: Callable[[str], bool] | None = None  # whether the disk is full for this file
    tells_stages: bool = False
    stop: Callable[[list[int]], None] | None = None  # called by the parent with the processes
    told: list[str] = field(default_factory=list)  # lines that the children wrote


def instrument(root: Path, fault: Fault) -> None:
    """Have `fault` visit every operation of this process under `root`."""
    last = "start"

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(target: Any, *rest: Any, **named: Any) -> Any:
            nonlocal last
            path = _path_of(target, named.get("dir_fd"))
            if path is None or root not in (path, *path.parents) or fault.visit is None:
                return original(target, *rest, **named)
            point = f"{name} {path.relative_to(root)}"
            if name == "fsync" and path.is_dir():
                point += f" after {last}"
            fault.visit("before", point)
            result = original(target, *rest, **named)
            fault.visit("after", point)
            last = f"{name} {path.relative_to(root)}"
            return result

        return wrapped

    for name in OPERATIONS:
        setattr(os, name, wrap(name, getattr(os, name)))
    truncate = os.ftruncate

    def truncate_and_fill(handle: int, length: int) -> None:
        truncate(handle, length)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        is_plain = path.name.endswith(".partial") and not path.name.endswith(TENSORS)
        if is_plain and is_full(path):
            path.unlink()
            path.symlink_to("/dev/full")

    def is_full(path: Path) -> bool:
        if fault.fills is None or root not in path.parents:
            return False
        return fault.fills(f"write {path.relative_to(root)}")

    def save_half(tensors: Any, path: Path, **named: Any) -> None:
        """Stand for a full disk where safetensors writes, which replaces the file it is given."""
        save_file(tensors, path, **named)
        if is_full(path):
            os.truncate(path, path.stat().st_size // 2)
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    from safetensors import SafetensorError

    from ditas_export import artifact_files

    save_file = artifact_files.save_file
    artifact_files.save_file = save_half
    os.ftruncate = truncate_and_fill


def _path_of(target: Any, folder: int | None) -> Path | None:
    """Return the path that an operation is about."""
    if isinstance(target, int):
        return Path(os.readlink(f"/proc/self/fd/{target}"))
    if folder is not None:
        return Path(os.readlink(f"/proc/self/fd/{folder}")) / os.fspath(target)
    return Path(os.path.abspath(os.fspath(target)))


def tell_stages(tell: Callable[[str], None]) -> None:
    """Have every stage of an export tell its beginning and its end."""
    import ditas_export.export_files
    import ditas_export.pipeline

    for stage, (module, name) in STAGES.items():
        place = getattr(ditas_export, module)

        def wrap(stage: str, original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def wrapped(*arguments: Any, **named: Any) -> Any:
                tell(f"begin {stage}")
                result = original(*arguments, **named)
                tell(f"end {stage}")
                return result

            return wrapped

        setattr(place, name, wrap(stage, getattr(place, name)))


def run(job: Job, folder: Path, ranks: int, fault: Fault, log: Path) -> list[int]:
    """Run a job in forked processes; return their exit codes, negative for signals."""
    folder.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    port = _free_port()
    processes = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.close(reading)
            _be_rank(job, folder, rank, ranks, port, fault, writing, log)
        processes.append(child)
    os.close(writing)
    with os.fdopen(reading) as lines:
        for line in lines:
            fault.told.append(line.strip())
            if fault.stop is not None and fault.told[-1].startswith("begin"):
                fault.stop(processes)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in processes]


def _be_rank(
    job: Job, folder: Path, rank: int, ranks: int, port: int, fault: Fault, pipe: int, log: Path
) -> None:
    """Be one process of a run; never returns."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 70
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if rank == fault.rank:
            told = functools.partial(_tell, pipe)
            fault.told = _Told(told)
            instrument(folder, fault)
            if fault.tells_stages:
                tell_stages(told)
        os.chdir(folder)
        from ditas_export.cli.console import clean_errors
        from ditas_export.distributed import launched_ranks

        with clean_errors(), launched_ranks("cpu") as place:
            job(folder, place)
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Told(list[str]):
    """What a child tells its parent."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def append(self, line: str) -> None:
        """Tell a line."""
        self._tell(line)


def _tell(pipe: int, line: str) -> None:
    """Write a line to the parent, whole."""
    os.write(pipe, f"{line}\n".encode())


def _free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chain(
    job: Job, folder: Path, ranks: int, rank: int, action: str, clean: Tree, log: Path
) -> tuple[int, str | None]:
    """Stop a job at one new point after the other until it comes through.

    Whatever has its final name is held against the clean run after every stop.

    Returns:
        How many times it was stopped, and what was wrong, None for nothing.
    """
    seen: set[str] = set()
    while True:
        fault = _fault_at_new(seen, rank, action)
        codes = run(job, folder, ranks, fault, log)
        hit = [line.removeprefix("hit ") for line in fault.told if line.startswith("hit ")]
        seen.update(hit)
        if not hit:
            return len(seen), None if codes == [0] * ranks else f"ended with {codes}"
        is_full = action == "disk full" or hit[0].startswith("write ")
        found = tree(folder)
        is_done = (
            is_full and codes[rank] == 0 and clean.keys() <= found.keys()
        )  # what was left over
        if not is_done and codes[rank] != (REFUSED if is_full else -signal.SIGKILL):
            return len(seen), f"code {codes[rank]} at {hit[0]}"
        if odd := [name for name, content in clean.items() if found.get(name, content) != content]:
            return len(seen), f"different after {hit[0]}: {odd}"


def _fault_at_new(seen: set[str], rank: int, action: str) -> Fault:
    """Return the fault at the first point that is not in `seen`."""
    fault = Fault(rank=rank)
    has_hit = False

    def is_new(point: str) -> bool:
        nonlocal has_hit
        if has_hit or point in seen:
            return False
        has_hit = True
        fault.told.append(f"hit {point}")
        return True

    def visit(when: str, point: str) -> None:
        if action != "disk full":
            if action.startswith(f"killed {when}") and is_new(point):
                os.kill(os.getpid(), signal.SIGKILL)
        elif when == "before" and point.split()[0] in FILLED and is_new(point):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fault.visit = visit
    fault.fills = is_new if "full" in action else None
    return fault


def each(
    job: Job, folder: Path, ranks: int, rank: int, action: str, clean: Tree, log: Path
) -> tuple[int, str | None]:
    """Stop a job at every point of a run from nothing, and have the next run come through."""
    number = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        fault = _fault_at_number(number, rank, action)
        codes = run(job, folder, ranks, fault, log)
        if codes == [0] * ranks:
            return number, None
        if codes[rank] != -signal.SIGKILL:
            return number, f"code {codes[rank]} at point {number}"
        codes = run(job, folder, ranks, Fault(), log)
        if codes != [0] * ranks:
            return number, f"ended with {codes} after point {number}"
        if odd := differences(clean, tree(folder)):
            return number, f"after point {number} ({fault.told[-1]}): {odd}"
        number += 1


def _fault_at_number(number: int, rank: int, action: str) -> Fault:
    """Return the fault at the n-th point of a run."""
    fault = Fault(rank=rank)
    count = 0

    def visit(when: str, point: str) -> None:
        nonlocal count
        if action != f"killed {when}":
            return
        if count == number:
            fault.told.append(f"hit {point}")
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    fault.visit = visit
    return fault


def moments(
    job: Job, folder: Path, ranks: int, per_stage: int, clean: Tree, log: Path
) -> Iterator[tuple[str, int, str | None]]:
    """Stop a job at random moments of each stage; the next run must come through.

    Yields:
        A stage, how many times it was stopped, and what was wrong, None for nothing.
    """
    lengths = _stage_seconds(job, folder, ranks, log)
    generator = random.Random(0)
    for stage, seconds in lengths.items():
        wrong, stopped, late = None, 0, 0
        while stopped < per_stage and wrong is None:
            shutil.rmtree(folder, ignore_errors=True)
            how, rank = SIGNALS[stopped % len(SIGNALS)], generator.randrange(ranks)
            fault = Fault(tells_stages=True)
            fault.stop = functools.partial(
                _stop_in, stage, generator.random() * seconds, how, rank, fault
            )
            codes = run(job, folder, ranks, fault, log)
            if codes == [0] * ranks and late < MOST_LATE:
                late += 1  # it was over before the signal came
                continue
            stopped += 1
            if codes[rank] not in INTERRUPTED:
                wrong = f"code {codes[rank]} for {how.name}"
                break
            codes = run(job, folder, ranks, Fault(), log)
            odd = differences(clean, tree(folder))
            if codes != [0] * ranks or odd:
                wrong = f"ended with {codes} after {how.name}: {odd}"
        yield stage, stopped, wrong


def _stop_in(
    stage: str, seconds: float, how: signal.Signals, rank: int, fault: Fault, processes: list[int]
) -> None:
    """Send a signal to a rank, seconds after a stage began; end the others as a launcher does."""
    if fault.told[-1] != f"begin {stage}":
        return
    time.sleep(seconds)
    os.kill(processes[rank], how)
    others = [process for process in processes if process != processes[rank]]
    time.sleep(0.2 if others else 0)
    for process in others:
        os.kill(process, signal.SIGTERM)


def _stage_seconds(job: Job, folder: Path, ranks: int, log: Path) -> dict[str, float]:
    """Return how long each stage takes."""
    shutil.rmtree(folder, ignore_errors=True)
    begun: dict[str, float] = {}
    lengths: dict[str, float] = {}
    fault = Fault(tells_stages=True)

    class Clock(list[str]):
        def append(self, line: str) -> None:
            what, _, stage = line.partition(" ")
            if what == "begin":
                begun[stage] = time.perf_counter()
            elif what == "end":
                lengths[stage] = time.perf_counter() - begun[stage]
            super().append(line)

    fault.told = Clock()
    codes = run(job, folder, ranks, fault, log)
    if codes != [0] * ranks:
        raise SystemExit(f"a run without faults ended with {codes}; see {log}")
    return lengths


Tree = dict[str, Any]
"""Path in a folder -> its bytes; less the seconds of a manifest, the command of statistics."""


def tree(folder: Path) -> Tree:
    """Return what a folder holds."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            found[f"{path.relative_to(folder)}/"] = None
            continue
        found[str(path.relative_to(folder))] = path.read_bytes()
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            if isinstance(content, dict):
                content.pop("seconds", None)
                found[str(path.relative_to(folder))] = json.dumps(content)
        elif path.name.endswith(".stats.safetensors"):
            found[str(path.relative_to(folder))] = _without_command(path.read_bytes())
    return found


def _without_command(statistics: bytes) -> bytes:
    """Return an export's statistics less the command, which names the folder, and its hash."""
    length = 8 + int.from_bytes(statistics[:8], "little")
    header = json.loads(statistics[8:length])
    for kind, text in header["__metadata__"].items():
        facts = json.loads(text)
        del facts["command"], facts["content_sha256"]
        header["__metadata__"][kind] = facts
    return json.dumps(header).encode() + statistics[length:]


def differences(clean: Tree, found: Tree) -> list[str]:
    """Return the names of what is missing, left over or different."""
    return sorted(
        name
        for name in clean.keys() | found.keys()
        if name not in clean or name not in found or clean[name] != found[name]
    )


def export_job(model: str, steps: int, samples: int, *, reference: bool = True) -> Job:
    """Return an export that writes every kind of file; the float model takes its time again."""
    from ditas_export.options import ExportOptions
    from ditas_export.pipeline import export

    small = {"rank": 2, "alpha_grid": (0.4, 0.5), "walk_tokens": 512} if model != "digits" else {}

    def job(folder: Path, ranks: Any) -> None:
        options = ExportOptions(
            output=folder / "out.onnx",
            model=model,
            device="cpu",
            steps=steps,
            samples=samples,
            adaln=4,
            save_calibration=folder / "states.safetensors",
            save_artifact=folder / "model.safetensors",
            reference=folder / "fp32.onnx" if reference else None,
            **small,
        )
        export(options, ranks=ranks)

    return job


def sample_job(file: Path) -> Job:
    """Return a job that samples five images of an exported file."""
    from ditas_export.generation.job import generate
    from ditas_export.generation.options import SampleOptions

    def job(folder: Path, ranks: Any) -> None:
        options = SampleOptions(
            model=str(file),
            output=folder / "images",
            classes="0-4",
            steps=3,
            batch=2,
            runtime="onnxruntime",
            threads=1,
            npz=folder / "all.npz",
        )
        generate(options, ranks=ranks)

    return job


def build_job(file: Path) -> Job:
    """Return a build by a stand-in, which writes the same plan every time."""
    from ditas_export.engine.build import BuiltEngine
    from ditas_export.engine.make import make_engine
    from ditas_export.engine.options import BuildOptions
    from ditas_export.engine.products import RTX

    def build(_onnx: Path, plan: Path) -> BuiltEngine:
        plan.write_bytes(b"a plan")
        return BuiltEngine(size_bytes=6, version="1.2.3", log="")

    def job(folder: Path, _ranks: Any) -> None:
        make_engine(
            file,
            folder / "out.plan",
            product=RTX,
            options=BuildOptions(),
            layout=None,
            build=build,
        )

    return job


def tiny_checkpoint(path: Path) -> str:
    """Write a random model of two blocks; return its name."""
    from safetensors.torch import save_file

    from ditas_export.dit.model import DiT, DiTConfig, randomize

    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=3, hidden_size=96, depth=2, num_heads=4,
        num_classes=10,
    )  # fmt: skip
    model = DiT(config)
    randomize(model, seed=0)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        path,
        metadata={"num_heads": "4"},
    )
    return str(path)


def warm_up(model: str) -> None:
    """Import everything and use it once, so that no child has to; starts no threads."""
    import torch

    torch.set_num_threads(1)
    from ditas_export.calibration.adaln import quantize_adaln
    from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
    from ditas_export.calibration.fold import fold_smoothing
    from ditas_export.calibration.modules import fake_quantized_model
    from ditas_export.calibration.states import CalibrationSettings, collect_states
    from ditas_export.families.load import load_model
    from ditas_export.onnx_export.skeleton import export_skeleton

    for name in ("onnxruntime", "torch.distributed.nn", "ditas_export.pipeline"):
        __import__(name)
    loaded = load_model(model)
    settings = CalibrationSettings(steps=2, classes=(0,))
    states = collect_states(loaded.model, settings, identity=loaded.identity)
    quantized = quantize_model(loaded.model, states, QuantizationSettings(alpha_grid=(0.5,)))
    folded = fold_smoothing(quantize_adaln(quantized, 4))
    fake_quantized_model(folded, ranges="token")
    export_skeleton(
        loaded.model.config,
        folded.float_parameters,
        dtype=torch.float32,
        folded=True,
    )


@contextmanager
def seconds_of(row: dict[str, Any]) -> Iterator[None]:
    """Measure a row."""
    start = time.perf_counter()
    yield
    row["seconds"] = round(time.perf_counter() - start, 1)


def main() -> None:
    """Run every fault that has not been run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="digits", help="digits, or tiny")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--jobs", default="export,sample,build")
    parser.add_argument("--faults", default="killed before,killed after,disk full,random moments")
    parser.add_argument("--moments", type=int, default=6, help="in each stage")
    parser.add_argument("--no-reference", action="store_true", help="leave out the float model")
    parser.add_argument("--each", action="store_true", help="each kill in a run from nothing")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["DITAS_EXPORT_CACHE"] = str(args.folder / "cache")
    model = tiny_checkpoint(args.folder / "tiny.safetensors") if args.model == "tiny" else "digits"
    warm_up(model)
    results = args.folder / "results.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    for row in rows_of(args, model, {row["name"] for row in rows}):
        rows.append(row)
        results.write_text(json.dumps(rows, indent=1))
        print(f"{row['name']:<52} {row['faults']:>5} {row['seconds']:>8.1f} s  {row['result']}")
        sys.stdout.flush()
    total = sum(row["faults"] for row in rows)
    wrong = [row for row in rows if row["result"] != "equal"]
    print(f"{len(rows)} rows, {total} faults, {len(wrong)} rows with something lost or different")
    raise SystemExit(bool(wrong))


def rows_of(args: argparse.Namespace, model: str, done: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table that are not done, as they come."""
    export = export_job(model, args.steps, args.samples, reference=not args.no_reference)
    log = args.folder / "log.txt"
    for ranks in map(int, args.ranks.split(",")):
        cleaned = args.folder / f"clean-export-{ranks}"
        if not cleaned.is_dir():
            codes = run(export, cleaned, ranks, Fault(), log)
            if codes != [0] * ranks:
                raise SystemExit(f"a run without faults ended with {codes}; see {log}")
        file = cleaned / "out.onnx"
        jobs = {"export": export, "sample": sample_job(file), "build": build_job(file)}
        for name in args.jobs.split(","):
            if name == "build" and ranks > 1:
                continue
            clean_folder, folder = args.folder / f"clean-{name}-{ranks}", args.folder / "work"
            if not clean_folder.is_dir():
                run(jobs[name], clean_folder, ranks, Fault(), log)
            clean = tree(clean_folder)
            for fault in args.faults.split(","):
                if fault == "random moments":
                    if name == "export":
                        yield from _moment_rows(args, jobs[name], folder, ranks, clean, log, done)
                    continue
                for rank in range(ranks):
                    title = f"{name}, {ranks} ranks, rank {rank} {fault}"
                    if title in done:
                        continue
                    row: dict[str, Any] = {"name": title}
                    shutil.rmtree(folder, ignore_errors=True)
                    with seconds_of(row):
                        if args.each and fault != "disk full":
                            found = each(jobs[name], folder, ranks, rank, fault, clean, log)
                        else:
                            found = chain(jobs[name], folder, ranks, rank, fault, clean, log)
                    row["faults"], wrong = found
                    odd = differences(clean, tree(folder))
                    row["result"] = wrong or (f"different: {odd}" if odd else "equal")
                    yield row


def _moment_rows(
    args: argparse.Namespace,
    job: Job,
    folder: Path,
    ranks: int,
    clean: Tree,
    log: Path,
    done: set[str],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each stage of an export."""
    titles = {stage: f"export, {ranks} ranks, random moments of {stage}" for stage in STAGES}
    if done.issuperset(titles.values()):
        return
    start = time.perf_counter()
    for stage, stopped, wrong in moments(job, folder, ranks, args.moments, clean, log):
        seconds, start = time.perf_counter() - start, time.perf_counter()
        if titles[stage] not in done:
            yield {
                "name": titles[stage],
                "faults": stopped,
                "seconds": round(seconds, 1),
                "result": wrong or "equal",
            }


if __name__ == "__main__":
    main()
