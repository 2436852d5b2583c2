"""Write the notebooks as linked web pages into runs/html.

Each as `make workbook` ran it, where it did; else as committed.

Usage: python .ci/pages.py [FOLDER [STUDY]]     (the repository's folder; runs/STUDY: workbook)
"""

import re
import sys
from pathlib import Path

from nbconvert import HTMLExporter

# nbconvert's lab pages leave out the words that a picture carries, break lines within a word, and
# fetch scripts for formulas, diagrams and widgets, of which there are none (but for widgets that
# somebody ran).
PAGE = """
{%- extends "lab/index.html.j2" -%}
{%- block html_head_js -%}{{ super() if "widgets" in nb.metadata }}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block data_png scoped -%}
{%- set alt = output | get_metadata("alt", "image/png") -%}
{%- set image = super() -%}
{{ image | replace("<img ", '<img alt="%s" ' | format(alt | escape_html), 1) if alt else image }}
{%- endblock data_png -%}
{%- block body_header -%}
{{ super() }}
<style>
.jp-OutputArea-output pre { word-break: normal; overflow-wrap: anywhere }
nav a { margin-right: 1em }
</style>
<nav class="jp-RenderedHTMLCommon">
{%- for page in resources["pages"] %} <a href="{{ page }}.html">{{ page }}</a>{% endfor -%}
</nav>
{%- endblock body_header -%}
"""


def main(folder: Path, study: str) -> None:
    target = folder / "runs" / "html"
    target.mkdir(parents=True, exist_ok=True)
    paths = sorted((folder / "notebooks").glob("*.ipynb"))
    exporter = HTMLExporter(raw_template=PAGE)
    for path in paths:
        ran = folder / "runs" / study / path.name
        path = ran if ran.exists() else path
        page, _ = exporter.from_filename(str(path), {"pages": [p.stem for p in paths]})
        page = re.sub(r'(href="\d\d_\w+)\.ipynb', r"\1.html", page)
        (target / f"{path.stem}.html").write_text(page, "utf-8")
        print(f"{(target / path.stem).relative_to(folder)}.html from {path.relative_to(folder)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent,
         sys.argv[2] if len(sys.argv) > 2 else "workbook")
