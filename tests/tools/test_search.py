"""The tools `search` and `read`."""

from __future__ import annotations

import json

import pytest

from sppo.environments.base import Call
from sppo.environments.toolbox import Toolbox
from sppo.errors import DataError, RecipeError
from sppo.tools.search import build, cut

ROWS = [
    {"title": "Otters", "text": "Otters swim in rivers and eat fish. " * 8},
    {"title": "Owls", "text": "Owls hunt mice at night."},
    {"title": "", "text": "Fish swim; rivers flow."},
    {"title": "Mice", "text": "Mice eat grain at night and at day."},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "passages.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_what_fits_best_comes_first_and_can_be_read(path):
    tools = build(str(path), most=2)
    found = tools.search("owls that hunt mice?").splitlines()
    assert found[0] == "[1] Owls: Owls hunt mice at night."
    assert found[1].startswith("[3] Mice")
    assert len(tools.search("otters").splitlines()[0]) < 200
    assert tools.read(2) == "Fish swim; rivers flow."
    assert tools.read(0).startswith("Otters\nOtters swim")
    assert tools.search("zebra ") == tools.search("") == "nothing has these words"


def test_a_call_that_asks_for_no_passage_is_answered(path):
    box = Toolbox([build(str(path))])
    assert list(box.tools) == ["read", "search"]
    assert box.call(Call("read", {"number": 9})) == (
        "error: ValueError: there is no passage 9: they are numbered from 0 to 3",
        False,
    )


def test_folders_of_texts_are_cut_into_passages(tmp_path):
    (tmp_path / "docs" / "a").mkdir(parents=True)
    (tmp_path / "docs" / "a" / "cats.md").write_text("Cats purr.\n\n" + "word " * 200 + "\n\nCats sleep.\n")
    (tmp_path / "docs" / "dogs.txt").write_text("Dogs bark.")
    tools = build(str(tmp_path / "docs"))
    assert tools.search("purr") == "[0] a/cats: Cats purr."
    assert tools.search("sleep") == "[2] a/cats: Cats sleep."
    assert tools.read(3) == "dogs\nDogs bark."
    assert cut("", 5) == []


def test_the_index_is_made_once(path):
    assert build(str(path))._index is build(str(path), most=1)._index


def test_what_holds_no_passages_is_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match="search:path="):
        build()
    with pytest.raises(DataError, match="no file"):
        build(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="needs a column `text`; the row has body"):
        build(str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no passages|empty"):
        build(str(tmp_path / "empty.jsonl"))
