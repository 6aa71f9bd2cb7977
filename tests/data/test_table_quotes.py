"""A stray quote in a table hides no row: the lines that it joins are bad rows, or the table is refused."""

import pytest

from src.data.sources.captions import Captions
from tests.helpers.rows import captions

NO_ROW = "the row is no row of a table"


def table(folder, head, rows, name="metadata.csv"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([head, *rows, ""]), newline="")
    return Captions(folder)


def rows(quotes, form="{i}.png,{q}caption {i}{e}"):
    """Forty rows, with a quote in front of the captions of some, or, by a number below 0, behind that of one."""
    return [form.format(i=i, q='"' * (i in quotes), e='"' * (-i in quotes)) for i in range(1, 41)]


def found(source):
    """Captions, or line and reason."""
    return [told if isinstance(told, str) else (int(told[0].split()[-1]), told[1]) for told in captions(source)]


def wanted(first, last):
    """Captions of the forty rows, of which the lines `first` to `last` are bad rows."""
    return [(i + 1, NO_ROW) if first <= i + 1 <= last else f"caption {i}" for i in range(1, 41)]


@pytest.mark.parametrize(
    ("head", "form"),
    [
        ("file_name,text", "{i}.png,{q}caption {i}{e}"),
        ("text,file_name", "{q}caption {i}{e},{i}.PNG"),
        ("file_name,id,text", "{i}.jpg,7,{q}caption {i}{e}"),
        ("file_name,text", "{i},{q}caption {i}{e}"),
        ("file_name,text", "{q}{i}.png,caption {i}{e}"),
    ],
)
def test_lines_that_a_quote_joins_are_all_bad_rows(tmp_path, head, form):
    for last in (4, 30, 40):
        assert found(table(tmp_path / "c", head, rows((3, -last), form))) == wanted(4, last + 1)
    assert found(table(tmp_path / "c", head, rows((3, 20), form))) == wanted(4, 21)
    tabs = table(
        tmp_path / "t", head.replace(",", "\t"), [r.replace(",", "\t") for r in rows((3, -30), form)], "captions.tsv"
    )
    assert found(tabs) == wanted(4, 31)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("many", [3, 30000])
def test_a_field_that_nothing_closes_refuses_the_table(tmp_path, end, many):
    lines = ["file_name,text", '0.png,"two', 'lines"', '1.png,"a", "b"'[:9], '2.png,5" wide', '3.png,"open']
    lines += [f"{i}.png,caption" for i in range(many)]
    (tmp_path / "metadata.csv").write_bytes(end.join([*lines, ""]).encode())
    with pytest.raises(ValueError, match=r"^the quote in line 6 of '.*metadata\.csv' opens a field that is not closed"):
        len(Captions(tmp_path))
    (tmp_path / "metadata.csv").write_text('file_name,"text\n1.png,a\n')
    with pytest.raises(ValueError, match="the quote in line 1 of"):
        len(Captions(tmp_path))


def test_captions_over_several_lines_stay_one_row(tmp_path):
    said = ["a red,\nblue, pear", "a\nb", "a\n\nof it, that", 'said ""b, c"",\nd, e', "1.png\nb,c.", "x\nsee 1.png"]
    source = table(tmp_path / "c", "file_name,text", [f'{i}.png,"{text}"' for i, text in enumerate(said)])
    assert found(source) == [text.replace('""', '"') for text in said]


def test_a_column_without_a_name_is_not_read(tmp_path):
    for head, row in ((",file_name,text", "0,{i}.png,{c}"), ("file_name,,text,", "{i}.png,x,{c},y")):
        source = table(tmp_path / "c", head, [row.format(i=i, c=f"caption {i}") for i in range(3)])
        assert found(source) == [f"caption {i}" for i in range(3)]
        assert set(source[0]) == {"image", "text", "caption"}
    for head in (",file_name", ",,text", "file_name,,file_name"):
        with pytest.raises(ValueError, match=r"its first line should name at least two"):
            len(table(tmp_path / "c", head, ["0,1.png"]))
