"Reads the facts of `settings.ini` into the build; everything else stands in `pyproject.toml`"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = parser['DEFAULT']
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']
topics = ['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
    'Topic :: Scientific/Engineering :: Artificial Intelligence']
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}

setup(author=cfg['author'], keywords=cfg['keywords'], python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require=extras, classifiers=[f"Development Status :: {statuses[int(cfg['status'])-1]}", *topics])
