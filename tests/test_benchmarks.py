"Each benchmark runs: its smallest form, which takes a second or so and keeps nothing"
import importlib,math,sys
from pathlib import Path

import pandas as pd,pytest,torch

root = Path(__file__).resolve().parents[1]
bench = root/'benchmarks'
pytest.importorskip('sklearn')
pytestmark = pytest.mark.skipif(not bench.exists(), reason='benchmarks are part of the repository, not of the package')
quick = ['products','training']
slow = ['speed','estimators_cost','estimators_noise','hessian_free','robustness','resnet20','equal_time','forum']

@pytest.fixture
def load(monkeypatch):
    "Imports a benchmark by its name, and forgets it afterwards"
    monkeypatch.syspath_prepend(str(bench))
    before,n = set(sys.modules),torch.get_num_threads()
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield importlib.import_module
    torch.set_num_threads(n)
    for k in set(sys.modules)-before:
        if (bench/f'{k}.py').exists(): del sys.modules[k]

def test_all_benchmarks_are_here():
    "None is left out: `defaults` and `gpu` have tests of their own, `studies` has nothing to run, and `transfer` needs weights"
    assert {p.stem for p in bench.glob('[a-z]*.py')} <= {*quick,*slow,'defaults','gpu','studies','transfer'}

def smoke(load, name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(load('_common'), 'RESULTS', tmp_path)
    load(name).main(['--smoke'])
    assert capsys.readouterr().out.strip() and not list(tmp_path.iterdir())

@pytest.mark.parametrize('name', quick)
def test_smoke(load, name, capsys, monkeypatch, tmp_path): smoke(load, name, capsys, monkeypatch, tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize('name', slow)
def test_long_smoke(load, name, capsys, monkeypatch, tmp_path): smoke(load, name, capsys, monkeypatch, tmp_path)

def test_defaults(load, tmp_path, monkeypatch):
    "A row of `defaults.py`, and its table"
    m = load('defaults')
    monkeypatch.setattr(m, 'RESULTS', tmp_path)
    m.PROBLEMS['table'].epochs = 1
    m.fill('table', ['Adam','all'], range(1), [0.01])
    shipped = m.fill_shipped('table', ['adahessian'], [7])
    rows = m.read('table')
    assert rows.entry.tolist()==['Adam','all'] and rows.loss.map(math.isfinite).all() and 'above Adam' in m.report(rows)
    assert shipped[['entry','lr','seed']].values.tolist()==[['adahessian','own',7]] and math.isfinite(shipped.loss[0])
    for _ in range(2): others = m.fill_shipped('table', ['adahessian, gnb'], [7], [0.1,0.3]) # The second time there is nothing to do
    assert others[['entry','lr']].values.tolist()==[['adahessian, gnb',0.1],['adahessian, gnb',0.3]] and len(m.fill_shipped('table', [], []))==1

def test_gpu_pieces(load, capsys, monkeypatch, tmp_path):
    "What `make gpu` would run: scripts that exist, with arguments that they know"
    m = load('gpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    m.main([])
    assert 'no CUDA device' in (said := capsys.readouterr().out) and all(k in said for k in m.pieces)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for command in m.pieces.values():
        script,args = command[3],command[4:]
        if not script.startswith('benchmarks/'): continue
        name = Path(script).stem
        parse = getattr(load(name), 'parse', None)
        if parse: assert parse(args).device=='cuda'

def test_gpu_goes_on(load, monkeypatch, tmp_path):
    "A piece that is not finished is run again, one that has ended is not, and one that does not end is told from both"
    m = load('gpu')
    monkeypatch.setattr(m, 'results', tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a device')
    count = tmp_path/'count'
    code = (f"import pathlib; p=pathlib.Path({str(count)!r}); n=int(p.read_text())+1 if p.exists() else 1; p.write_text(str(n)); "
        "print('done' if n>1 else 'to be continued')")
    slept = "import time; time.sleep(60)"
    monkeypatch.setattr(m, 'pieces', dict(twice=[sys.executable, '-W', 'ignore', '-c', code, '--minutes', '1']))
    for _ in range(2): m.main(['--pieces', 'twice'])
    assert count.read_text()=='2' and 'a device' in (tmp_path/'gpu_twice.txt').read_text() and m.is_done('twice')
    m.run('slept', [sys.executable, '-W', 'ignore', '-c', slept], 'a device', limit=1)
    assert 'ran out of time' in (tmp_path/'gpu_slept.txt').read_text() and not m.is_done('slept')

# ResNet-20

@pytest.mark.slow
def test_resnet20_goes_on(load, monkeypatch, tmp_path):
    "Stopped after each epoch, ResNet-20 trains to the same weights as in one go"
    m = load('resnet20')
    form = m.Form('resnet20.csv', 1., True, 3, 1, 4)
    data = [m.prepared(*m.made_up(o), 'cpu', True) for o in ('train','test')]
    finals = []
    for saved,deadline in ((tmp_path/'a.pt',math.inf),(tmp_path/'b.pt',0.)):
        path,n = tmp_path/f'{saved.stem}.csv',0
        while m.done(path, 'adahessian', 0)<form.epochs:
            m.train('adahessian', 0, form, data, 'cpu', path, saved, deadline, 'here')
            n += 1
        finals.append((n, torch.load(saved, weights_only=False)['model'], pd.read_csv(path)))
    (n1,a,rows1),(n2,b,rows2) = finals
    assert (n1,n2)==(1,3) and rows1.drop(columns='seconds').equals(rows2.drop(columns='seconds'))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_resnet20_rates_and_shifts(load):
    "The rate drops at half and at three quarters; a picture is shifted by its padding at most, and flipped or not"
    m = load('resnet20')
    lr = m.drops(0.1)
    assert [round(lr(o), 6) for o in (0,0.49,0.5,0.74,0.75,1)] == [0.1,0.1,0.01,0.01,0.001,0.001]
    x = torch.arange(64.).view(1,1,8,8).repeat(16,1,1,1)+1
    (got,_), = m.Batches(x, torch.zeros(16), 16, seed=0)
    pad,one = torch.nn.functional.pad(x[0], [1]*4),x[0,0]
    both = pad,torch.nn.functional.pad(one.flip(-1)[None], [1]*4)
    ways = [torch.stack([o[:,dy:dy+8,dx:dx+8] for dy in range(3) for dx in range(3)]) for o in both]
    assert all(any(torch.equal(o, w) for w in torch.cat(ways)) for o in got) and len({tuple(o.flatten().tolist()) for o in got})>4

def test_resnet20_is_as_published(load):
    "269,722 parameters, 19 convolutions, ten classes at both sizes"
    net = load('resnet20').resnet20()
    assert sum(p.numel() for p in net.parameters())==269_722
    assert sum(isinstance(o, torch.nn.Conv2d) for o in net.modules())==19
    for size in (16,32): assert net(torch.randn(2,3,size,size)).shape==(2,10)

# Robustness

def test_robustness_looks_on_both_sides(load):
    "Rates are tried until there is a decade on each side of the best, wherever that is; a failed run is not the best"
    m = load('robustness')
    def losses(best, fails=lambda o: False):
        s = pd.DataFrame(dict(loss=pd.Series(dtype=float), accuracy=pd.Series(dtype=float)))
        while (e := m.next_exponent(s, -1.))is not None: s.loc[e] = [math.inf if fails(e) else 1+abs(e-best), 0.5]
        return s
    for best in (-1.,0.25,-3.):
        found = losses(best)
        assert found.loss.idxmin()==best and {best-1,best+1} <= set(found.index)
    assert losses(0.5, lambda o: o>0).loss.idxmin()==0.
    flat = m.shares(losses(-1.))
    assert flat['rates']==9 and flat['loss_within']==pytest.approx(1/9) and flat['accuracy_within']==1 and flat['accuracy_lost']==0

def test_a_run_that_failed_is_in_no_mean(load):
    "A mean over the others would make a rate at which runs fail the best one"
    nan,runs = math.nan,[0.3,math.nan,0.2]
    rows = pd.DataFrame(dict(entry='Adam', lr=0.1, seed=range(3), loss=runs, rest_loss=runs, accuracy=runs, rest_accuracy=runs, valid_loss=[0.3,nan,0.2],
        diverged=[False,True,False], seconds=1., n_steps=1, epochs=1, epoch=1))
    assert load('defaults').report(rows).loss.iloc[0]=='nan ± 0.071' and 'nan' in load('studies').study_table(rows).loss.iloc[0]
    assert 'nan' in load('transfer').table(rows).loss.iloc[0] and 'NaN' in load('forum').report(rows)
    verdict,fine = load('equal_time').verdict,pd.Series([0.3,0.2])
    bad = pd.Series([0.1,math.inf])
    assert [verdict(a, b) for a,b in ((bad,fine), (fine,bad), (bad,bad), (fine,fine))]==['behind','ahead','tie','tie']

def test_results_say_of_what_they_are(load):
    "Versions, the package's among them, and its commit"
    assert 'adahessian_fastai' in (said := load('_common').machine()) and 'torch' in said and (not (root/'.git').exists() or load('_common').commit())
