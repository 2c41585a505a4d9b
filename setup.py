"""Reads settings.ini, the one source of name, version and requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    keywords=s["keywords"].split(),
    license="Apache-2.0",
    author=s["author"],
    author_email=s["author_email"],
    url=s["url"],
    python_requires=f">={s['min_python']}",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["tpu_mini_sglang*"]),
    package_data={"tpu_mini_sglang": ["py.typed"]},
    install_requires=s["requirements"].split(),
    extras_require={extra: s[f"{extra}_requirements"].split() for extra in ("tpu", "cuda", "dev", "clients")},
    entry_points={"console_scripts": s["console_scripts"].split()},
)
