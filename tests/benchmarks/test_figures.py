"""Figures travel with the code: pages hold what docs/figures.json says, which names commands."""

import json
import re

import figures
import pytest
from figures import Figure, count_of, mean_of, plain, record, share_of

EXEMPT = {
    "command": "how long targets may take",
    "field": "formats of files",
    "file": "formats of files",
    "group": "sizes of the demo's data",
    "method": "forward rows of each method, by construction",
    "name": "names and licences of art",
    "option": "values of options",
    "property": "bounds that tests assert",
    "trainer": "names of models",
}
"""First headers of tables that hold no measurements, and what their numbers are."""
LINE = re.compile(r"^\|(.*)\|$", re.MULTILINE)
NOT_MEASURED = re.compile(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->")


@pytest.fixture
def written() -> dict:
    return json.loads((figures.ROOT / "docs" / "figures.json").read_text("utf-8"))


def tables(page: str) -> list[list[list[str]]]:
    """Return tables as rows of cells, the header first; code blocks have none."""
    found: list[list[list[str]]] = []
    end = -2
    for line in LINE.finditer(page):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line[1])]
        if line.start() != end + 1:
            found.append([])
        found[-1].append(cells)
        end = line.end()
    return found


def bare_numbers(rows: list[list[str]]) -> list[str]:
    """Return cells with a number that no key names; the first column holds labels."""
    return [
        cell
        for row in rows[2:]
        for cell in row[1:]
        if re.search(r"(?<![A-Za-z])\d", NOT_MEASURED.sub("", figures.MARKED.sub("", cell)))
    ]


@pytest.mark.parametrize("page", figures.pages(), ids=lambda p: str(p.relative_to(figures.ROOT)))
def test_pages_hold_the_figures(page, written):
    text = page.read_text("utf-8")
    assert figures.fill(text, written) == text, "run `make figures`"


def test_a_changed_number_is_found(written):
    text = (figures.ROOT / "docs" / "figures.md").read_text("utf-8")
    for mark in figures.MARKED.finditer(text):
        place = max(i for i in range(*mark.span("text")) if text[i].isdigit())
        changed = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
        assert figures.fill(changed, written) == text != changed


def test_every_number_in_a_table_of_measurements_has_a_key():
    used, bare = set(), {}
    for page in figures.pages():
        for rows in tables(page.read_text("utf-8")):
            if cells := bare_numbers(rows):
                if (first := rows[0][0]) in EXEMPT:
                    used.add(first)
                else:
                    bare[page.name, first] = cells
    assert not bare
    assert used == set(EXEMPT), "an exemption that nobody needs"


def test_a_number_without_a_key_is_found():
    page = "| score | AUC |\n|---|---|\n| 4 seeds | {} |\n\n| x |\n"
    assert len(tables(page)) == 2
    assert bare_numbers(tables(page.format(".97"))[0]) == [".97"]
    assert bare_numbers(tables(page.format("`0.1`, .97<!--a.b-->, SD3"))[0]) == []


def test_every_figure_says_what_prints_it(written):
    about = written.pop("about")
    assert about.keys() >= {"python", "torch", "diffusers", "transformers", "unmemorize"}
    assert about.keys() >= {"processor", "seeds"}
    assert list(written) == sorted(written)
    for key, figure in written.items():
        assert figures.KEY.fullmatch(key)
        assert set(figure) == {"value", "low", "high", "n", "command"}
        command = figures.COMMAND.fullmatch(figure["command"])
        assert command, (key, figure["command"])
        assert (
            command["name"] is None
            or (figures.ROOT / "tests" / "benchmarks" / f"{command['name']}.py").is_file()
        )


FIGURE = {"value": 0.98333, "low": 0.9106, "high": 0.99958, "n": 60, "command": "make demo"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (".50", ".98"),
        (".5000", ".9833"),
        (".500 (.400 to .600)", ".983 (.911 to 1.000)"),
        (".50 to .60", ".91 to 1.00"),
        ("5 %", "98 %"),
        ("5.0 % (.0 to 9.0 %)", "98.3 % (91.1 to 100.0 %)"),
        ("1 of 2", "59 of 60"),
    ],
)
def test_a_figure_is_written_in_the_form_that_stands_there(before, after):
    page = "about 3 seeds: {}<!--words.demo.top1--> and 7 more"
    filled = figures.fill(page.format(before), {"words.demo.top1": FIGURE})
    assert filled == page.format(after)
    assert figures.fill(filled, {"words.demo.top1": FIGURE}) == filled


@pytest.mark.parametrize(
    ("value", "before", "after"),
    [
        (1234.5, "1", "1,234"),
        (-0.004, "-1 %", "-0 %"),
        (-0.05, "1.0", "-.1"),
        (-0.001, ".00", ".00"),
    ],
)
def test_large_and_negative_numbers(value, before, after):
    figure = FIGURE | {"value": value, "low": None, "high": None}
    assert (
        figures.fill(f"{before}<!--a.b-->", {"a.b": figure})
        == f"{after.replace('-0 ', '0 ')}<!--a.b-->"
    )


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (".98<!--words.demo.top2-->", "no figure 'words.demo.top2'"),
        ("none<!--words.demo.top1-->", "stands a number"),
        ("98<!--words.demo.top1--> %", "before the comment"),
        ("x.98<!--words.demo.top1-->", "stands a number"),
        (".1 to .2<!--a.b-->", "no interval"),
        ("1 of 3<!--a.b-->", "no count of 3"),
    ],
)
def test_a_page_that_cannot_be_filled_says_what_to_write(page, message):
    known = {"words.demo.top1": FIGURE, "a.b": FIGURE | {"value": 0.5, "low": None, "n": 3}}
    with pytest.raises(ValueError, match=message):
        figures.fill(page, known)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A checkout with pages of its own."""
    for folder in ("docs", "demo"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("Nothing measured.\n")
    (tmp_path / "README.md").write_text("It finds 1 of 2<!--words.demo.top1-->.\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    return tmp_path


def test_a_run_replaces_its_own_keys_alone(clone, capsys):
    record({"words.demo.top1": count_of(3, 4), "grid.a": plain(1 / 3, 1)}, "make demo")
    record({"words.demo.top1": count_of(4, 4)}, "make bench NAME=words")
    told = json.loads((clone / "docs" / "figures.json").read_text("utf-8"))
    assert list(told) == ["about", "grid.a", "words.demo.top1"]
    assert told["grid.a"] == {
        "value": 0.333333, "low": None, "high": None, "n": 1, "command": "make demo",
    }  # fmt: skip
    assert told["words.demo.top1"]["value"] == 1
    assert told["words.demo.top1"]["command"] == "make bench NAME=words"
    assert json.loads((clone / "bench.json").read_text("utf-8")) == told
    assert "4 of 4<!--" in (clone / "README.md").read_text("utf-8")
    assert "| words.demo.top1 | 1 | 0.3976 | 1 | 4 |" in capsys.readouterr().out


def test_a_trial_leaves_figures_and_pages_alone(clone):
    record({"words.demo.top1": count_of(4, 4)}, "make demo", output=clone / "trial.json")
    assert (clone / "trial.json").is_file()
    assert not (clone / "docs" / "figures.json").exists()
    assert "1 of 2<!--" in (clone / "README.md").read_text("utf-8")


def test_what_was_written_by_hand_about_figures_stays(clone):
    (clone / "docs" / "figures.json").write_text('{"about": {"note": "older", "torch": "1"}}')
    record({"words.demo.top1": count_of(1, 2)}, "make demo")
    about = json.loads((clone / "docs" / "figures.json").read_text("utf-8"))["about"]
    assert about["note"] == "older"
    assert about["torch"] != "1"


@pytest.mark.parametrize(
    ("key", "value", "command"),
    [
        ("about", 1.0, "make demo"),
        ("Words.demo", 1.0, "make demo"),
        ("words demo.x", 1.0, "make demo"),
        ("words..x", 1.0, "make demo"),
        ("a.b", float("nan"), "make demo"),
        ("a.b", 1.0, "python words.py"),
    ],
)
def test_what_cannot_be_a_figure_is_refused(clone, key, value, command):
    with pytest.raises(ValueError, match="got"):
        record({key: plain(value, 1)}, command)
    assert not (clone / "docs" / "figures.json").exists()


def test_commands_are_what_is_typed(monkeypatch):
    assert figures.command_of("words", []) == "make bench NAME=words"
    typed = figures.command_of("words", ["--captions", "4", "--work", "kept here", "--seeds", "1"])
    assert typed == 'make bench NAME=words ARGS="--captions 4 --seeds 1"'
    assert figures.COMMAND.fullmatch(typed)
    monkeypatch.setattr("sys.argv", ["copies.py", "--output=trial.json", "--only", "a"])
    assert figures.command_of("copies") == 'make bench NAME=copies ARGS="--only a"'


def test_means_and_shares_have_intervals():
    values = [0.0, 1.0] * 200
    mean = mean_of(values)
    assert mean.low < mean.value == 0.5 < mean.high
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)  # the normal one
    assert mean_of(values) == mean
    assert mean_of([0.5]) == Figure(0.5, None, None, 1)
    assert share_of([True, True, False]) == count_of(2, 3)
    assert share_of([True] * 60).low == pytest.approx(0.025 ** (1 / 60))
