"""Files that several runs write."""

from concurrent.futures import ThreadPoolExecutor

from experiments.files import replace_file


def test_writers_of_one_file_leave_one_of_theirs_whole(tmp_path):
    path = tmp_path / "table.md"
    texts = [str(number) * 10_000 for number in range(8)]

    def write(text: str) -> None:
        for _ in range(50):
            replace_file(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]
