"""Prompts from every kind of file, and what is said of a file that holds none."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prompts import load_prompts

WANTED = ("a red cat", "two dogs, one hat", "a red cat", 'the sign says "open"')


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_text(tmp_path: Path) -> None:
    text = '\ufeffa red cat\n\n  two dogs, one hat \r\na red cat\n\t\nthe sign says "open"'
    assert load_prompts(written(tmp_path / "a.txt", text)) == WANTED


def test_csv(tmp_path: Path) -> None:
    text = 'id,Prompt\n1,a red cat\n2,"two dogs, one hat"\n\n3,a red cat\n4," "\n5,"the sign says ""open"""\n'
    assert load_prompts(written(tmp_path / "a.csv", text)) == WANTED


def test_tsv_keeps_quotes(tmp_path: Path) -> None:
    rows = ['"G L E" in colours\tx', '"all"\tx', 'say "a" and "b"\tx', '"say ""open"" twice"\tx', '"\tx']
    text = "\n".join(["PROMPT\tnote", *rows])
    wanted = ('"G L E" in colours', '"all"', 'say "a" and "b"', 'say "open" twice', '"')
    assert load_prompts(written(tmp_path / "a.TSV", text)) == wanted


def test_the_first_name_of_a_column_is_taken(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path / "a.csv", "text,Caption\nno,yes\n")) == ("yes",)
    assert load_prompts(written(tmp_path / "b.csv", "caption,text,prompt\nno,no,yes\n")) == ("yes",)


def test_objects(tmp_path: Path) -> None:
    text = '{"Text": "a red cat"}\n\n{"id": 3, "prompt": "a dog", "text": "no"}\n{"prompt": null}\n{"prompt": " "}\n'
    assert load_prompts(written(tmp_path / "a.jsonl", text)) == ("a red cat", "a dog")


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3, 4], "caption": ["a red cat", None, "a dog", "a red cat"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet") == ("a red cat", "a dog", "a red cat")


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.txt", lambda _path: None, "no file of prompts at .*a.txt"),
    "kind": ("a.json", lambda path: written(path, "[]"), "a.json is none of .txt .tsv .csv .jsonl .parquet"),
    "blank": ("a.txt", lambda path: written(path, "\n \n"), "a.txt holds no prompts"),
    "encoding": ("a.txt", lambda path: path.write_bytes(b"caf\xe9"), "a.txt is not UTF-8 text"),
    "column": (
        "a.csv",
        lambda path: written(path, "id,words\n1,a\n"),
        "line 1 names id, words; prompts are named prompt",
    ),
    "no header": ("a.tsv", lambda path: written(path, ""), "line 1 names nothing"),
    "short row": ("a.csv", lambda path: written(path, "id,text\n1,a\n2\n"), "a.csv line 3 has 1 cells; .* cell 2"),
    "json": ("a.jsonl", lambda path: written(path, '{"text": "a"}\n{"text"'), "a.jsonl line 2 is not readable JSON"),
    "list": ("a.jsonl", lambda path: written(path, '["a"]'), "line 1 must hold a JSON object; it holds list"),
    "number": ("a.jsonl", lambda path: written(path, '{"text": 3}'), "line 1: a prompt must be text; given 3"),
    "no field": ("a.jsonl", lambda path: written(path, '{"text": "a"}\n{"words": "a"}'), "line 2 names words"),
    "no parquet": ("a.parquet", lambda path: written(path, "hello"), "a.parquet is not a readable Parquet file"),
    "numbers": (
        "a.parquet",
        lambda path: pq.write_table(pa.table({"text": [1, 2]}), path),
        "a.parquet row 0: a prompt must be text; given 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files(fault: str, tmp_path: Path) -> None:
    name, breaking, message = FAULTS[fault]
    breaking(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(tmp_path / name)
    assert str(error.value).count("\n") < 2
