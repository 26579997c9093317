"""What is inside the page of a report."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any


def page_data(path: Path) -> dict[str, Any]:
    """The tables and charts of a page."""
    (packed,) = re.findall(r'<script type="text/plain" id="data">([^<]*)</script>', path.read_text())
    return json.loads(gzip.decompress(base64.b64decode(packed)))
