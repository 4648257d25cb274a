"""Pages of the site that are written from the source: the methods' cards and table, the CLI, adding a method.

A hook of mkdocs (see ``mkdocs.yml``); nothing is copied into the tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from gossamer.cli import app
from gossamer.core import registry

__all__ = ["on_files"]


def _paper(arxiv: str) -> str:
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "–"


def methods_page() -> str:
    """Return the table of all methods, as their cards state them."""
    lines = [
        "# Methods",
        "",
        "Every method is a *room*: a folder with its code, card, recipes, figures and tests. Order and",
        "compatibility in a stack follow from what each declares (stage, touches, needs).",
        "",
        "| class, recipe key | paper | family | stage, touches | state |",
        "| --- | --- | --- | --- | --- |",
    ]
    for m in registry.methods().values():
        touches = ", ".join(m.touches) or "–"
        lines.append(
            f"| [{m.cls}]({m.name}.md)<br>{m.name.replace('_', '_<wbr>')} | {m.title}, {_paper(m.arxiv)} "
            f"| {m.family} | {m.stage}; {touches} | {m.status} |"
        )
    return "\n".join(lines) + "\n"


def method_page(name: str) -> str:
    """Return one method's card with its facts on top and its options below."""
    m = registry.info(name)
    card = registry.card(name)
    title = "" if card.lstrip().startswith("# ") else f"# {m.cls}\n\n"
    facts = f"*{m.title}* · arXiv {_paper(m.arxiv)} · {m.family} · stage {m.stage} · **{m.status}**\n\n"
    body = card.lstrip()
    if not title:
        head, _, rest = body.partition("\n")
        title, body = f"{head}\n\n", rest.lstrip()
    options = f"\n\n## Options\n\n::: {m.package}.{m.cls}\n    options: {{members: false, heading_level: 3}}\n"
    return title + facts + body.rstrip() + options


def cli_page() -> str:
    """Return every command with its arguments, options and example."""
    lines = ["# Command line", "", "Exit codes: 0 ok, 2 bad input, 1 a failure while working, 130 interrupted.", ""]
    for name, command in typer.main.get_command(app).commands.items():
        lines += [
            f"## gossamer {name}",
            "",
            (command.help or "").strip(),
            "",
            "| option | meaning | default |",
            "| --- | --- | --- |",
        ]
        for p in command.params:
            shown = " ".join(f"`{o}`" for o in p.opts) if p.param_type_name == "option" else f"`{p.name.upper()}`"
            default = "" if p.default in (None, False) or p.required else f"`{p.default}`"
            lines.append(f"| {shown} | {getattr(p, 'help', '') or ''} | {default} |")
        lines += ["", "```", (command.epilog or "").removeprefix("Example: "), "```", ""]
    return "\n".join(lines)


def room_page() -> str:
    """Return the part of CONTRIBUTING.md on adding a method."""
    text = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    body = text.partition("## Adding a method: the room")[2]
    return "# Adding a method" + body.replace("\n### ", "\n## ")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {"methods/index.md": methods_page(), "reference/cli.md": cli_page(), "adding-a-method.md": room_page()}
    pages |= {f"methods/{name}.md": method_page(name) for name in registry.methods()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files
