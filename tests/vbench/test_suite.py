"""The suites are the published ones, and prompts carry what scoring needs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from analysis.metrics.vbench.dimensions import DIMENSIONS
from analysis.metrics.vbench.presets import MINI, PRESETS
from analysis.metrics.vbench.suite import i2v_prompts, read, t2v_prompts
from tests.pipelines import picture


def entries(path: str) -> list[dict]:
    return json.loads(Path(path).read_text())


def dimensions_of(prompts) -> Counter:
    return Counter(name for prompt in prompts for name in prompt.meta["vbench"]["dimensions"])


def test_the_t2v_suite_has_944_prompts_in_946_entries(t2v_info):
    suite = entries(t2v_info)
    prompts = t2v_prompts(info=t2v_info)
    assert (len(suite), len(prompts)) == (946, 944)
    assert len({prompt.id for prompt in prompts}) == 944
    counts = {name: about.prompts for name, about in DIMENSIONS.items() if about.prompts}
    assert dimensions_of(prompts) == counts
    assert sum(counts.values()) == 1362
    assert len({tuple(sorted(entry["dimension"])) for entry in suite}) == 11


def test_a_prompt_that_stands_in_the_suite_twice_is_one_video(t2v_info):
    """Upstream gives both entries one file name."""
    (bund,) = [p for p in t2v_prompts(info=t2v_info) if p.text == "The bund Shanghai, oil painting"]
    assert bund.meta["vbench"]["dimensions"] == [
        "aesthetic_quality",
        "appearance_style",
        "imaging_quality",
        "overall_consistency",
    ]
    assert bund.meta["vbench"]["auxiliary_info"] == {
        "appearance_style": {"appearance_style": "oil painting"}
    }


def test_the_suite_has_case_twins_that_stay_apart(t2v_info):
    texts = [prompt.text for prompt in t2v_prompts(info=t2v_info)]
    twins = [text for text, count in Counter(map(str.lower, texts)).items() if count > 1]
    assert "a fantasy landscape" in twins and len(texts) == len(set(texts))


@pytest.mark.parametrize(
    "preset, count", [("quality7", 326), ("custom6", 251), ("mlperf6", 248), ("t2v", 944)]
)
def test_presets_have_the_prompts_of_their_dimensions(preset, count, t2v_info):
    prompts = t2v_prompts(preset, t2v_info)
    assert len(prompts) == count
    found = dimensions_of(prompts)
    for name in PRESETS[preset].dimensions:
        assert found[name] == DIMENSIONS[name].prompts == PRESETS[preset].expected(name)


def test_mini_is_fixed_and_has_every_dimension_equally(t2v_info):
    prompts = t2v_prompts("mini", t2v_info)
    assert len(prompts) == 11 * MINI
    assert dimensions_of(prompts) == dict.fromkeys(PRESETS["mini"].dimensions, MINI)
    published = hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()
    assert published[:16] == "d0fe0776010c1a94"
    page = Path(__file__).parents[2] / "docs" / "vbench.md"
    quoted = [line for line in page.read_text().splitlines() if line.startswith("> ")]
    suite = entries(t2v_info)
    places = [int(place) for line in quoted for place in line[2:].split()]
    assert [suite[place]["prompt_en"] for place in places] == [prompt.text for prompt in prompts]


def test_a_prompt_is_the_same_request_in_every_preset(t2v_info):
    whole = {prompt.id: prompt for prompt in t2v_prompts(info=t2v_info)}
    for preset in ("mini", "quality7", "mlperf6"):
        assert all(whole[prompt.id] == prompt for prompt in t2v_prompts(preset, t2v_info))


def test_videos_are_made_from_rewritten_prompts_and_scored_by_the_suites_own(t2v_info, tmp_path):
    file = tmp_path / "long.txt"
    texts = [entry["prompt_en"] for entry in entries(t2v_info)]
    file.write_text("\n".join(f"{text}, at length" for text in texts))
    prompts = t2v_prompts(info=t2v_info, rewritten=str(file))
    assert len(prompts) == 944
    assert all(p.text == f"{p.meta['vbench']['prompt']}, at length" for p in prompts)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert {prompt.meta["vbench"]["rewritten_sha256"] for prompt in prompts} == {digest}


def test_rewritten_prompts_must_align(t2v_info, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="2 lines for 946 entries"):
        t2v_prompts(info=t2v_info, rewritten=str(file))


def test_of_two_rewritings_of_one_prompt_the_last_counts(t2v_info, tmp_path):
    """VBench's own all_dimension_longer.txt has two for each prompt that occurs twice; upstream
    writes both videos to one file."""
    file = tmp_path / "long.txt"
    file.write_text("\n".join(f"text {i}" for i in range(946)))
    made = {p.meta["vbench"]["prompt"]: p.text for p in t2v_prompts("t2v", t2v_info, str(file))}
    upstream = {entry["prompt_en"]: f"text {i}" for i, entry in enumerate(entries(t2v_info))}
    assert made == upstream and len(made) == 944


def test_another_file_is_not_the_suite(tmp_path):
    file = tmp_path / "VBench_full_info.json"
    with pytest.raises(ValueError, match="no VBench suite.*hsa-bench setup vbench"):
        read("t2v", file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="not VBench_full_info.json"):
        read("t2v", file)


def test_presets_belong_to_a_suite(t2v_info):
    with pytest.raises(ValueError, match="preset='i2v' is none of the t2v suite"):
        t2v_prompts("i2v", t2v_info)
    with pytest.raises(ValueError, match="preset='all': choose t2v, "):
        t2v_prompts("all", t2v_info)


@pytest.fixture(scope="module")
def crops(i2v_info, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("crop")
    (folder / "7-4").mkdir()
    (folder / "one.png").parent.mkdir(exist_ok=True)
    picture().save(folder / "one.png")
    for name in {entry["image_name"] for entry in entries(i2v_info)}:
        (folder / "7-4" / name).symlink_to(folder / "one.png")
    return folder


def test_the_i2v_suite_has_355_images_and_763_camera_moves(i2v_info, crops):
    prompts = i2v_prompts(str(crops), "7-4", info=i2v_info)
    assert len(prompts) == 1118
    counts = {name: about.prompts_i2v for name, about in DIMENSIONS.items() if about.prompts_i2v}
    assert dimensions_of(prompts) == counts
    assert len({prompt.meta["vbench"]["image"] for prompt in prompts}) == 355
    assert all(prompt.image.is_file() for prompt in prompts)  # opened one by one, when needed
    still = i2v_prompts(str(crops), "7-4", "i2v_no_camera", i2v_info)
    assert len(still) == 355 and "camera_motion" not in dimensions_of(still)


def test_a_missing_image_or_ratio_is_named(i2v_info, crops):
    with pytest.raises(ValueError, match="ratio='4-3'.*there: 7-4"):
        i2v_prompts(str(crops), "4-3", info=i2v_info)
    victim = next((crops / "7-4").iterdir())
    target = victim.readlink()
    victim.unlink()
    with pytest.raises(ValueError, match="prompts.images: cannot read the image"):
        i2v_prompts(str(crops), "7-4", info=i2v_info)
    victim.symlink_to(target)
