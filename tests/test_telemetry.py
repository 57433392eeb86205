"""Nothing is reported to anyone: no connection, no look-up of a name, no file but our cache's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditas_export import telemetry

GUARDED = """
import sys

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.send")

def guard(event, arguments):
    if event.startswith(NETWORK):
        sys.stderr.write(f"{event}{arguments}\\n")
        sys.stderr.flush()
        import os
        os._exit(99)

sys.addaudithook(guard)
"""

COMMANDS = """
import importlib, shlex, sys
for line in sys.stdin:
    name, *arguments = shlex.split(line)
    app = importlib.import_module(f"ditas_export.cli.{name}").app
    code = app(arguments, standalone_mode=False)
    assert not code, (line, code)
import onnxruntime, openvino
assert "openvino_telemetry" not in sys.modules
"""


def run(code: str, home: Path, *, stdin: str = "", **variables: str) -> str:
    """Run code in a process of its own, in an empty home; return what it printed."""
    home.mkdir(exist_ok=True)
    (home.parent / "temporary").mkdir(exist_ok=True)
    own = ("HOME", "XDG_CACHE_HOME", "DITAS_EXPORT_CACHE", "ORT_DISABLE_TELEMETRY", "CI")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    temporary = {"HOME": str(home), "TMPDIR": str(home.parent / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        env={**kept, **temporary, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_reach_nobody_and_leave_our_cache_alone(checkpoint: Path, tmp_path: Path) -> None:
    home, out, float_file = tmp_path / "home", tmp_path / "out.onnx", tmp_path / "fp32.onnx"
    few = "--steps 2 --quiet"
    commands = f"""
        export {out} --model {checkpoint} --samples 2 --walk-tokens 100 --method linear {few}\
 --device cpu --reference {float_file}
        sample {out} -o {tmp_path}/a --images 1 --runtime onnxruntime --vae none {few}
        sample {out} -o {tmp_path}/b --images 1 --runtime openvino --vae none {few}
        compare {float_file} {out} --images 1 {few}
    """
    lines = "\n".join(line.strip() for line in commands.strip().splitlines())
    run(GUARDED + COMMANDS, home, stdin=lines)
    assert [path.name for path in home.iterdir()] == [".cache"]
    assert [path.name for path in (home / ".cache").iterdir()] == ["ditas-export"]
    assert not list((tmp_path / "temporary").glob("*.ses"))


SWITCH = "import ditas_export, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"


def test_onnxruntimes_own_switch_is_the_users(tmp_path: Path) -> None:
    assert run(SWITCH, tmp_path / "home") == "1\n"
    assert run(SWITCH, tmp_path / "home", ORT_DISABLE_TELEMETRY="0") == "0\n"


REPORTER = """
import sys
from ditas_export.telemetry import import_openvino
import_openvino()
from openvino.tools.ovc import telemetry_utils
print(telemetry_utils.tm.__name__)
import openvino_telemetry
"""


def test_openvinos_reporter_is_there_for_others_and_not_for_it(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry")
    assert run(REPORTER, tmp_path / "home") == "openvino.tools.ovc.telemetry_stub\n"


@pytest.mark.parametrize(("text", "agreed"), [("1\n", True), ("0", False), ("", False)])
def test_openvinos_file_of_consent_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, agreed: bool
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "intel").mkdir()
    (tmp_path / "intel" / "openvino_telemetry").write_text(text)
    assert telemetry._user_agreed() is agreed


def test_who_has_no_home_agreed_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert telemetry._user_agreed() is False
