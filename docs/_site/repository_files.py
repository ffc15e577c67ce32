"""MkDocs hook: files outside docs/ that its pages link to become part of the site.

Pages link to the repository's files by relative path, as a code host resolves them. The site has no such
files of its own, so it gets each one that is linked to: Markdown as a page, source as a page of highlighted
code, anything else as it is. Links are rewritten to lead there; MkDocs checks them afterwards like others.

A page that would load something from another host fails the build.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"^(?P<fence>```.*?^```$)|(?<=\]\()(?P<target>[^)\s]+)(?=\))", re.MULTILINE | re.DOTALL)
_LOADED = re.compile(
    r"""<(?:script|img|iframe|link rel="(?:stylesheet|preload|icon)")[^>]*(?:src|href)="(?:https?:)?//[^>]+"""
)
_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh"}
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config) -> Files:
    """Adds what is linked to, and what those files link to."""
    origins = {f"docs/{file.src_uri}": file for file in files.documentation_pages()}
    origins |= dict.fromkeys(_PAGES)
    waiting = list(origins)
    while waiting:
        path = waiting.pop()
        if origins[path] is None:
            origins[path] = _generated(path, config)
            files.append(origins[path])
        if path.endswith(".md"):
            new = [target for target in _targets(path) if target not in origins and not _is_of_docs(target)]
            origins |= dict.fromkeys(new)
            waiting += new
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links between files of the repository become links between pages of the site."""
    here, origin = page.file.src_uri, getattr(page.file, "origin", f"docs/{page.file.src_uri}")

    def rewritten(match: re.Match) -> str:
        target = match["target"]
        path, hash_, anchor = (target or "").partition("#")
        if target is None or not path or "://" in path:
            return match[0]
        place = _place(_resolved(origin, path))
        return posixpath.relpath(place, posixpath.dirname(here) or ".") + hash_ + anchor

    return _LINK.sub(rewritten, markdown)


def on_post_page(output: str, page, **_) -> str:
    """Refuses a page that needs another host."""
    if loaded := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {loaded[0]}")
    return output


def _generated(path: str, config) -> File:
    """The site's file of one in the repository."""
    source, place = _ROOT / path, _place(path)
    if place.endswith(".md") and not path.endswith(".md"):
        text = f"# {path}\n\n````{_LANGUAGES[source.suffix]}\n{source.read_text()}````\n"
        file = File.generated(config, place, content=text)
    else:
        file = File.generated(config, place, abs_src_path=str(source))
    file.origin = path
    return file


def _targets(path: str) -> Iterator[str]:
    """Files that a Markdown file links to and that exist."""
    for match in _LINK.finditer((_ROOT / path).read_text()):
        target = (match["target"] or "").partition("#")[0]
        if target and "://" not in target and (_ROOT / _resolved(path, target)).is_file():
            yield _resolved(path, target)


def _resolved(path: str, target: str) -> str:
    """A relative link of a file, as a path from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _is_of_docs(path: str) -> bool:
    return path.startswith("docs/")


def _place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in _PAGES:
        return _PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}.md" if Path(path).suffix in _LANGUAGES else f"repository/{path}"
