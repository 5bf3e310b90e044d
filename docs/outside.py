"""Part of the site's build: files of the repository outside docs/ that pages link to, as `../benchmarks/results/...`.

On GitHub such links work as they stand. For the site the files are copied to the same path below its root.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path("benchmarks/results")

_SHOWN = (".md", ".svg", ".csv", ".json")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the recorded results of the benchmarks."""
    repository = Path(config.config_file_path).parent
    for path in sorted((repository / RESULTS).rglob("*")):
        if path.suffix in _SHOWN:
            name = str(path.relative_to(repository))
            files.append(File(name, str(repository), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of the pages in docs/ itself at the copies."""
    return re.sub(rf"\]\(\.\./{RESULTS}/", f"]({RESULTS}/", markdown)
