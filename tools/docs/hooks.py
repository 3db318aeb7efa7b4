"""MkDocs hooks: the site's pages from outside docs/, and those that are made from the sources."""

from __future__ import annotations

import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.docs.command_page import command_page
from tools.docs.config_pages import group_pages, top_page
from tools.docs.file_page import file_page
from tools.docs.markdown import ROOT
from tools.docs.message_page import message_page

# File of the repository -> page of the site.
OUTSIDE = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "benchmarks/README.md": "numbers/benchmarks.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and the reference."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, text in reference().items():
        files.append(File.generated(config, page, content=text))
    return files


def reference() -> dict[str, str]:
    """Return {page: Markdown} of the reference."""
    conf, package = ROOT / "conf", ROOT / "loraplus_hydra"
    return {
        **group_pages(conf),
        "reference/keys.md": top_page(conf),
        "reference/command-line.md": command_page(conf),
        "reference/files.md": file_page(package),
        "reference/errors.md": message_page(package),
    }


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository at the pages of the site."""
    uri = page.file.src_uri
    source = next((source for source, made in OUTSIDE.items() if made == uri), f"docs/{uri}")
    return re.sub(r"(?<=\]\()[^)\s#:]+(?=[)#])", lambda link: _on_site(link[0], source, uri), markdown)


def _on_site(link: str, source: str, uri: str) -> str:
    """Return the link of the page `uri`, which is made from the file `source`, to a page of the site."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if found := re.fullmatch(r"conf/(\w+)(?:/(\w+)\.yaml)?", target):  # a group, or an option of it
        target = f"reference/groups/{found[1]}.md" + (f"#{found[2]}" if found[2] else "")
    target = OUTSIDE.get(target, target.removeprefix("docs/"))
    return posixpath.relpath(target, posixpath.dirname(uri) or ".")
