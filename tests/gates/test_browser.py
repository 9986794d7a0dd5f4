"""The page in a real browser without a network, where there is one."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from PIL import Image

from gates.report import html
from tests.gates.test_report import made

# As Debian and as GitHub's runners name it.
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
# The first two colours of the plots' lines, and the green of a passed gate.
BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (216, 240, 223)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(BROWSER is None, reason="no chromium on the path")
def test_tables_and_plots_are_drawn_without_a_network(tmp_path):
    folder = made(tmp_path / "a", ["mixed-arrival", "story-recall"], [1.0, 2.0])
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(html.page([folder]), encoding="utf-8")
    subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=1400,2600", "--virtual-time-budget=10000"),
            *(f"--screenshot={picture}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=150,
    )
    with Image.open(picture) as seen:
        colors = {color: count for count, color in seen.convert("RGB").getcolors(1 << 24)}
        size = seen.size
    assert size == (1400, 2600)
    # Lines of the two roles in the token timeline, and the verdicts.
    assert colors.get(BLUE, 0) > 100 and colors.get(ORANGE, 0) > 100
    assert colors.get(GREEN, 0) > 300
