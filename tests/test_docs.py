"The documentation's tables and numbers are those of the result files"
import csv,re,sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import results

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

def test_sections_wait_for_their_files(folder):
    md = '# T\n\ntext\n\n## A\n\n<!-- results: training t -->\n\n## B\n\n<!-- results: plain p -->\n'
    write(folder/'p.csv', 'name cost', 'x 1.23456')
    assert results.filled(md)=='# T\n\ntext\n\n## B\n\n| name | cost |\n| --- | --- |\n| x | 1.23 |\n'

def test_a_number_is_the_mean_of_what_matches_and_a_missing_one_is_named(folder):
    write(folder/'p.csv', 'name cost', 'x 1', 'x 2', 'y 9')
    assert results.filled('costs 0.00<!-- p.csv name=x cost -->, 7<!-- p.csv name=y cost*100 -->')=='costs 1.50, 900'
    with pytest.raises(ValueError, match='name=z'): results.filled('1<!-- p.csv name=z cost -->')

@pytest.mark.parametrize('vs,want', [([1.], '1'), ([1.,1.], '1.000 ± 0.000'), ([0.1234,0.1334], '0.1284 ± 0.0071'), ([100.,140.], '120 ± 28')])
def test_digits_of_a_mean_are_those_of_its_spread(vs, want): assert results.mean_sd(vs).replace('\u00a0', ' ')==want

def test_every_result_file_is_documented():
    text = (root/'docs/benchmarks.md').read_text(encoding='utf-8')
    asked = {a for m in results.re_table.finditer(text) for a in m[1].split()}
    for p in (root/'benchmarks/results').glob('*.csv'):
        parts = {p.stem, *re.split('_', p.stem), re.sub('^(training|robustness|hessian_free)_', '', p.stem)}
        assert asked & parts, f'docs/benchmarks.md shows nothing of {p.name}'
