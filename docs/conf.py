import re
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

project = "ice_engine"
author = "the ice_engine authors"
copyright = f"2026, {author}"
release = version = installed_version("ice-engine")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "measured/*.md"]  # the latter are included by pages

html_theme = "furo"
html_title = f"ice_engine {release}"
html_static_path = ["_static"]
html_css_files = ["ice.css"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
toc_object_entries = False  # a list of hundreds of names beside the page hides its sections
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# No intersphinx: its inventories come over the network, and a failed fetch is a warning, which is an error here.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|ignite|abc|collections|contextlib|typing|pathlib|os|logging|matplotlib|tensorboard|numpy)\..*"),
    ("py:class", r"ice_engine\.(.*\.)?_\w+"),  # a private base class, named under "Bases:"
    ("py:class", r"ice_engine\.(closing\.Closing|saving\.Saving)"),  # likewise: what it has is listed under Optimizer
]


def _from_here(_app: Sphinx, path: Path, _docname: str, content: list[str]) -> None:
    """Make the README's links to files start at docs/, where index.md includes it."""
    root = Path(__file__).resolve().parents[1]
    if path.name == "README.md":
        content[0] = re.sub(
            r"(?<=\]\()[\w./-]+",
            lambda link: f"../{link[0]}" if (root / link[0]).exists() else link[0],
            content[0],
        )


def setup(app: Sphinx) -> None:
    app.connect("include-read", _from_here)
