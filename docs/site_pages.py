"""The hook of mkdocs.yml: the pages of the site, which are the files of this repository with links written anew.

README.md is the home, CHANGELOG.md and experiments/ are pages beside docs/, and the notebook is text and code.
A link to a file that is no page of the site, such as a test, becomes its text.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "docs/quickstart.ipynb": "quickstart.md"}
ORIGIN = {there: here for here, there in MOVED.items()}
OF_EXPERIMENTS = (".md", ".png", ".csv")
# A link, whose text may hold code, or code, which may hold what looks like a link.
LINK = re.compile(r"(?P<picture>!?)\[(?P<label>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)|`[^`\n]+`")
BLOCK_OF_CODE = re.compile(r"(^```.*?^```$|^(?: {4}|\t)[^\n]*$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for origin, name in MOVED.items():
        text = (ROOT / origin).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=of_notebook(text) if origin.endswith(".ipynb") else text))
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in OF_EXPERIMENTS:
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the links of a page anew, outside code."""
    parts = BLOCK_OF_CODE.split(markdown)  # text and code alternate
    parts[::2] = [of_links(text, page.file.src_uri, files) for text in parts[::2]]
    return "".join(parts)


def of_links(text: str, page: str, files: Files) -> str:
    """Return a text whose links lead from a page of the site to pages of the site."""
    origin = ORIGIN.get(page, page if page.startswith("experiments/") else f"docs/{page}")

    def written(found: re.Match[str]) -> str:
        picture, label, target, anchor = found.groups(default="")
        if not target or "://" in target:
            return found.group()
        file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        name = MOVED.get(file, file.removeprefix("docs/"))
        if files.get_file_from_path(name) is None and (ROOT / file).exists():
            return label
        return f"{picture}[{label}]({os.path.relpath(name, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(written, text)


def of_notebook(text: str) -> str:
    """Return the text and the code of a notebook as Markdown."""
    cells: list[dict[str, Any]] = json.loads(text)["cells"]
    return "\n\n".join(
        source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for cell in cells if (source := "".join(cell["source"]))
    )
