"""What the documentation site has beside docs/: the project's pages and the reference."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "servegym"
#: Pages of the project at the top of the repository.
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "EXPERIMENTS.md")
#: Commands are described by `--help`; compiled loops have no face of their own.
LEFT_OUT = re.compile(r"(^|\.)(commands|cli|assets|kernels|.*_kernels)$")
#: What a page would load from another machine; links to follow are no such thing.
REMOTE = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")

_log = logging.getLogger("mkdocs.hooks.servegym")


def packages() -> dict[str, list[str]]:
    """Name the packages of servegym and the modules of each that have a face."""
    found: dict[str, list[str]] = {}
    for folder in [SOURCE, *sorted(_folders(SOURCE))]:
        name = ".".join(["servegym", *folder.relative_to(SOURCE).parts])
        if LEFT_OUT.search(name):
            continue
        modules = [
            f"{name}.{path.stem}"
            for path in sorted(folder.glob("*.py"))
            if path.stem != "__init__" and not LEFT_OUT.search(path.stem) and _has_face(path)
        ]
        if modules:
            found[name] = modules
    return found


def _folders(top: Path) -> list[Path]:
    """Find packages below one; links are followed, as the five folders at the top are links."""
    below = [path for path in top.iterdir() if (path / "__init__.py").is_file()]
    return below + [deeper for path in below for deeper in _folders(path)]


def _has_face(path: Path) -> bool:
    names = [getattr(node, "name", "_") for node in ast.parse(path.read_text()).body]
    return any(not name.startswith("_") for name in names)


def reference_page(package: str, modules: list[str]) -> str:
    """Write the page of a package: what it is for, and its modules from their docstrings."""
    init = SOURCE.joinpath(*package.split(".")[1:], "__init__.py")
    meaning = ast.get_docstring(ast.parse(init.read_text())) or ""
    return "\n\n".join([f"# {package}", meaning, *(f"::: {module}" for module in modules), ""])


def _page_name(package: str) -> str:
    return f"reference/{package}.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the reference's pages in the navigation."""
    (shelf,) = (part["Reference"] for part in config.nav or [] if "Reference" in part)
    (api,) = (part for part in shelf if "API" in part)
    api["API"] = [{package: _page_name(package)} for package in packages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the project's pages and the reference."""
    for name in PROJECT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for package, modules in packages().items():
        page = reference_page(package, modules)
        files.append(File.generated(config, _page_name(package), content=page))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between docs/ and the top of the repository lead to the site's pages."""
    if page.file.src_uri in PROJECT:
        return markdown.replace("](docs/", "](")
    return re.sub(rf"\]\(((?:\.\./)*)\.\./({'|'.join(PROJECT)})", r"](\1\2", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse what is loaded from elsewhere: pages are read without a network."""
    for tag in REMOTE.findall(output):
        _log.warning(f"{page.file.src_uri} would load {tag}")
    return output
