"""The pages of docs/ do what they say, name files that exist, and every message of the package has its row."""

import ast
import builtins
import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from models import MLP, ConvNet, distilbert, tokens
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

import iada_plugin
from iada_plugin import IADAConfig, MetaIADA, MetaIADACallback

try:
    from iada_plugin import MetaIADATask
except ImportError:
    MetaIADATask = None  # a timm before 1.0.23

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
TROUBLE = "troubleshooting.md"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_site_has_every_page_and_every_public_name():
    site = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in PAGES if name not in site] == []
    assert {*re.findall(r"^::: iada_plugin\.(\w+)$", PAGES["api.md"], re.MULTILINE)} == {*iada_plugin.__all__} - {
        "__version__"
    }


# ------------------------------------------------------------------------------------------------------ blocks that run


def rows(n, seed):
    return Dataset.from_dict({k: v.tolist() for k, v in tokens(n, 2, seed=seed).items()})


def trainer_names(tmp_path, save="no"):
    args = TrainingArguments(str(tmp_path / "run"), max_steps=8, logging_steps=1, per_device_train_batch_size=8, report_to=[],
                             use_cpu=True, save_strategy=save, disable_tqdm=True)  # fmt: skip
    return {"model": distilbert(), "args": args, "train": rows(32, 0), "dev": rows(8, 1), "meta": rows(8, 2)}


def images_names(tmp_path):
    x = torch.randn(16, 3, 32, 32)
    data = TensorDataset(x, torch.arange(16) % 4)
    model = ConvNet()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train": data,
        "rows": range(8),
        "loader": DataLoader(data, batch_size=8, drop_last=True),
        "validation": DataLoader(data, batch_size=16),
        "meta_loader": DataLoader(data, batch_size=8),
        "counts": [4, 4, 4, 4],
        "epochs": 4,
    }


def loop_names(tmp_path):
    data = TensorDataset(torch.randn(24, 6), torch.arange(24) % 3)
    model = MLP()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data": data,
        "meta": TensorDataset(torch.randn(12, 6), torch.arange(12) % 3),
        "loader": DataLoader(data, batch_size=6),
        "validation": DataLoader(data, batch_size=12),
        "meta_loader": DataLoader(data, batch_size=6),
        "counts": [8, 8, 8],
        "epochs": 3,
        "network": MLP,
    }


def trusted_names(tmp_path):
    names = loop_names(tmp_path)
    labels = (np.arange(60) % 3).copy()
    names["train"] = TensorDataset(torch.randn(60, 6), torch.arange(60) % 3)
    return {**names, "labels": labels, "corrected_labels": labels[:30], "clean": names["meta"]}


def special_names(tmp_path):
    names = trainer_names(tmp_path)
    config = IADAConfig.fine_tuning()
    return {**names, "Trainer": Trainer, "config": config, "callback": MetaIADACallback(names["meta"], config)}


def split_names(tmp_path):
    labels, groups = np.arange(240) % 4, np.arange(240) // 4 % 3
    groups[:20] = 0
    checked = np.arange(0, 240, 3)
    return {
        "labels": labels,
        "groups": np.eye(3, dtype=int)[groups],
        "attribute": groups,
        "checked_rows": checked,
        "checked_labels": np.where(checked % 10, labels[checked], (labels[checked] + 1) % 4),
    }


def resumed_names(tmp_path):
    names = trainer_names(tmp_path, save="epoch")
    callbacks = [MetaIADACallback(names["meta"], IADAConfig(warmup_epochs=1))]
    names["trainer"] = Trainer(
        model=names["model"], args=names["args"], train_dataset=names["train"], callbacks=callbacks
    )
    return names


def pictures_names(tmp_path):
    model = ConvNet()
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    iada = MetaIADA(model, torch.optim.SGD(model.parameters(), lr=0.1), meta_loader=[(x, y)], steps_per_epoch=1, epochs=3,
                    config=IADAConfig(warmup_epochs=1))  # fmt: skip
    for _ in range(3):
        iada(model(x), y).backward()
        iada.optimizer.step()
    decoder = torch.nn.Sequential(torch.nn.Linear(8, 3 * 8 * 8), torch.nn.Unflatten(1, (3, 8, 8)))
    return {
        "iada": iada,
        "images": x[:4],
        "labels": y[:4],
        "train_loader": [(x, y)],
        "train_images": x,
        "decoder": decoder,
    }


def report_names(tmp_path):
    names = trainer_names(tmp_path)
    labels = np.arange(20) % 2
    return {
        **names, "Trainer": Trainer, "config": IADAConfig(warmup_epochs=1), "texts": [f"text {i}" for i in range(32)],
        "predictions": labels, "plain_predictions": 1 - labels, "test_labels": labels, "test_groups": labels,
    }  # fmt: skip


def wrong_labels_names(tmp_path):
    names = trainer_names(tmp_path)
    x, y = torch.randn(60, 6), torch.arange(60) % 3
    model = MLP()
    return {
        "embeddings": x, "labels": y, "trusted_rows": range(30), "texts": [f"text {k}" for k in range(60)], "epochs": 2, "names": ["a", "b", "c"],
        "train": TensorDataset(x, y), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "classifier": names["model"], "args": names["args"], "dataset": rows(60, 0),
    }  # fmt: skip


def decoders_names(tmp_path):
    names = trainer_names(tmp_path)
    config = LlamaConfig(
        vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0
    )
    return {**names, "model": LlamaForSequenceClassification(config), "rows": range(8)}


def lightning_names(tmp_path):
    pytest.importorskip("lightning")
    y = torch.arange(24) % 3
    return {
        "model": MLP(),
        "train": TensorDataset(torch.randn(24, 6), y),
        "rows": range(12),
        "epochs": 5,
        "folder": tmp_path,
    }


def other_loops_names(tmp_path):
    pytest.importorskip("fastai.basics")
    names = loop_names(tmp_path)
    return {**names, "train": names["data"], "validation": names["data"], "trusted": range(12), "device": "cpu"}


def embeddings_names(tmp_path):
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 200)
    x = draw.normal(size=(200, 4)) + 3 * y[:, None]
    return {"X": x, "y": y, "trusted": range(60), "X_test": x[:5]}


def after_wrong_labels(names):
    assert (
        names["recorder"].epochs == [1, 2] and names["audit"].wrong_labels.label.tolist() == names["dataset"]["labels"]
    )
    assert Path("wrong_labels/wrong_labels.html").is_file() and Path("audit/wrong_labels.csv").is_file()


#: What the blocks of a page find: one namespace a page, in which its blocks run one after the other.
PREPARED = {
    "examples.md": lambda tmp_path: {"labels": np.arange(200) % 4},
    "extending.md": loop_names,
    "how_it_works.md": pictures_names,
    "hypergradient_modes.md": loop_names,
    "long_runs.md": resumed_names,
    "meta_set.md": split_names,
    "plain_loop.md": loop_names,
    "report.md": report_names,
    "settings.md": lambda tmp_path: {},
    "timm.md": images_names,
    "trainer.md": trainer_names,
    "trainer_special.md": special_names,
    "trusted_rows.md": trusted_names,
    "without_meta_set.md": loop_names,
    "decoders.md": decoders_names,
    "embeddings.md": embeddings_names,
    "lightning.md": lightning_names,
    "other_loops.md": other_loops_names,
    "wrong_labels.md": wrong_labels_names,
}


def after_trainer(names):
    """The metric for selection passes over the warm-up."""
    assert any("iada/meta_loss" in log for log in names["trainer"].state.log_history)
    names["model"], names["callback"] = distilbert(), MetaIADACallback(names["meta"], names["config"])
    args = TrainingArguments("best", num_train_epochs=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, eval_strategy="epoch",
                             save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="selection",
                             greater_is_better=True, disable_tqdm=True)  # fmt: skip
    names["trainer"] = Trainer(model=names["model"], args=args, train_dataset=names["train"], eval_dataset=names["dev"],
                               callbacks=[names["callback"]], compute_metrics=names["compute_metrics"])  # fmt: skip
    names["trainer"].train()
    found = [log["eval_selection"] for log in names["trainer"].state.log_history if "eval_selection" in log]
    assert len(found) == 3 and found[0] <= 0 < names["trainer"].state.best_metric == max(found[1:])


def after_loop(names):
    assert names["accelerator"].num_processes == 1 and names["iada"].step == 2 * names["epochs"]


def after_trusted(names):
    assert len(names["rows"]) == 30 and names["joined_rows"].tolist() == list(range(60, 72))
    assert names["iada"].reference.histories.visits.tolist() == [names["epochs"]] * 60


def after_examples(names):
    assert len(names["checked"]) == 20 and (names["noisy"] == names["labels"])[names["checked"]].all()


def after_special(names):
    assert type(names["trainer"]).__name__ == "Trainer" and names["counts"].tolist() == [16, 16]
    assert any("iada/meta_loss" in log for log in names["trainer"].state.log_history)


def after_timm(names):
    assert names["trusted"].engine.reference.histories.visits.tolist() == [1] * 16


def after_without_meta_set(names):
    assert names["head"].class_count.sum() == 24 * names["epochs"]


def after_split(names):
    labels, rows = names["labels"], names["meta_rows"]
    assert names["trusted"][rows].all() and np.bincount(labels[rows]).tolist() == [5] * 4
    assert len(rows) + len(names["train_rows"]) == len(labels)


def after_report(names):
    page = Path("report/report.html").read_text()
    assert "text 3" in page and "group_accuracy" in page and len(names["callback"].report.suspects()) == 32


def after_extending(names):
    assert names["iada"].learner.perturbation.mean.numel() == 16 and names["iada"].pop_metrics()["iada/meta_loss"] > 0
    assert names["weighted"].epsilon.std() > 0 and names["weighted"].failures.skipped == 0


#: What holds after a page's blocks have run.
AFTERWARDS = {
    "examples.md": after_examples,
    "extending.md": after_extending,
    "meta_set.md": after_split,
    "plain_loop.md": after_loop,
    "report.md": after_report,
    "timm.md": after_timm,
    "trainer.md": after_trainer,
    "trainer_special.md": after_special,
    "trusted_rows.md": after_trusted,
    "without_meta_set.md": after_without_meta_set,
    "wrong_labels.md": after_wrong_labels,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer's, from another test
    assert page in PREPARED, f"docs/{page} has python blocks: give them a namespace in PREPARED"
    if "MetaIADATask" in PAGES[page] and MetaIADATask is None:
        pytest.skip("this timm has no timm.task")
    monkeypatch.chdir(tmp_path)
    names = PREPARED[page](tmp_path)
    for number, block in enumerate(blocks(PAGES[page], "python"), start=1):
        assert len(block.strip().splitlines()) <= 15, f"block {number} of docs/{page} is long"
        exec(compile(block, f"docs/{page}, block {number}", "exec"), names)
    AFTERWARDS.get(page, lambda names: None)(names)


def test_no_namespace_without_a_page():
    assert all(blocks(PAGES.get(page, ""), "python") for page in PREPARED)
    assert set(AFTERWARDS) <= set(PREPARED)


# --------------------------------------------------------------------------------------------------------- links, scripts

#: Scripts of other projects that a page runs.
ELSEWHERE = {"train.py"}


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """GitHub's anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_links_lead_somewhere(page):
    path = ROOT / page
    prose = re.sub(r"`[^`\n]*`", "code", without_blocks(path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(found.read_text()), f"{page} links to {target}"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_scripts_that_are_run_exist(page):
    for block in blocks((ROOT / page).read_text(), "bash"):
        for script in re.findall(r"[\w./-]+\.(?:py|sh)\b|(?<!\S)\.ci/\w+", block):
            assert script in ELSEWHERE or (ROOT / script).is_file(), f"{page} runs {script}"


# --------------------------------------------------------------------------------------------------------- messages

HOLE = "\0"  # stands for what a message fills in


def is_error(call):
    """``SomeError("...")``, ``warnings.warn("...")`` or ``logger.warning("...")``."""
    name = ast.unparse(call.func)
    if name in ("warnings.warn", "logger.warning", "logger.error"):
        return True
    kind = getattr(builtins, name, None)
    known = isinstance(kind, type) and issubclass(kind, BaseException)
    return (known or name.endswith("Error")) and name != "AttributeError"  # which Python asks for


def text_of(node, names, depth=4):
    """Text of a message, with holes for what is known at run time only; ``names`` holds the strings that were assigned."""
    again = lambda part: text_of(part, names, depth - 1)  # noqa: E731
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(again, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return again(node.left) + again(node.right)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return again(node.value)
    if isinstance(node, ast.IfExp):  # one of the two is enough to tell the message
        return again(node.body)
    if isinstance(node, ast.Name) and node.id in names and depth:
        return again(names[node.id])
    return HOLE


def strings(scope, nested):
    """Names that a module or function assigns, and what it assigns them first."""
    found = {}
    for node in ast.walk(scope) if nested else scope.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, node.value)
    return found


def messages():
    """``{place: text}`` of every message of the package."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "iada_plugin").rglob("*.py"))}
    shared = {}  # constants such as REENTRANT are imported by other modules
    for tree in trees.values():
        shared |= {name: value for name, value in strings(tree, nested=False).items() if name.isupper()}
    found = {}
    for path, tree in trees.items():
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for scope in [tree, *functions]:  # inner functions after the outer ones
            names = {**shared, **strings(scope, nested=scope is not tree)}
            for call in ast.walk(scope):
                if isinstance(call, ast.Call) and call.args and is_error(call):
                    text = " ".join(text_of(call.args[0], names).replace("`", "").split())
                    found[f"{path.relative_to(ROOT)}:{call.lineno}"] = text
    return found


def patterns():
    """``{first cell: [regular expressions]}`` of the message tables of the troubleshooting page."""
    found = {}
    for table in re.findall(r"^\| message \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", PAGES[TROUBLE], re.MULTILINE):
        for row in table.splitlines():
            cell = row.split(" | ")[0]
            spans = [html.unescape(span) for span in re.findall(r"`([^`]+)`", cell)]
            assert spans, f"a row without a message: {row}"
            for span in spans:
                parts = [part.strip() for part in span.split("...") if part.strip()]
                assert sum(map(len, parts)) >= 10, f"too short to tell a message: {span}"
                found.setdefault(span, re.compile(".*?".join(map(re.escape, parts)), re.DOTALL))
    return found


MESSAGES = messages()


def test_the_messages_are_found():
    assert len(MESSAGES) > 100
    assert any(place.startswith("iada_plugin/data/") for place in MESSAGES)
    assert sum("reentrant gradient checkpointing" in text for text in MESSAGES.values()) >= 3  # a constant, imported
    blank = [place for place, text in MESSAGES.items() if len(text.replace(HOLE, "")) < 12]
    assert not blank, f"what do these say? Write the text where it is raised: {blank}"


def test_every_message_has_a_row():
    known = patterns().values()
    missing = [f"{place}: {text.replace(HOLE, '...')}" for place, text in MESSAGES.items()
               if not any(pattern.search(text) for pattern in known)]  # fmt: skip
    assert not missing, f"docs/{TROUBLE} has no row for:\n" + "\n".join(missing)


def test_every_row_has_a_message():
    texts = MESSAGES.values()
    stale = [span for span, pattern in patterns().items() if not any(map(pattern.search, texts))]
    assert not stale, "no message of the package is:\n" + "\n".join(stale)
