"""A page that needs no other file: its frame and style, for people on a phone as well. No torch."""

import base64
from collections.abc import Mapping
from html import escape


def html_page(title: str, origin: str, headline: str, sections: Mapping[str, str]) -> str:
    """The whole page: a title, where it comes from, and the HTML of its parts, each under its heading."""
    parts = "\n".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in sections.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1><p class="note">{escape(origin)}</p>\n{headline}\n{parts}\n'
        "</main></body></html>\n"
    )


def image(png: bytes, alt: str) -> str:
    """A picture inside the page; `alt` says the same in words."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5f6672; --line: #d9dde3; --page: #f6f7f9; --card: #fff;
  --blue: #0067a3; --orange: #9a6200; --sky: #3d94c4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a3abb8; --line: #3a404a; --page: #14171b;
  --card: #1e2228; --blue: #5db7ef; --orange: #f0b13c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 960px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 0; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 1rem 0; }
section > :first-child { margin-top: 0; }
section > :last-child { margin-bottom: 0; }
.note { color: var(--soft); font-size: .9rem; margin: .25rem 0 .75rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.tiles div { border-left: 4px solid var(--soft); padding-left: .75rem; color: var(--soft); font-size: .9rem; }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--text); white-space: nowrap; }
.tiles .memory { border-color: var(--blue); } .tiles .own { border-color: var(--sky); }
.tiles .reset { border-color: var(--orange); }
img { display: block; width: 100%; max-width: 680px; height: auto; margin: 0 auto 1rem; padding: .25rem;
  background: #fff; border-radius: 6px; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem;
  align-items: start; }
ol { padding-left: 1.5rem; margin: 0; } li { margin-bottom: .75rem; }
dl { display: grid; grid-template-columns: 5.5rem 1fr; gap: .1rem .5rem; margin: 0; }
dt { color: var(--soft); font-size: .85rem; line-height: 1.75; } dd { margin: 0; white-space: pre-wrap; }
dd.answer { color: var(--blue); font-weight: 600; }
code { font-size: .9em; }
@media (max-width: 560px) { main { padding: .5rem; } section { padding: .75rem; }
  table { font-size: .8rem; } th, td { padding: .35rem .25rem; } th { white-space: normal; vertical-align: bottom; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles .gain { grid-column: 1 / -1; } .tiles .gain b { font-size: 2.2rem; }
  dl { grid-template-columns: 4.75rem 1fr; } ol { padding-left: 1.25rem; } }
"""
