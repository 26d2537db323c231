"""Sphinx configuration of the site that `make docs` builds."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parent
REPO = DOCS.parent
sys.path[:0] = [str(DOCS), str(REPO)]

from hyper_parameters import table  # noqa: E402

project = "yolo-lightning"
html_title = project
html_theme = "furo"
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = html_show_copyright = False
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# The sources are the repository, so that links work here and where it is browsed.
root_doc = "README"
include_patterns = ["*.md", "docs/*"]
exclude_patterns = [
    ".*", "build", "dist", "*.egg-info", "outputs", "datasets", "mlruns", "mlartifacts",
    "yolo_lightning", "datamodules", "callbacks", "recipes", "tests", "docs/*.py", "docs/*.css",
]  # fmt: skip
myst_heading_anchors = 4
nb_execution_mode = "off"

default_role = "py:obj"  # docstrings mark code by single backticks
autodoc_member_order = "bysource"
maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"


class HyperParameters(SphinxDirective):
    """The table of the parameters of a class, from its signature and docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table as nodes."""
        return self.parse_text_to_nodes(table(self.arguments[0]))


class SourceLinks(SphinxTransform):
    """Links to files of the repository that are no pages lead to pages with their text."""

    default_priority = 800  # before Sphinx copies files to download

    def apply(self, **kwargs: Any) -> None:
        """Replace the downloads that MyST makes of such links."""
        for link in list(self.document.findall(addnodes.download_reference)):
            file, _ = self.env.relfn2path(link["reftarget"], self.env.docname)
            FILES.add(file)
            uri = self.app.builder.get_relative_uri(self.env.docname, f"source/{file}")
            link.replace_self(nodes.reference("", "", *link.children, refuri=uri, internal=True))


def show_titles(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Show the title of a page where the text of a link is its file name."""
    for link in doctree.findall(nodes.reference):
        if name := re.fullmatch(r"(?:docs/)?([\w-]+)\.md", link.astext()):
            titles = app.env.titles
            title = titles.get(f"docs/{name[1]}") or titles.get(name[1])
            if title:
                link.children = [nodes.inline("", title.astext())]


FILES: set[str] = set()
LEXERS = {".py": "python", ".yaml": "yaml", ".sh": "sh"}


def pages_of_files(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the page of each file that a link leads to."""
    for file in sorted(FILES):
        text, lexer = (REPO / file).read_text("utf-8"), LEXERS.get(Path(file).suffix, "text")
        code = app.builder.highlighter.highlight_block(text, lexer)  # type: ignore[attr-defined]
        yield f"source/{file}", {"title": file, "body": f"<h1>{file}</h1>{code}"}, "page.html"


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add the lists of docs/README.md to the start page, as the navigation of the site."""
    if docname != root_doc:
        return
    index = (DOCS / "README.md").read_text("utf-8").split("\n## ")[0]
    source[0] += "\n```{toctree}\n:hidden:\n\ndocs/README\n```\n"
    for part in re.split(r"^\*\*(?=.+\*\*$)", index, flags=re.M)[1:]:
        caption, pages = part.split("**", 1)
        names = [f"docs/{name}" for name in re.findall(r"\]\(([\w./-]+)\.(?:md|ipynb)\)", pages)]
        names = [name.replace("docs/../", "") for name in names]
        tree = "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])
        source[0] += f"\n{tree}\n"


def add_start_page(app: Sphinx, error: Exception | None) -> None:
    """Lead from the folder of the site to its first page."""
    if not error:
        to_first = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (app.outdir / "index.html").write_text(to_first)


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.add_directive("hyper-parameters", HyperParameters)
    app.add_transform(SourceLinks)
    app.connect("source-read", add_navigation)
    app.connect("doctree-resolved", show_titles)
    app.connect("html-collect-pages", pages_of_files)
    app.connect("build-finished", add_start_page)
