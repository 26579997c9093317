"""The site of the documentation: it builds with strict links, its navigation has every page, its API every name."""

import html
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import harness

ROOT = Path(__file__).parents[1]


def test_the_navigation_has_every_page():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    experiments = {path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").glob("*/README.md")}
    assert listed == pages | experiments | {"index.md", "quickstart.md", "changelog.md"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if any(find_spec(package) is None for package in ("mkdocs", "material", "mkdocstrings_handlers")):
        pytest.skip("the site needs mkdocs-material and mkdocstrings: make install, or pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def links(page: Path) -> list[str]:
    return [html.unescape(link) for link in re.findall(r'(?:href|src)="?([^"#\s>]+)', page.read_text())]


def test_every_link_of_the_built_pages_leads_to_a_file(site):
    """mkdocs looks at Markdown; this looks at what a browser gets."""
    pages = [page for page in site.rglob("index.html")]
    assert len(pages) > 40
    for page in pages:
        for link in links(page):
            if "://" not in link and not link.startswith(("mailto:", "data:")):
                target = page.parent / link
                assert target.is_file() or (target / "index.html").is_file(), f"{page.relative_to(site)}: {link}"


def test_no_page_is_loaded_from_elsewhere(site):
    for page in site.rglob("index.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="?(http[^"\s>]+)', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="?stylesheet"?[^>]*href="?(http[^"\s>]+)', page.read_text())
        assert not loaded, page


def test_the_api_has_every_public_name(site):
    text = (site / "api" / "index.html").read_text()
    for name in set(harness.__all__) - {"__version__", "regions"}:
        assert re.search(rf'id="harness\.[\w.]*\b{name}"', text), name
    for name in ("Decile", "Fraction", "Laser", "small", "MarchenkoPastur"):
        assert f'id="harness.spectral.regions.{name}"' in text, name
    assert "&gt;&gt;&gt;" in text  # examples are code, and not quotations within quotations


def test_the_home_is_the_readme_and_the_quick_start_the_notebook(site):
    home = (site / "index.html").read_text()
    assert "make demo" in home and 'href="tasks/"' in home and "docs/tasks.md" not in home
    quick = (site / "quickstart" / "index.html").read_text()
    assert "Quickstart: what do the singular values" in quick and "<code>" in quick
