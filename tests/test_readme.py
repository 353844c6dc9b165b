"""The README does what it says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from models import MLP, distilbert, tokens
from transformers import TrainingArguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def rows(n, seed):
    return Dataset.from_dict({k: v.tolist() for k, v in tokens(n, 2, seed=seed).items()})


def images(*shape):
    return torch.utils.data.TensorDataset(torch.randn(16, *shape), torch.arange(16) % 10)


def trainer_names(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=10, logging_steps=1, per_device_train_batch_size=8, report_to=[], use_cpu=True,
                             save_strategy="no")  # fmt: skip
    return {"model": distilbert(), "args": args, "train": rows(32, 0), "dev": rows(8, 1), "rows": range(8)}


def timm_names(tmp_path):
    return {"train": images(3, 32, 32), "rows": range(10), "epochs": 5}


def loop_names(tmp_path):
    model = MLP(classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"train": images(6), "rows": range(10), "epochs": 3, "model": model, "optimizer": optimizer}


def embeddings_names(tmp_path):
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 100)
    x = draw.normal(size=(100, 4)) + 2 * y[:, None]
    return {"X": x, "y": y, "rows": range(20), "X_test": x[:5]}


PREPARED = {"Trainer": trainer_names, "TrustedClassifier": embeddings_names, "timm": timm_names, "Report": loop_names}


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[index]
    key = next(k for k in PREPARED if k in block)
    if "MetaIADATask" in block:
        pytest.importorskip("timm.task")  # timm >= 1.0.23
    names = PREPARED[key](tmp_path)
    exec(compile(block, f"README block {index}", "exec"), names)
    if key == "Trainer":
        assert any("iada/let_go" in log for log in names["trainer"].state.log_history)
        assert (tmp_path / "report" / "report.html").is_file() and len(names["callback"].report.suspects()) == 32
        assert names["trainer"].state.global_step == 10 and (tmp_path / "my-model" / "config.json").is_file()
    elif key == "TrustedClassifier":
        assert (
            names["classifier"].predict(names["X_test"]).shape == (5,) and names["classifier"].wrong_labels_ is not None
        )
    elif key == "timm":
        engine = names["task"].engine
        assert engine.step == 10 and engine.pop_metrics() == {"iada/let_go": 0}
        assert engine.reference.histories.visits.tolist() == [5] * 16
    else:
        assert names["iada"].step == 6 and type(names["model"].fc) is torch.nn.Linear
        assert (tmp_path / "report" / "report.html").is_file() and len(names["report"].suspects()) == 16


def test_the_blocks_are_short_and_all_there():
    assert len(BLOCKS) == len(PREPARED)
    assert all(len(block.strip().splitlines()) <= 15 for block in BLOCKS)


def test_the_two_commands_are_the_documented_ones():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands == [
        'pip install ".[examples]" && python examples/civilcomments.py',
        'pip install ".[test]" && python -m pytest',
    ]
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_it_is_short():
    """At most 900 words, as `wc -w` counts them."""
    assert len(README.split()) <= 900


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    return tables


def test_tables_are_up_to_date():
    command = [sys.executable, ROOT / "docs" / "tables.py", "--check"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stderr


def test_a_changed_figure_is_found(tmp_path, monkeypatch):
    tables, page = load_tables(), tmp_path / "README.md"
    monkeypatch.setattr(tables, "BLOCKS", {page: [tables.results]})
    page.write_text(README)
    assert tables.stale() == []
    figure = re.search(r"\d\d\.\d±", README).group(0)
    page.write_text(README.replace(figure, "99.9±", 1))
    assert tables.stale() == ["README.md"]


def test_bold_only_where_it_is_clear():
    """Ahead by two standard errors of the difference, paired over at least three seeds."""
    cells = load_tables()._cells
    clear = {"ce": {0: 50.0, 1: 52.0, 2: 51.0}, "gate": {2: 61.0, 1: 63.0, 0: 60.0}}
    assert cells(clear) == {"ce": "51.0±1.0", "gate": "**61.3±1.5**"}
    close = {"ce": {0: 50.0, 1: 60.0, 2: 55.0}, "gate": {0: 61.0, 1: 51.0, 2: 56.0}}
    assert cells(close) == {"ce": "55.0±5.0", "gate": "56.0±5.0"}
    assert cells({"gate": {0: 70.0}, "ce": {0: 50.0}}) == {"gate": "70.0 (one seed)", "ce": "50.0 (one seed)"}


def test_the_table_of_results(tmp_path, monkeypatch):
    """The best other method is named; what knows the wrong labels is no rival."""
    tables = load_tables()
    values = {"ce": 0.5, "la": 0.51, "iada": 0.61, "aum20": 0.6, "glc": 0.55, "iada_gate": 0.9, "oracle": 0.8}
    runs = [
        {"scenario": "flip", "method": m, "seed": s, "metrics": {"accuracy": v + s / 100}}
        for m, v in values.items()
        for s in (0, 1, 2)
    ]
    (tmp_path / "accuracy_x.jsonl").write_text("\n".join(map(json.dumps, runs)) + "\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head, _, line, empty = tables._compared(
        "x", {"flip": ("Flip", "accuracy"), "none": ("None", "accuracy")}, "t", ["ce", "la", "iada"], "told"
    ).splitlines()
    assert head == "|t|cross-entropy|Logit Adjustment|Meta-IADA|best other method|told|"
    assert line == "|Flip|51.0±1.0|52.0±1.0|**62.0±1.0**|61.0±1.0 (AUM 20 %)|81.0±1.0|"
    assert empty == "|None||||||"


def test_the_number_of_timm_families():
    claimed = re.search(r"\[(\d+) of (\d+) work\]", README).groups()
    page = (ROOT / "docs" / "timm_families.md").read_text()
    families = re.findall(r"^\| \w+ \| .* \| (.*) \|$", page, re.MULTILINE)[1:]
    assert claimed == (str(families.count("works")), str(len(families)))
    assert int(timm.__version__[0]) >= 1
