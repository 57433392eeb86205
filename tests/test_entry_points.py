"""Families of other packages: found by entry point, imported only where they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_frames import EXAMPLES, exported, found_in, made, pretend_installed
from safetensors.torch import save_file

from ditas_export.errors import CheckpointError, DitasExportError, OnnxExportError
from ditas_export.families import entry_points
from ditas_export.families.base import ModelConfig
from ditas_export.families.load import load_model
from ditas_export.families.packaged import save_checkpoint
from ditas_export.families.registry import config_of, known_names, record_of
from ditas_export.options import CheckpointHints, ExportOptions
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

FRAMES = ("frames", "own_family.family:FRAMES")
BROKEN = """
import no_such_package
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder in which the example is installed."""
    pretend_installed(tmp_path / "site", [FRAMES])
    return tmp_path / "site"


@pytest.fixture
def checkpoint(tmp_path: Path, installed: Path) -> Path:
    """A checkpoint of the example's."""
    path = tmp_path / "frames.safetensors"
    with found_in(EXAMPLES, installed):
        save_checkpoint(made().FRAMES, made().random_model(), path)
    return path


def test_known_checkpoints_import_no_family_of_others(tmp_path: Path) -> None:
    """In the ordinary case not even the list of them is read."""
    pretend_installed(tmp_path, [("loud", "loud_family:FAMILY")], package="loud")
    (tmp_path / "loud_family.py").write_text("raise SystemExit('imported')\n")
    code = (
        "import importlib.metadata, sys\n"
        "def refuse(**asked): raise SystemExit(f'asked for {asked}')\n"
        "import ditas_export.families.entry_points as found\n"
        "found.entry_points = refuse\n"
        "from ditas_export.families.load import load_model\n"
        "from ditas_export.families.registry import config_of, record_of\n"
        "config = load_model('digits').model.config\n"
        "assert config_of(record_of(config)) == config\n"
        "assert load_model('digits-sit').model.config\n"
        "assert 'loud_family' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hints", [{}, {"family": "frames"}], ids=["by itself", "by name"])
def test_an_unrecognised_checkpoint_is_read(
    hints: dict[str, str], checkpoint: Path, installed: Path
) -> None:
    with found_in(EXAMPLES, installed):
        loaded = load_model(checkpoint, CheckpointHints(**hints))
        model = made().random_model()
    assert loaded.model.config == made().CONFIG
    assert loaded.source == f"{checkpoint} (frames)"
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_record_names_the_package(installed: Path) -> None:
    with found_in(EXAMPLES, installed):
        entry_points.family_named("frames", known=known_names())
        config: ModelConfig = made().CONFIG
        record = record_of(config)
        assert (record["family"], record["package"]) == ("frames", "own-family")
    with found_in(EXAMPLES, installed):
        assert config_of(record) == config
    with (
        found_in(EXAMPLES),
        pytest.raises(
            CheckpointError, match=r"'frames' is not known .* install the package own-fa"
        ),
    ):
        config_of(record)


def test_a_file_loads_its_family_or_names_it(installed: Path) -> None:
    with found_in(EXAMPLES, installed):
        entry_points.family_named("frames", known=known_names())
        path = exported()
    with found_in(EXAMPLES, installed), OnnxRuntimeRunner(path, threads=1) as runner:
        assert runner.config == made().CONFIG
    with found_in(), pytest.raises(OnnxExportError) as caught:
        OnnxRuntimeRunner(path, threads=1)
    message = str(caught.value)
    assert message.startswith(f"{path}: the family 'frames' is not known here: expected dit, sit")
    assert "install the package own-family" in message
    assert "\n" not in message


def test_names_are_checked(tmp_path: Path, checkpoint: Path, installed: Path) -> None:
    with (
        found_in(EXAMPLES, installed),
        pytest.raises(CheckpointError, match=r"'flux' .* other packages bring frames"),
    ):
        load_model(checkpoint, CheckpointHints(family="flux"))
    with (
        found_in(EXAMPLES, installed),
        pytest.raises(CheckpointError, match=r"--num-heads say nothing to the family frames"),
    ):
        load_model(checkpoint, CheckpointHints(family="frames", num_heads=4))
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    with (
        found_in(EXAMPLES, installed),
        pytest.raises(CheckpointError, match=r"is no checkpoint of the family frames"),
    ):
        load_model(other, CheckpointHints(family="frames"))
    with (
        found_in(EXAMPLES, installed),
        pytest.raises(CheckpointError, match=r"nowhere: no such file or folder"),
    ):
        load_model("nowhere", CheckpointHints(family="frames"))
    assert ExportOptions(output=tmp_path / "out.onnx", family="frames").hints.family == "frames"


def test_a_broken_family_is_named_and_left_out(
    tmp_path: Path, checkpoint: Path, installed: Path
) -> None:
    """It stands in nobody's way; where nothing else helps it is said why it could not."""
    pretend_installed(tmp_path / "broken", [("aaa", "broken_family:FAMILY")], package="broken")
    (tmp_path / "broken" / "broken_family.py").write_text(BROKEN)
    with found_in(EXAMPLES, installed, tmp_path / "broken"):
        assert load_model(checkpoint).model.config == made().CONFIG
    with found_in(tmp_path / "broken"), pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    message = str(caught.value)
    assert "is no DiT" in message
    assert (
        "left out: the family aaa of broken does not load: ModuleNotFoundError: No module named "
        "'no_such_package'" in message
    )
    assert "\n" not in message


def test_two_of_one_name_are_refused(tmp_path: Path, checkpoint: Path, installed: Path) -> None:
    pretend_installed(tmp_path / "second", [FRAMES], package="second")
    with (
        found_in(EXAMPLES, installed, tmp_path / "second"),
        pytest.raises(CheckpointError, match=r"frames is brought by own-family and second;"),
    ):
        load_model(checkpoint, CheckpointHints(family="frames"))
    pretend_installed(tmp_path / "third", [("dit", FRAMES[1])], package="third")
    with found_in(EXAMPLES, tmp_path / "third"):
        families, left_out = entry_points.all_families(known_names())
    assert not families
    assert left_out == [
        "the family dit is brought by third, and is known here already; uninstall all but one, or "
        "rename it"
    ]


INCOMPLETE = """
from ditas_export.families.packaged import PackagedFamily
class Half(PackagedFamily):
    name = "half"
    config_type = int
class Other(Half):
    name = "other"
HALF, CLASS, NOTHING = Half(), Half, object()
"""


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("HALF", "does not state module, blocks, enter"),
        ("CLASS", "is no instance below PackagedFamily"),
        ("NOTHING", "is no instance below PackagedFamily"),
        ("MISSING", "has no attribute 'MISSING'"),
    ],
)
def test_what_is_no_family_is_refused(tmp_path: Path, attribute: str, reason: str) -> None:
    pretend_installed(tmp_path, [("half", f"half_family:{attribute}")], package="half")
    (tmp_path / "half_family.py").write_text(INCOMPLETE)
    with found_in(tmp_path), pytest.raises(CheckpointError, match=reason):
        entry_points.family_named("half", known=known_names())


def test_faults_of_a_reader_are_one_line(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, installed: Path
) -> None:
    with found_in(EXAMPLES, installed):
        family = entry_points.family_named("frames", known=known_names())

        def read(_path: Path) -> None:
            raise RuntimeError("first line\nsecond line")

        monkeypatch.setattr(type(family), "read", staticmethod(read))
        with pytest.raises(DitasExportError) as caught:
            load_model(checkpoint, CheckpointHints(family="frames"))
    expected = f"the family frames cannot read {checkpoint}: RuntimeError: first line"
    assert str(caught.value) == expected


def test_a_damaged_checkpoint_is_named(tmp_path: Path, installed: Path) -> None:
    with found_in(EXAMPLES, installed):
        model = made().random_model()
        del model.to_frames
        save_checkpoint(made().FRAMES, model, tmp_path / "less.safetensors")
        with pytest.raises(CheckpointError, match=r"less\.safetensors.*to_frames"):
            load_model(tmp_path / "less.safetensors")
