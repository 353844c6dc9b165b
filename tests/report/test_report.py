"""What a report collects and writes."""

import csv
import gc
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from models import MLP, distilbert
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_auc_score
from trainers import arguments, dataset, trainer
from transformers import Trainer, TrainerCallback

from iada_plugin import IADAConfig, MetaIADA, MetaIADACallback, Report, metrics
from iada_plugin.functional.covariance import LowRank
from iada_plugin.integrations.trainer_report import _class_names
from iada_plugin.perturbation.network import PerturbationNetwork
from iada_plugin.report import figures
from iada_plugin.report.analysis import eigenvalues, explain
from iada_plugin.report.recorder import Recorder
from iada_plugin.report.streams import Curve, Reservoir
from iada_plugin.step import Step

ROOT = Path(__file__).parents[2]
N, C, BATCH, PER_EPOCH = 60, 3, 10, 6


def problem(wrong=0.2, seed=0):
    """Three separable classes, some labels wrong: x, y, truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(N) % C
    x = torch.randn(N, 6, generator=generator) + 3 * torch.eye(6)[truth]
    flipped = torch.rand(N, generator=generator) < wrong
    return x, torch.where(flipped, (truth + 1) % C, truth), truth


def start(characteristics=None, **options):
    x, _, truth = problem()
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    more = {} if characteristics is None else {"characteristics": characteristics}
    iada = MetaIADA(model, optimizer, meta_loader=[(x[:30] + 0.1, truth[:30])], steps_per_epoch=PER_EPOCH, epochs=8,
                    config=IADAConfig(warmup_epochs=2, meta_lr=1e-2), **more)  # fmt: skip
    return iada, model, optimizer, None if options.pop("none", False) else Report(iada, **options)


def train(iada, model, optimizer, epochs=8, with_ids=True, seen=None, stop=None, seed=0):
    x, y, _ = problem()
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for k, rows in enumerate(torch.randperm(N, generator=generator).split(BATCH)):
            if stop == (epoch, k):
                return
            output = model(x[rows])
            loss = iada(output, y[rows], ids=rows if with_ids else None)
            if seen is not None and iada.epsilon is not None:
                for into, values in zip(seen, (iada.epsilon, output.argmax(1)), strict=True):
                    into.setdefault(epoch, {}).update(zip(rows.tolist(), values.tolist(), strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.fixture(scope="module")
def finished():
    """A run of eight epochs, two of them warm-up, whose epsilon was written down in a plain way too."""
    torch.manual_seed(0)
    _, _, truth = problem()
    iada, model, optimizer, _ = start(none=True)
    report = Report(
        iada, true_labels=truth, samples=problem()[0].view(N, 2, 3), epochs=3, class_names=["ant", "<bee>", "cat"]
    )
    seen = {}, {}
    train(iada, model, optimizer, seen=seen)
    before = report.suspects()
    iada.close()
    return report, seen, before


# ---------------------------------------------------------------------------------------------------------- collecting


def test_suspects_are_judged_by_the_last_epochs(finished):
    report, (seen, predicted), before = finished
    _, y, _ = problem()
    assert sorted(seen) == [2, 3, 4, 5, 6, 7]
    expected = {i: np.mean([seen[e][i] for e in (5, 6, 7)]) for i in range(N)}
    suspects = report.suspects()
    assert suspects == before and report.suspects(4) == suspects[:4]
    assert sorted(s.id for s in suspects) == list(range(N))
    for s in suspects:
        assert s.epsilon == pytest.approx(expected[s.id], abs=1e-6) and s.epochs == 3 and s.label == y[s.id]
        assert 0 <= s.predicted < C and s.loss > 0
        assert s.suspicion == pytest.approx(0.5 * ((1 - s.epsilon) / 2 + s.contradicted))
        told = [predicted[e][s.id] != s.label for e in (5, 6, 7)]
        assert s.contradicted == pytest.approx(np.mean(told))
    assert [s.suspicion for s in suspects] == sorted((s.suspicion for s in suspects), reverse=True)
    assert suspects[0].suspicion > suspects[-1].suspicion


def test_counts_of_adversarial_samples(finished):
    report, (seen, _), _ = finished
    _, y, truth = problem()
    counts = report._merged().by_class
    assert sorted(counts) == sorted(seen)
    for epoch, values in seen.items():
        for c in range(C):
            own = [e for i, e in values.items() if y[i] == c]
            assert counts[epoch][c] == pytest.approx([len(own), sum(e > 0 for e in own), sum(own)], abs=1e-5)
        wrong = [e for i, e in values.items() if y[i] != truth[i]]
        assert report._merged().by_truth[epoch][1] == pytest.approx(
            [len(wrong), sum(e > 0 for e in wrong), sum(wrong)], abs=1e-5
        )


def test_a_page_on_which_no_label_stands_out(tmp_path):
    x, _, truth = problem()
    iada, model, optimizer, report = start()
    for _ in range(5):
        for rows in torch.arange(N).split(BATCH):
            optimizer.zero_grad()
            loss = iada(model(x[rows] * 3), truth[rows], ids=rows)
            loss.backward()
            optimizer.step()
    highest = report.suspects(1)[0].suspicion
    assert highest < 0.6
    report.write(tmp_path)
    assert f"No label stands out here: the highest suspicion is {highest:.2f}" in (tmp_path / "report.html").read_text()


def test_without_ids_a_part_is_kept_and_nobody_is_suspect(tmp_path):
    iada, model, optimizer, report = start(capacity=40)
    with pytest.warns(UserWarning, match="the batches have no sample ids: the report will name no suspects"):
        train(iada, model, optimizer, with_ids=False)
    assert len(report._merged().rows()["epsilon"]) == 40 and report._merged().label.size == 0
    with pytest.raises(RuntimeError, match=r"ids=ids"):
        report.suspects()
    iada.close()
    report.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "samples.csv").open()))
    assert len(rows) == 40 and {r["id"] for r in rows} == {"-1"}
    assert "drawn at random" in (tmp_path / "report.html").read_text()


def test_memory_is_bounded():
    recorder = Recorder(C, 4, 10, epochs=2, capacity=20, max_id=1000)
    for step in range(2000):
        n = 7
        f = torch.randn(n, 4)
        ids = torch.randint(0, 1000, (n,))
        record(recorder, torch.randint(0, C, (n,)), torch.randn(n, C), f, f[:, 0].abs(), f[:, 1].tanh(), ids, step)
        assert len(recorder._waiting) <= 64
    arrays = (recorder.epsilon, recorder.loss, recorder.contradicted, recorder.label, recorder.predicted)
    assert sum(a.nbytes for a in arrays) <= 1000 * (9 * 2 + 8)
    assert len(recorder.reservoirs) == 2 and len(recorder.rows()["f"]) == 20
    assert len(recorder.meta_loss.points()[1]) <= 2000 and len(recorder.seconds) == 200


def record(recorder, labels, logits, f, loss, epsilon, ids, number=0):
    """A step of one micro-batch, with a meta step."""
    step = Step(number)
    samples = {"labels": labels, "f": f, "loss": loss, "epsilon": epsilon}
    step.add(samples, [(recorder, recorder.see(samples, logits, ids))])
    step.augmented, step.meta = True, (torch.tensor(1.0), torch.tensor(True))
    recorder.commit(step, samples)


def test_a_value_that_is_not_finite_is_not_kept():
    recorder = Recorder(C, 1, 10)
    nan = torch.tensor([float("nan"), 0.5])
    record(
        recorder, torch.tensor([0, 1]), torch.zeros(2, C), torch.zeros(2, 1), torch.ones(2), nan, torch.tensor([0, 1])
    )
    recorder.drain()
    assert recorder.samples()["id"].tolist() == [1] and recorder.by_class[0][:, 0].tolist() == [0, 1, 0]


def test_buffers_that_are_used_again():
    """Loaders and captured graphs that write each batch into the same tensors."""
    iada, model, optimizer, report = start()
    x, y, _ = problem()
    data, target, ids = x[:BATCH].clone(), y[:BATCH].clone(), torch.arange(BATCH)
    for _ in range(4):
        for rows in torch.arange(N).split(BATCH):
            data.copy_(x[rows]), target.copy_(y[rows]), ids.copy_(rows)
            optimizer.zero_grad()
            iada(model(data), target, ids=ids).backward()
            optimizer.step()
    assert {s.id: s.label for s in report.suspects()} == dict(enumerate(y.tolist()))


def test_without_matplotlib():
    """The package is whole; a report says at once what it needs."""
    code = """
        import sys
        sys.modules["matplotlib"] = None
        from iada_plugin import IADAConfig, MetaIADA, MetaIADACallback, Report
        import torch, iada_plugin.report.visualize
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        batch = torch.randn(4, 2), torch.arange(4) % 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        iada = MetaIADA(model, optimizer, meta_loader=[batch], steps_per_epoch=1, epochs=3, config=IADAConfig(warmup_epochs=1))
        for make in (lambda: Report(iada), lambda: MetaIADACallback([batch], report_dir="x")):
            try:
                make()
            except ImportError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.count("pip install matplotlib") == 2, done.stderr


def test_the_reservoir_is_uniform():
    kept = np.zeros(50)
    for seed in range(400):
        reservoir = Reservoir(10, 1, seed)
        for part in np.arange(50.0).reshape(10, 5, 1):
            reservoir.add(part)
        assert reservoir.seen == 50 and len(reservoir.rows) == 10
        kept[reservoir.rows[:, 0].astype(int)] += 1
    assert kept.sum() == 4000 and abs(kept / 400 - 0.2).max() < 0.08  # four standard deviations


def test_a_curve_keeps_its_shape():
    curve = Curve(capacity=8)
    for value in range(100):
        curve.add(float(value))
    x, y = curve.points()
    assert len(y) <= 8 and curve.width == 16 and np.allclose(x[:-1], y[:-1])  # the value is its own number


def test_what_a_step_takes(finished):
    report, _, _ = finished
    seconds = report._merged().seconds
    assert set(seconds[0]) == {"warm-up"} and set(seconds[5]) == {"meta step"} and sorted(seconds) == list(range(8))
    assert all(0 < low <= median <= high for kinds in seconds.values() for low, median, high in kinds.values())
    assert len(report._merged().meta_loss.points()[1]) == 6 * PER_EPOCH


# ------------------------------------------------------------------------------------------------------------ analysis


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_and_precision_recall(ties):
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.3
    scores = rng.normal(size=300) + positive
    scores = scores.round(0) if ties else scores
    assert metrics.auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    precision, recall = metrics.precision_recall(scores, positive)
    theirs, recalls, _ = precision_recall_curve(positive, scores)
    assert np.allclose(precision[::-1], theirs[:-1]) and np.allclose(recall[::-1], recalls[:-1])
    assert np.isnan(metrics.auroc(scores, np.ones(300)))


def test_what_drives_epsilon():
    torch.manual_seed(0)
    network = PerturbationNetwork(4)
    torch.nn.init.normal_(network.output.weight)
    f = torch.randn(50, 4).double() * torch.tensor([1.0, 3.0, 0.5, 2.0]) + 1
    for _ in range(20):
        network.update_moments(f.float())
    network.double()
    signed, curves = explain(network, f.numpy(), strongest=2, points=5)
    std = network.var.sqrt()
    for k in range(4):
        step = torch.zeros(4).double()
        step[k] = 1e-5 * std[k]
        slope = (network(f + step) - network(f - step)).detach() / 2e-5  # by one standard deviation
        assert np.allclose(signed[:, k], slope * (f[:, k] - network.mean[k]) / std[k], atol=1e-3)
    assert list(curves) == list(np.argsort(-abs(signed).mean(axis=0))[:2])
    for k, (values, epsilon) in curves.items():
        for value, mean in zip(values, epsilon, strict=True):
            moved = f.clone()
            moved[:, k] = float(value)
            assert float(network(moved).mean()) == pytest.approx(float(mean), abs=1e-6)


def test_spectra():
    factor = torch.randn(2, 5, 2)
    diagonal = torch.rand(2, 5)
    full = torch.diag_embed(diagonal) + factor @ factor.mT
    expected = np.linalg.eigvalsh(full[1].numpy())[::-1]
    assert np.allclose(eigenvalues(full, 1), expected, atol=1e-5)
    assert np.allclose(eigenvalues(LowRank(diagonal, factor), 1), expected, atol=1e-5)
    assert np.allclose(eigenvalues(diagonal, 1), np.sort(diagonal[1].numpy())[::-1])


# ------------------------------------------------------------------------------------------------------------- writing


class Page(HTMLParser):
    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs["src"])
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


SECTIONS = ["adversarial_share", "epsilon", "clean_and_wrong", "finding", "suspects", "drivers", "spectra", "meta_loss", "step_time", "confusion",
            "class_accuracy", "group_accuracy"]  # fmt: skip


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    report, _, _ = finished
    folder = tmp_path_factory.mktemp("report")
    labels = np.arange(30) % C
    report.add_evaluation("cross-entropy", np.roll(labels, 1), labels, groups=labels % 2, group_names=["even", "odd"])
    report.add_evaluation("Meta-IADA", torch.from_numpy(labels), labels, groups=np.eye(2, dtype=bool)[labels % 2], group_names=["even", "odd"])  # fmt: skip
    assert report.write(folder) == folder / "report.html"
    return folder


def test_the_page_is_whole_and_self_contained(written, finished):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.ids == ["facts", *SECTIONS] and page.links == [f"#{s}" for s in SECTIONS]
    assert len(page.images) == len(SECTIONS)
    for name, source in zip(SECTIONS, page.images, strict=True):
        data = b64decode(source.removeprefix("data:image/png;base64,"))
        assert data == (written / f"{name}.png").read_bytes()
        assert min(Image.open(BytesIO(data)).size) > 150
    assert "http" not in re.sub('base64,[^"]*', "", text) and "<script" not in text
    assert "<bee>" not in text and "&lt;bee&gt;" in text  # names are text
    assert "No label stands out" not in text
    assert "first without warm-up is number 13" in text and "warmup_epochs=2" in text


def test_the_csv_holds_all_samples(written, finished):
    rows = list(csv.DictReader((written / "samples.csv").open()))
    suspects = finished[0].suspects()
    assert [int(r["id"]) for r in rows] == [s.id for s in suspects]
    assert [float(r["epsilon"]) for r in rows] == pytest.approx([s.epsilon for s in suspects], abs=1e-5)
    assert {k: int(rows[0][k]) for k in ("label", "predicted", "epochs")} == {k: getattr(suspects[0], k) for k in ("label", "predicted", "epochs")}  # fmt: skip
    assert int(rows[0]["true_label"]) == problem()[2][suspects[0].id]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_every_picture(written, tmp_path):
    check = "<script>addEventListener('load', () => { document.title = [...document.images].filter(i => i.naturalWidth > 150"
    check += " && i.getBoundingClientRect().width > 150).length + ' pictures, ' + document.querySelectorAll('h2').length })</script>"
    copy = tmp_path / "page.html"
    copy.write_text((written / "report.html").read_text().replace("</body>", f"{check}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert f"<title>{len(SECTIONS)} pictures, {len(SECTIONS)}</title>" in shown, shown[:300]


@pytest.mark.parametrize("classes", [15, 70, 300])
def test_pictures_of_many_classes(classes):
    rng = np.random.default_rng(0)
    names = [f"class number {c}" for c in range(classes)]
    counts = {e: np.column_stack([np.full(classes, 5), rng.integers(0, 6, classes), np.zeros(classes)]) for e in (3, 4)}
    made = [
        figures.adversarial_share(counts, names, np.arange(classes)),
        figures.epsilon_histograms(rng.uniform(-1, 1, 500), rng.integers(0, classes, 500), names, (-1, 1)),
        figures.accuracies({"a": rng.random(classes), "b": rng.random(classes)}, names, np.full(classes, 9)),
        figures.confusions({"a": rng.integers(0, 9, (classes, classes))}, names),
    ]
    for figure in made:
        buffer = BytesIO()
        figure.savefig(buffer)
        assert max(Image.open(buffer).size) < 2600


@pytest.mark.parametrize("options, match", [
    ({"class_names": ["a", "b"]}, "2 names; the classifier has 3"),
    ({"epochs": 0}, "epochs=0 must be a whole number"),
    ({"capacity": 0.5}, "capacity=0.5 must be"),
    ({"true_labels": [0.5] * N}, "true_labels must be whole numbers"),
])  # fmt: skip
def test_options_that_cannot_work(options, match):
    with pytest.raises(ValueError, match=match):
        start(**options)


@pytest.mark.parametrize("ids, match", [
    (torch.arange(9), r"ids are torch.int64 \[9\].*10 samples"),
    (torch.rand(10), "ids are torch.float32"),
    (list(range(10)), "ids are list"),
    (torch.arange(10) - 1, r"sample id -1 is not in 0..59"),
    (torch.arange(10) + 55, r"sample id 60 is not in 0..59"),
    (None, "true_labels are known by sample id"),
])  # fmt: skip
def test_ids_that_are_no_row_numbers(ids, match):
    iada, model, _, _ = start(true_labels=problem()[2])
    x, y, _ = problem()
    with pytest.raises(ValueError, match=match):
        iada(model(x[:10]), y[:10], ids=ids)


def test_ids_with_every_batch_or_with_none():
    iada, model, _, _ = start()
    x, y, _ = problem()
    iada(model(x[:10]), y[:10], ids=torch.arange(10))
    with pytest.raises(ValueError, match="some batches have sample ids"):
        iada(model(x[:10]), y[:10])


def test_evaluations_that_do_not_fit():
    report = start()[3]
    for arguments_, match in [
        (([0, 1], [0]), "2 predictions for 1 labels"),
        (([0, 3], [0, 1]), "predictions run from 0 to 3; there are 3"),
        (([0.5], [0]), "predictions must be whole numbers"),
        (([0], [0], [0, 1]), r"groups \[2, 2\] for 1 labels"),
        (([0], [0], [-1]), "group -1 is negative"),
        (([0], [0], ["old"]), "groups must be whole numbers"),
        (([0], [0], [0], ["a", "b"]), "2 group_names for 1 groups"),
        (([0, 0], [0, 0], [0, 1], ["a", "a"]), "1 group_names for 2 groups"),
    ]:
        with pytest.raises(ValueError, match=match):
            report.add_evaluation("x", *arguments_)


def test_nothing_to_report(tmp_path):
    iada, model, optimizer, report = start()
    train(iada, model, optimizer, epochs=2)
    assert report.empty
    for call in (report.suspects, lambda: report.write(tmp_path)):
        with pytest.raises(RuntimeError, match="no batch was trained after the warm-up"):
            call()


def test_a_report_changes_nothing():
    """Parameters, Omega and random state with a report are those without, bit for bit."""
    found = []
    for watched in (True, False):
        iada, model, optimizer, _ = start()
        if not watched:
            iada.observers.clear()
        train(iada, model, optimizer)
        state = {**model.state_dict(), **iada.state_dict()}
        found.append({**state, "rng": torch.get_rng_state()})
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_names_that_are_no_plain_text(tmp_path):
    iada, model, optimizer, report = start(class_names={2: "c" * 60, 0: "cheap $ & <$5", 1: "a_$^$b"})
    assert report.class_names[0].startswith("cheap")
    train(iada, model, optimizer, epochs=4)
    report.add_evaluation("$x_$ " + "long " * 20, [0, 1, 2], [0, 1, 1], groups=[0, 1, 1], group_names=["$", "$$"])
    report.write(tmp_path)
    assert "cheap $ &amp; &lt;$5" in (tmp_path / "report.html").read_text()


def test_only_values_that_are_not_finite(tmp_path):
    iada, model, optimizer, report = start()
    train(iada, model, optimizer, epochs=2)
    x, y, _ = problem()
    for rows in torch.arange(N).split(BATCH):
        iada(model(x[rows] * float("nan")), y[rows], ids=rows)
        optimizer.step()
    assert report.empty
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        report.write(tmp_path)


def test_what_a_report_holds_after_closing():
    """The model and its optimizer can go."""
    iada, model, optimizer, report = start()
    train(iada, model, optimizer, epochs=4)
    iada.close()
    watched = weakref.ref(optimizer)
    del iada, model, optimizer
    gc.collect()
    assert watched() is None and len(report.suspects()) == N
    closed = start(none=True)[0]
    closed.close()
    with pytest.raises(RuntimeError, match="was closed: make the Report"):
        Report(closed)


def test_a_batch_counts_in_the_epoch_of_its_step():
    iada, model, optimizer, report = start()
    train(iada, model, optimizer, epochs=3)
    x, y, _ = problem()
    loss = iada(model(x[:10]), y[:10], ids=torch.arange(10))
    report.state_dict()  # in the middle of the next epoch's first step
    loss.backward()
    optimizer.step()
    assert {e: int(c[:, 0].sum()) for e, c in report._merged().by_class.items()} == {2: N, 3: 10}


def test_a_state_in_a_report_of_more_capacity():
    rows = 50
    small, large = (Recorder(2, 1, 10, capacity=c, epochs=1) for c in (10, 100))
    zeros = torch.zeros(rows)
    record(small, zeros.long(), torch.zeros(rows, 2), torch.ones(rows, 1), zeros + 1, zeros + 0.5, torch.arange(rows))
    large.load_state_dict(small.state_dict())
    assert large.rows()["epsilon"].tolist() == [0.5] * 10
    record(large, zeros.long(), torch.zeros(rows, 2), torch.ones(rows, 1), zeros + 1, zeros + 0.5, torch.arange(rows))
    large.drain()
    assert large.rows()["epsilon"].tolist() == [0.5] * 10 and large.reservoirs[0].seen == 100


def test_asked_after_the_process_group_is_gone():
    recorder = Recorder(2, 1, 10)
    recorder._world_size = 2
    with pytest.raises(RuntimeError, match=r"2 processes have trained, of which 1 can be asked"):
        recorder.merged()


# -------------------------------------------------------------------------------------------------------- the Trainer


def watched(folder, **options):
    return MetaIADACallback(dataset(8, seed=7), IADAConfig(warmup_epochs=1), report_dir=folder / "report", **options)


@pytest.fixture
def no_page(monkeypatch):
    """For tests that look at what was collected: drawing the page takes longer than the training."""
    monkeypatch.setattr(Report, "write", lambda self, folder: Path(folder) / "report.html")


def labels_of_rows(train):
    return {i: row["labels"] for i, row in enumerate(train)}


@pytest.mark.parametrize("options", [
    {},
    {"dataloader_num_workers": 1},
    {"gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 5, "dataloader_drop_last": True},
])  # fmt: skip
def test_the_trainer_tells_samples_by_row(tmp_path, options):
    rows = dataset(32)
    rows = rows.remove_columns("labels").add_column("labels", [(i * i) % 7 % 2 for i in range(32)])  # no pattern by row
    ours = watched(tmp_path)
    t = trainer(tmp_path, ours, train=rows, max_steps=16, evaluate=True, eval_strategy="epoch", **options)
    t.train()
    suspects = ours.report.suspects()
    expected = labels_of_rows(rows)
    assert {s.id: s.label for s in suspects}.items() <= expected.items() and len(suspects) >= 30
    assert sorted(ours.report.evaluations) == ["Meta-IADA", "warm-up"]
    assert len(ours.report.evaluations["Meta-IADA"].labels) == 16
    found = {p.name for p in (tmp_path / "report").iterdir()}
    assert {"report.html", "samples.csv", "confusion.png", "class_accuracy.png"} <= found
    # Nothing of it stays behind.
    assert not t.model._forward_pre_hooks and not t.model._forward_hooks
    loader = t.get_train_dataloader()
    assert "sample_ids" not in next(iter(loader))


def test_the_same_training_with_a_report(tmp_path, no_page):
    found = []
    for report in (True, False):
        ours = watched(tmp_path) if report else MetaIADACallback(dataset(8, seed=7), IADAConfig(warmup_epochs=1))
        t = trainer(tmp_path, ours)
        t.train()
        found.append(t.model.state_dict())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_own_ids_and_a_resumed_run(tmp_path, no_page):
    """A "sample_ids" column that reaches the model is taken as it is; the report of a resumed run is that of the whole run."""
    rows = dataset(32).add_column("sample_ids", [100 + i for i in range(32)])
    found = []
    for resume in (None, str(tmp_path / "checkpoint-10")):
        ours = watched(tmp_path, report_options={"max_id": 200, "epochs": 2})
        t = trainer(
            tmp_path, ours, train=rows, save_strategy="steps", save_steps=5, remove_unused_columns=False, max_steps=14
        )
        t.train(resume_from_checkpoint=resume)
        found.append((ours.report.suspects(), ours.report._merged()))
    (whole, one), (resumed, two) = found
    assert whole == resumed and {s.id: s.label for s in whole} == {
        100 + i: v for i, v in labels_of_rows(dataset(32)).items()
    }
    assert all(np.array_equal(one.by_class[e], two.by_class[e]) for e in one.by_class) and list(one.by_class) == [
        1,
        2,
        3,
    ]
    assert np.array_equal(one.meta_loss.points()[1], two.meta_loss.points()[1]) and two.first_step == 4
    assert len(two.rows()["f"]) == len(one.rows()["f"]) == 32 + 16


def test_a_checkpoint_without_what_was_seen(tmp_path, no_page):
    """It says since when the report is, and a state of another classifier is refused."""
    t = trainer(tmp_path, watched(tmp_path), save_strategy="steps", save_steps=5, max_steps=8)
    t.train()
    (tmp_path / "checkpoint-5" / "iada_report-0.pt").unlink()
    ours = watched(tmp_path)
    t = trainer(tmp_path, ours, save_strategy="steps", save_steps=5, max_steps=8)
    t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert ours.report._merged().first_step == 5 and len(ours.report.suspects()) == 24
    other = start()[3]
    with pytest.raises(ValueError, match="of other classes, characteristics, epochs or processes"):
        other.load_state_dict(ours.report.state_dict())


def test_a_streamed_training_set_has_no_rows(tmp_path):
    config = IADAConfig(warmup_ratio=0.5)
    ours = MetaIADACallback(dataset(8, seed=7), config, report_dir=tmp_path / "report", class_counts=[16, 16])
    streamed = IterableDataset.from_generator(_stream)
    Trainer(model=distilbert(), args=arguments(tmp_path), train_dataset=streamed, callbacks=[ours]).train()
    assert not ours.report._merged().with_ids and (tmp_path / "report" / "report.html").is_file()


def _stream():
    yield from [dict(row) for row in dataset(32)]


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_no_step_after_the_warm_up_is_said(tmp_path):
    t = trainer(tmp_path, watched(tmp_path))
    t.add_callback(StopEarly())
    with pytest.warns(UserWarning, match="no report in"):
        t.train()
    assert not (tmp_path / "report").exists()


def test_closing_goes_on_where_a_report_fails():
    iada, model, optimizer, report = start()
    train(iada, model, optimizer, epochs=4)
    iada.before_close.append(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        iada.close()
    assert type(model.fc) is torch.nn.Linear and not model._forward_hooks and len(report.suspects()) == N


def test_another_engine_takes_the_place_of_the_first(tmp_path):
    iada, model, optimizer, report = start()
    train(iada, model, optimizer, epochs=4)
    x, _, truth = problem()
    with pytest.warns(UserWarning, match="an earlier MetaIADA"):
        MetaIADA(
            model, optimizer, meta_loader=[(x, truth)], steps_per_epoch=1, epochs=3, config=IADAConfig(warmup_epochs=1)
        )
    report.write(tmp_path)
    assert (tmp_path / "samples.csv").is_file()


class Rows(torch.utils.data.Dataset):
    """A torch data set that a callback changes, and that can be told to go its own ways."""

    def __init__(self, batches=False):
        self.rows, self.level, self.seen = [dict(row) for row in dataset(32)], 0, []
        if batches:
            self.__getitems__ = lambda indices: _collate([self.rows[i] for i in indices])

    def __len__(self):
        return 32

    def __getitem__(self, i):
        self.seen.append(self.level)
        return self.rows[i]


def _collate(rows):
    return rows if isinstance(rows, dict) else {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}


def _drop_one(rows):
    return _collate(rows[:-1])


class Curriculum(TrainerCallback):
    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.level = round(state.epoch or 0)
        assert isinstance(train_dataloader.dataset[0], dict)
        train_dataloader.dataset.seen.pop()


def test_the_users_data_set_is_still_theirs(tmp_path, no_page):
    rows, meta = Rows(), dataset(8, seed=7)
    ours = MetaIADACallback(meta, IADAConfig(warmup_epochs=1), report_dir=tmp_path / "report", class_counts=[16, 16])
    t = Trainer(model=distilbert(), args=arguments(tmp_path, max_steps=12), train_dataset=rows, data_collator=_collate,
                callbacks=[ours, Curriculum()])  # fmt: skip
    t.train()
    assert rows.level == 2 and sorted(rows.seen)[:32] == [0] * 32 and max(rows.seen) == 2 and rows.seen.count(1) == 32
    assert len(ours.report.suspects()) == 32


@pytest.mark.parametrize("batches, collate", [(False, _drop_one), (True, _collate)])
def test_batches_whose_rows_are_not_known(tmp_path, batches, collate):
    """Training goes on, without suspects."""
    ours = watched(tmp_path)
    t = Trainer(
        model=distilbert(),
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=Rows(batches),
        data_collator=collate,
        callbacks=[ours],
    )
    with pytest.warns(UserWarning, match="the report will name no suspects"):
        t.train()
    assert t.state.global_step == 8 and not ours.report._merged().with_ids
    assert (tmp_path / "report" / "report.html").is_file()


def test_what_does_not_fit_the_training_set_is_said_before_the_first_step(tmp_path):
    for options, train_set, match in [
        ({"true_labels": [0] * 9}, None, "true_labels has 9 values; the training set has 32 rows"),
        ({"true_labels": [0] * 32}, IterableDataset.from_generator(_stream), "a streamed training set has none"),
        ({"class_names": ["a"]}, None, "class_names has 1 names"),
        ({"samples": ["a"] * 40}, None, "samples has 40 entries; the training set has 32 rows"),
    ]:
        ours = watched(tmp_path, report_options=options, class_counts=[16, 16])
        ours.config = IADAConfig(warmup_ratio=0.5)
        t = trainer(tmp_path, ours, train=train_set)
        with pytest.raises(ValueError, match=match):
            t.train()
        assert type(t.model.classifier) is torch.nn.Linear and not t.model._forward_hooks


class LookingElsewhere(TrainerCallback):
    """Runs the model in eval mode in each step, and breaks an evaluation off."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad():
            model(**_collate([dict(dataset(1)[0])]))
        model.train()
        if state.global_step == 6:
            with pytest.raises(ZeroDivisionError):
                self.trainer.evaluate(Broken())


class Broken(Rows):
    def __getitem__(self, i):
        return self.rows[i] if i < 16 else 1 / 0


def test_only_evaluations_are_evaluations(tmp_path, no_page):
    ours, other = watched(tmp_path), LookingElsewhere()
    rows = dataset(20, seed=3).remove_columns("labels").add_column("labels", [-100] * 4 + [0, 1] * 8)
    options = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8}
    other.trainer = Trainer(model=distilbert(), args=arguments(tmp_path, **options), train_dataset=dataset(), eval_dataset=rows,
                            callbacks=[ours, other])  # fmt: skip
    other.trainer.train()
    assert {k: len(e.labels) for k, e in ours.report.evaluations.items()} == {"warm-up": 16, "Meta-IADA": 16}


def test_a_damaged_or_other_state_starts_the_report_anew(tmp_path, no_page):
    trainer(tmp_path, watched(tmp_path), save_strategy="steps", save_steps=5).train()
    file = tmp_path / "checkpoint-5" / "iada_report-0.pt"
    whole = file.read_bytes()
    for content, options in ((b"nothing", {}), (whole, {"epochs": 2})):
        file.write_bytes(content)
        ours = watched(tmp_path, report_options=options)
        with pytest.warns(UserWarning, match=r"(?s)iada_report-0.pt cannot be used .*from step 5 on"):
            trainer(tmp_path, ours, save_strategy="steps", save_steps=5).train(resume_from_checkpoint=str(file.parent))
        assert ours.report._merged().first_step == 5


def test_names_in_the_models_config():
    model = distilbert(12)
    engine = type("Engine", (), {"head": model.classifier})
    for names, expected in [
        ({str(i): f"n{i}" for i in range(12)}, [f"n{i}" for i in range(12)]),
        ({0: "a", 1: "b"}, None),
        ({"x": "a"}, None),
        (None, None),
    ]:
        model.config.__dict__["id2label"] = names
        assert _class_names(model, engine) == expected


def test_report_options_are_checked_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"report_options colour: a Report has the options class_names, true_labels"):
        watched(tmp_path, report_options={"colour": 1})


def test_suspects_shown_as_text_and_as_rows(tmp_path):
    iada, model, optimizer, _ = start(none=True)
    texts = Dataset.from_dict(
        {"uuid": [f"{i:03}" for i in range(N)], "text": [f"text <{i}> " + "x" * 300 for i in range(N)]}
    )
    report = Report(iada, samples=texts)
    train(iada, model, optimizer, epochs=4)
    first = report.suspects(1)[0].id
    report.write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert f"text &lt;{first}&gt; xxx" in text and "x" * 250 not in text and not (tmp_path / "suspects.png").exists()
    shown = [np.zeros((4, 4, 3)), np.zeros((2, 4, 5)), np.zeros((1, 4, 4)), Image.new("RGBA", (4, 4)), Image.new("P", (4, 4)),
             {"image": None, "text": "a\ud83d b"}, np.zeros(4), torch.zeros(4, 4, dtype=torch.bfloat16)]  # fmt: skip
    report.samples = lambda i: shown[i % len(shown)]  # one that cannot be shown is left out
    report.write(tmp_path)
    assert (tmp_path / "suspects.png").is_file() and "a? b" in (tmp_path / "report.html").read_text()
    report.samples = None
    report.write(tmp_path)
    assert not (tmp_path / "suspects.png").exists()  # of the report before
    for samples, match in (
        (lambda i: np.zeros(4), r"an image has the shape \[4\]"),
        ([], r"samples\[0\] cannot be had"),
    ):
        with pytest.warns(UserWarning, match="had a Report already"), pytest.raises(ValueError, match=match):
            Report(iada, samples=samples)


def test_a_report_that_cannot_be_written_loses_nothing(tmp_path):
    (tmp_path / "report").write_text("a file where the folder should be")
    t = trainer(tmp_path, watched(tmp_path))
    with pytest.warns(UserWarning, match=r"could not be written .*train\(\) is over"):
        t.train()
    assert t.state.global_step == 8
