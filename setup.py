"Installs kalm; every value comes from settings.ini, the file nbdev reads."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    project_urls={"Paper": "https://arxiv.org/abs/2404.09248"},  # pyproject.toml wants every dynamic field to be given
    packages=find_packages(include=["kalm", "kalm.*"]),
    package_data={"kalm": ["assets/**/*"], "kalm.clevr": ["assets/*"], "kalm.metaworld": ["assets/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): value.split() for key, value in cfg.items()
                    if key.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "kalm.domains": cfg["domains"].split()},
    zip_safe=False,
)
