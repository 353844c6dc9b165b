"""The command, on small tables and folders."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from iada_plugin.wrong_labels import embed
from iada_plugin.wrong_labels.command import main

WORDS = {"sport": ["goal", "match", "team", "league"], "money": ["bank", "stock", "price", "loan"]}


@pytest.fixture
def table(tmp_path):
    """News of two kinds, of which a sixth has the other label; 60 rows are trusted."""
    draw = np.random.default_rng(0)
    rows, wrong = [], []
    for k in range(240):
        kind = "sport" if k % 2 else "money"
        mistaken = k >= 60 and draw.random() < 0.2
        text = " ".join([*draw.choice(WORDS[kind], 4), *draw.choice(["the", "of", "day", "new"], 3)])
        rows.append(
            {
                "text": text,
                "kind": {"sport": "money", "money": "sport"}[kind] if mistaken else kind,
                "checked": int(k < 60),
            }
        )
        wrong += [k] if mistaken else []
    path = tmp_path / "news.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "kind", "checked"])
        writer.writeheader()
        writer.writerows(rows)
    return path, wrong


def run(*arguments):
    return main([str(a) for a in arguments])


def audit(path, folder, *more, trusted="checked"):
    """The exit code of an audit of the news, by their words."""
    return run("audit", path, "--text", "text", "--label", "kind", "--trusted", trusted, "--model", "tfidf", "--output", folder, *more)  # fmt: skip


def listed(folder):
    with open(folder / "wrong_labels.csv") as file:
        return [int(r["row"]) for r in csv.DictReader(file) if int(r["listed"])]


def test_texts_of_a_table(table, tmp_path, capsys):
    path, wrong = table
    assert audit(path, tmp_path / "out") == 0
    found = listed(tmp_path / "out")
    assert len(set(found) & set(wrong)) >= 0.8 * len(wrong) and len(set(found) - set(wrong)) <= 8
    assert "sport -> money" in capsys.readouterr().out
    page = (tmp_path / "out" / "wrong_labels.html").read_text()
    assert "goal" in page and '"names": ["money", "sport"]' in page
    # what a person decides comes back
    first = found[0]
    with open(tmp_path / "out" / "wrong_labels.csv") as file:
        label = next(int(r["label"]) for r in csv.DictReader(file) if int(r["row"]) == first)
    (tmp_path / "decisions.csv").write_text(f"row,label,decision,new_label\n{first},{label},wrong,{1 - label}\n")
    assert audit(path, tmp_path / "two", "--decisions", tmp_path / "decisions.csv") == 0
    assert first not in listed(tmp_path / "two")


def test_rows_are_drawn_checked_and_trusted(table, tmp_path, capsys):
    path, wrong = table
    drawn = tmp_path / "to_check.csv"
    assert run("draw", path, "--text", "text", "--label", "kind", "--rows", 80, "--output", drawn) == 0
    with open(drawn) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80 and len({r["row"] for r in rows}) == 80
    assert list(rows[0]) == ["row", "text", "kind", "trusted", "right_label"]
    again = run("draw", path, "--label", "kind", "--output", drawn)
    assert again == 2 and "is there already" in capsys.readouterr().err
    with open(drawn, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**r, "trusted": int(int(r["row"]) not in wrong)} for r in rows)
    assert audit(path, tmp_path / "out", trusted=drawn) == 0
    found = wrong_of(rows, wrong)
    said = capsys.readouterr().out
    assert len(listed(tmp_path / "out")) > 10 and not set(listed(tmp_path / "out")) & set(found)
    assert f"Of 80 labels drawn at random {len(found)} were wrong" in said
    assert re.search(rf"money +{sum(r['kind'] == 'money' for r in read(path))} ", said)
    # and the right labels, where they are known: the rows are trusted, and a table without the mistakes comes out
    other = {"sport": "money", "money": "sport"}
    with open(drawn, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for r in rows:
            bad = int(r["row"]) in wrong
            writer.writerow({**r, "trusted": int(not bad), "right_label": other[r["kind"]] if bad else ""})
    assert audit(path, tmp_path / "two", trusted=drawn) == 0
    assert f"Of 80 labels drawn at random {len(found)} were wrong" in capsys.readouterr().out
    corrected, before = read(tmp_path / "two" / "corrected.csv"), read(path)
    assert [k for k, (a, b) in enumerate(zip(corrected, before, strict=True)) if a["kind"] != b["kind"]] == found
    assert sum(r["trusted"] == "1" for r in corrected) == 80
    assert [r["text"] for r in corrected] == [r["text"] for r in before]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def wrong_of(rows, wrong):
    return sorted(int(r["row"]) for r in rows if int(r["row"]) in wrong)


def test_second_round(table, tmp_path, capsys, monkeypatch):
    """The corrected table is audited anew; so are the decisions of both rounds; nothing is written over an earlier page."""
    path, _ = table
    monkeypatch.chdir(tmp_path)
    options = ("audit", "--text", "text", "--label", "kind", "--model", "tfidf", "--trusted")
    assert run(*options, "checked", path) == 0
    known = {int(r["row"]): r for r in read("wrong_labels/wrong_labels.csv")}
    first, second, third = listed(tmp_path / "wrong_labels")[:3]

    def decided(row, decision):
        label = int(known[row]["label"])
        return f"{row},{label},{decision},{label if decision == 'right' else 1 - label}\n"

    head = "row,label,decision,new_label\n"
    Path("one.csv").write_text(head + decided(first, "wrong"))
    Path("two.csv").write_text(head + decided(second, "wrong") + decided(third, "right"))
    assert run(*options, "checked", path, "--decisions", "one.csv") == 0
    assert first not in listed(tmp_path / "wrong_labels_2")
    assert run(*options, "trusted", "wrong_labels_2/corrected.csv", "--decisions", "two.csv") == 0
    assert run(*options, "checked", path, "--decisions", "one.csv", "two.csv") == 0
    three, four = (read(f"wrong_labels_{k}/corrected.csv") for k in (3, 4))
    assert three == four and [r["kind"] for r in three if r["trusted"]] != []
    assert three[first]["kind"] != known[first]["label_name"] and three[third]["kind"] == known[third]["label_name"]
    assert not set(listed(tmp_path / "wrong_labels_4")) & {first, second, third}
    assert run(*options, "checked", path, "--output", "wrong_labels") == 2
    assert "is there already, perhaps with decisions on it" in capsys.readouterr().err


def test_rows_found_wrong_stay_so(table, tmp_path, capsys):
    """A mark "wrong" in a column of all rows, which a corrected table has, is no 0, of which nobody knows."""
    path, wrong = table
    rows = [{**r, "checked": "wrong" if k in wrong[:5] else r["checked"]} for k, r in enumerate(read(path))]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    assert audit(path, tmp_path / "out") == 0
    assert not set(listed(tmp_path / "out")) & set(wrong[:5])
    assert {
        int(r["row"])
        for r in read(tmp_path / "out" / "wrong_labels.csv")
        if r["checked"] == "1" and r["trusted"] == "0"
    } == set(wrong[:5])


@pytest.mark.parametrize(
    "line, message",
    [
        ("0,money,1,sport", "row 0 has the right_label 'sport' and '1' under trusted"),
        ("0,money,0,money", "row 0 has the right_label 'money' and '0' under trusted"),
        ("0,money,0,weather", "another one of the data's: money, sport"),
    ],
)
def test_right_labels_that_cannot_be(table, tmp_path, capsys, line, message):
    drawn = tmp_path / "to_check.csv"
    drawn.write_text(f"row,kind,trusted,right_label\n{line}\n")
    assert audit(table[0], tmp_path, trusted=drawn) == 2 and message in capsys.readouterr().err


def test_tables_that_are_none(table, tmp_path, capsys):
    path, _ = table
    text = path.read_text()
    path.write_bytes(text.replace("goal", "gö").encode("latin-1"))
    assert audit(path, tmp_path / "out") == 2 and "is no UTF-8 text" in capsys.readouterr().err
    path.write_text(text + "a,b,money,1\n")
    assert audit(path, tmp_path / "out") == 2 and "row 240 (from 0) has too many fields" in capsys.readouterr().err
    path.write_text("text,kind,checked\n" + "a goal,sport,1\n" * 60)
    assert audit(path, tmp_path / "out") == 2 and "all labels in the column kind are 'sport'" in capsys.readouterr().err
    assert run("audit", "--text", "text") == 2 and "--text without data" in capsys.readouterr().err


def test_images_in_folders(tmp_path):
    draw = np.random.default_rng(0)
    trusted = []
    for k in range(160):
        dark, mistaken = k % 2, k >= 80 and draw.random() < 0.25
        folder = tmp_path / "images" / ("dark" if dark != mistaken else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 90, (8, 8, 3)) + (0 if dark else 120)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
        trusted += [f"{folder.name}/{k}.png"] if k < 80 else []
    (tmp_path / "right.txt").write_text("\n".join(trusted))
    options = ("audit", "--images", tmp_path / "images", "--model", "pixels", "--output", tmp_path / "out")
    assert run(*options, "--trusted", tmp_path / "right.txt") == 0
    assert len(listed(tmp_path / "out")) > 5
    assert "data:image/png" in (tmp_path / "out" / "wrong_labels.html").read_text()
    assert run(*options) == 2
    (tmp_path / "right.txt").write_text("dark/nothing.png")
    assert run(*options, "--trusted", tmp_path / "right.txt") == 2


def test_a_timm_model_with_weights_in_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    pictures = [np.full((40, 40, 3), 30 * k, dtype=np.uint8) for k in range(3)]
    for model_name in (f"resnet10t:{tmp_path / 'nothing.pth'}", "resnet9"):
        with pytest.raises(ValueError, match=r"timm cannot make .*NAME:CHECKPOINT"):
            embed.embed_images(pictures, model_name)
    found = embed.embed_images(pictures, f"resnet10t:{tmp_path / 'weights.pth'}")
    assert found.shape == (3, model.num_features) and not torch.equal(found[0], found[1])


def test_a_transformer_embeds_texts(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    texts = ["a b c d e f", "a", "a b"]
    found = embed.embed_texts(texts, str(tmp_path), batch_size=2)
    assert found.shape == (3, 8)
    torch.testing.assert_close(found[1], embed.embed_texts(["a"], str(tmp_path))[0])  # padding has no part in it


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["audit", "CSV"], "name the columns of the CSV"),
        (["audit", "CSV", "--text", "text", "--label", "kind"], "no row is trusted"),
        (["audit", "CSV", "--text", "body", "--label", "kind", "--trusted", "checked"], "has no column body; it has text, kind, checked"),
        (["audit", "nothing.csv", "--text", "text", "--label", "kind", "--trusted", "checked"], "there is no file nothing.csv in"),
        (["audit", "CSV", "--text", "text", "--label", "kind", "--trusted", "nothing.csv"], "there is no file nothing.csv in"),
        (["audit", "CSV", "--text", "kind", "--label", "text", "--trusted", "checked"], "the column text has "),
        (["audit", "--images", "nothing", "--trusted", "checked"], "there is no folder nothing in"),
        (["audit", "CSV", "--text", "text", "--label", "kind", "--trusted", "checked", "--model", "nothing"], "no transformers model 'nothing'"),
        (["audit", "CSV", "--image", "text", "--label", "kind", "--trusted", "checked"], "name a --model for images"),
        (["draw", "CSV", "--label", "kind", "--rows", "9999"], "--rows 9999"),
        (["draw", "CSV"], "draw needs a CSV and its --label column"),
    ],
)  # fmt: skip
def test_bad_input_is_named(table, capsys, arguments, message):
    assert run(*(table[0] if a == "CSV" else a for a in arguments)) == 2
    assert message in capsys.readouterr().err


def test_the_built_in_sample(tmp_path, capsys):
    kept = tmp_path / "pixels.safetensors"
    assert run("audit", "--output", tmp_path / "one", "--embeddings", kept) == 0
    said = capsys.readouterr()
    found = listed(tmp_path / "one")
    truth = load_digits().target
    corrected = [int(r["label"]) for r in read(tmp_path / "one" / "corrected.csv")]
    wrong = np.flatnonzero(truth != corrected)
    assert len(set(found) & set(wrong)) > 0.5 * len(wrong) and "The truth is known here" in said.out
    # decisions on its list, and the embeddings once more
    labels = {int(r["row"]): r["label"] for r in read(tmp_path / "one" / "wrong_labels.csv")}
    right = [row for row in found if labels[row] == str(truth[row])]
    lines = [f"{row},{labels[row]},{'right' if row in right else 'wrong'},{truth[row]}" for row in found]
    (tmp_path / "d.csv").write_text("\n".join(["row,label,decision,new_label", *lines]))
    assert "reading images" in said.err
    assert run("audit", "--output", tmp_path / "two", "--embeddings", kept, "--decisions", tmp_path / "d.csv") == 0
    assert "reading images" not in capsys.readouterr().err and not set(listed(tmp_path / "two")) & set(found)
    corrected = np.array([int(r["label"]) for r in read(tmp_path / "two" / "corrected.csv")])
    assert (truth != corrected).sum() == len(set(wrong) - set(found))


def test_embeddings_of_other_samples_are_made_anew(tmp_path):
    file, calls = tmp_path / "e.safetensors", []

    def embed_all(samples, model):
        calls.append(1)
        return torch.full((2, 3), float(len(calls)))

    image = tmp_path / "a.png"
    for samples, model, made in [
        (["a", "b"], "m", 1), (["a", "b"], "m", 1), (["a", "c"], "m", 2), (["a", "c"], "n", 3), (["a", "c"], "n", 3),
    ]:  # fmt: skip
        assert float(embed.kept(file, samples, model, embed_all)[0, 0]) == made
    image.write_bytes(b"one")
    assert [float(embed.kept(file, [image], "m", embed_all)[0, 0]) for _ in range(2)] == [4, 4]
    image.write_bytes(b"another")
    assert float(embed.kept(file, [image], "m", embed_all)[0, 0]) == 5


def test_what_is_odd_about_the_data_is_said(table, tmp_path, capsys):
    path, _ = table
    text = path.read_text().splitlines()
    text[1] = text[1].replace("sport", " sport ").replace("money", " money ")
    text += [
        "the the,sport,0",
        "the the,money,0",
        "the the,Money,0",
        '" ",money,0',
        "day day,money,0",
        "day day,money,0",
    ]
    path.write_text("\n".join(text))
    assert audit(path, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "of 3 classes" in said  # a space is no other class
    assert "The labels 'Money' and 'money' count as two classes." in said
    assert "1 texts are empty." in said and "5 texts are there more than once, 3 of them with different labels." in said


def test_why_nothing_is_listed_is_said(table, tmp_path, capsys):
    path, _ = table
    assert audit(path, tmp_path / "out", "--false-alarms", "0.02") == 0
    said = capsys.readouterr().out
    assert "0 of 180 labels are listed" in said
    assert re.search(
        r"listed at 2 %. With --false-alarms 0.02 --adaptive: \d+ rows; --false-alarms 0.04: \d+; --false-alarms", said
    )
    assert re.search(r"takes about \d+ checked rows; there are 60", said)


def test_checked_rows_of_other_data_are_refused(table, tmp_path, capsys):
    path, _ = table
    drawn = tmp_path / "to_check.csv"
    assert run("draw", path, "--text", "text", "--label", "kind", "--rows", 40, "--output", drawn) == 0
    assert audit(path, tmp_path, trusted=drawn) == 2 and "no row is trusted" in capsys.readouterr().err
    lines = drawn.read_text().splitlines()
    drawn.write_text("\n".join([lines[0], lines[1].removesuffix(",,") + ",perhaps,"]))
    assert (
        audit(path, tmp_path, trusted=drawn) == 2
        and "'perhaps' does not say whether the label was found right" in capsys.readouterr().err
    )
    first = lines[1].split(",")
    drawn.write_text("\n".join([lines[0], ",".join([first[0], "another text", first[2], "1"])]))
    assert (
        audit(path, tmp_path, trusted=drawn) == 2
        and f"row {first[0]} has another text in the data" in capsys.readouterr().err
    )
    drawn.write_text("row,trusted\n3,1\n4,1\n3,0\n")
    assert audit(path, tmp_path, trusted=drawn) == 2 and "row 3 is there twice" in capsys.readouterr().err
    drawn.write_text("row,trusted\n3,0\n4,0\n")
    assert (
        audit(path, tmp_path, trusted=drawn) == 2
        and "all 2 labels that were checked are wrong" in capsys.readouterr().err
    )
    drawn.write_text("row,trusted\n999,1\n")
    assert (
        audit(path, tmp_path, trusted=drawn) == 2
        and "row '999' is not in the data, which has the rows 0 to 239" in capsys.readouterr().err
    )


def test_a_mark_at_the_start_and_empty_labels(table, tmp_path, capsys):
    path, _ = table
    marked = tmp_path / "marked.csv"
    marked.write_text(path.read_text(), encoding="utf-8-sig")
    assert audit(marked, tmp_path / "out") == 0
    lines = path.read_text().splitlines()
    lines[5] = lines[5].split(",")[0] + ", ,1"
    path.write_text("\n".join(lines))
    assert audit(path, tmp_path / "out") == 2 and "row 4 (from 0) has no kind" in capsys.readouterr().err
