"The repository itself: one source for each fact, imports downwards only, generated files current, nothing of the machine it was made on"
import json,os,re,shutil,subprocess,sys,tarfile,zipfile
from collections import Counter
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
import pytest,yaml

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import house
lib = house.lib

# Metadata

build_code = """
import sys
sys.modules['pkg_resources'] = None
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""

def build(hook, folder, dest):
    "Run the build backend's `hook` in `folder`, with `pkg_resources` out of reach"
    res = subprocess.run([sys.executable, '-c', build_code, hook, str(dest)], cwd=folder, capture_output=True, text=True)
    assert not res.returncode, res.stderr
    return res.stderr

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from the unpacked sdist, so that what the sdist lacks is missed"
    tmp = tmp_path_factory.mktemp('dist')
    skip = shutil.ignore_patterns('.*', '_docs', '_proc', 'build', 'dist', '*.egg-info', 'results', 'nbs', 'tests', '__pycache__')
    shutil.copytree(root, tmp/'repo', ignore=skip)
    build('build_sdist', tmp/'repo', tmp)
    sdist, = tmp.glob('*.tar.gz')
    with tarfile.open(sdist) as t: t.extractall(tmp/'sdist', **(dict(filter='data') if hasattr(tarfile, 'data_filter') else {}))
    build('build_wheel', next((tmp/'sdist').iterdir()), tmp)
    return zipfile.ZipFile(next(tmp.glob('*.whl')))

@pytest.fixture(scope='module')
def metadata(wheel): return message_from_string(wheel.read(next(n for n in wheel.namelist() if n.endswith('METADATA'))).decode())

@pytest.fixture(scope='module')
def settings():
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(root/'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])

def norm(req): return re.sub(r'\s|\'|"|\(|\)', '', req).lower().replace('_', '-')

def test_requirements_reach_the_wheel(metadata, settings):
    want = settings['requirements'].split()
    for k,v in settings.items():
        if k.endswith('_requirements'): want += [f"{o};extra=={k.removesuffix('_requirements')}" for o in v.split()]
    assert sorted(map(norm, metadata.get_all('Requires-Dist'))) == sorted(map(norm, want))
    assert {'dev', 'docs'} <= set(metadata.get_all('Provides-Extra'))

def test_facts_reach_the_wheel(metadata, settings):
    version = re.search(r'__version__ = "(.+)"', (root/lib/'__init__.py').read_text())[1]
    assert (metadata['Name'], metadata['Version'], metadata['Requires-Python']) == (lib, version, f">={settings['min_python']}")
    assert metadata['Author'] == settings['author'] and metadata['License-Expression'] == 'Apache-2.0'
    assert set(re.split('[ ,]', metadata['Keywords'])) == set(settings['keywords'].split())
    assert any(o.startswith(f"Development Status :: {settings['status']}") for o in metadata.get_all('Classifier'))
    assert metadata.get_payload().strip() == (root/'README.md').read_text(encoding='utf-8').strip()

def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in wheel.namelist() if '.dist-info/' not in n}
    assert names == {f'{lib}/py.typed', *(f'{lib}/{p.name}' for p in (root/lib).glob('*.py'))}
    points = wheel.read(next(n for n in wheel.namelist() if n.endswith('entry_points.txt'))).decode()
    assert 'adahessian-compare = ' in points and '[nbdev]' in points
    assert any(n.endswith('LICENSE') for n in wheel.namelist())

def test_each_fact_has_one_source(settings):
    pyproject = (root/'pyproject.toml').read_text()
    for field in ('requires-python', 'dependencies', 'authors', 'keywords', 'classifiers', 'version'):
        assert not re.search(rf'^{field} *=(?! *\{{attr)', pyproject, re.M), f'{field} stands in settings.ini or the package'
    assert 'version' not in settings and 'version:' not in (root/'CITATION.cff').read_text().replace('cff-version:', '')

# Notebooks

def exported(path): return '\n'.join(s for c in json.loads(path.read_text(encoding='utf-8'))['cells']
    if (s := ''.join(c['source'])) and re.match(r'#\| *(export|default_exp)', s) and c['cell_type']=='code')

def upward_imports(sources):
    "Imports in `sources` (exported code by notebook name) that do not come from a lower notebook"
    home = {m[1]: nm for nm,s in sources.items() if (m := re.search(r'^#\| *default_exp (\w+)', s, re.M))}
    for nm,s in sources.items():
        for mod in re.findall(rf'^\s*(?:from|import) {lib}\.(\w+)', s, re.M):
            if not mod.startswith('_') and home.get(mod, '~') >= nm: yield f'{nm} imports upwards from {mod}'

@pytest.fixture(scope='module')
def sources(): return {p.name: exported(p) for p in sorted((root/'nbs').glob('[0-9]*.ipynb'))}

def test_imports_run_downwards(sources):
    assert len(sources) > 3
    assert not list(upward_imports(sources))

def test_upward_imports_are_seen():
    low,high = '#| default_exp low\n#| export\nfrom {0}.high import *','#| default_exp high\n#| export\nimport torch'
    assert list(upward_imports({'00_low.ipynb': low.format(lib), '10_high.ipynb': high})) == ['00_low.ipynb imports upwards from high']
    assert not list(upward_imports({'10_low.ipynb': low.format(lib), '00_high.ipynb': high}))

def test_ground_floor_knows_nothing_of_fastai(sources):
    allowed = {'torch', 'fastcore', 'fastprogress', 'numpy', 'scipy', 'matplotlib', lib, *sys.stdlib_module_names}
    for nm,s in sources.items():
        if nm >= '10': continue
        lines = re.findall(r'^\s*(?:from ([\w.]+) import|import ([^\n#]+))', s, re.M)
        mods = {o.strip().split(' ')[0].split('.')[0] for a,b in lines for o in (a or b).split(',')}
        assert mods <= allowed, f'{nm} imports {mods-allowed}'

def test_all_is_for_users():
    "What one room needs of another is imported from there, by name"
    names = {}
    exec(f'from {lib}.all import *', names)
    assert {'adahessian', 'sophia', 'hessian_free', 'AdaHessian', 'AdaHessianWrapper', 'hessian_product', 'compare_optimizers'} <= set(names)
    helpers = {'loss_count', 'loss_callbacks', 'check_twice', 'borrowed', 'check_counts', 'check_choices', 'check_hypers', 'peek_seed', 'warn_rarely', 'cross_rank_mean', 'loss_scale', 'step_size', 'total_norm'}
    assert not helpers & set(names)
    classes = {n for n,v in names.items() if isinstance(v, type) and v.__module__.split('.')[0]==lib}
    assert {'CG', 'Damping', 'LineSearch', 'Preconditioner', 'Batches'} <= classes and not [n for n in names if n.isupper() and n not in classes]

@pytest.mark.parametrize('name', ['CG', 'Damping', 'LineSearch', 'Preconditioner', 'Batches'])
def test_settings_are_found_where_they_were(name):
    from adahessian_fastai import all,hessian_free
    assert getattr(hessian_free, name) is getattr(all, name)

def in_step(d): return subprocess.run([sys.executable, d/'tools/in_step.py'], capture_output=True, text=True)

def test_out_of_step_is_named_and_mendable(tmp_path):
    pytest.importorskip('nbdev')
    for o in ('nbs', lib, 'tools'): shutil.copytree(root/o, tmp_path/o, ignore=shutil.ignore_patterns('.*', '__pycache__', 'models'))
    for o in ('pyproject.toml', 'settings.ini'): shutil.copy(root/o, tmp_path)
    (tmp_path/lib/'averaging.py').write_text((tmp_path/lib/'averaging.py').read_text()+'\nedited = 1\n')
    (tmp_path/lib/'gone.py').write_text('# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/gone.ipynb.\n')
    nb = json.loads((tmp_path/'nbs/01_hutchinson.ipynb').read_text())
    nb['cells'][1]['execution_count'] = 7
    (tmp_path/'nbs/01_hutchinson.ipynb').write_text(json.dumps(nb))
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    res = in_step(tmp_path)
    assert res.returncode == 1 and 'make sync' in res.stderr
    for o in (f'{lib}/averaging.py: not what', f'{lib}/gone.py: no notebook', 'nbs/01_hutchinson.ipynb: not clean', 'README.md: not what'): assert o in res.stderr
    assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}

def test_readme_is_current():
    res = subprocess.run([sys.executable, '-c', 'from readme import *; import sys; sys.stdout.buffer.write(readme_md().encode())'],
        capture_output=True, cwd=root/'tools')
    assert not res.returncode, res.stderr.decode()
    assert res.stdout == (root/'README.md').read_bytes(), 'README.md is not current: make sync'

# Files

def tracked():
    "The repository's text files: what git knows, or in an unpacked archive what is there"
    res = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True) if (root/'.git').exists() and shutil.which('git') else None
    names = res.stdout.decode().split('\0') if res and not res.returncode else [p.relative_to(root).as_posix() for p in root.rglob('*')]
    return [root/n for n in names if n and not n.startswith(('.venv', '_')) and (root/n).is_file() and (root/n).suffix not in ('.png', '.gif', '.pkl', '.pth')]

def test_no_paths_of_a_machine():
    machine = re.compile(r'(?<![\w.])/(?:work|root|home|Users|tmp)/\w[^\s"\']*')
    found = [f'{p.relative_to(root)}: {m[0]}' for p in tracked() for m in machine.finditer(p.read_text(encoding='utf-8', errors='replace'))]
    assert not found, f'`make outputs` saves a notebook without such warnings: {found}'

@pytest.mark.parametrize('path', sorted((root/'nbs').glob('[0-9]*.ipynb')), ids=lambda p: p.stem)
def test_a_notebook_shows_something_when_opened(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert any(c.get('outputs') for c in cells), 'no cell has an output: print a number or a picture, then save it with `make outputs`'

def test_ci_is_the_test_command():
    script = (root/'.ci/run').read_text()
    assert re.search(r'exec make test\b', script) and os.access(root/'.ci/run', os.X_OK)
    assert 'make test' in (root/'README.md').read_text(encoding='utf-8')

@pytest.fixture(scope='module')
def workflows(): return {p.stem: yaml.safe_load(p.read_text()) for p in (root/'.github/workflows').glob('*.yml')}

def test_ci_tries_the_oldest_python_and_the_oldest_versions(workflows, settings):
    jobs = workflows['test']['jobs']
    for o in ('newest','oldest'): assert jobs[o]['strategy']['matrix']['python'][0] == settings['min_python']
    assert any('settings.ini' in o.get('run', '') for o in jobs['oldest']['steps'])

def test_actions_are_pinned(workflows):
    "A tag can be moved to other code, a commit cannot; the comment is what Dependabot and people read"
    assert len(workflows) > 3
    uses = [m[1] for p in (root/'.github/workflows').glob('*.yml') for m in re.finditer(r'uses: (.+)', p.read_text())]
    loose = [o for o in uses if not o.startswith('./') and not re.fullmatch(r'[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+', o)]
    assert len(uses) > 8 and not loose

def test_hooks_and_forms():
    "They parse, and the hooks fetch nothing: each is a program of `make sync` or `make test`"
    for p in (root/'.github').rglob('*.yml'): assert yaml.safe_load(p.read_text()), p
    repos = yaml.safe_load((root/'.pre-commit-config.yaml').read_text())['repos']
    entries = [h['entry'] for o in repos for h in o['hooks']]
    assert {o['repo'] for o in repos} == {'local'} and len(entries) > 3
    for o in entries: assert o.replace('.venv/bin/', '$(bin)/') in (root/'Makefile').read_text()

def test_oldest_versions_are_exact(settings):
    "CI's job with the oldest versions turns each `>=` into `==`, so each has to name a release"
    assert all(re.fullmatch(r'[\w-]+>=\d+(\.\d+)+', o) for o in settings['requirements'].split())

# The house

@pytest.fixture(scope='module')
def measured(): return house.measures()

@pytest.mark.parametrize('measure', house.goals)
def test_house(measured, measure):
    value,where = measured[measure]
    assert value <= house.allowed(measure), f'{measure}: {value} at {where}'

def test_what_is_measured_is_there(measured):
    "A measure that looks at nothing would pass; `house.meanwhile` names goals only"
    assert set(house.goals) <= set(measured) and set(house.meanwhile) <= set(house.goals)
    assert measured['functions'][0] > 200 and len(house.rooms()) > 15
    for o in ('arguments', 'lines of a body', "names an optimizer's room imports", *(k for k in measured if ' of ' in k)): assert measured[o][0] > 1
    assert measured['cells without an example, %'][0] > 0 and measured['rules between arguments'][0] > 1

def test_contributing_has_the_goals_that_are_not_met():
    "With what they may be meanwhile at most"
    rows = re.findall(r'^\| (.+?) \| ([\d.,]+) \| ([\d.,]+) \| .*\|$', (root/'CONTRIBUTING.md').read_text(), re.M)
    said = {nm: [float(o.replace(',', '')) for o in vs] for nm,*vs in rows}
    assert {nm: goal for nm,(_,goal) in said.items()} == {nm: house.goals[nm] for nm in house.meanwhile}
    assert all(house.goals[nm] < now <= house.allowed(nm) for nm,(now,_) in said.items())

def test_each_rule_between_arguments_is_in_the_code_once(measured): assert measured['rules between arguments'][1] == ''

def test_house_looks_for_examples():
    "Imports need none; what is hidden or exported is none, prose between does not count, and the last cell has none"
    imports,f,x,hidden = '#| export\nimport math\nfrom os import path','#| export\ndef f(): pass','f()','#| hide\nf()'
    assert house.without_example([imports, f, x]) == (1,0) and house.without_example([f, hidden, f, f, x, x, f]) == (4,3)
    assert house.without_example(['#| export\n_a = 1', x, '#| default_exp a', 'b = 1', x]) == (1,0)

source = """'''A title

{long}'''
from .low import a,b
from .star import *
import torch
def f(
    x, # {long}
    *args, y=1, **kwargs
):
    "Says"
    def inner():
        return x

    return inner
class A:
    def one(self, z): pass
    @property
    def two(self):
        return 2
""".format(long='x'*141)

def test_house_measures_what_it_says():
    "Each measure on a source whose numbers can be counted by hand"
    fs = dict(house.functions(source))
    assert {k: house.body_lines(o) for k,o in fs.items()} == {'f': 4, 'A.one': 1, 'A.two': 1}
    assert {k: house.n_args(o) for k,o in fs.items()} == {'f': 2, 'A.one': 1, 'A.two': 0}
    assert house.long_lines(source, True) == [3] and house.long_lines(source, False) == [8]
    kinds = Counter(house.line_kinds(source))
    assert kinds['docstrings']==3+1 and kinds['imports and exports']==3 and kinds['arguments']==3 and kinds['blank']==1, kinds
    assert sum(kinds.values())==len(source.splitlines()) and house.line_kinds('# a\nx = 1')==['comments','code']
    rooms = dict(low='from .top import f', star="__all__ = ['c', 'd', 'e']", top=source)
    assert house.n_imported(source, rooms) == 5
    assert set(house.circle(rooms)) == {'low','top'} and house.circle(dict(top=source, low='')) == []
    assert house.lettered(['11_a.ipynb', '11b_a.ipynb', 'index.ipynb']) == ['11b_a.ipynb']

def test_house_counts_a_class():
    "fastai's `Lookahead` by hand: seven methods, `zero_grad` of the room `learner`, a property with getter and setter; `opt, k, alpha, count, slow_weights`"
    from fastai.optimizer import Lookahead,SGD
    from fastai.basics import nn,tensor
    import adahessian_fastai.learner # chkstyle: ignore
    assert house.n_methods(Lookahead) == 10
    assert house.n_attributes(Lookahead(SGD([nn.Parameter(tensor(1.))], lr=0.1))) == 5
