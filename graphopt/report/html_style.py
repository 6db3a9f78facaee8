"""The style sheet of the report: system fonts, light and dark, from a telephone's width to a desk's, and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --ink: #1b2129; --soft: #57616e; --line: #dde1e6; --fill: #edf0f3;
  --good: #19713a; --good-fill: #e2f3e7; --bad: #b3261e; --bad-fill: #fce8e6; --warn: #7a5200; --warn-fill: #fdf1d5;
  --series: #4a78c8; --delivered: #1f8a4c; --reference: #7c8794; --worst: #cf4a3c; --returned: #b98300;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1217; --card: #161c23; --ink: #e4eaf1; --soft: #9dabb9; --line: #2c3540; --fill: #222a33;
    --good: #5fd08a; --good-fill: #12301f; --bad: #ff8f85; --bad-fill: #3c1a18; --warn: #edc25c; --warn-fill: #35290f;
    --series: #6b9cf0; --delivered: #4cc47e; --reference: #8895a3; --worst: #f0776a; --returned: #e0ad3e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main { max-width: 1180px; margin: 0 auto; padding: 0 clamp(12px, 3vw, 32px); }
header { padding-top: 28px; padding-bottom: 16px; }
main { padding-bottom: 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 12px; }
h3 { font-size: .95rem; margin: 16px 0 6px; }
p { margin: 0 0 8px; }
code { font: .88em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.eyebrow { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .02em; }
.muted, .note { color: var(--soft); font-size: .87rem; }
header .muted { margin-top: 6px; }
.note { max-width: 75ch; margin-bottom: 14px; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: clamp(14px, 2vw, 22px); margin-bottom: 16px; min-width: 0;
}

.verdict { border-left: 6px solid var(--reference); }
.verdict.good { border-left-color: var(--delivered); }
.verdict.bad { border-left-color: var(--bad); }
.headline { font-size: clamp(1.25rem, 3vw, 1.6rem); font-weight: 650; line-height: 1.25; }
.missed { background: var(--bad-fill); color: var(--bad); border-radius: 8px; padding: 10px 14px; margin-bottom: 12px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin-top: 14px; }
.figure { background: var(--fill); border-radius: 8px; padding: 12px 14px; }
.figure-title { color: var(--soft); font-size: .85rem; }
.figure-value { font-size: 1.55rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figure-value.good { color: var(--good); }
.figure-value.bad { color: var(--bad); }
.figure-change { font-variant-numeric: tabular-nums; }
.warnings { background: var(--warn-fill); border-color: var(--warn); color: var(--warn); }
.warnings ul { margin: 0; padding-left: 1.2em; font-weight: 600; }
.badge {
  display: inline-block; padding: 0 8px; border-radius: 99px; font-size: .78rem; font-weight: 600; line-height: 1.6;
  background: var(--fill); color: var(--soft); white-space: nowrap;
}
.badge.good { background: var(--good-fill); color: var(--good); }
.badge.bad { background: var(--bad-fill); color: var(--bad); }
.badge.warn { background: var(--warn-fill); color: var(--warn); white-space: normal; border-radius: 10px; }

/* A shade at an edge that hides columns: the two covers scroll with the table, the two shades do not. */
.scroll {
  overflow-x: auto; background-color: var(--card); background-repeat: no-repeat;
  background-image: linear-gradient(to right, var(--card) 40%, transparent),
    linear-gradient(to left, var(--card) 40%, transparent),
    linear-gradient(to right, var(--line), transparent), linear-gradient(to left, var(--line), transparent);
  background-position: left, right, left, right; background-size: 40px 100%, 40px 100%, 14px 100%, 14px 100%;
  background-attachment: local, local, scroll, scroll;
}
.prose { min-width: 13em; }
.nowrap { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: baseline; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: .84rem; white-space: nowrap; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
table code { overflow-wrap: break-word; }
.wide code { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
.wide { width: 100%; min-width: 15em; overflow-wrap: anywhere; }
tr.delivered > * { font-weight: 650; }
tr.total > * { border-bottom-color: transparent; color: var(--soft); }
tr.total > td { color: var(--ink); }
tr.bad > * { color: var(--bad); }
.delta { display: inline-block; min-width: 3.4em; font-size: .85em; text-align: right; }
.compact table { width: auto; min-width: min(100%, 640px); }
.compact thead .number:nth-child(n+3) { padding-right: calc(16px + 2.6rem); }
.compact thead .number:nth-child(n+3):last-child { padding-right: 2.6rem; }
.less { color: var(--good); }
.more { color: var(--warn); }

.lat-row {
  display: grid; grid-template-columns: minmax(0, 11.5rem) minmax(0, 1fr) 12.5rem; gap: 0 16px; align-items: center;
  padding: 4px 0; --shade: var(--series);
}
.lat-row.delivered { --shade: var(--delivered); }
.lat-row.reference { --shade: var(--reference); }
.lat-row + .lat-row:not(.axis-row) { border-top: 1px solid var(--line); }
.lat-title { font-weight: 500; overflow-wrap: anywhere; line-height: 1.35; }
.lat-value { display: flex; flex-direction: column; font-size: .87rem; font-variant-numeric: tabular-nums; }
.lat-value strong { font-size: 1rem; }
.lat-row.delivered .lat-value strong { color: var(--good); }
.lat-row svg { display: block; width: 100%; height: 84px; }
svg { overflow: visible; }
svg path { vector-effect: non-scaling-stroke; fill: none; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .hist { fill: var(--shade); fill-opacity: .38; }
svg .dots { stroke: var(--shade); stroke-width: 3.2; stroke-linecap: round; stroke-opacity: .45; }
svg .interval { fill: var(--shade); fill-opacity: .3; }
svg .median { stroke: var(--shade); stroke-width: 2.5; }
svg .length { stroke: var(--shade); stroke-width: 3; stroke-opacity: .75; }
svg .against { stroke: var(--soft); stroke-width: 1.3; stroke-dasharray: 4 4; }
.axis { position: relative; height: 1.5em; color: var(--soft); font-size: .8rem; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span.start { transform: translateX(0); }

.bars { list-style: none; margin: 0; padding: 0; }
.bars li {
  display: grid; grid-template-columns: minmax(0, 12rem) minmax(0, 1fr) 5.5rem; gap: 0 12px; align-items: center;
  padding: 5px 0; font-size: .9rem;
}
.bar-value { text-align: right; font-variant-numeric: tabular-nums; }
.track { background: var(--fill); border-radius: 4px; height: 16px; overflow: hidden; }
.bar { display: block; height: 100%; min-width: 2px; background: var(--series); border-radius: 4px; }
.bar.delivered { background: var(--delivered); }
.bar.reference { background: var(--reference); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 16px; }

.column-plot { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr); padding: 10px 0 4px; }
.y-axis { position: relative; color: var(--soft); font-size: .8rem; }
.y-axis span { position: absolute; right: 10px; transform: translateY(-50%); white-space: nowrap; }
.columns svg { display: block; width: 100%; height: 180px; }
.columns rect { fill: var(--series); }
.columns rect.worst, .key.worst { fill: var(--worst); background: var(--worst); }
.columns rect.returned, .key.returned { fill: var(--returned); background: var(--returned); }
.columns rect:hover { opacity: .65; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 18px; color: var(--soft); font-size: .84rem; padding: 6px 0 0 4.2rem;
}
.key {
  display: inline-block; width: .8em; height: .8em; border-radius: 2px; background: var(--series); margin-right: 6px;
}
.names { margin: 0; padding-left: 1.2em; columns: 20rem auto; }

details { border-top: 1px solid var(--line); padding: 8px 0 0; margin-top: 8px; }
summary { cursor: pointer; padding: 2px 0; overflow-wrap: anywhere; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--series); outline-offset: 2px; }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 4px 32px; }
.group { min-width: 0; }
.facts { margin: 0; font-size: .9rem; }
.facts div { display: grid; grid-template-columns: 10.5rem minmax(0, 1fr); gap: 12px; padding: 2px 0; }
.facts dt { color: var(--soft); overflow-wrap: anywhere; }
.facts dd { margin: 0; overflow-wrap: anywhere; }

@media (max-width: 760px) {
  .lat-row { grid-template-columns: minmax(0, 1fr) auto; gap: 2px 12px; padding: 8px 0; }
  .lat-row svg, .axis { grid-column: 1 / -1; grid-row: 2; }
  .lat-value { text-align: right; }
  .bars li { grid-template-columns: minmax(0, 1fr) auto; }
  .bars .track { grid-column: 1 / -1; grid-row: 2; }
  .facts div { grid-template-columns: minmax(0, 8rem) minmax(0, 1fr); }
  .legend { padding-left: 0; }
  th, td { padding-right: 11px; }
}
@media print {
  :root {
    --page: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444c55; --line: #c9ced4; --fill: #f0f2f4;
    --good: #19713a; --good-fill: #e2f3e7; --bad: #b3261e; --bad-fill: #fce8e6; --warn: #7a5200; --warn-fill: #fdf1d5;
    --series: #4a78c8; --delivered: #1f8a4c; --reference: #7c8794; --worst: #cf4a3c; --returned: #b98300;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 12px; }
  .pair { display: block; }
  header, main { max-width: none; padding-left: 0; padding-right: 0; }
  section { break-inside: auto; border-radius: 0; }
  h2, h3 { break-after: avoid; }
  tr, .lat-row, .figure, .bars li { break-inside: avoid; }
  .scroll { overflow: visible; background: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
