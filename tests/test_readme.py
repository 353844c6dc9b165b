"""The README does what it says."""

import re
from pathlib import Path

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
    return {"model": distilbert(), "args": args, "train": rows(32, 0), "dev": rows(8, 1), "rows": range(0, 32, 3)}


def timm_names(tmp_path):
    return {"train": images(3, 32, 32), "rows": range(0, 12), "epochs": 5}


def loop_names(tmp_path):
    data = images(6)
    model = MLP(classes=10)
    return {
        "meta_loader": torch.utils.data.DataLoader(data, batch_size=16), "loader": torch.utils.data.DataLoader(data, batch_size=8),
        "counts": [2] * 6 + [1] * 4, "epochs": 2, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }  # fmt: skip


def split_names(tmp_path):
    return {"dataset": Dataset.from_dict({"label": [0, 1] * 20, "x": list(range(40))})}


PREPARED = {
    "Trainer": trainer_names,
    "timm": timm_names,
    "config =": loop_names,
    "balanced_meta_split": split_names,
}


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[index]
    key = next(k for k in PREPARED if k in block)
    names = PREPARED[key](tmp_path)
    exec(compile(block, f"README block {index}", "exec"), names)
    if key == "Trainer":
        assert any("iada/let_go" in log for log in names["trainer"].state.log_history)
        assert (tmp_path / "report" / "report.html").is_file()
        assert names["trainer"].state.global_step == 10 and (tmp_path / "my-model" / "config.json").is_file()
    elif key == "timm":
        assert names["criterion"].step == 10 and names["criterion"].pop_metrics() == {"iada/let_go": 0}
        assert names["criterion"].reference.histories.visits.tolist() == [5] * 16
    elif key == "config =":
        assert names["iada"].step == 4 and type(names["model"].fc) is torch.nn.Linear
    else:
        assert len(names["meta"]) == 20 and len(names["train"]) == 20


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
    """At most 900 words."""
    assert len(README.split()) <= 900


def test_tables_are_up_to_date():
    import importlib.util

    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.BLOCKS:
        assert page.read_text() == tables.filled(page), "run: python docs/tables.py"
    claimed = re.search(r"\[(\d+) of (\d+) work\]", README).groups()
    page = (ROOT / "docs" / "timm_families.md").read_text()
    families = re.findall(r"^\| \w+ \| .* \| (.*) \|$", page, re.MULTILINE)[1:]
    assert claimed == (str(families.count("works")), str(len(families)))
    assert int(timm.__version__[0]) >= 1
