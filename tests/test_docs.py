"The documentation's tables and numbers are those of the result files"
import ast,csv,inspect,json,re,sys,typing
from pathlib import Path
import pytest
from fastai.basics import Learner,nn
from fastcore.docments import docments
from IPython.core.interactiveshell import InteractiveShell
import adahessian_fastai.all as everything
from adahessian_fastai import _help
from adahessian_fastai.all import CurvatureRecorder,GNB,adahessian,hessian_free,sophia

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import results,site_pages

guides = sorted((root/'docs').glob('*.md'))

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'folder', tmp_path)
    return tmp_path

def write(path, head, *rows):
    with path.open('w', newline='') as f: csv.writer(f).writerows([head.split(), *(r.split() for r in rows)])

@pytest.mark.parametrize('path', guides, ids=lambda p: p.stem)
def test_numbers_in_guides_are_those_of_the_files(path):
    md = path.read_text(encoding='utf-8')
    assert results.renumbered(md)==md, f'{path.name} is not in step with benchmarks/results'
    assert '<!-- results' not in results.filled(md)

def test_best_rate_has_the_lowest_loss_at_the_first_seed(folder):
    write(folder/'training_t.csv', 'task entry lr seed epochs valid_loss loss accuracy seconds machine',
        't a 0.1 0 5 1 1.1 0.7 9 here', 't a 0.3 0 5 2 2.1 0.5 9 here', 't a 0.1 1 5 4 1.3 0.9 11 here', 't a 0.3 1 5 0.1 0.1 1 9 here',
        't b 1 0 5 nan nan 0.1 9 here', 't b 2 0 5 3 3 0.2 9 here')
    a,b = results.training('t').replace('\u00a0', ' ').splitlines()[2:4]
    assert a=='| a | 0.1 | 1.20 ± 0.14 | 0.80 ± 0.14 | 5 | 10 | 2 |'
    assert b=='| b | 2 | 3 | 0.2 | 5 | 9 | 1 |'
    assert results.training('t').endswith('\n\nhere.')

def test_a_file_may_choose_by_the_loss_it_reports(folder):
    write(folder/'training_t.csv', 'task entry lr seed epochs loss chrf bleu seconds', 't a 1 0 5 2 30 10 9', 't a 2 0 5 1 40 20 9')
    assert results.training('t').splitlines()[::2]==['| entry | lr | loss | chrf | bleu | epochs | seconds | seeds |', '| a | 2 | 1 | 40 | 20 | 5 | 9 | 1 |']

def test_what_comes_with_the_package_is_compared_on_the_same_seeds(folder):
    "Those that most have; seed 2 has no `b`, which says so. Adam is best at 0.1"
    write(folder/'shipped_p.csv', 'entry lr seed loss', *(f'Adam {lr} {s} {l}' for s in range(3) for lr,l in ((0.1,4),(0.2,4-2*(s==2)+s))),
        'adahessian own 0 1', 'adahessian own 1 2', 'adahessian own 2 90', 'b own 0 7', 'b own 1 7')
    assert results.shipped('p').replace('\u00a0', ' ').splitlines()[::2]==['| loss | p, 3 seeds |', '| Adam | 4.000 ± 0.000 |',
        '| b | 7.000 ± 0.000 (2 of them) |']
    assert results.shipped('q')==''

def test_a_table_ends_before_the_text_goes_on():
    "Without an empty line between them the text becomes a row"
    cells = [''.join(c['source']) for p in root.glob('nbs/*.ipynb') for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown']
    for md in [*cells, *(p.read_text(encoding='utf-8') for p in (*guides, *root.glob('*.md')))]:
        ls = md.splitlines()
        assert not [b for a,b in zip(ls, ls[1:]) if a.startswith('|') and b.strip() and not b.startswith('|')]

def test_sections_wait_for_their_files(folder):
    md = '# T\n\ntext\n\n## A\n\n<!-- results: training t -->\n\n## B\n\n<!-- results: plain p -->\n'
    write(folder/'p.csv', 'name cost', 'x 1.23456')
    assert results.filled(md)=='# T\n\ntext\n\n## B\n\n| name | cost |\n| --- | --- |\n| x | 1.23 |\n'

def test_a_number_is_the_mean_of_what_matches_and_a_missing_one_is_named(folder):
    write(folder/'p.csv', 'name cost', 'x 1', 'x 2', 'y 9')
    assert results.filled('costs 0.00<!-- p.csv name=x cost -->, 7<!-- p.csv name=y cost*100 -->')=='costs 1.50, 900'
    with pytest.raises(ValueError, match='name=z'): results.filled('1<!-- p.csv name=z cost -->')

@pytest.mark.parametrize('vs,want', [([1.], '1'), ([1.,1.], '1.000 ± 0.000'), ([0.1234,0.1334], '0.1284 ± 0.0071'), ([100.,140.], '120 ± 28'), ([3.5487,3.5499], '3.549 ± 0.001')])
def test_digits_of_a_mean_are_those_of_its_spread(vs, want): assert results.mean_sd(vs).replace('\u00a0', ' ')==want

def test_every_result_file_is_documented(monkeypatch):
    "A table or a number is made of it, or it is named; the autoencoder's rates were searched for in a file of their own"
    shown,rows,text = {'hessian_free_autoencoder_search.csv'},results.rows,'\n'.join(p.read_text(encoding='utf-8') for p in guides)
    monkeypatch.setattr(results, 'rows', lambda name: shown.add(f'{name}.csv') or rows(name))
    results.filled(text)
    unknown = {p.name for p in (root/'benchmarks/results').glob('*.csv')}-shown-{*re.findall(r'\w+\.csv', text)}
    assert len(shown)>20 and not unknown, f'no guide shows anything of {unknown}'

# What `?` shows, and what an optimizer says of itself

public = {nm: o for nm,o in vars(everything).items() if nm[0]!='_' and inspect.isfunction(o) and o.__module__.startswith('adahessian_fastai')}

@pytest.mark.parametrize('name', public)
def test_help_has_the_comment_beside_each_parameter(name):
    f = public[name]
    want = {k: ' '.join(v.split()) for k,v in docments(f).items() if v and k!='return'}
    notes = {k.lstrip('*'): ' '.join(v.split()) for k,v in _help.parameter_notes(f).items()}
    assert {k: notes.get(k) for k in want}==want and set(notes)<={*inspect.signature(f).parameters, 'returns', 'kwargs'}
    assert all(v in ' '.join(f.__doc__.split()) for v in notes.values())

def test_jupyter_shows_all_arguments_of_functions_methods_and_classes():
    def asked(o, key): return InteractiveShell.instance().inspector.info(o)[key]
    doc = asked(adahessian, 'docstring')
    assert doc.startswith('AdaHessian as `opt_func` of a `Learner`\n\nParameters:\n  params ')
    assert all(re.search(rf'^  \*{{0,2}}{k} ', doc, re.M) for k in inspect.signature(adahessian).parameters)
    assert re.search('^  returns +Raises `ValueError`', doc, re.M) and max(map(len, doc.splitlines()))<=88
    assert re.search('^ *every +Measure after each', asked(CurvatureRecorder, 'init_docstring'), re.M)
    assert re.search('^  n_batches +Training batches', asked(Learner.curvature_summary, 'docstring'), re.M)

def test_what_has_no_notes_keeps_its_docstring():
    def plain(x): "Plain"
    _help.add_notes(plain)
    assert plain.__doc__=='Plain' and '\n' not in CurvatureRecorder.__doc__

free_words = {'arch', 'data', 'lr', 'opts', 'out'} # Parameters with a word by default that are no choice among a few

def choices(name, o):
    "The parameters of `o` with a word by default, and what may stand there by the annotation"
    fs = [o] if inspect.isfunction(o) else [o.__init__] if inspect.isclass(o) and inspect.isfunction(o.__init__) else []
    return [(f'{name}.{p.name}',p) for f in fs for p in inspect.signature(f).parameters.values() if isinstance(p.default, str) and p.name not in free_words]

CHOICES = dict(o for nm,f in vars(everything).items() if nm[0]!='_' and (getattr(f, '__module__', None) or '').startswith('adahessian_fastai') for o in choices(nm, f))

@pytest.mark.parametrize('name', CHOICES)
def test_an_editor_can_complete_each_choice(name):
    p = CHOICES[name]
    assert p.default in typing.get_args(p.annotation), f'{name}: annotate {p.name} by a Literal of what it takes'

def nets(): return nn.Linear(2,3),nn.Linear(3,1)

def test_an_optimizer_says_what_it_is():
    a,b = nets()
    a.bias.requires_grad_(False)
    text = _help.describe(sophia([list(a.parameters()),list(b.parameters())], lr=slice(1e-3,1e-2), estimator=GNB(3)))
    assert text=="""sophia: weight_decay, average_grad, average_diag_hessian, sophia_step
  estimator: GNB(n_samples=3)
  when: Every(update_each=10)
  smooth: average_diag(block_length=1, signed=True, average_kernels=False)
  group 0: 2 tensors, 6 of 9 weights train; wd=0.1, sqr_mom=0.99, rho=0.04, eps=1e-12, lr=0.001, mom=0.965
  group 1: 2 tensors, 4 of 4 weights train; wd=0.1, sqr_mom=0.99, rho=0.04, eps=1e-12, lr=0.01, mom=0.965"""

@pytest.mark.parametrize('kwargs,want', [(dict(signed=True), 'average_diag_hessian'), (dict(n_acc=2), 'n_acc: 2'), (dict(rho=0.4), 'rho=0.4'),
    (dict(hvp='auto'), "Hessian(method='auto')"), (dict(budget=0.25), 'Budget(overhead=0.25'), (dict(lr=0.3), 'lr=0.3'),
    (dict(dense=(20,4)), 'dense=(20, 4)'), (dict(block_length='row'), "average_diag(block_length='row')"), (dict(signed_blocks=True), 'average_diag(signed=True)'),
    (dict(average_kernels=False), 'average_kernels=False'), (dict(debiased=True, n_samples=2), 'debiased: True')])
def test_a_variant_is_seen(kwargs, want):
    ps = [p for m in nets() for p in m.parameters()]
    plain,other = (_help.describe(adahessian(ps, **kw)) for kw in ({}, kwargs))
    assert want in other and want not in plain.replace('sqr_average', '').replace('average_sqr', '')

def test_groups_alike_are_one_line(): assert 'groups 0 to 1: 4 tensors, 13 of 13 weights' in _help.describe(hessian_free([list(m.parameters()) for m in nets()]))

FIRST_WORDS = dict(adahessian='adahessian:', adahessian_paper='adahessian_paper:', sophia='sophia:', sassha='sassha:', m_sassha='m_sassha:',
    hessian_free='HessianFree')

@pytest.mark.parametrize('name', FIRST_WORDS)
def test_repr_begins_with_the_name(name):
    opt = getattr(everything, name)(nn.Linear(2,3).parameters())
    assert repr(opt).split()[0]==FIRST_WORDS[name] and 'group 0: 2 tensors, 9 of 9 weights train' in repr(opt)

@pytest.mark.parametrize('name,given,said', [('adahessian','num_samples','use n_samples'), ('adahessian','bugdet','use budget'),
    ('sophia','betas','use mom and sqr_mom'), ('m_sassha','weight_decay','use wd'), ('sassha','weight_decay','use wd'),
    ('hessian_free','weight_decay','use wd'), ('hessian_free','cg_maxiter','use cg_max_iter'), ('adahessian_paper','update_period','use update_each')])
def test_a_name_from_elsewhere_is_answered(name, given, said):
    with pytest.raises(TypeError, match=f"has no argument '{given}': {said}"): getattr(everything, name)(nn.Linear(2,3).parameters(), **{given: 1})

def test_hessian_free_suggests_nothing_that_it_lacks():
    with pytest.raises(TypeError, match="has no argument 'betas'$"): hessian_free(nn.Linear(2,3).parameters(), betas=(.9,.99))

def test_help_lists_the_settings_of_objects():
    for o in ('cg_max_iter', 'damping', 'ls_beta', 'fisher_probes', 'n_acc'): assert f'  {o} ' in hessian_free.__doc__, o
    assert "'gnb'" in hessian_free.__doc__, 'what `precondition` takes'

# The site

def test_colab_is_offered_only_where_there_is_an_address():
    path = root/'nbs/30_tutorial.toys.ipynb'
    assert site_pages.colab_note(path, '')=='' and site_pages.colab_note(path, 'https://example.org/a/b')==''
    note = site_pages.colab_note(path, 'https://github.com/someone/adahessian_fastai')
    assert '(https://colab.research.google.com/github/someone/adahessian_fastai/blob/main/nbs/30_tutorial.toys.ipynb)' in note
    assert 'pip install git+https://github.com/someone/adahessian_fastai' in note

def test_overview_begins_with_what_people_use():
    names = re.findall(r'`(?:Learner\.)?(\w+) <', site_pages.main_table())
    assert names[0]=='adahessian' and {'sophia', 'hessian_free', 'CurvatureRecorder', 'curvature_summary', 'compare_optimizers'}<=set(names)
    assert list(site_pages.kinds())[-1]=='Inside' and sorted(p for ps in site_pages.kinds().values() for p in ps)==site_pages.rooms()

def test_tutorials_come_in_a_learners_order():
    stems = [p.stem.split('.')[-1] for p in site_pages.stories()]
    known = [s for s in site_pages.first_stories if s in stems]
    assert stems[:len(known)]==known and 'pytorch' in known and site_pages.guides()[0].stem=='start'

def test_the_comment_of_a_signature_on_one_line_is_that_of_the_result():
    "As `help` says it; over several lines each parameter has its own"
    def tables(src): return [site_pages.docments_table(n, src) for n in ast.parse(src).body]
    one, = tables('def f(a:int, b=1)->int: # What comes out\n    "Doc"\n    return a\n')
    assert 'What comes out' in one and one.count('What comes out')==1 and 'returns' in one and '`b' not in one
    more, = tables('def f(\n    a:int, # First\n    b=1, # Second\n)->int: # What comes out\n    "Doc"\n    return a\n')
    assert all(o in more for o in ('First','Second','What comes out','returns'))
