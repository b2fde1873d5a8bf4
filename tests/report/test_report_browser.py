"""The page as a browser lays it out: on a phone, a tablet and a desktop, light and dark, and on paper. Needs a Chromium."""

import glob
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import made_up
import pytest

from memzoo.report import read_results, write_report

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLAYWRIGHT = ("chromium_headless_shell-*/*/*headless?shell", "chromium-*/*/chrome")  # what `playwright install` leaves
WIDTHS = (360, 390, 820, 1280)

# Runs in the page itself and tells the page around it what it sees.
MEASURE = """
addEventListener('load', () => {
  const wide = innerWidth, svgs = [...document.querySelectorAll('svg')], cut = [], small = [];
  for (const svg of svgs) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('text')) {
      const t = text.getBoundingClientRect();
      if (t.left < box.left - 1.5 || t.right > box.right + 1.5 || t.top < box.top - 1.5 || t.bottom > box.bottom + 1.5)
        cut.push(svg.getAttribute('aria-label') + ': ' + text.textContent);
      if (Math.min(t.height, t.width * 9) < 8) small.push(text.textContent);
    }
  }
  const boxes = svgs.map(s => s.getBoundingClientRect());
  const seen = e => { const s = getComputedStyle(e); return s.color; };
  const plot = document.querySelector('svg text');
  parent.postMessage(JSON.stringify({
    wide, page: document.documentElement.scrollWidth, cut, small,
    svgs: svgs.length, empty: boxes.filter(b => b.width < 200 || b.height < 80).length,
    outside: boxes.filter(b => b.left < 0 || b.right > wide + 0.5).length,
    columns: new Set(boxes.map(b => Math.round(b.left))).size,
    tables: [...document.querySelectorAll('.scroll')].filter(d => d.getBoundingClientRect().right > wide + 0.5).length,
    scrolls: [...document.querySelectorAll('.scroll')].filter(d => d.scrollWidth > d.clientWidth + 1)
      .map(d => d.textContent.slice(0, 40) + ' ' + d.scrollWidth + ' in ' + d.clientWidth),
    fetched: performance.getEntriesByType('resource').map(e => e.name),
    ground: getComputedStyle(document.body).backgroundColor, ink: seen(document.body), muted: seen(document.querySelector('.note')),
    label: getComputedStyle(plot).fill, swatch: getComputedStyle(document.querySelector('.key')).backgroundColor,
    font: getComputedStyle(plot).fontFamily, height: document.documentElement.scrollHeight,
  }), '*');
});
"""
COLLECT = """
const found = []; let left = %d;
addEventListener('message', e => { found.push(JSON.parse(e.data)); if (!--left) {
  const out = document.createElement('pre'); out.id = 'found'; out.textContent = JSON.stringify(found); document.body.append(out); } });
"""


def browser():
    """Path of a Chromium, or None: MEMZOO_BROWSER, one on the PATH, or one that playwright installed."""
    if os.environ.get("MEMZOO_BROWSER"):
        return os.environ["MEMZOO_BROWSER"]
    kept = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or str(Path.home() / ".cache" / "ms-playwright")
    installed = [path for pattern in PLAYWRIGHT for path in sorted(glob.glob(f"{kept}/{pattern}"))]
    return next((path for name in NAMES if (path := shutil.which(name))), None) or next(iter(installed), None)


pytestmark = pytest.mark.skipif(
    browser() is None, reason="no Chromium: apt-get install chromium-headless-shell, or name one in MEMZOO_BROWSER"
)


def run(folder, *flags):
    """What the browser prints; it has no network."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--force-device-scale-factor=1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    write_report(read_results(made_up.write(folder / "results")), folder / "report.html")
    page = (folder / "report.html").read_text()
    (folder / "measured.html").write_text(page.replace("</body>", f"<script>{MEASURE}</script></body>"))
    frames = "".join(f'<iframe src="measured.html" style="width:{w}px;height:800px;border:0"></iframe>' for w in WIDTHS)
    (folder / "frames.html").write_text(
        f'<!DOCTYPE html><meta name="color-scheme" content="light dark"><script>{COLLECT % len(WIDTHS)}</script><body>{frames}</body>'
    )
    return folder


def measured(folder, *flags):
    out = run(folder, *flags, "--dump-dom", (folder / "frames.html").as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', out, re.DOTALL)
    assert found, out[-2000:]
    return {m["wide"]: m for m in json.loads(found.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))}


def test_it_fits_every_screen_and_fetches_nothing(made):
    found = measured(made)
    assert sorted(found) == sorted(WIDTHS)
    for wide, m in found.items():
        assert m["page"] <= wide, f"the page is {m['page']} pixels wide on a screen of {wide}"
        assert m["svgs"] > 10 and m["empty"] == m["outside"] == m["tables"] == 0
        assert m["cut"] == [], f"text outside its plot at {wide}"
        assert m["fetched"] == []
    assert found[360]["small"] == []  # no text in a plot under 8 pixels
    assert found[360]["columns"] == 1 and found[1280]["columns"] >= 2
    # Wide tables scroll by themselves on a phone, and need not on a desk.
    assert found[360]["scrolls"] and not found[1280]["scrolls"]


def test_dark_and_light_follow_the_reader_and_stay_readable(made):
    light = measured(made)[820]
    dark = measured(made, "--blink-settings=preferredColorScheme=0")[820]
    for m, low, high in ((light, 0.9, 1.0), (dark, 0.0, 0.1)):
        ground = _luminance(m["ground"])
        assert low <= ground <= high
        for part in ("ink", "muted", "label"):
            assert _contrast(_luminance(m[part]), ground) >= 4.5, part
    assert light["swatch"] != dark["swatch"] and light["label"] != dark["label"]


def test_it_prints(made):
    run(made, "--no-pdf-header-footer", f"--print-to-pdf={made / 'report.pdf'}", (made / "report.html").as_uri())
    pdf = (made / "report.pdf").read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and 3 <= pages <= 14


def test_a_picture_of_the_page_is_not_blank(made):
    from matplotlib.image import imread

    run(made, f"--screenshot={made / 'page.png'}", "--window-size=800,1600", (made / "report.html").as_uri())
    pixels = imread(made / "page.png")[..., :3]
    assert pixels.shape[:2] == (1600, 800)
    dark = (pixels.mean(-1) < 0.5).mean()
    coloured = ((pixels.max(-1) - pixels.min(-1)) > 0.3).mean()
    assert 0.01 < dark < 0.4 and coloured > 0.002


def _luminance(colour):
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(one, other):
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)
