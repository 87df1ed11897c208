"""What the site needs beside mkdocs and its plugins: the menu, a page of names for each module, links, formulas.

Formulas become MathML when the site is built, so that nothing has to be fetched when it is read.
"""
import html
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
WINGS = {"core": "Core", "tensors": "Tensors", "clevr": "CLEVR-Robot", "metaworld": "Meta-World", "babyai": "BabyAI",
         "lm": "Language model", "rl": "Offline RL", "run": "Runs", "paper": "Paper"}
CSS = """
.md-grid { max-width: 80rem; }
.jp-Cell, .jp-OutputArea-output { max-width: 100%; }
.jp-OutputArea-output, .highlight-ipynb pre { overflow-x: auto; }
.highlight-ipynb pre, .jp-RenderedHTMLCommon pre { font-size: .64rem; }
.jp-RenderedHTMLCommon table, .md-typeset table:not([class]) { display: block; overflow-x: auto; max-width: 100%; }
.jp-Cell-inputWrapper:has(pre.unseen), .jp-OutputPrompt, .jp-InputPrompt,
.jp-Notebook-cell:has(.highlight-ipynb pre > span:only-child:empty) {
  display: none !important; }
.jp-RenderedImage img, .jp-RenderedHTMLCommon img { max-width: 100%; height: auto; }
@media (max-width: 60em) { .highlight-ipynb pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
"""
UNSEEN = re.compile(r'<pre><span></span><span class="c1">#\| ?(?:echo: false|hide)\b.*?</pre>', re.S)   # outputs stay
DIRECTIVE = re.compile(r'<span class="c1">#\| ?(?:export|slow|gpu|hide|default_exp)[^<]*</span>\n?')


def title_of(path: Path) -> str:
    "The first heading of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")


def module_of(path: Path) -> str:
    "What a notebook exports to, empty for none."
    found = re.search(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
    return f"kalm.{found[1]}" if found else ""


def notebooks() -> dict[str, list[Path]]:
    "The notebooks of each wing, in order."
    return {wing: sorted((ROOT/"nbs"/wing).glob("[0-9]*.ipynb")) for wing in WINGS if (ROOT/"nbs"/wing).is_dir()}


def on_config(config):
    "The menu: front page, tour, wings, names."
    def place(path: Path) -> str:
        return path.relative_to(ROOT/"nbs").as_posix()

    wings = [{WINGS[wing]: [{title_of(p): place(p)} for p in paths]} for wing, paths in notebooks().items()]
    names = [{WINGS[wing]: [{module_of(p): f"names/{module_of(p)}.md"} for p in paths if module_of(p)]}
             for wing, paths in notebooks().items() if any(map(module_of, paths))]
    front = [{"kalm": "index.ipynb"}, {"Tour": "tour.ipynb"}, {"Play": "play.ipynb"}]
    config.nav = [*front, {"Notebooks": wings}, {"Names": names}]
    return config


def on_files(files, config):
    "A page for each module, and the style sheet."
    for path in [p for paths in notebooks().values() for p in paths if module_of(p)]:
        name, back = module_of(path), posixpath.relpath(path.relative_to(ROOT/"nbs").as_posix(), "names")
        text = f"# {name}\n\nExplained and tested in [{title_of(path)}]({back}).\n\n::: {name}\n"
        files.append(File.generated(config, f"names/{name}.md", content=text))
    files.append(File.generated(config, "site.css", content=CSS))
    return files


def on_page_content(content: str, page, config, files) -> str:
    "Links between notebooks, and formulas; without the words that are meant for nbdev."
    here = posixpath.dirname(page.file.src_uri)

    def linked(match: re.Match) -> str:
        target, _, part = html.unescape(match[1]).partition("#")
        found = files.get_file_from_path(posixpath.normpath(posixpath.join(here, target)))
        if found is None:   # a file of the repository that the site does not have
            return f'title="{html.escape(posixpath.normpath(posixpath.join("nbs", here, target)))}"'
        return f'href="{html.escape(found.url_relative_to(page.file))}{"#" + part if part else ""}"'

    content = re.sub(r'href="(?!\w+:|#)([^"]+?\.(?:ipynb|md|py)(?:#[^"]*)?)"', linked, content)
    return with_formulas(DIRECTIVE.sub("", UNSEEN.sub('<pre class="unseen"></pre>', content)))


def with_formulas(content: str) -> str:
    "`$...$` and `$$...$$` as MathML, outside of code and outputs."
    parts = re.split(r"(<(pre|code|script|style)\b.*?</\2>)", content, flags=re.S)
    for i in range(0, len(parts), 3):   # text, code with its tag, tag
        text = re.sub(r"\$\$(.+?)\$\$", lambda m: _formula(m[1], "block"), parts[i], flags=re.S)
        parts[i] = re.sub(r"\$([^$<>\n]+?)\$", lambda m: _formula(m[1], "inline"), text)
    return "".join(part for i, part in enumerate(parts) if i % 3 != 2)


def _formula(text: str, display: str) -> str:
    return convert(html.unescape(text), display=display)
