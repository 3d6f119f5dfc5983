"""report.html beside the manifest, and in MLflow: what was kept and dropped, as numbers, drawings and samples."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from calumma.platform import storage
from calumma.platform.curation.report.findings import Findings
from calumma.platform.curation.report.page import Part, page

if TYPE_CHECKING:
    from calumma.platform.storage.manifest import Manifest
    from calumma.platform.tracking.run import Run

logger = logging.getLogger(__name__)

PAGE, DATA = "report.html", "report.json"


def write(output: str, manifest: Manifest, findings: Mapping[str, Findings], run: Run) -> None:
    """Write the page, and the findings that the next run needs where a source stands. Raises StorageError."""
    reports: dict[str, dict[str, Any]] = manifest.report["sources"]
    everything = _earlier(output, reports) | dict(findings)
    data = {
        name: {"fingerprint": reports[name]["fingerprint"], "findings": found.model_dump(mode="json")}
        for name, found in everything.items()
    }
    parts = [Part(name, report, everything.get(name, Findings())) for name, report in reports.items()]
    html = page(parts).encode()
    storage.write_bytes(storage.join(output, DATA), json.dumps(data).encode())
    storage.write_bytes(storage.join(output, PAGE), html)
    with tempfile.TemporaryDirectory(prefix="calumma-report-") as folder:
        local = Path(folder) / PAGE
        local.write_bytes(html)
        run.log_artifact(local)


def _earlier(output: str, reports: Mapping[str, dict[str, Any]]) -> dict[str, Findings]:
    """Findings about sources that stand as an earlier run made them."""
    try:
        data = json.loads(storage.read_bytes(storage.join(output, DATA)))
        return {
            name: Findings.model_validate(part["findings"])
            for name, part in data.items()
            if name in reports and part["fingerprint"] == reports[name]["fingerprint"]
        }
    except storage.NotFound:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        logger.warning("%s in %s cannot be read, the report goes without earlier samples: %s", DATA, output, error)
        return {}
