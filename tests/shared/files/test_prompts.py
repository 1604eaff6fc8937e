import json
import logging
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need_package
from unmemorize.shared.files.prompts import PromptError, clean, read_prompts

STRANGE = [
    "a cat", "ein Mädchen", "猫が座っている", "قطة على سجادة", "👩‍👩‍👧 family",
    "<script>alert(1)</script>",
    "[red]markup[/red]", "bell\x07 and \x1b[31mescape", "null\x00byte", "right\u202eleft",
    "line\u2028separator", "form\x0cfeed", "next\x85line", "  spaces  ", '"quoted", comma', "a\tb",
    "%s {x} $HOME `ls`", "-".join(["word"] * 10_000),
]  # fmt: skip


def texts(path):
    return [prompt.text for prompt in read_prompts(path)]


def write_csv(path, rows):
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, **columns):
    arrow = need_package("pyarrow")
    parquet = need_package("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_strange_prompts_stay_what_they_are_in_every_format(tmp_path):
    assert texts(write_text(tmp_path / "a.txt", "\n".join(STRANGE) + "\n")) == STRANGE
    assert texts(write_jsonl(tmp_path / "a.jsonl", [{"prompt": s} for s in STRANGE])) == STRANGE
    assert texts(write_jsonl(tmp_path / "b.jsonl", STRANGE)) == STRANGE
    assert texts(write_parquet(tmp_path / "a.parquet", caption=STRANGE)) == STRANGE
    table = [s for s in STRANGE if "\0" not in s]  # Python 3.10's csv does not take it
    assert texts(write_csv(tmp_path / "a.csv", [["text"], *([s] for s in table)])) == table
    assert clean(read_prompts(tmp_path / "a.txt")).prompts == tuple(STRANGE)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])),
                      min_size=1))  # fmt: skip
def test_text_files_split_at_newlines_only(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "a.txt"
    lines = [*lines, "end"]
    path.write_bytes("\n".join(lines).encode())
    # A byte-order mark is one only at the very start of a file.
    assert texts(path) == [lines[0].removeprefix("\ufeff"), *lines[1:]]


def test_windows_line_ends_and_byte_order_marks_are_no_part_of_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,n\r\none,1\r\n")
    assert texts(tmp_path / "a.csv") == ["one"]


def test_sources_name_file_and_line(tmp_path):
    prompts = read_prompts(write_text(tmp_path / "a.txt", "one\n\ntwo\n"))
    assert [p.source for p in prompts] == ["a.txt:1", "a.txt:2", "a.txt:3"]
    prompts = read_prompts(write_csv(tmp_path / "a.csv", [["prompt"], ["two\nlines"], ["x"]]))
    assert [p.source for p in prompts] == ["a.csv:3", "a.csv:4"]
    write_text(tmp_path / "a.jsonl", '{"prompt": "one"}\n\n{"prompt": "two"}\n')
    assert [p.source for p in read_prompts(tmp_path / "a.jsonl")] == ["a.jsonl:1", "a.jsonl:3"]


def test_the_prompt_column_is_found_among_others(tmp_path):
    rows = [["id", "Caption", "n"], ["1", "a cat", "3"]]
    assert texts(write_csv(tmp_path / "a.csv", rows)) == ["a cat"]
    path = write_parquet(tmp_path / "a.parquet", id=[1, 2], text=["a", None])
    assert texts(path) == ["a", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no prompts"),
        ("blank.txt", " \n\t\n\n", "holds no prompts"),
        ("empty.csv", "", "holds no prompts"),
        ("header.csv", "prompt\n", "holds no prompts"),
        ("empty.jsonl", "\n\n", "holds no prompts"),
        ("column.csv", "id,words\n1,a\n", "found 'id', 'words', expected one of prompt, caption"),
        ("column.jsonl", '{"id": 1}\n', "column.jsonl:1 has no column .* found 'id'"),
        ("number.jsonl", '{"prompt": 3}\n', "number.jsonl:1: 'prompt' holds int, expected text"),
        ("list.jsonl", "[1]\n", "found list"),
        ("broken.jsonl", '{"prompt": "a"}\n{"pro', "broken.jsonl:2 is not JSON"),
        ("deep.jsonl", "[" * 100_000 + "\n", "is not JSON"),
        ("quote.csv", 'prompt\n"never closed\n', "not a valid table"),
        ("broken.parquet", "PAR1", "not a readable parquet file"),
        ("prompts.docx", "x", "ends in '.docx', expected one of .txt"),
        ("prompts", "x", "ends in 'nothing', expected one of"),
    ],
)
def test_bad_files_are_refused_with_the_reason(name, content, message, tmp_path):
    if name.endswith("parquet"):
        need_package("pyarrow")
    with pytest.raises(PromptError, match=message):
        read_prompts(write_text(tmp_path / name, content))


def test_parquet_without_a_prompt_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", id=[1], words=["x"])
    with pytest.raises(PromptError, match="found 'id', 'words'"):
        read_prompts(path)


def test_missing_files_and_other_encodings(tmp_path):
    with pytest.raises(PromptError, match="No such file or folder"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1"))
    with pytest.raises(PromptError, match=r"not UTF-8 text \(byte 2\)"):
        read_prompts(tmp_path / "latin.txt")


def test_half_characters_cannot_reach_a_tokenizer(tmp_path):
    write_text(tmp_path / "a.jsonl", '{"prompt": "half \\ud83d of one"}\n')
    assert texts(tmp_path / "a.jsonl") == ["half \ufffd of one"]


def test_empty_and_repeated_prompts_are_dropped_and_merged_with_a_warning(tmp_path, caplog):
    path = write_text(tmp_path / "a.txt", "cat\n\ndog\ncat\n  \ncat \ncat\n")
    with caplog.at_level(logging.WARNING):
        found = clean(read_prompts(path))
    assert found.prompts == ("cat", "dog", "cat ")
    assert found.sources[0] == ("a.txt:1", "a.txt:4", "a.txt:7")
    assert (found.read, found.empty, found.duplicates) == (7, 2, 2)
    assert "2 of 7 prompts are empty" in caplog.text
    assert "2 prompts repeat an earlier one" in caplog.text


def test_nothing_is_said_about_clean_prompts(tmp_path, caplog):
    found = clean(read_prompts(write_text(tmp_path / "a.txt", "cat\ndog\n")))
    assert (found.empty, found.duplicates) == (0, 0)
    assert not caplog.records


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_kohya_folders(tmp_path):
    first = picture(tmp_path / "10_mark cat" / "a.png")
    write_text(first.with_suffix(".txt"), "mark cat on a mat\nsecond line is for wildcards\n")
    second = picture(tmp_path / "10_mark cat" / "b.JPG")
    write_text(second.with_suffix(".caption"), "mark cat asleep")
    third = picture(tmp_path / "10_mark cat" / "c.webp")
    fourth = picture(tmp_path / "plain" / "d.png")
    found = read_prompts(tmp_path)
    assert [(p.text, p.image) for p in found] == [
        ("mark cat on a mat", first), ("mark cat asleep", second), ("mark cat", third), ("", fourth)
    ]  # fmt: skip
    assert found[0].source == "10_mark cat/a.png"
    assert clean(found).images == ((first,), (second,), (third,))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_tables_of_diffusers(kind, tmp_path):
    image = picture(tmp_path / "train" / "a.png")
    rows = [("a.png", "a cat"), ("../../outside.png", "a dog"), ("gone.png", "a cow")]
    path = tmp_path / "train" / f"metadata.{kind}"
    if kind == "csv":
        write_csv(path, [["file_name", "text"], *rows])
    else:
        write_jsonl(path, [{"file_name": name, "text": text} for name, text in rows])
    picture(tmp_path.parent / "outside.png")
    found = read_prompts(tmp_path)
    assert [(p.text, p.image) for p in found] == [
        ("a cat", image),
        ("a dog", None),
        ("a cow", None),
    ]
    assert found[0].source.startswith(f"train/metadata.{kind}:")


def test_folders_without_captions(tmp_path):
    with pytest.raises(PromptError, match="holds no images with captions"):
        read_prompts(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(PromptError, match="holds no prompts"):
        read_prompts(tmp_path)


def test_a_prompt_s_own_commas_are_no_fields(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\na dog\na cat, sitting on a mat, masterpiece\n")
    with pytest.raises(PromptError, match=r"p\.csv: row 3 has 3 fields, the header 1\. Put text"):
        read_prompts(path)
    path.write_text('prompt,seed\n"a cat, sitting",1\n')
    assert [prompt.text for prompt in read_prompts(path)] == ["a cat, sitting"]


@pytest.mark.parametrize(
    ("line", "text"),
    [(r'"\ud800 cat"', "� cat"), (r'{"text": "cat \udfff"}', "cat �"),
     (r'{"file_name": "\ud800.png", "text": "cat"}', "cat"), (r'"\ud83d\ude00"', "😀")],
)  # fmt: skip
def test_halves_of_characters_are_replaced_wherever_they_stand(tmp_path, line, text):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    prompt, *_ = read_prompts(tmp_path / "p.jsonl")
    assert (prompt.text, prompt.source, prompt.image) == (text, "p.jsonl:1", None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_named_pipes_are_named_and_not_opened(tmp_path, caplog):
    os.mkfifo(tmp_path / "p.txt")
    signal.alarm(20)  # where one is opened, the test ends here
    try:
        with pytest.raises(PromptError, match=r"p\.txt is no regular file"):
            read_prompts(tmp_path / "p.txt")
        folder = tmp_path / "set"
        folder.mkdir()
        os.mkfifo(folder / "metadata.jsonl")
        os.mkfifo(folder / "b.png")
        (folder / "a.png").write_bytes(b"")
        (folder / "a.txt").write_text("a cat")
        assert [prompt.text for prompt in read_prompts(folder)] == ["a cat"]
    finally:
        signal.alarm(0)
    assert "metadata.jsonl" in caplog.text
    assert "b.png" in caplog.text


def test_captions_are_read_as_their_trainer_reads_them(tmp_path, caplog):
    for name, text in (("a", "first\nsecond"), ("b", "[trigger] first\nsecond\n")):
        (tmp_path / f"{name}.png").write_bytes(b"")
        (tmp_path / f"{name}.txt").write_text(text)
    assert [prompt.text for prompt in read_prompts(tmp_path)] == [
        "first",
        "[trigger] first\nsecond",
    ]
    assert "1 caption has [trigger] or [name]" in caplog.text
    assert "give that as --prompts" in caplog.text


def test_what_other_programs_read_as_a_sign_is_named(tmp_path, caplog):
    path = tmp_path / "p.txt"
    path.write_text(
        "a (cat:1.2)\na {red|blue} cat\na __colour__ cat\n<lora:cat:1> cat\nC__2 (a: b)\n"
    )
    assert len(read_prompts(path)) == 5
    assert "4 prompts have signs of other programs" in caplog.text


def test_captions_and_images_that_are_not_used_are_named_with_the_remedy(tmp_path, caplog):
    """A sentence a kind; what belongs together is not in one."""
    for name in ("a.png", "A b.jpg", "é.png", "used.webp", "photo.heic", "old.eps"):
        (tmp_path / name).write_bytes(b"")
    texts = ("a.png.txt", "a B.txt", "e\u0301.txt", "used.txt", "used.TXT", "other.caption")
    for name in texts:
        (tmp_path / name).write_text("words")
    read_prompts(tmp_path)
    for name, remedy in {
        "a.png.txt": "two suffixes", "a B.txt": "capitals: rename", "e\u0301.txt": "normal form",
        "used.TXT": "suffix is in capitals", "other.caption": "no image here",
        "photo.heic": "convert them to PNG", "old.eps": "convert them to PNG",
    }.items():  # fmt: skip
        assert any(name in line and remedy in line for line in caplog.messages), name
    assert not any("used.txt" in line for line in caplog.messages)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_fields_that_nothing_reads_are_named_once(kind, tmp_path, caplog):
    path = tmp_path / f"p.{kind}"
    if kind == "csv":
        path.write_text("prompt,seed,negative\na cat,3,blurry\na dog,4,\n")
    else:
        path.write_text('{"prompt": "a cat", "seed": 3}\n{"prompt": "a dog", "negative": "x"}\n')
    assert len(read_prompts(path)) == 2
    (told,) = [line for line in caplog.messages if "nothing here reads" in line]
    assert "'seed', 'negative'" in told


def test_paths_that_windows_wrote_into_a_table_are_found(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(b"")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncats\\a.png,a cat\n..\\x.png,a dog\n")
    assert [prompt.image for prompt in read_prompts(tmp_path)] == [tmp_path / "cats/a.png", None]
