"""Hooks of mkdocs: pages and pictures that stand outside of docs/ become part of the site, and links to other files show their text."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "examples", "iada_plugin")


def on_files(files, config):
    """Add the README, and what the folders hold of text and pictures."""
    found = [ROOT / "README.md", *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")))]
    for path in found:
        if path.suffix in (".md", ".png", ".py", ".yaml", ".sh", ".jsonl") and "__pycache__" not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they are on the site, where ``docs/`` is the root."""
    if page.file.src_uri == "README.md":
        return re.sub(r"\]\(docs/", "](", markdown)
    if page.file.src_uri.startswith("benchmarks/"):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")
