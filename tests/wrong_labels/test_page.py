"""The page, its table, and the decisions that come back from it."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from iada_plugin import find_wrong_labels
from iada_plugin.wrong_labels import with_decisions

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def found(classes=3, **options):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, 400)
    mistaken = draw.random(400) < 0.2
    trusted = draw.permutation(400)[:80]
    mistaken[trusted] = False
    margins = draw.normal(3 - 6 * mistaken, 1)
    return find_wrong_labels(labels, trusted, margins=margins, suggested=(labels + 1) % classes, **options)


def rows_of(page):
    return [dict(re.findall(r'data-(\w+)="(-?\d+)"', tag)) for tag in re.findall(r'<div class="row[^>]*>', page)]


def test_the_page_has_the_list_at_three_levels(tmp_path):
    wrong = found(class_names=["cat", "dog", "</script><b>"])
    samples = [f"text {k} <i>" for k in range(400)]
    page = wrong.write(tmp_path, samples=samples, limit=120).read_text()
    rows = rows_of(page)
    assert [int(r["row"]) for r in rows] == wrong.order[:120].tolist()
    for r in rows:
        row, level = int(r["row"]), int(r["level"])
        expected = [wrong.at(v).listed[row] for v in (0.05, 0.1, 0.2)]
        assert expected == [k >= level for k in range(3)]
        assert int(r["label"]) == wrong.label[row] and int(r["to"]) == wrong.suggested[row]
    data = json.loads(re.search(r"const DATA=(\{.*?\});", page)[1])
    assert data["sizes"] == [len(wrong.at(v)) for v in (0.05, 0.1, 0.2)] and data["start"] == 1
    assert (
        data["names"][2] == "</script><b>" and page.count("</script>") == 1
    )  # and nothing of the data is read as HTML
    assert f"text {wrong.order[0]} &lt;i&gt;" in page and "<b>" not in page.replace("<b>", "", 0).split("DATA")[0]
    assert str(wrong) in page and "prefers-color-scheme:dark" in page
    with open(tmp_path / "wrong_labels.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 400 and [int(r["row"]) for r in table[: len(wrong)]] == wrong.rows.tolist()
    assert sum(int(r["listed"]) for r in table) == len(wrong) and table[0]["label_name"] in (
        "cat",
        "dog",
        "</script><b>",
    )


def test_pictures_many_classes_and_nothing_to_list(tmp_path):
    pictures = np.random.default_rng(0).random((400, 3, 40, 200))
    page = found(classes=30).write(tmp_path, samples=lambda row: pictures[row], limit=5).read_text()
    assert page.count('src="data:image/png;base64,') == 5 and "true class" in page
    clean = find_wrong_labels([0, 1] * 100, range(60), margins=np.random.default_rng(0).normal(size=200))
    page = clean.write(tmp_path).read_text()
    assert '"start": -1' in page and len(rows_of(page)) == 140
    few = found(classes=250)
    assert few.transition is None and "Too many classes" in few.write(tmp_path, limit=3).read_text()
    with pytest.raises(ValueError, match="an image has the shape"):
        clean.write(tmp_path, samples=np.zeros((200, 9, 9, 9)))


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_page_works_in_a_browser(tmp_path):
    wrong = found()
    page = wrong.write(tmp_path, samples=[f"text {k}" for k in range(400)])
    script = (
        "<script>document.querySelector('.bad').click();document.querySelectorAll('.ok')[1].click()</script></body>"
    )
    (tmp_path / "clicked.html").write_text(page.read_text().replace("</body>", script))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        (tmp_path / "clicked.html").as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert (
        "2 looked at, 1 of them wrong" in shown
        and 'class="row text wrong"' in shown
        and 'class="row text right"' in shown
    )
    hidden = len(re.findall(r'<div class="row[^>]*hidden', shown))
    assert len(rows_of(shown)) - hidden == len(wrong)


def decisions(path, lines, header="row,label,decision,new_label"):
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_decisions_correct_labels_and_make_trusted_rows(tmp_path):
    labels = np.array([0, 1, 2, 0, 1, 2])
    path = decisions(tmp_path / "d.csv", ["2,2,wrong,0", "4,1,right,1"])
    corrected, checked = with_decisions(labels, path)
    assert corrected.tolist() == [0, 1, 0, 0, 1, 2] and checked.tolist() == [2, 4] and labels[2] == 2
    again = with_decisions(corrected, path)  # once more changes nothing
    assert again[0].tolist() == corrected.tolist() and again[1].tolist() == checked.tolist()


@pytest.mark.parametrize(
    "line, message",
    [
        ("9,0,right,0", r"line 2: row 9 is not in 0\.\.5"),
        ("1,0,right,0", "row 1 had the label 0 on the page and has 1 here"),
        ("1,1,wrong,1", "'wrong' with the label 1 and the new label 1"),
        ("1,1,maybe,0", "'maybe' with the label 1"),
        ("a,1,right,1", "line 2: row, label and new_label must be whole numbers"),
    ],
)
def test_decisions_of_other_data_are_refused(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        with_decisions([0, 1, 2, 0, 1, 2], decisions(tmp_path / "d.csv", [line]))


def test_another_file_is_no_decisions(tmp_path):
    with pytest.raises(ValueError, match="has no column decision, new_label"):
        with_decisions([0, 1], decisions(tmp_path / "d.csv", ["1,2"], "row,label"))
