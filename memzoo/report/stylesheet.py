"""The page's look: one stylesheet, light and dark, for screens of any width and for paper."""

from __future__ import annotations

from .style import THEME


def stylesheet() -> str:
    light = "".join(f"--{name}:{colour};" for name, colour, _ in THEME)
    dark = "".join(f"--{name}:{colour};" for name, _, colour in THEME)
    return (
        f"""
:root{{color-scheme:light dark;--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;{light}
--tint:#f4f6f8;--theirs:#faf5ea;--link:#00568a}}
@media screen and (prefers-color-scheme:dark){{:root{{{dark}--tint:#1c232b;--theirs:#262117;--link:#7cc4f5}}}}
"""
        + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans);font-variant-numeric:tabular-nums}
main,header,footer,nav{max-width:1160px;margin:0 auto;padding:0 20px}
header{padding-top:44px}
h1{font-size:clamp(1.7rem,4.5vw,2.5rem);line-height:1.12;letter-spacing:-.02em;margin:0 0 .35em}
h2{font-size:1.5rem;line-height:1.2;letter-spacing:-.01em;margin:2.6em 0 .4em;padding-top:.7em;border-top:2px solid var(--ink)}
h3{font-size:1.08rem;margin:1.9em 0 .4em}
p{max-width:70ch;margin:.5em 0}
.lede{font-size:1.08rem;color:var(--muted)}
.note{color:var(--muted);font-size:.875rem;line-height:1.45}
a{color:var(--link);text-underline-offset:.15em}
a:focus-visible,[tabindex]:focus-visible,summary:focus-visible{outline:2px solid var(--link);outline-offset:2px}
nav{margin-top:18px}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:6px 18px;margin:0;padding:10px 0;border-top:1px solid var(--grid);
border-bottom:1px solid var(--grid)}
nav a{text-decoration:none;font-weight:600;display:inline-block;padding:3px 0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:20px 34px;margin:14px 0 8px;align-items:start}
figure{margin:0;min-width:0;break-inside:avoid}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:var(--sans)!important}
.scroll{overflow-x:auto;margin:4px 0 14px;-webkit-overflow-scrolling:touch;max-width:100%}
table{border-collapse:collapse;font-size:.92rem;line-height:1.35}
.caption{margin:14px 0 0}
th,td{padding:6px 13px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid);vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:4px;position:sticky;left:0;background:var(--paper);max-width:52vw;
white-space:normal;overflow-wrap:anywhere;min-width:8.5rem}
td.text,th.text{text-align:left}
thead th{color:var(--muted);font-weight:600;border-bottom:1.5px solid var(--ink);vertical-align:bottom;white-space:normal}
tbody th{font-weight:500}
tbody tr.group th{padding-top:15px;font-weight:700;border-bottom:1px solid var(--muted);position:static;max-width:none}
tr.group small{display:inline;font-weight:400;margin-left:.7em}
td b{font-weight:750}
td small,tr.group small{color:var(--muted)}
td small{display:block;font-size:.76rem}
.key{display:inline-block;width:.72em;height:.72em;border-radius:50%;margin-right:.5em}
.theirs{background:var(--theirs);border-left:4px solid var(--muted);padding:4px 16px 8px;margin:24px 0;break-inside:avoid}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:22px;align-items:start}
.beside .theirs{margin:0;min-width:0}.beside .wide{grid-column:1/-1}
.theirs th:first-child,.theirs td:first-child{background:var(--theirs)}
.theirs h4{margin:.7em 0 .1em;font-size:1rem}
.theirs .tag{display:inline-block;font-size:.74rem;font-weight:700;letter-spacing:.05em;text-transform:uppercase;color:var(--muted);
border:1px solid var(--muted);border-radius:3px;padding:0 .45em;margin-right:.6em;vertical-align:.08em}
.theirs thead th[colspan]{text-align:center}
.theirs .sep{border-left:1px solid var(--muted)}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;font-size:.92rem;margin:.8em 0}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:56px;padding-top:14px;padding-bottom:44px;border-top:1px solid var(--grid);color:var(--muted);font-size:.875rem}
@media (max-width:560px){main,header,footer,nav{padding-left:14px;padding-right:14px}header{padding-top:26px}
th,td{padding:6px 9px}dl.facts{grid-template-columns:1fr}dl.facts dt{margin-top:.4em}}
@media print{@page{margin:15mm 13mm}
body{font-size:10.5pt;line-height:1.4}
main,header,footer{max-width:none;padding:0}nav{display:none}
h2{margin-top:1.6em;break-after:avoid}h3,.caption{break-after:avoid}
.plots{grid-template-columns:1fr 1fr;gap:14px 20px}
figure svg{max-width:100%!important}.beside{display:block}.beside .theirs{margin:0 0 14px}
.scroll{overflow:visible}table{font-size:8pt}tr{break-inside:avoid}
th,td{padding:3px 6px}th:first-child,td:first-child{position:static}
.theirs{border:1px solid var(--muted)}.theirs table{font-size:7.5pt}.theirs th,.theirs td{padding:2px 4px}
a{color:inherit;text-decoration:none}}
"""
    )
