"""What an installation brings."""

import configparser
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_the_package_and_nothing_that_compares():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    assert config["options"]["packages"] == "find:"
    found = find_packages(str(ROOT), include=config["options.packages.find"]["include"].split())
    assert {name.split(".")[0] for name in found} == {"iada_plugin"}
    folders = {path.parent for path in (ROOT / "iada_plugin").rglob("*.py")}
    # A room without __init__.py would be missing in an installation, but not in a clone.
    assert set(found) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
