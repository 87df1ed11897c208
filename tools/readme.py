"Write README.md from nbs/index.ipynb; `--check` only says whether they agree."
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The index notebook as Markdown, with links that work from the top of the repository and hidden code left out."
    exporter = MarkdownExporter(exclude_output_prompt=True, exclude_input_prompt=True)
    text, _ = exporter.from_filename(ROOT/"nbs"/"index.ipynb")
    text = re.sub(r"```(?:python)?\n#\| (?:hide|echo: false)\n.*?```\n", "", text, flags=re.S)
    text = re.sub(r"\]\(((?:\w+/)?(?:images/|\w+\.ipynb))", r"](nbs/\1", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    path = ROOT/"README.md"
    if "--check" in sys.argv:
        same = path.read_text(encoding="utf-8") == readme()
        sys.exit(0 if same else "README.md differs from nbs/index.ipynb: run `make export`")
    path.write_text(readme(), encoding="utf-8")
