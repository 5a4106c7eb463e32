"""Reports as one self-contained HTML file each, readable offline, on a phone and on paper.

Templates are in the folders of their verbs: "study/report.html" is study/report.html of this package. They extend "report/base.html".
"""

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from ..folder import OutputFolder
from .drawing import save_png, svg

TEMPLATES = Environment(
    loader=PackageLoader("parloop", ""), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
)


def render(template: str, **values: Any) -> str:
    """Return the page of a template.

    Args:
        template: path of the template in this package.
        **values: values of its variables.
    """
    return TEMPLATES.get_template(template).render(**values)


def put(figures: dict[str, tuple[str, Figure]], out: OutputFolder, prefix: str = "") -> dict[str, tuple[str, Markup]]:
    """Write figures as PNG, and return them for a page.

    Args:
        figures: name -> (caption, figure).
        out: folder to write into.
        prefix: prefix of the files' names.

    Returns:
        name -> (caption, <svg> element).

    Raises:
        OutputError: other files have these names, or the folder cannot be written.
    """
    drawn = {}
    for name, (caption, figure) in figures.items():
        with out.file(f"{prefix}{name}.png") as path:
            save_png(figure, path)
        drawn[name] = (caption, Markup(svg(figure)))
    return drawn
