"""The documents' figures are those of the result files."""

import pytest

from benchmarks import documents


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_documents_hold_what_the_files_say(name):
    text = (documents.ROOT / name).read_text()
    assert len(documents.BLOCK.findall(text)) == text.count("<!-- figures:") > 0
    assert documents.rendered(text) == text, f"{name} is out of date: run python -m benchmarks docs"


def test_a_changed_figure_is_noticed():
    text = (documents.ROOT / "README.md").read_text()
    changed = text.replace("| d128 full | ", "| d128 full | 9", 1)
    assert changed != text
    assert documents.rendered(changed) == text


def test_an_unknown_block_names_the_known_ones():
    with pytest.raises(ValueError, match=r"known ones are .*overview"):
        documents.rendered("<!-- figures: nonsense h200_forward.json -->\n<!-- end of figures -->")
