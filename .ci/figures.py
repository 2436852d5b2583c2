"""Write one small picture per notebook into notebooks/figures, from its committed outputs.

The README shows them. Usage: python .ci/figures.py [FOLDER]    (the repository's folder)
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

WIDTH = 830  # pixels: a README's column on a code host, so that no browser shrinks the letters
# Which of a notebook's pictures stands for it, counted from 0; a negative number from the end.
CHOSEN = {"02": 0, "03": -1, "05": 0, "06": 0, "07": 0}


def pictures(path: Path) -> list[bytes]:
    """All PNG outputs of a notebook, in order."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [o for c in cells for o in c.get("outputs", [])]
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs
            if "image/png" in o.get("data", {})]


def main(folder: Path) -> None:
    target = folder / "notebooks" / "figures"
    target.mkdir(exist_ok=True)
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        if path.name[:2] not in CHOSEN:
            continue
        image = Image.open(io.BytesIO(pictures(path)[CHOSEN[path.name[:2]]])).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image.thumbnail((WIDTH, image.height), Image.LANCZOS)
        image = image.quantize(128, method=Image.Quantize.FASTOCTREE)  # keeps the methods' colours
        image.save(target / f"{path.stem}.png", optimize=True)
        print(f"{path.stem}.png: {(target / f'{path.stem}.png').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
