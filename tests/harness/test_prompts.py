"""Prompts from files: what is read, and what is refused."""

import json
import os

import pytest

from experiments.prompts import from_file, from_texts
from tests.pipelines import picture


def test_one_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog/\N{DOG FACE}\n", encoding="utf-8")
    assert [(prompt.id, prompt.text) for prompt in from_file(str(file))] == [
        ("0000", "a cat"),
        ("0001", "  a dog/\N{DOG FACE}"),
    ]


def test_objects_with_images_beside_the_file(tmp_path):
    picture().save(tmp_path / "first.png")
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"text": "a cat"},
        {"id": "x", "text": "a dog", "image": "first.png", "meta": {"n": 1}},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    cat, dog = from_file(str(file))
    assert (cat.id, cat.image, cat.image_sha256, cat.meta) == ("0000", None, None, {})
    assert (dog.id, dog.image, dog.meta) == ("x", tmp_path / "first.png", {"n": 1})


def test_the_picture_counts_not_its_file(tmp_path):
    hashes = set()
    for name in ("one.png", "other.bmp"):
        picture().save(tmp_path / name)
        (tmp_path / "p.jsonl").write_text(json.dumps({"text": "a", "image": name}))
        (prompt,) = from_file(str(tmp_path / "p.jsonl"))
        hashes.add(prompt.image_sha256)
    turned = picture().rotate(90)
    turned.save(tmp_path / "one.png")
    os.utime(tmp_path / "one.png", (0, 0))  # on many file systems time passes in steps
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "a", "image": "one.png"}))
    assert len(hashes) == 1
    assert from_file(str(tmp_path / "p.jsonl"))[0].image_sha256 not in hashes


@pytest.mark.parametrize(
    "line, words",
    [
        ("not json", "entry 2"),
        ("[1]", "entry 2"),
        ('{"prompt": "a"}', "text"),
        ('{"text": "a", "imag": "x"}', "imag"),
        ('{"text": "a", "image": "missing.png"}', "missing.png"),
        ('{"text": 7}', "text"),
    ],
)
def test_a_wrong_line_is_named(line, words, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=words):
        from_file(str(file))


def test_texts_must_be_texts():
    with pytest.raises(ValueError, match="7"):
        from_texts(["a", 7])
