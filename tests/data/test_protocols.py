"""Label noise, clusters, Colored MNIST, groups, and published file layouts."""

import csv
import gzip
import json
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import TensorDataset

from iada_plugin import balanced_meta_split
from iada_plugin.data import (
    as_labels,
    attribute_clusters,
    colored_digits,
    glt_splits,
    long_tail_counts,
    noisy_labels,
    read_celeba,
    read_cifar,
    read_glt,
    read_image_list,
    read_mnist,
    read_waterbirds,
    transition_matrix,
)


def save(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---------------------------------------------------------------------------------------------------------- the labels


def test_labels_of_anything():
    want = [2, 0, 1]

    class Torch(torch.utils.data.Dataset):
        targets = want

        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("no sample may be loaded")

    class Hidden(Torch):
        targets = None

    found = (want, np.array(want), torch.tensor(want), Dataset.from_dict({"label": want}), Dataset.from_dict({"label": want})["label"],
             TensorDataset(torch.zeros(3), torch.tensor(want)), Torch())  # fmt: skip
    for data in found:
        assert as_labels(data).tolist() == want
    with pytest.raises(TypeError, match="pass them as an array"):
        as_labels(Hidden())
    for bad in ([], [[1]], [0.5, 1.0], [-1, 0], ["a", "b"]):
        with pytest.raises(ValueError, match="labels must"):
            as_labels(bad)


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", ["uniform", "flip1", "flip2"])
def test_noise_follows_its_matrix(kind):
    labels = np.repeat(np.arange(5), 4000)
    noisy, matrix = noisy_labels(labels, kind, 0.4, seed=3)
    assert np.allclose(matrix.sum(axis=1), 1)
    if kind == "uniform":
        assert np.allclose(matrix, 0.6 * np.eye(5) + 0.4 / 5)
    else:
        others = 1 if kind == "flip1" else 2
        off = matrix - 0.6 * np.eye(5)
        assert ((off > 0).sum(axis=1) == others).all() and np.allclose(off[off > 0], 0.4 / others)
        assert not off.diagonal().any()
    observed = np.stack([np.bincount(noisy[labels == c], minlength=5) for c in range(5)]) / 4000
    assert np.abs(observed - matrix).max() < 4 * np.sqrt(0.25 / 4000)
    again, _ = noisy_labels(labels, kind, 0.4, seed=3)
    assert (again == noisy).all() and (noisy_labels(labels, kind, 0.4, seed=4)[0] != noisy).any()


def test_noise_at_its_ends():
    labels = np.arange(1000) % 4
    assert (noisy_labels(labels, "flip1", 0.0)[0] == labels).all()
    assert (noisy_labels(labels, "flip1", 1.0)[0] != labels).all()
    for arguments, message in (
        (("flip3", 0.1, 4), "is unknown"),
        (("flip1", 1.5, 4), r"rate=1.5"),
        (("flip2", 0.4, 2), "at least 3"),
        (("uniform", 0.4, 1), "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            transition_matrix(*arguments)
    with pytest.raises(ValueError, match="label 3"):
        noisy_labels(labels, "flip1", 0.2, num_classes=3)


# ------------------------------------------------------------------------------------------------------------ clusters


def blobs(sizes=((90, 40, 20), (80, 50, 30))):
    """Classes of three well separated blobs; returns features, labels and the blob of each row."""
    rng = np.random.default_rng(0)
    rows = [(y, a) for y, own in enumerate(sizes) for a, n in enumerate(own) for _ in range(n)]
    labels, blob = np.array(rows).T
    centres = rng.normal(0, 20, (len(sizes), 3, 4))
    return centres[labels, blob] + rng.normal(0, 0.1, (len(rows), 4)), labels, blob


def test_clusters_find_the_attributes_largest_first():
    features, labels, blob = blobs()
    assert (attribute_clusters(features, labels, 3) == blob).all()
    with pytest.raises(ValueError, match="class 0 has 150 rows"):
        attribute_clusters(features, labels, 161)
    with pytest.raises(ValueError, match="NaN"):
        attribute_clusters(features * np.nan, labels)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        attribute_clusters(features[:5], labels)


def test_glt_splits():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 1200)
    clusters = rng.choice(6, 3600, p=[0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    splits = glt_splits(labels, clusters, [300, 100, 50], test_per_cell=20, seed=1)
    attributes = splits.attributes
    assert (attributes == clusters // 2).all()

    def cells(rows):
        return np.stack([np.bincount(attributes[rows][labels[rows] == y], minlength=3) for y in range(3)])

    assert cells(splits.train).tolist() == [[210, 60, 30], [70, 20, 10], [35, 10, 5]]
    assert cells(splits.train_balanced).tolist() == [[105, 30, 15]] * 3
    assert cells(splits.test_balanced).tolist() == [[20, 20, 20]] * 3
    assert cells(splits.test_class_balanced).tolist() == [[42, 12, 6]] * 3
    tests = set(splits.test_balanced) | set(splits.test_class_balanced)
    assert len(tests) == 360 and not tests & (set(splits.train) | set(splits.train_balanced))
    assert splits.protocol("CLT") == (splits.train, splits.test_class_balanced)
    assert splits.protocol("ALT") == (splits.train_balanced, splits.test_balanced)
    with pytest.raises(ValueError, match="none of CLT"):
        splits.protocol("LT")
    with pytest.raises(ValueError, match="4 are needed"):
        glt_splits([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], [1, 1])
    # class x cluster for the meta set
    meta, rest = balanced_meta_split(labels, 2, groups=labels * 6 + clusters)
    assert np.bincount((labels * 6 + clusters)[meta]).tolist() == [2] * 18 and not set(meta) & set(rest)


def test_meta_rows_are_trusted_ones():
    labels = np.arange(100) % 4
    trusted = np.arange(100) < 60
    meta, rest = balanced_meta_split(labels, 5, trusted=trusted)
    assert trusted[meta].all() and np.bincount(labels[meta]).tolist() == [5] * 4 and len(rest) == 80
    with pytest.raises(ValueError, match="class 0 has 25 rows, 15 of them trusted"):
        balanced_meta_split(labels, 16, trusted=trusted)
    with pytest.raises(ValueError, match=r"trusted must be \[N\]"):
        balanced_meta_split(labels, 5, trusted=[True])


# ------------------------------------------------------------------------------------------------------- Colored MNIST


def test_colored_digits():
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, 60000)
    images = np.broadcast_to(np.arange(60000, dtype=np.uint8)[:, None, None], (60000, 2, 2))
    splits = colored_digits(images, digits, seed=5)
    assert [len(s.labels) for s in splits.values()] == [30000, 10000, 20000]
    for split, noise in zip(splits.values(), (0.2, 0.5, 0.9), strict=True):
        colour = split.groups % 2
        assert (split.groups == 2 * split.labels + colour).all()
        assert (colour != split.labels).mean() == pytest.approx(noise, abs=0.02)
        red, green = split.images[:, 0].any(axis=(1, 2)), split.images[:, 1].any(axis=(1, 2))
        assert not (red & green).any() and not (red & (colour == 0)).any() and not (green & (colour == 1)).any()
        assert split.images.dtype == np.float32 and split.images.max() <= 1
    # a quarter of the labels is wrong: what caps a colour-blind classifier at 75 %
    grey = np.arange(1, 60001, dtype=np.float32)[:, None, None] / 60000
    clean = colored_digits(grey, digits, seed=5)["train"]
    digit = digits[(clean.images.max(axis=(1, 2, 3)) * 60000).round().astype(int) - 1]
    assert ((digit >= 5) != clean.labels).mean() == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="more than the 10"):
        colored_digits(images[:10], digits[:10], sizes=(8, 2, 1))
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        colored_digits(images[:, 0], digits)


def test_mnists_files(tmp_path):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    content = struct.pack(">HBBIII", 0, 8, 3, 3, 4, 4) + images.tobytes()
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        read_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 3) + bytes([7, 0, 9]))
    found, digits = read_mnist(tmp_path)
    assert (found == images).all() and digits.tolist() == [7, 0, 9]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(ValueError, match="cut short"):
        read_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(ValueError, match="no IDX file"):
        read_mnist(tmp_path)


# -------------------------------------------------------------------------------------------------------- file layouts


def test_image_lists(tmp_path):
    for k in range(3):
        save(tmp_path / "train" / f"n0{k}" / "a b.JPEG", 40 * k)
    lines = [f"train/n0{k}/a b.JPEG {k}" for k in range(3)]
    path = tmp_path / "ImageNet_LT_train.txt"
    path.write_text("\n".join(lines) + "\n")
    data = read_image_list(path, tmp_path)
    image, label = data[2]
    assert len(data) == 3 and label == 2 and image.shape == (3, 8, 8) and abs(float(image.mean()) - 80 / 255) < 0.02
    assert as_labels(data).tolist() == [0, 1, 2] and data.select([1]).targets.tolist() == [1]
    path.write_text("\n".join([lines[0], "train/x.jpg"]))
    with pytest.raises(ValueError, match="line 2"):
        read_image_list(path, tmp_path)
    path.write_text("train/none.jpg 0\n")
    with pytest.raises(FileNotFoundError, match=r"none.jpg.*is .* the folder of the images"):
        read_image_list(path, tmp_path)
    with pytest.raises(FileNotFoundError, match="ImageNet_LT_train"):
        read_image_list(tmp_path / "no.txt", tmp_path)


@pytest.mark.parametrize("coco", [False, True])
def test_glt_annotations(tmp_path, coco):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.jpg")
    part = {"label": {"a.jpg": "0", "b.jpg": "1"}, "frequency": {"a.jpg": 0, "b.jpg": 2}, "attribute": {"a.jpg": 2, "b.jpg": 0}}  # fmt: skip
    if coco:  # objects by key, with their files in a table of their own
        part = {k: {f"{i}": v for i, v in enumerate(own.values())} for k, own in part.items()}
        part["path"] = {"0": "a.jpg", "1": "b.jpg"}
    annotation = {"cat2id": {}, "id2cat": {}, **{s: part for s in ("train", "val", "test_lt", "test_bl", "test_bbl")}}
    path = tmp_path / "x_inter_lt.json"
    path.write_text(json.dumps(annotation))
    found = read_glt(path, tmp_path)
    assert set(found) == {"train", "val", "test_lt", "test_bl", "test_bbl"}
    assert found["test_bl"].targets.tolist() == [0, 1] and found["train"].groups.tolist() == [2, 0]
    assert found["train"].paths[1] == tmp_path / "b.jpg"
    # the class-balanced annotation has an empty test_lt
    path.write_text(json.dumps({**annotation, "test_lt": {"label": {}}}))
    assert "test_lt" not in read_glt(path, tmp_path)
    path.write_text(json.dumps({**annotation, "train": {}}))
    with pytest.raises(ValueError, match="'train' has no labels"):
        read_glt(path, tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        read_glt(path, tmp_path)


def test_waterbirds(tmp_path):
    rows = []
    for i in range(12):
        save(tmp_path / f"bird{i}.jpg")
        rows.append({"img_id": i, "img_filename": f"bird{i}.jpg", "y": i % 2, "split": i // 4, "place": i // 2 % 2})
    write_csv(tmp_path / "metadata.csv", rows)
    found = read_waterbirds(tmp_path)
    assert {k: len(v) for k, v in found.items()} == {"train": 4, "val": 4, "test": 4}
    assert found["train"].groups.tolist() == [0, 2, 1, 3] and found["train"].targets.tolist() == [0, 1, 0, 1]
    write_csv(tmp_path / "metadata.csv", [{**r, "y": 7} for r in rows])
    with pytest.raises(ValueError, match="row 1: y is '7'"):
        read_waterbirds(tmp_path)
    write_csv(tmp_path / "metadata.csv", [{k: v for k, v in r.items() if k != "place"} for r in rows])
    with pytest.raises(ValueError, match="no column place"):
        read_waterbirds(tmp_path)
    write_csv(tmp_path / "metadata.csv", [{**r, "split": 0} for r in rows])
    with pytest.raises(ValueError, match="split 'val'"):
        read_waterbirds(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"metadata.csv"):
        read_waterbirds(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [False, True])
def test_celeba(tmp_path, text):
    rows = []
    for i in range(12):
        save(tmp_path / "img_align_celeba" / f"{i:06}.jpg")
        rows.append({"image_id": f"{i:06}.jpg", "Blond_Hair": 1 if i % 2 else -1, "Male": 1 if i // 2 % 2 else -1})
    if text:
        lines = ["12", "Blond_Hair Male", *(f"{r['image_id']}  {r['Blond_Hair']}  {r['Male']}" for r in rows)]
        (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / "list_eval_partition.txt").write_text("".join(f"{r['image_id']} {i // 4}\n" for i, r in enumerate(rows)))  # fmt: skip
    else:
        write_csv(tmp_path / "list_attr_celeba.csv", rows)
        write_csv(tmp_path / "list_eval_partition.csv", [{"image_id": r["image_id"], "partition": i // 4} for i, r in enumerate(rows)])  # fmt: skip
    found = read_celeba(tmp_path)
    assert found["val"].groups.tolist() == [0, 2, 1, 3] and found["val"].targets.tolist() == [0, 1, 0, 1]
    if not text:
        write_csv(tmp_path / "list_eval_partition.csv", [{"image_id": "x.jpg", "partition": 0}])
        with pytest.raises(ValueError, match=r"000000.jpg has attributes but no partition"):
            read_celeba(tmp_path)


def test_cifars_parquet_files(tmp_path):
    from io import BytesIO

    def png(value):
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(buffer := BytesIO(), "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    with pytest.raises(FileNotFoundError, match=r"no \*train\*.parquet"):
        read_cifar(tmp_path)
    for split in ("train", "test"):
        Dataset.from_dict({"img": [png(9), png(200)], "label": [3, 1]}).to_parquet(tmp_path / f"c-{split}.parquet")
    images, labels = read_cifar(tmp_path)["test"]
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8 and labels.tolist() == [3, 1]
    assert images[1].unique().tolist() == [200]
    Dataset.from_dict({"pixels": [1], "label": [3]}).to_parquet(tmp_path / "c-train.parquet")
    with pytest.raises(ValueError, match="columns pixels, label"):
        read_cifar(tmp_path)


def test_the_published_long_tail():
    assert long_tail_counts(10, 4990, 100) == [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]
