"""The report as Markdown and as HTML: one file each, which loads nothing."""

from collections.abc import Sequence
from html import escape

from lexi_search.allocation.auto import Outcome
from lexi_search.allocation.baselines import PAPER
from lexi_search.cli.report.drawings import draw_front, draw_heatmap, draw_scale
from lexi_search.cli.report.facts import gather
from lexi_search.cli.report.statements import Step, find_unit

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #fff; --ink: #1b1d22; --soft: #5d6370; --line: #e3e4e8;
  --accent: #3350c4; --good: #1f7a55; --warm: #d1580c; --code: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --card: #1b1e24; --ink: #e8e9ec; --soft: #9ba1ae;
  --line: #2e323b; --accent: #8fa5ff; --good: #5fd0a0; --warm: #ff9a52; --code: #22262e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
.eyebrow { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; }
h1 { margin: .1rem 0 .6rem; font-size: 2rem; line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 2.6rem 0 .7rem; font-size: 1.15rem; letter-spacing: -.01em; }
h3 { margin: 0; font-size: .95rem; }
p { margin: .4rem 0; max-width: 44rem; }
.lead { font-size: 1.1rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1.6rem
  0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; font-weight: 650; line-height: 1.3; letter-spacing: -.02em;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile em { font-style: normal; font-weight: 400; font-size: .95rem; color: var(--soft); letter-spacing: 0; }
.tile span { color: var(--soft); font-size: .82rem; line-height: 1.35; display: block; }
.layers { display: grid; grid-template-columns: repeat(auto-fill, minmax(3.4rem, 1fr)); gap: .4rem; padding: 0;
  margin: 0; list-style: none; }
.layers li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .25rem .3rem
  .35rem; text-align: center; }
.layers b { display: block; font-size: 1.15rem; line-height: 1.25; }
.layers small { color: var(--soft); font-size: .7rem; display: block; }
.layers i { display: block; height: 3px; border-radius: 2px; background: linear-gradient(90deg, var(--accent)
  var(--sure), var(--line) 0); margin: .2rem .15rem 0; }
figure { margin: .6rem 0 0; background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding:
  .9rem .9rem .7rem; }
figure div { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; font-family: inherit; }
svg .tick { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .label { font-size: 13px; fill: var(--soft); }
svg .cell { font-size: 12px; text-anchor: middle; font-variant-numeric: tabular-nums; }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .halo { fill: none; stroke: #000; stroke-opacity: .6; stroke-width: 6; stroke-linejoin: round; }
svg .chosen { fill: none; stroke: #fff; stroke-width: 3; stroke-linejoin: round; }
svg .grid { stroke: var(--line); fill: none; }
svg .front { fill: none; stroke: var(--accent); stroke-width: 2.2; stroke-linejoin: round; }
svg .uniform { fill: var(--card); stroke: var(--good); stroke-width: 2.2; }
svg .paper { fill: var(--card); stroke: var(--soft); stroke-width: 2.2; }
svg .ours { fill: var(--warm); stroke: var(--card); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .5rem 0 0; padding: 0; list-style: none; color:
  var(--soft); font-size: .85rem; align-items: center; }
.legend svg { display: inline-block; width: 22px; min-width: 0; height: 14px; vertical-align: -2px; margin-right:
  .4rem; }
.scale { display: inline-block; width: 9rem; height: .7rem; border-radius: .2rem; vertical-align: -1px; margin: 0
  .4rem; }
.table { overflow-x: auto; margin-top: .6rem; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .8rem; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; }
.named th:first-child, .named td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
.named tbody tr:first-child td { font-weight: 650; }
.step { border-top: 1px solid var(--line); padding: .8rem 0; display: grid; grid-template-columns: 8.5rem minmax(0,
  1fr); gap: .2rem 1rem; }
pre { margin: 0 0 .35rem; padding: .55rem .75rem; background: var(--code); border-radius: .45rem; white-space:
  pre-wrap; overflow-x: auto; font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, 
  "Liberation Mono", monospace; }
.step p { margin: 0; }
ul.plain { margin: .3rem 0; padding-left: 1.1rem; max-width: 44rem; }
ul.plain li { margin: .3rem 0; }
dl { display: grid; grid-template-columns: 6rem minmax(0, 1fr); gap: .25rem 1rem; font-size: .85rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
pre span { white-space: nowrap; }
@media (max-width: 40rem) { svg { min-width: 0; } svg .tick { font-size: 20px; } svg .label { font-size: 21px; }
  svg .cell { font-size: 18px; } figure { padding: .6rem .5rem; } main {
  padding: 1.5rem 1rem 2rem; } h1 { font-size: 1.6rem; } .step {
  grid-template-columns: 1fr; } .tiles { grid-template-columns: 1fr 1fr; gap: .5rem; } .tile { padding: .65rem
  .75rem; } .tile b { font-size: 1.15rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { :root { --ground: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --code: #f4f4f4;
  --accent: #3350c4; --good: #1f7a55; --warm: #d1580c; } body { font-size: 10.5pt; } main { max-width: none;
  padding: 0; } h2 { margin-top: 1.6rem; break-after: avoid; } figure, .tile, .step, .layers li, tr {
  break-inside: avoid; } figure div, .table, pre { overflow: visible; } svg { min-width: 0; } table {
  font-size: 8.5pt; } th, td { padding: .25rem .4rem; } .layers { grid-template-columns: repeat(16, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def format_html(outcome: Outcome) -> str:
    """The report as a page for light, dark, small and paper."""
    facts = gather(outcome)
    gradient, low, high = draw_scale(outcome)
    origin = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.origin)
    sections = {
        "k of each layer": f'<ul class="layers">{"".join(_layer(*one) for one in facts.layers)}</ul>'
        '<p class="soft">The bar is how often the layer would have this k with another sample of the profile.</p>',
        "Loss of each layer at each k": f"<figure><div>{draw_heatmap(outcome)}</div><ul class='legend'><li>{low}"
        f'<span class="scale" style="background: {gradient}"></span>{high} {escape(find_unit(outcome))}</li>'
        "<li>the line is on top of the chosen k; the cells below it are the experts that run</li></ul></figure>",
        "Against the same budget spent otherwise": _table(facts.columns, facts.rows, named=True),
        "Front": f"<figure><div>{draw_front(outcome)}</div>{_legend(outcome)}</figure>"
        + _table(facts.front_columns, facts.front_rows, named=False),
        "How sure": _list(facts.certainty),
        "What to do next": "".join(map(_step, facts.steps)),
        "What the words mean": _list(facts.meaning),
        "Origin": f"<dl>{origin}</dl>",
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections.items())
    tiles = "".join(
        f'<div class="tile"><span>{escape(tile.label)}</span><b>{escape(tile.figure)}<em>{escape(tile.error)}</em></b>'
        f"<span>{escape(tile.note)}</span></div>"
        for tile in facts.tiles
    )
    title = escape(facts.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: k of each layer</title><style>{STYLE}</style></head>\n<body><main>"
        f'<p class="eyebrow">LExI: experts of each layer</p><h1>{title}</h1>'
        f'<p class="lead">{escape(facts.decision)}</p><p>{escape(facts.verdict)}</p>'
        f'<div class="tiles">{tiles}</div>{body}</main></body></html>\n'
    )


def format_markdown(outcome: Outcome) -> str:
    """The report as Markdown, with tables in place of drawings."""
    facts = gather(outcome)
    blocks = [f"# {_mark(facts.title)}: k of each layer", _mark(facts.decision), _mark(facts.verdict)]
    blocks += ["## k of each layer", _lines(("layer", "k", "sure"), [_cells(layer) for layer in facts.layers])]
    blocks += ["## Against the same budget spent otherwise", _lines(facts.columns, facts.rows)]
    blocks += [f"## Loss of each layer at each k, {find_unit(outcome)}", _heat(outcome)]
    blocks += ["## Front", _lines(facts.front_columns, facts.front_rows)]
    blocks += ["## How sure", _bullets(facts.certainty), "## What to do next"]
    for step in facts.steps:
        blocks += [f"{step.title}: {_mark(step.note)}", "\n".join(f"    {command}" for command in step.commands)]
    blocks += ["## What the words mean", _bullets(facts.meaning)]
    blocks += ["## Origin", "\n".join(f"- {name}: {_mark(text)}" for name, text in facts.origin)]
    return "\n\n".join(blocks) + "\n"


def _layer(index: int, top_k: int, sure: float) -> str:
    return f'<li><small>{index}</small><b>{top_k}</b><i style="--sure: {100 * sure:.0f}%"></i></li>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, named: bool) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="named"' if named else ""
    return f'<div class="table"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(texts: Sequence[str]) -> str:
    return f'<ul class="plain">{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>'


def _step(step: Step) -> str:
    words = (" ".join(f"<span>{escape(word)}</span>" for word in line.split(" ")) for line in step.commands)
    commands = "\n".join(words)
    return (
        f'<div class="step"><h3>{escape(step.title)}</h3><div><pre>{commands}</pre>'
        f'<p class="soft">{escape(step.note)}</p></div></div>'
    )


def _legend(outcome: Outcome) -> str:
    marks = {
        "the least loss": '<path d="M0 7H22" class="front"/>',
        "the same k in every layer": '<circle cx="11" cy="7" r="4.5" class="uniform"/>',
        "the paper's method": '<path d="M11 1l6 6l-6 6l-6 -6z" class="paper"/>',
        "this allocation": '<path d="M11 0l2 5h5l-4 3l2 6l-5 -4l-5 4l2 -6l-4 -3h5z" class="ours"/>',
    }
    if not any(one.name == PAPER and one.loss is not None for one in outcome.contenders):
        del marks["the paper's method"]
    items = (f'<li><svg viewBox="0 0 22 14" aria-hidden="true">{mark}</svg>{text}</li>' for text, mark in marks.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def _mark(text: str) -> str:
    """`text` as Markdown shows it: nothing in it is markup."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#~$&" else character for character in text)


def _cells(layer: Sequence[float]) -> tuple[str, str, str]:
    index, top_k, sure = layer
    return str(index), str(top_k), f"{100 * sure:.0f} %"


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---:" if index else "---" for index in range(len(columns))], *rows]
    return "\n".join(
        f"| {' | '.join(cell if set(cell) <= set('-:') else _mark(cell) for cell in line)} |" for line in lines
    )


def _heat(outcome: Outcome) -> str:
    """The loss table, the chosen k in bold."""
    profile, chosen = outcome.profile, outcome.contenders[0].top_k
    rows = []
    for layer, own, losses in zip(profile.model.moe_layers, chosen, profile.losses(profile.default_loss), strict=True):
        cells = [f"**{loss:.3g}**" if k == own else f"{loss:.3g}" for k, loss in enumerate(losses, 1)]
        rows.append(f"| {layer} | {' | '.join(cells)} |")
    names = ("layer", *(f"k = {k}" for k in range(1, profile.max_k + 1)))
    return "\n".join([_lines(names, []), *rows])


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {_mark(text)}" for text in texts)
