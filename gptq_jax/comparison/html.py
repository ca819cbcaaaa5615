"""One HTML file that needs no other: the table, the plots inside, what failed and what was measured."""

import base64
from collections.abc import Mapping
from typing import Any

from gptq_jax.comparison.table import COLUMNS, ComparisonTable, Row, Spread

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bad: #c22; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { opacity: .75; margin-top: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
th:nth-child(-n+2), td:nth-child(-n+2), .settings td, .settings th { text-align: left; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B4"; }
th[aria-sort=descending] button::after { content: " \\25BE"; }
tr.float { background: var(--soft); } td.failed { color: var(--bad); text-align: left; white-space: normal; }
td small { opacity: .65; }
figure { margin: 1rem 0; } img { max-width: 100%; background: white; border-radius: 4px; }
.settings td { white-space: normal; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
<div class="wide"><table id="results">
<thead><tr>{% for name in header %}
<th scope="col"><button type="button">{{ name }}</button></th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr{% if loop.first %} class="float"{% endif %}>
{%- for cell in row %}<td
{%- if cell.value is not none %} data-value="{{ cell.value }}"{% endif %}
{%- if cell.failed %} class="failed" colspan="{{ cell.span }}"{% endif %}>{{ cell.text }}
{%- if cell.spread %} <small>± {{ cell.spread }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% if remarks %}<ul>{% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}</ul>{% endif %}
{% for name, data in plots.items() %}<figure><img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></figure>
{% endfor %}
<h2>What was measured</h2>
<p>Every cell quantizes the same float model with the same calibration windows (those of a seed) and is measured on the
same held-out windows, which do not overlap; in each, all tokens but the first are predicted. KL is that of the float
model's next-token distribution to the cell's, in nats. Seconds are the wall time of quantizing, compilation included;
peak MB is the memory of the whole process meanwhile, the float model included.</p>
<table class="settings">{% for name, value in settings.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}
</table>
<script>
const body = document.querySelector("#results tbody");
document.querySelectorAll("#results th").forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  document.querySelectorAll("#results th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => { const cell = row.cells[column]; return cell ? cell.dataset.value ?? cell.textContent : ""; };
  const order = (a, b) => key(a) === "" ? 1 : key(b) === "" ? -1 : (down ? -1 : 1)
    * (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b));
  body.append(...[...body.rows].sort(order));
}));
</script>
</body>
</html>
"""


def html_report(table: ComparisonTable, plots: Mapping[str, bytes]) -> str:
    """The page, with `plots` (name -> PNG) inside; it asks the network for nothing."""
    import jinja2

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    names = table.names
    counts = f"{len(table.cells)} runs" + (f", {len(table.failures)} failed" if table.failures else "")
    texts = ", ".join(f"{what.replace('_', ' ')}: {name}" for what, name in names.items() if what != "model")
    return template.render(
        title=f"Quantization methods compared{' on ' + names['model'] if 'model' in names else ''}",
        subtitle="; ".join(part for part in (counts, texts) if part),
        header=["method", "grid", *(column.title for column in COLUMNS)],
        rows=[_float_row(table), *map(_row, table.rows())],
        remarks=table.remarks(),
        plots={name: base64.b64encode(data).decode() for name, data in plots.items()},
        settings=_flat(table.settings),
    )


def _float_row(table: ComparisonTable) -> list[dict[str, Any]]:
    values = [column.of_float(table.float_figures) for column in COLUMNS]
    cells = [
        _cell("" if value is None else column.show(value), value) for column, value in zip(COLUMNS, values, strict=True)
    ]
    return [_cell("float"), _cell(""), *cells]


def _row(row: Row) -> list[dict[str, Any]]:
    start = [_cell(row.method), _cell(row.grid)]
    if not row.seeds:
        return [*start, {**_cell("failed: " + "; ".join(dict.fromkeys(row.failed.values()))), "failed": True}]
    return start + [_figure_cell(row.values.get(column.name), column.show) for column in COLUMNS]


def _figure_cell(spread: Spread | None, show: Any) -> dict[str, Any]:
    if spread is None:
        return _cell("")
    return {**_cell(show(spread.mean), spread.mean), "spread": show(spread.deviation) if spread.deviation else None}


def _cell(text: str, value: float | None = None) -> dict[str, Any]:
    return {"text": text, "value": value, "spread": None, "failed": False, "span": len(COLUMNS)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
