"""MkDocs: links from a page to files outside docs/, which are the repository's and no pages."""

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
log = get_plugin_logger("repository")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replaces such links by the files' names.

    Warns of a file that is missing, which mkdocs takes for an error with --strict.
    """

    def name(match: re.Match[str]) -> str:
        text, target = match[1], (ROOT / "docs" / match[2]).resolve()
        if not target.exists():
            log.warning(f"{page.file.src_path} links to {match[2]}, which does not exist")
        path = target.relative_to(ROOT)
        return text if text.strip("`") == str(path) else f"{text} (`{path}`)"

    return LINK.sub(name, markdown)
