"""The look of the report: inline, without fonts or scripts, for screen, telephone and paper."""

COLOURS = ("#0b6e99", "#c2571a", "#4d7c2e", "#8a3b86", "#8a6a00", "#a3263a", "#3b5bb5", "#52606d")
"""Distinguishable on white also with colour blindness; plots add markers and dashes to them."""

STYLE = """
:root { --ink: #1c2733; --soft: #52606d; --line: #d8dee5; --ground: #f5f7f9; --accent: #0b6e99;
  --warn: #9a3412; --warn-ground: #fff4ec; --good: #2f6b2f; --good-ground: #eef7ee; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--accent); }
.soft, caption, figcaption { color: var(--soft); }
code { font: .86em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .92rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.3rem 1.4rem; margin: 1.1rem 0; }
.banner { border-radius: .6rem; padding: 1rem 1.3rem; margin: 1.1rem 0; border: 2px solid; }
.banner p { margin: .2rem 0 0; }
.banner strong { font-size: 1.35rem; letter-spacing: .01em; }
.not-private { color: var(--warn); background: var(--warn-ground); border-color: var(--warn); }
.not-private strong { font-size: 2rem; text-transform: uppercase; letter-spacing: .06em; }
.plain strong { font-size: 1.35rem; text-transform: none; letter-spacing: .01em; }
.private { color: var(--good); background: var(--good-ground); border-color: var(--good); }
.banner p { color: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.9rem, 1fr)); gap: .8rem;
  margin: 1.1rem 0; padding: 0; }
.cards div { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.cards dt { color: var(--soft); font-size: .85rem; }
.cards dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
.cards dd small { display: block; font-size: .8rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
caption { text-align: left; font-size: .88rem; padding-bottom: .4rem; }
th, td { text-align: right; padding: .32rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; overflow-wrap: break-word; }
td { white-space: nowrap; } .facts td { white-space: normal; }
.facts th, .facts td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.facts th:first-child { width: 14rem; min-width: 7rem; overflow-wrap: break-word; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
.grid { width: auto; font-size: .85rem; }
.grid th, .grid td { padding: .12rem .3rem; text-align: center; border: 1px solid var(--line); }
.grid th:first-child { text-align: left; }
.aggregated { background: #dcefdc; } .late { background: #fdeec2; } .refused { background: #e4e1f4; }
.invalid { background: #f8dccb; } .failed { background: #f3c9cd; } .absent { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; }
ul { padding-left: 1.2rem; margin: .4rem 0; } li { max-width: 46rem; margin: .2rem 0; }
footer { color: var(--soft); font-size: .88rem; padding-bottom: 2.5rem; }
@media (max-width: 40rem) { body { font-size: 15px; } section { padding: 1rem; } h1 { font-size: 1.5rem; }
  .facts th:first-child { width: 34%; } }
@media print { body { background: #fff; font-size: 10.5pt; } nav { display: none; }
  section, .banner, .cards div { break-inside: avoid; border-radius: 0; } .scroll { overflow: visible; }
  section { border-width: 1px 0 0; padding: .8rem 0; } .plots { grid-template-columns: 1fr 1fr; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
