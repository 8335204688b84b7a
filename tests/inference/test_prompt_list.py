from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.inference import prompt_list


def test_a_file_gives_one_prompt_for_each_line_that_is_not_blank(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog  \n")
    assert [(p.text, p.index) for p in prompt_list.from_file(file)] == [("a cat", 0), ("a dog", 1)]


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.parquet"])
def test_a_table_gives_texts_references_and_negatives(tmp_path, name):
    (tmp_path / "a.png").touch()
    table = pa.table({"text": ["a cat, black", "a dog"], "ref": ["a.png;b.png", ""], "neg": ["", "blur"]})
    if name.endswith("csv"):
        pa.csv.write_csv(table, tmp_path / name)
    else:
        pa.parquet.write_table(table, tmp_path / name)
    first, second = prompt_list.from_table(tmp_path / name)
    assert first == prompt_list.Prompt("a cat, black", 0, (tmp_path / "a.png", Path("b.png")), "")
    assert second == prompt_list.Prompt("a dog", 1, (), "blur")


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\na cat\n", encoding="utf-8-sig")
    assert [(p.text, p.index) for p in prompt_list.from_file(file)] == [("a cat", 0)]


def test_only_line_breaks_end_a_prompt(tmp_path):
    file, inside = tmp_path / "prompts.txt", "a\u2028b\u2029c\x85d\ve\ff\x1cg\x1dh\x1ei"
    file.write_bytes(f"{inside}\r\na dog\n".encode())
    assert [p.text for p in prompt_list.from_file(file)] == [inside, "a dog"]


def test_columns_of_parquet_are_read_as_text_or_refused(tmp_path):
    pa.parquet.write_table(pa.table({"text": [7, 8]}), tmp_path / "numbers.parquet")
    assert [p.text for p in prompt_list.from_table(tmp_path / "numbers.parquet")] == ["7", "8"]
    pa.parquet.write_table(pa.table({"text": ["a"], "ref": [[{"b": 1}]]}), tmp_path / "nested.parquet")
    with pytest.raises(UserError, match="cannot be read as a table"):
        prompt_list.from_table(tmp_path / "nested.parquet")


def test_one_source_is_read_and_others_are_not_ignored(tmp_path):
    file, table = tmp_path / "prompts.txt", tmp_path / "table.csv"
    file.write_text("from the file\n")
    table.write_text("text\nfrom the table\n")
    source = prompt_list.from_source
    assert [p.text for p in source(["typed"], None, str(table), None)] == ["typed"]
    assert [p.text for p in source([], str(file), str(table), None)] == ["from the file"]
    assert [p.text for p in source([], None, str(table), None)] == ["from the table"]
    assert source(["a", "b"], None, None, "x.png;y.png")[1].references == (Path("x.png"), Path("y.png"))
    with pytest.raises(UserError, match="Both --prompt and --prompts"):
        source(["typed"], str(file), None, None)
    for path in str(file), None:
        with pytest.raises(UserError, match="--ref goes with --prompt"):
            source([], path, str(table), "x.png")
    for nothing in [], [" "]:
        with pytest.raises(UserError, match="There is no prompt"):
            source(nothing, None, None, None)


def test_a_part_of_the_list_keeps_its_indices():
    prompts = prompt_list.from_strings(list("abcde"), None)
    assert [p.index for p in prompt_list.select(prompts, 2, 2)] == [2, 3]
    assert [p.index for p in prompt_list.select(prompts, 3, None)] == [3, 4]


@pytest.mark.parametrize(("start", "count"), [(5, None), (-1, 2), (0, 0), (0, -1)])
def test_a_selection_of_nothing_is_refused(start, count):
    with pytest.raises(UserError, match="picks none of 5 prompts"):
        prompt_list.select(prompt_list.from_strings(list("abcde"), None), start, count)


def test_missing_and_empty_sources_are_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        prompt_list.from_file(empty)
    with pytest.raises(UserError, match="does not exist"):
        prompt_list.from_file(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="does not exist"):
        prompt_list.from_table(tmp_path / "nowhere.csv")


def test_tables_without_prompts_are_refused(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("caption\na cat\n")
    with pytest.raises(UserError, match="no column 'text', only caption"):
        prompt_list.from_table(file)
    file.write_text("text\n")
    with pytest.raises(UserError, match="holds no prompts"):
        prompt_list.from_table(file)
    file = tmp_path / "table.parquet"
    file.write_text("no table")
    with pytest.raises(UserError, match="cannot be read as a table"):
        prompt_list.from_table(file)


def test_files_that_no_one_can_read_give_no_prompts(tmp_path):
    path = tmp_path / "meta.csv"
    path.write_text("path,text,status\na.mp4,a cat,ok\nb.mp4,broken,bad\nc.mp4,a dog,\n")
    assert [prompt.text for prompt in prompt_list.from_table(path)] == ["a cat", "a dog"]
