"""The report as a file: written whole or not at all, and known by its first bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditas_export.artifact_files import atomic_path
from ditas_export.errors import ArtifactError, ReportError
from ditas_export.job_files import JobFiles, Output
from ditas_export.options import stats_path_of
from ditas_export.paths import StrPath
from ditas_export.report.facts import manifest_facts
from ditas_export.report.stats import ExportStats

PAGE_SIGN = '<!doctype html>\n<meta name="generator" content="ditas-export report">\n'
"""How a report begins."""


def is_report_file(path: StrPath) -> bool:
    """Return whether `write_page` wrote a file."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(PAGE_SIGN)) == PAGE_SIGN.encode()
    except OSError:
        return False


def require_matplotlib() -> None:
    """Refuse a report where its figures cannot be drawn.

    Raises:
        ReportError: says what to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("a report needs matplotlib: pip install 'ditas-export[report]'")


def write_page(path: StrPath, manifest: Mapping[str, Any], stats: ExportStats) -> None:
    """Write the report of an export; atomic.

    Args:
        path: the HTML file.
        manifest: of the export.
        stats: of the same.

    Raises:
        ReportError: matplotlib is not installed.
        ArtifactError: statistics of another file, a manifest that lacks something, or the page
            cannot be written.
    """
    require_matplotlib()
    from ditas_export.report.page import page  # matplotlib takes a second

    text = PAGE_SIGN + page(manifest, stats)
    with atomic_path(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def report(manifest: StrPath, output: StrPath | None = None) -> Path:
    """Write the report of an export that is done, from its manifest and statistics alone.

    Args:
        manifest: the out.json of an export; out.stats.safetensors lies beside it.
        output: the HTML file; out.html if not given.

    Returns:
        Where it was written.

    Raises:
        ReportError: matplotlib is not installed.
        ArtifactError: a file that is missing, damaged, of another kind or of another export, or an
            output that must not be replaced.
    """
    manifest = Path(manifest)
    output = manifest.with_suffix(".html") if output is None else Path(output)
    stats_path = stats_path_of(manifest)
    require_matplotlib()
    inputs = {"OUT.json": manifest, "its statistics": stats_path}
    JobFiles(
        inputs={name: path for name, path in inputs.items() if path.exists()},
        outputs=(Output(path=output, what="report", is_ours=is_report_file),),
    ).check()
    facts = manifest_facts(manifest)
    if not stats_path.exists():
        raise ArtifactError(
            f"{stats_path} is not there: exports write it since there are reports; export again, "
            f"with --artifact in a minute where the quantized model was kept"
        )
    write_page(output, facts, ExportStats.load(stats_path))
    return output
