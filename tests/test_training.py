"The plan of the training studies in `benchmarks/training.py`"
import math,sys
from pathlib import Path

import pandas as pd,pytest

pytest.importorskip('sklearn')
bench = Path(__file__).parents[1]/'benchmarks'
pytestmark = pytest.mark.skipif(not bench.exists(), reason='benchmarks are part of the repository, not of the package')

@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(bench))
    import training
    entries = dict(a=training.Entry(None, 1., swept=True), b=training.Entry(None, 0.1), longer=training.Entry(None, 1., epochs=3, like='a'))
    monkeypatch.setitem(training.TASKS, 'fake', training.Task(None, 1, entries))
    yield training
    sys.modules.pop('training', None)

def simulate(training, loss, seeds=3):
    rows = pd.DataFrame(columns=['entry','lr','seed','valid_loss'])
    todo = lambda: training.missing(training.plan(rows, 'fake', ['a','b','longer'], seeds), rows)
    while o := todo(): rows.loc[len(rows)] = [*o, loss(*o)]
    return rows

def test_same_number_of_rates_then_seeds(training):
    "Each entry tries three rates at seed 0 and trains from the other seeds with the best; `like` tries none"
    rows = simulate(training, lambda entry,lr,seed: abs(lr-0.32))
    counts = rows.groupby('entry').agg(rates=('lr','nunique'), runs=('lr','size'))
    assert counts.loc['a'].tolist() == counts.loc['b'].tolist() == [3,5] and counts.loc['longer'].tolist() == [1,3]
    assert set(rows.lr[rows.seed>0]) == {0.32} and set(rows.seed) == {0,1,2}

@pytest.mark.parametrize('best,fourth', [(0.1,0.1),(1.,0.1),(2.,10.),(10.,10.)])
def test_fourth_rate_lies_beyond_the_better_end(training, best, fourth):
    training.TASKS['fake'].n_rates = 4
    rows = simulate(training, lambda entry,lr,seed: abs(math.log(lr/best)) if lr<4 or best>4 else float('nan'))
    assert rows.lr[(rows.entry=='a') & (rows.seed==0)].tolist() == [1.,0.32,3.2,fourth]

def test_diverged_runs_are_not_chosen(training):
    rows = simulate(training, lambda entry,lr,seed: float('nan') if lr>=1 else 5-lr)
    assert rows.lr[(rows.entry=='a') & (rows.seed==2)].tolist() == [0.32]

def test_a_second_run_continues(training):
    rows = simulate(training, lambda entry,lr,seed: lr)
    assert training.missing(training.plan(rows, 'fake', ['a','b','longer'], 3), rows) is None
    assert training.missing(training.plan(rows, 'fake', ['a'], 4), rows) == ('a', 0.32, 3)

def test_sweep_is_two_decades(training):
    plan = training.sweep_plan('fake', ['a','b'], 2)
    assert [lr for _,lr,s in plan if s==0] == [0.1,0.32,1.,3.2,10.] and {k for k,*_ in plan} == {'a'}
