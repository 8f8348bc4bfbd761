from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import pipeline, report, report_media, report_settings
from analysis.frame import Runtimes, runtimes, tidy
from analysis.summary import summarise
from experiments.plan import Plan
from experiments.video import decode
from tests.analysis import browser, stored


@pytest.fixture(scope="module")
def out_dir(results, config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    pipeline.analyse(config, *results, folder)
    return folder


def page_data(html: str) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text.group(1), parse_constant=pytest.fail)  # NaN is no JSON


def test_everything_is_written(out_dir: Path) -> None:
    names = {path.name for path in out_dir.iterdir()}
    tables = {"table.md", "table.csv", "table.tex", "comparison.md"}
    images = {"frontier.png", "frontier.svg", "sweep_hsa.png", "sweep_hsa.svg"}
    assert names == tables | images | {"index.html", "media"}
    for title in ("Quality, T2V", "Against flow matching at the same runtime, I2V"):
        assert f"## {title}" in (out_dir / "table.md").read_text()
    assert (
        "HSA minus the others at 50.0 % of the runtime, I2V"
        in (out_dir / "comparison.md").read_text()
    )


def test_analysis_is_reproducible(results, config, out_dir: Path, tmp_path: Path) -> None:
    pipeline.analyse(config, *results, tmp_path)
    made = {path.relative_to(out_dir) for path in out_dir.rglob("*") if path.is_file()}
    assert made == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for path in made:
        if "-minus-" in path.name:  # H.264 is not reproducible
            continue
        assert (out_dir / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_media_are_made_once_and_those_of_earlier_plans_dropped(results, tmp_path: Path) -> None:
    plan, store = results
    frame = tidy(plan, store, stored.METRICS)
    summary = summarise(frame, runtimes(plan, store), stored.METRICS)
    folder = tmp_path / "media"
    report_media.videos(frame, summary, store, stored.METRICS, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "of-an-earlier-plan.mp4").write_bytes(b"")
    report_media.videos(frame, summary, store, stored.METRICS, folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_an_empty_store_is_one_clear_line(results, config, tmp_path: Path) -> None:
    from experiments.store import Store

    with pytest.raises(ValueError, match=r"none of the 28 videos is stored"):
        pipeline.analyse(config, results[0], Store(tmp_path / "none"), tmp_path)


def test_unavailable_metrics_are_named(out_dir: Path) -> None:
    assert "Not available on this machine: lpips." in (out_dir / "table.md").read_text()


def test_the_page_needs_nothing_but_its_media(out_dir: Path) -> None:
    html = (out_dir / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "@import" not in html and "<script src" not in html
    assert set(re.findall(r"https?://[^\"'\s]+", html)) == {"http://www.w3.org/2000/svg"}
    named = {f"media/{path.name}" for path in (out_dir / "media").iterdir()}
    assert set(re.findall(r"media/[\w.-]+", html)) == named


def test_the_media_are_those_of_the_store(results, out_dir: Path) -> None:
    plan, store = results
    videos = page_data((out_dir / "index.html").read_text())["videos"]
    assert len(videos) == len(plan.cells)
    for cell, video in zip(plan.cells, videos, strict=True):
        sample = store.sample(cell.key)
        preview = (sample.path / "preview.mp4").read_bytes()
        assert (out_dir / video["video"]).read_bytes() == preview
        assert (video["label"], video["made"]["key"]) == (cell.label, cell.key)
        assert (video["allocation"] is None) == ("allocation" not in sample.arrays)
        assert (video["difference"] is None) == (cell.key == cell.reference_key)


def test_differences_are_to_the_same_prompts_reference(results, out_dir: Path) -> None:
    plan, store = results
    videos = page_data((out_dir / "index.html").read_text())["videos"]
    for cell, video in zip(plan.cells, videos, strict=True):
        if video["difference"]:
            frames, target = (
                store.sample(key).frames().astype(float) for key in (cell.key, cell.reference_key)
            )
            expected = np.clip(4 * np.abs(frames - target).mean(-1), 0, 255)
            shown = decode(out_dir / video["difference"])
            assert shown.shape == frames.shape
            assert np.abs(shown.mean(-1) - expected).mean() < 6  # H.264 is not lossless


def test_identical_videos_have_a_black_difference() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    assert not report_media.difference(frames, frames).any()
    brighter = np.clip(frames.astype(int) + 3, 0, 255).astype(np.uint8)
    interior = (frames < 253).all(-1)
    assert (report_media.difference(brighter, frames)[interior] == 12).all()


def test_the_strip_shows_every_tokens_group(results, out_dir: Path) -> None:
    plan, store = results
    videos = page_data((out_dir / "index.html").read_text())["videos"]
    video = next(v for v in videos if v["label"] == "HSA 0.3")
    groups = store.sample(video["made"]["key"]).arrays["allocation"]
    strip = np.asarray(Image.open(out_dir / video["allocation"]["strip"]))
    assert [group["name"] for group in video["allocation"]["groups"]] == ["40 steps", "10 steps"]
    assert strip.shape == (groups.shape[0] * groups.shape[1], groups.shape[2], 4)
    for k, group in enumerate(video["allocation"]["groups"]):
        colour = list(bytes.fromhex(group["colour"][1:]))
        assert (strip[groups.reshape(strip.shape[:2]) == k][:, :3] == colour).all()


def test_every_setting_tells_configuration_and_provenance(results, out_dir: Path) -> None:
    plan, _ = results
    settings = page_data((out_dir / "index.html").read_text())["settings"]
    assert [(s["task"], s["label"]) for s in settings] == list(
        dict.fromkeys((cell.task, cell.label) for cell in plan.cells)
    )
    hsa = next(s for s in settings if s["label"] == "HSA 0.2")
    assert hsa["configuration"]["method"]["params"]["thresholds"] == [0.2]
    assert hsa["configuration"]["schedule"] == {"steps": 40}
    assert "prompt" not in hsa["configuration"]["request"]  # two prompts
    assert hsa["configuration"]["request"]["seed"] == 0
    assert [origin["videos"] for origin in hsa["origins"]] == [2]
    assert dict(hsa["facts"])["Runtime"] == "0.505 s, 50.0 %"


def test_the_front_of_the_page_is_the_front_of_the_table(results, out_dir: Path) -> None:
    plan, store = results
    summary = summarise(tidy(plan, store, stored.METRICS), runtimes(plan, store), stored.METRICS)
    rows = summary[(summary["task"] == "t2v") & (summary["metric"] == "psnr")].set_index("label")
    settings = page_data((out_dir / "index.html").read_text())["settings"]
    for setting in settings:
        if setting["task"] != "t2v" or "psnr" not in setting["metrics"]:
            continue
        here = rows.loc[setting["label"]]
        beaten = (
            (rows["runtime_s"] <= here["runtime_s"])
            & (rows["mean"] >= here["mean"])
            & ((rows["runtime_s"] < here["runtime_s"]) | (rows["mean"] > here["mean"]))
        ).any()
        assert setting["metrics"]["psnr"]["front"] == (not beaten)
        assert setting["metrics"]["psnr"]["mean"] == pytest.approx(here["mean"])
        assert setting["cost"][0] == pytest.approx(100 * here["runtime"])


def test_the_page_opens_on_every_method_near_a_quarter_of_the_runtime(results) -> None:
    plan, store = results
    summary = summarise(tidy(plan, store, stored.METRICS), runtimes(plan, store), stored.METRICS)
    assert report.opening(summary) == ["FM T=40", "FM T=10", "HSA 0.3", "TeaCache 0.2"]


def test_without_timings_settings_have_no_cost(results) -> None:
    plan, store = results
    frame = tidy(plan, store, stored.METRICS)
    untimed = Runtimes(None, runtimes(Plan(()), store).table)
    summary = summarise(frame, untimed, stored.METRICS)
    told = report_settings.settings(frame, summary, store, stored.METRICS)
    assert [setting["cost"] for setting in told] == [None] * 2 * len(stored.SETTINGS)
    assert not any(m["front"] for setting in told for m in setting["metrics"].values())
    page_data(report.render("", "", [], [], [], stored.METRICS, told, [], []))  # no NaN in it


def test_large_videos_are_left_out_by_whole_prompts(results, monkeypatch, tmp_path: Path) -> None:
    plan, store = results
    frame = tidy(plan, store, stored.METRICS)
    summary = summarise(frame, runtimes(plan, store), stored.METRICS)
    monkeypatch.setattr(report_media, "VIDEO_BYTES", 1)
    videos = report_media.videos(frame, summary, store, stored.METRICS, tmp_path / "media")
    assert {(v["task"], v["prompt_id"]) for v in videos} == {
        ("t2v", "heldout-0"),
        ("i2v", "heldout-0"),
    }
    assert len(videos) == 2 * len(stored.SETTINGS)


def test_prompts_are_text_not_markup(results) -> None:
    nasty = "</script><script>alert(1)</script> & 🦊"
    video = {"label": nasty, "task": "t2v", "prompt_id": "x", "prompt": nasty, "caption": []}
    html = report.render(nasty, nasty, [], [], [], [], [], [video], [nasty])
    assert "<script>alert" not in html
    assert page_data(html)["videos"][0]["prompt"] == nasty


VIDEOS = "[...document.querySelectorAll('video')]"


@pytest.fixture(scope="module")
def page(out_dir: Path, tmp_path_factory):
    if browser.find() is None:
        pytest.skip(f"no headless browser: none of {', '.join(browser.NAMES)} is installed")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    opened.open(out_dir / "index.html")
    opened.until(f"{VIDEOS}.every(v => v.readyState >= 2)")
    yield opened
    opened.close()


def choose(page, select: str, value: str) -> None:
    page.run(
        f"{{const s = document.getElementById('{select}'); s.value = '{value}'; "
        "s.dispatchEvent(new Event('change', {bubbles: true}))}"
    )


def scrub(page, frame: int) -> None:
    page.run(
        f"{{const s = document.getElementById('scrub'); s.value = {frame}; "
        "s.dispatchEvent(new Event('input'))}"
    )


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
    scrub(page, 6)
    page.until(f"{VIDEOS}.every(v => !v.seeking)")
    expected = 6.5 / stored.FPS
    assert page.run(f"{VIDEOS}.map(v => v.currentTime)") == pytest.approx([expected] * 4)
    assert page.run("document.getElementById('frame').value") == "7 / 9"


def test_settings_and_prompts_can_be_chosen(page) -> None:
    for count in (len(stored.SETTINGS), 4):
        page.run("document.getElementById('all').click()")
        assert page.run(f"{VIDEOS}.length") == count
    page.run("document.querySelector('#settings input[value=\"HSA 0.1\"]').click()")
    assert page.run(f"{VIDEOS}.length") == 5
    page.run("document.querySelector('#settings input[value=\"HSA 0.1\"]').click()")
    choose(page, "prompt", "i2v heldout-0")
    page.until(f"{VIDEOS}.length === 4 && {VIDEOS}.every(v => v.readyState >= 2)")
    first = f"{VIDEOS}[0].getAttribute('src')"
    before = page.run(first)
    choose(page, "prompt", "t2v heldout-0")
    page.until(f"{VIDEOS}.every(v => v.readyState >= 2)")
    assert page.run(first) != before
    assert page.errors == []


def test_the_overlay_shows_the_tokens_of_the_frame(page) -> None:
    overlays = (
        "Object.fromEntries([...document.querySelectorAll('#stage figure')]"
        ".map(f => [f.querySelector('button').textContent, f.querySelector('.tokens')])"
        ".filter(([, t]) => !t.hidden)"
        ".map(([name, t]) => [name, getComputedStyle(t).backgroundPositionY]))"
    )
    assert page.run(overlays) == {}
    page.run("document.getElementById('overlay').click()")
    for frame, latent in ((0, 0), (1, 1), (7, 7), (8, 8)):  # as many as frames in this store
        scrub(page, frame)
        assert page.run(overlays) == {"HSA 0.3": f"{100 * latent / 8:g}%"}
    strip = "getComputedStyle(document.querySelector('.tokens:not([hidden])')).backgroundImage"
    size = page.run(
        f"new Promise(done => {{ const i = new Image(); i.src = {strip}.slice(5, -2); "
        "i.onload = () => done([i.naturalWidth, i.naturalHeight]) })"
    )
    assert size == [8, 72]
    page.run("document.getElementById('overlay').click()")
    assert page.run(overlays) == {}


def test_differences_take_the_place_of_the_videos(page) -> None:
    names = f"{VIDEOS}.map(v => v.getAttribute('src').includes('-minus-'))"
    choose(page, "view", "difference")
    page.until(f"{VIDEOS}.every(v => v.readyState >= 2)")
    assert page.run(names) == [False, True, True, True]
    choose(page, "view", "video")
    assert page.run(names) == [False] * 4


def test_hovering_a_point_shows_its_cell(page) -> None:
    card = "document.getElementById('card')"
    points = "[...document.querySelectorAll('.point')]"
    hsa = f"{points}.find(p => p.getAttribute('aria-label').startsWith('HSA 0.2'))"
    assert page.run(f"{points}.length") == 6  # the reference has no fidelity to itself
    assert page.run(f"{card}.hidden")
    page.run(f"{hsa}.scrollIntoView({{block: 'center'}})")
    page.hover(f"{hsa}.querySelector('.target')")
    page.until(f"!{card}.hidden")
    text = page.run(f"{card}.textContent")
    assert text.startswith("HSA 0.2") and "T2V" in text and "0.505 s, 50.0 %" in text
    assert re.search(r"PSNR \(dB\) \S[\d.]+ \[[\d.]+, [\d.]+\]", text)
    page.hover("document.querySelector('h1')")
    page.until(f"{card}.hidden")


def test_other_tasks_and_metrics_are_drawn(page) -> None:
    lowest = (
        "[...document.querySelectorAll('.point')].map(p => "
        "[+p.querySelector('.target').getAttribute('cy'), p.ariaLabel]).sort((a, b) => b[0] - a[0])"
        "[0][1]"
    )
    choose(page, "task", "i2v")
    assert page.run(lowest).startswith("FM T=10")
    choose(page, "metric", "latent_error")  # lower is better: the axis is turned
    assert page.run(lowest).startswith("FM T=10")
    choose(page, "task", "t2v")
    choose(page, "metric", "psnr")


@pytest.mark.parametrize(
    "opener", ["table.sortable td button", ".point", "#stage figcaption button"]
)
def test_a_setting_opens_its_configuration(page, opener: str) -> None:
    dialog = "document.getElementById('cell')"
    page.run(f"document.querySelector('{opener}').dispatchEvent(new MouseEvent('click'))")
    assert page.run(f"{dialog}.open")
    text = page.run(f"{dialog}.textContent")
    assert "schedule.steps" in text and "Provenance" in text and "method.name" in text
    page.run(f"{dialog}.close()")
    assert page.errors == []


def test_only_what_is_shown_is_loaded(page) -> None:
    loaded = "performance.getEntriesByType('resource').map(e => e.name)"
    assert page.run(f"{VIDEOS}.length") == 4
    assert all(name.startswith(("file:", "data:")) for name in page.run(loaded))
    assert page.run("document.querySelectorAll('video[src], img').length") < 10


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
