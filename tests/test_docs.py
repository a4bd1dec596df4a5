"""The documentation builds as a site, without a link or an anchor that leads nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.helpers.ranks import ROOT


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", site],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_builds(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        html = (tmp_path / "site" / page.stem / "index.html").read_text()
        # A fenced block in a list comes out as a paragraph of code; one that is indented does not.
        assert not re.search(r"<p><code>[^<]*\n[^<]*</code></p>", html), page.name


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """Of a page, of an anchor, and of a file of the repository."""
    links = ["other.md", "page.md#nothing", "../README.md"]
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config |= {"docs_dir": "docs", "nav": [{"Page": "page.md"}]}
    for number, link in enumerate(links):
        folder = tmp_path / str(number)
        (folder / "docs").mkdir(parents=True)
        (folder / "docs/hooks.py").write_text((ROOT / "docs/hooks.py").read_text())
        (folder / "docs/page.md").write_text(f"# Page\n\n[there]({link})\n")
        (folder / "mkdocs.yml").write_text(yaml.safe_dump(config))
        done = build(folder / "mkdocs.yml", folder / "site")
        assert done.returncode != 0, link
        assert re.search(re.escape(link.split("#")[0]), done.stderr)


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, page.name
