from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from analysis import pipeline, report
from analysis.frame import runtimes, tidy
from analysis.summary import summarise
from tests.analysis import browser, stored


@pytest.fixture(scope="module")
def out_dir(results, config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    pipeline.analyse(config, *results, folder)
    return folder


def page_data(html: str) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text.group(1))


def test_everything_is_written(out_dir: Path) -> None:
    names = {path.name for path in out_dir.iterdir()}
    tables = {"table.md", "table.csv", "table.tex", "comparison.md"}
    images = {"frontier.png", "frontier.svg", "sweep_hsa.png", "sweep_hsa.svg"}
    assert names == tables | images | {"index.html"}
    for title in ("Quality, T2V", "Against flow matching at the same runtime, I2V"):
        assert f"## {title}" in (out_dir / "table.md").read_text()
    assert (
        "HSA minus the others at 50.0 % of the runtime, I2V"
        in (out_dir / "comparison.md").read_text()
    )


def test_analysis_is_reproducible(results, config, out_dir: Path, tmp_path: Path) -> None:
    pipeline.analyse(config, *results, tmp_path)
    for path in out_dir.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_an_empty_store_is_one_clear_line(results, config, tmp_path: Path) -> None:
    from experiments.store import Store

    with pytest.raises(ValueError, match=r"none of the 28 videos is stored"):
        pipeline.analyse(config, results[0], Store(tmp_path / "none"), tmp_path)


def test_unavailable_metrics_are_named(out_dir: Path) -> None:
    assert "Not available on this machine: lpips." in (out_dir / "table.md").read_text()


def test_the_page_needs_nothing_else(out_dir: Path) -> None:
    html = (out_dir / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "url(" not in html and "@import" not in html


def test_the_page_holds_the_stored_previews(results, out_dir: Path) -> None:
    import base64

    plan, store = results
    videos = page_data((out_dir / "index.html").read_text())["videos"]
    assert len(videos) == len(plan.cells)
    previews = {(store.sample(c.key).path / "preview.mp4").read_bytes() for c in plan.cells}
    assert {base64.b64decode(video["mp4"]) for video in videos} == previews
    allocated = {video["label"] for video in videos if video["allocation"]}
    assert allocated == {"HSA 0.1", "HSA 0.2", "HSA 0.3"}


def test_the_page_opens_on_every_method_near_a_quarter_of_the_runtime(results) -> None:
    plan, store = results
    summary = summarise(tidy(plan, store, stored.METRICS), runtimes(plan, store), stored.METRICS)
    assert report.opening(summary) == ["FM T=40", "FM T=10", "HSA 0.3", "TeaCache 0.2"]


def test_large_videos_are_left_out_by_whole_prompts(results, monkeypatch) -> None:
    plan, store = results
    frame = tidy(plan, store, stored.METRICS)
    summary = summarise(frame, runtimes(plan, store), stored.METRICS)
    monkeypatch.setattr(report, "VIDEO_BYTES", 1)
    videos = report.videos(frame, summary, store, stored.METRICS)
    assert {(v["task"], v["prompt_id"]) for v in videos} == {
        ("t2v", "heldout-0"),
        ("i2v", "heldout-0"),
    }
    assert len(videos) == 2 * len(stored.SETTINGS)


def test_prompts_are_text_not_markup(results) -> None:
    nasty = "</script><script>alert(1)</script> & 🦊"
    video = {"label": nasty, "task": "t2v", "prompt_id": "x", "prompt": nasty, "caption": []}
    html = report.render(nasty, nasty, [], [], [], [video], [nasty])
    assert "<script>alert" not in html
    assert page_data(html)["videos"][0]["prompt"] == nasty


@pytest.fixture(scope="module")
def page(out_dir: Path, tmp_path_factory):
    if browser.find() is None:
        pytest.skip(f"no headless browser: none of {', '.join(browser.NAMES)} is installed")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    opened.open(out_dir / "index.html")
    opened.until("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    yield opened
    opened.close()


VIDEOS = "[...document.querySelectorAll('video')]"


def test_videos_decode_without_console_errors(page) -> None:
    assert page.run(f"{VIDEOS}.length") == 4
    assert page.run(f"{VIDEOS}.every(v => v.videoWidth === 64 && v.duration > 1 && !v.error)")
    assert page.errors == []


IN_STEP = f"(t => Math.max(...t) - Math.min(...t) < 1 / 8)({VIDEOS}.map(v => v.currentTime))"


def test_videos_play_in_step(page) -> None:
    page.run("document.getElementById('play').click()")
    page.until(f"{VIDEOS}.every(v => v.currentTime > 0.3 && !v.paused) && {IN_STEP}")
    page.run(f"{VIDEOS}[2].currentTime = 0")  # one falls behind and catches up
    page.until(IN_STEP)
    page.until(f"{VIDEOS}[0].currentTime < 0.2")  # the end, and from the start again
    page.until(f"{VIDEOS}.every(v => v.currentTime > 0.3) && {IN_STEP}")
    page.run("document.getElementById('play').click()")
    assert page.run(f"{VIDEOS}.every(v => v.paused)")


def test_the_scrubber_sets_all_videos_to_one_frame(page) -> None:
    page.run(
        "{const s = document.getElementById('scrub'); s.value = 6; "
        "s.dispatchEvent(new Event('input'))}"
    )
    page.until(f"{VIDEOS}.every(v => !v.seeking)")
    expected = 6.5 / stored.FPS
    assert page.run(f"{VIDEOS}.map(v => v.currentTime)") == pytest.approx([expected] * 4)
    assert page.run("document.getElementById('frame').value") == "7 / 9"


def test_settings_and_prompts_can_be_chosen(page) -> None:
    page.run("document.querySelector('#settings input[value=\"HSA 0.1\"]').click()")
    assert page.run(f"{VIDEOS}.length") == 5
    page.run("document.querySelector('#settings input[value=\"HSA 0.1\"]').click()")
    page.run(
        "{const p = document.getElementById('prompt'); p.selectedIndex = 2; "
        "p.dispatchEvent(new Event('change'))}"
    )
    page.until(f"{VIDEOS}.length === 4 && {VIDEOS}.every(v => v.readyState >= 2)")
    assert page.run("document.getElementById('prompt').value") == "i2v heldout-0"
    assert page.errors == []


def test_the_overlay_paints_the_tokens_of_full_budget(page) -> None:
    painted = (
        "[...document.querySelectorAll('canvas')].map(c => c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data.filter((x, i) => i % 4 === 3 && x > 0).length)"
    )
    page.run("document.getElementById('overlay').click()")
    names = page.run("[...document.querySelectorAll('#stage b')].map(b => b.textContent)")
    counts = dict(zip(names, page.run(painted), strict=True))
    assert 0 < counts.pop("HSA 0.3") < 64
    assert set(counts.values()) == {0}
    page.run("document.getElementById('overlay').click()")
    assert set(page.run(painted)) == {0}


def test_tables_sort_by_number_with_missing_last(page) -> None:
    column = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[8].textContent)"
    page.run("document.querySelector('table').tHead.rows[0].cells[8].click()")
    rising = page.run(column)
    page.run("document.querySelector('table').tHead.rows[0].cells[8].click()")
    falling = page.run(column)
    assert rising[-1] == falling[-1] == "\N{EN DASH}"
    numbers = [float(text.split()[0]) for text in rising[:-1]]
    assert len(numbers) == 6 and numbers == sorted(numbers)
    assert [float(text.split()[0]) for text in falling[:-1]] == numbers[::-1]
    assert page.errors == []
