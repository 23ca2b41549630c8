"The command line, as a user calls it, and the tables and pictures of comparisons"
import math,os,subprocess,sys
from functools import partial
from pathlib import Path

import matplotlib,numpy as np,pandas as pd,pytest,torch
from fastai.basics import SGD,Adam,Callback,CancelFitException,DataLoaders,Learner,get_random_states
from fastai.callback.tracker import TerminateOnNaNCallback
matplotlib.use('Agg')
from PIL import Image
from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.steppers import average_diag_hessian
from adahessian_fastai.compare import compare_optimizers,comparison_table,default_rate,digits_dls,main,muted,parse_opts,plot_comparison,plot_rates
from adahessian_fastai.compare import rates_table,save_comparison


# The variables that keep PyTorch's profiler quiet come from the Makefile; nobody else has them
LOUD = {k: v for k,v in os.environ.items() if not k.startswith(('KINETO','TORCH_CPP'))}

def call(*args, env=None): return subprocess.run([sys.executable,'-m','adahessian_fastai',*args], capture_output=True, text=True, env=env)


def test_exit_code_and_stream_of_the_command():
    res = call('--data','nowhere')
    assert (res.returncode,res.stdout)==(2,'') and res.stderr.count('\n')==1

WRONG = {'a missing folder': dict(data='nowhere'), 'an unknown optimizer': dict(opts='adam,newton'), 'no epochs': dict(epochs=0),
    'an unknown arch': dict(arch='resnet17'), 'a negative learning rate': dict(lr='-1'), 'no number': dict(lr='adam=much'),
    'an argument that it lacks': dict(opts='adam,adahessian:betas=3'), 'a value out of range': dict(opts='adahessian:update_each=0'),
    'a range of less than none': dict(rates=-1), 'a file as out': dict(out=__file__), 'an empty folder': dict(data='EMPTY'),
    'batches above the data': dict(bs=2000), 'a rate that is a word': dict(opts='adahessian:lr=abc'), 'a slice': dict(opts='adam:lr=slice(1e-3,1e-2)'),
    'a network for larger images': dict(arch='resnet18'), 'a schedule that is a word': dict(opts='adahessian:when=Every(3)'),
    'a momentum that would be scheduled': dict(opts='adam:mom=0.5'), 'nowhere to write': dict(out='/proc/nowhere')}

@pytest.mark.parametrize('what', WRONG)
def test_mistakes_get_one_line_and_exit_code_2(what, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    args = {k: str(tmp_path/'empty') if v=='EMPTY' else v for k,v in WRONG[what].items()}
    with pytest.raises(SystemExit, match='2'): main(**{'out': str(tmp_path/'res'), **args})
    out,err = capsys.readouterr()
    assert out=='' and err.startswith('adahessian-compare: ') and err.count('\n')==1
    assert not (tmp_path/'res').exists()


def test_a_folder_of_images_is_compared(tmp_path):
    for part in ('train','val'):
        for name,level in (('dark',40),('light',200)):
            folder = tmp_path/'images'/part/name
            folder.mkdir(parents=True)
            for i in range(6): Image.new('RGB', (20,20), (level+i,level,level-i)).save(folder/f'{i}.png')
    out = tmp_path/'res'
    args = '--arch xresnet18 --size 16 --bs 4 --epochs 1 --opts sgd,adahessian'.split()
    res = call('--data', str(tmp_path/'images'), *args, '--out', str(out), env=LOUD)
    assert res.returncode==0, res.stderr
    assert {o.name for o in out.iterdir()}=={'compare.csv','runs.csv','compare.png'}
    table = pd.read_csv(out/'compare.csv')
    assert list(table.optimizer)==['sgd','adahessian'] and table.ratio[0]==1
    assert {'valid_loss','accuracy','s/epoch','peak MB'}<=set(table.columns) and table['peak MB'].min()>1
    assert '\r' not in res.stdout and max(map(len, res.stdout.split('\n')[-8:-3]))<=80
    assert not any(o in (res.stdout+res.stderr).lower() for o in ('profiler','kineto','gpugetdevice'))


def test_variants_over_a_range_of_rates(tmp_path, capsys, monkeypatch):
    "The default rate is one of the range, each line an epoch, and the picture marks what nobody gave"
    monkeypatch.chdir(tmp_path)
    name = 'adahessian:update_each=10,clip=3.,dense=2'
    main(epochs=1, opts=f'adam,{name},sophia:lr=0.01', rates=3)
    out = capsys.readouterr().out
    runs = pd.read_csv('results/runs.csv')
    own = default_rate(adahessian, len(digits_dls().train))
    assert default_rate(partial(adahessian, n_acc=4), 800)==default_rate(adahessian, 200)!=default_rate(adahessian, 800)
    tried = {'adam': [.001,.01,.1], name: [own/10,own,own*10], 'sophia:lr=0.01': [.001,.01,.1]}
    assert runs.groupby('optimizer').lr.apply(list).to_dict()=={k: pytest.approx(o) for k,o in tried.items()}
    assert runs.groupby('optimizer').default.first().to_dict()=={'adam': .001, name: own, 'sophia:lr=0.01': .01}
    assert out.count('epoch 0, train_loss')==9 and '\r' not in out and max(map(len, out.split('\n')))<=80
    table = pd.read_csv('results/compare.csv').set_index('optimizer')
    for k,o in runs.groupby('optimizer'):
        best = o.loc[o.valid_loss.idxmin()]
        assert table.loc[k, 'best lr']==best.lr and table.loc[k, 'lowest loss']==pytest.approx(best.valid_loss)
        assert table.loc[k, 'loss']==pytest.approx(o.valid_loss[np.isclose(o.lr, o.default)].item())
        assert table.loc[k, 'near best']==pytest.approx((o.valid_loss<=1.1*best.valid_loss).mean())


def test_what_an_optimizer_is_given_is_what_trains():
    opts = parse_opts('adahessian:update_each=10,estimator=gnb,signed=True,block_length=1,hessian_free:lr=0.5,adam')
    assert list(opts)==['adahessian:update_each=10,estimator=gnb,signed=True,block_length=1','hessian_free:lr=0.5','adam']
    assert opts['hessian_free:lr=0.5'].keywords==dict(lr=.5)
    assert list(opts.values())[0].keywords==dict(update_each=10, estimator='gnb', signed=True, block_length=1)


def runs_of(*rates):
    rows = [dict(optimizer=k, lr=lr, valid_loss=loss, valid_losses=[2.,loss], seconds=[1.,3.], losses=[3.,2.,1.,.5]) for k,lr,loss in rates]
    return pd.DataFrame(rows).assign(seed=0, default=.1, **{'s/epoch': 1.5})

def test_pictures_have_a_validation_curve_and_a_time_axis():
    one = plot_comparison(runs_of(('a',.1,.3)))
    assert [o.get_xdata().tolist() for o in one[0].lines]==[[0,1,2,3],[2.,4.]] and one[0].lines[1].get_ydata().tolist()==[2.,.3]
    assert one[1].lines[0].get_xdata().tolist()==[1.,3.] and 'seconds' in one[1].get_xlabel()
    many = plot_rates(runs_of(('a',.01,.5), ('a',.1,.4), ('a',1.,.2)))
    assert many[0].lines[0].get_xydata().tolist()==[[.01,.5],[.1,.4],[1.,.2]]
    assert many[0].lines[1].get_xydata().tolist()==[[.1,.4]] and many[0].lines[1].get_marker()=='*'
    assert [o.get_ydata().tolist()[-1] for o in many[1].lines[:2]]==[.4,.2]

def test_a_diverged_run_leaves_the_others_visible():
    ax = plot_rates(runs_of(('a',.1,.2), ('a',1.,1e17)))[0]
    assert ax.get_ylim()[1]<=20 and not math.isinf(ax.get_ylim()[1])


def test_muted_is_silent_below_python_and_ends(capfd):
    with muted(): os.write(2, b'lost')
    os.write(2, b'heard')
    assert capfd.readouterr().err=='heard'
    with pytest.raises(ZeroDivisionError), muted(): 1/0
    os.write(2, b'again')
    assert capfd.readouterr().err=='again'


# Studies

@pytest.fixture
def studies(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]/'benchmarks'))
    import studies
    return studies

@pytest.fixture
def study():
    rows = [('a',0.1,0,1.,0.8), ('a',1.,0,2.,0.9), ('a',0.1,1,9.,0.6), ('b',0.1,0,math.nan,0.1), ('b',1.,0,3.,0.5)]
    return pd.DataFrame(rows, columns=['entry','lr','seed','valid_loss','accuracy']).assign(epochs=1, seconds=[2.,1.,4.,1.,6.])

def test_the_rate_with_the_lowest_loss_at_the_first_seed_counts(studies, study):
    "0.1 for `a`, so its accuracies are 0.8 and 0.6; a run that diverged has no loss and is never chosen"
    table = studies.study_table(study)
    assert list(table.accuracy)==['70.0% ± 14.1%','50.0%'] and list(table.lr)==[.1,1.] and list(table.time)==[1.,2.]

def test_what_was_kept_for_the_report_is_reported(studies, study):
    "`a` is chosen by `loss`, 0.1 before 1, and reported by `rest_loss`; without one by `loss` itself"
    rows = study.rename(columns=dict(valid_loss='loss')).assign(rest_loss=[5.,6.,7.,8.,9.])
    assert list(studies.study_table(studies.shipped(rows)).loss)==['6.000 ± 1.414','9.000']
    assert list(studies.study_table(studies.shipped(rows.assign(rest_loss=math.nan))).loss)==['5.000 ± 5.657','3.000']

def test_pictures_of_a_study(studies, study):
    points = studies.plot_study(study).containers
    assert [o[0].get_xydata().tolist()[0] for o in points]==[[3.,pytest.approx(.7)],[6.,.5]]
    lines = studies.plot_lrs(study).lines
    assert [o.get_xydata().tolist() for o in lines]==[[[.1,pytest.approx(.7)],[1.,.9]],[[.1,.1],[1.,.5]]]


def test_loaders_of_pytorch_begin_at_the_seed_too():
    "Two entries of one optimizer see the same batches"
    ds = torch.utils.data.TensorDataset(torch.randn(48, 3), torch.randint(2, (48,)))
    def make(opt_func):
        dls = DataLoaders(*(torch.utils.data.DataLoader(ds, 8, shuffle=True) for _ in range(2)))
        return Learner(dls, torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), opt_func=opt_func)
    a,b = compare_optimizers(make, dict(a=Adam, b=Adam), 1).losses
    assert a==b


def test_a_comparison_leaves_the_random_state_and_the_switches_of_cudnn(monkeypatch):
    "Those of the last run would make all that comes after repeatable, and slow"
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', False)
    ds = [(torch.randn(4),torch.randint(2, ())) for _ in range(16)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)
    before,cudnn = get_random_states(),torch.backends.cudnn
    runs = compare_optimizers(lambda opt: Learner(dls, torch.nn.Linear(4,2), torch.nn.functional.cross_entropy, opt_func=opt), dict(adam=Adam), 1)
    now = get_random_states()
    assert len(runs)==1 and not cudnn.deterministic and before['random_state']==now['random_state']
    assert torch.equal(before['torch_state'], now['torch_state']) and (before['numpy_state'][1]==now['numpy_state'][1]).all()

def test_a_rate_for_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="adma.*'adam'"): compare_optimizers(None, dict(adam=Adam), 1, lr=dict(adma=1e-2))

def test_a_loader_of_pytorch_begins_each_run_alike():
    "Its generator would go on where the run before has left it, and the second optimizer see other batches"
    ds = torch.utils.data.TensorDataset(torch.randn(64,4), torch.randint(2, (64,)))
    train = torch.utils.data.DataLoader(ds, bs := 8, shuffle=True, generator=torch.Generator())
    dls = DataLoaders(train, torch.utils.data.DataLoader(ds, bs))
    def make(opt): return Learner(dls, torch.nn.Linear(4,2), torch.nn.functional.cross_entropy, opt_func=opt)
    runs = compare_optimizers(make, dict(a=Adam, b=Adam), 2)
    assert runs.losses[0]==runs.losses[1]


def small(opt_func, cbs=None, **recorder):
    "A Learner on 32 rows of two classes"
    x = torch.linspace(-1, 1, 64).view(32,2)
    rows = [(o, (o.sum()>0).long()) for o in x]
    learn = Learner(DataLoaders.from_dsets(rows, rows, bs=8, num_workers=0), torch.nn.Linear(2,2), torch.nn.CrossEntropyLoss(), opt_func=opt_func, cbs=cbs)
    vars(learn.recorder).update(recorder)
    return learn

class FailsOnce(Callback):
    "What happens in the third batch of a run with a rate of 1"
    def __init__(self, what): self.what = what
    def after_loss(self):
        if not self.training or self.opt.hypers[-1]['lr']<0.5 or self.train_iter<2: return
        if self.what=='nan': self.learn.loss_grad = self.learn.loss = self.loss*math.nan
        if self.what=='cancel': raise CancelFitException

@pytest.mark.parametrize('cbs', [lambda: [FailsOnce('nan'),TerminateOnNaNCallback()], lambda: [FailsOnce('nan')], lambda: [FailsOnce('cancel')]])
def test_a_sweep_in_which_one_optimizer_never_comes_to_an_end_is_kept(cbs, tmp_path):
    "It counts as not a number, whatever was noted before it failed; all the rest is in table, file and picture"
    fit = dict(adam=partial(Adam), sgd=partial(SGD))
    lrs = dict(adam=[1e-3,1e-2], sgd=[1.,2.])
    constant = lambda o: small(o, cbs())
    runs = compare_optimizers(lambda o: with_constant_rate(constant(o)), fit, 2, lr=lrs)
    bad = runs[runs.optimizer=='sgd']
    assert bad.valid_loss.isna().all() and runs[runs.optimizer=='adam'].valid_loss.notna().all()
    table = save_comparison(runs, tmp_path)
    assert math.isnan(table.loc['sgd','best lr']) and table.loc['adam','lowest loss']==runs[runs.optimizer=='adam'].valid_loss.min()
    assert {o.name for o in tmp_path.iterdir()}=={'compare.csv','runs.csv','compare.png'}
    plot_comparison(runs)

def with_constant_rate(learn):
    learn.fit_one_cycle = lambda n, lr, cbs: learn.fit(n, lr, cbs=cbs)
    return learn

def test_a_rate_of_zero_is_a_rate():
    "It trains nothing, and the table says so"
    run, = compare_optimizers(small, dict(adam=Adam), 1, lr=0).itertuples()
    assert run.lr==0 and run.default==1e-3

@pytest.mark.parametrize('lr', ['1e-3',slice(1e-3,1e-2),-1.,math.nan,True])
def test_a_rate_that_is_no_number_is_refused(lr):
    with pytest.raises(ValueError, match='lr must be a number >= 0'): compare_optimizers(small, dict(adam=Adam), 1, lr=lr)

@pytest.mark.parametrize('lr', [(1e-3,1e-2),np.array([1e-3,1e-2]),torch.tensor([1e-3,1e-2])])
def test_rates_of_any_kind(lr):
    runs = compare_optimizers(small, dict(adam=Adam), 1, lr=lr)
    assert np.allclose(runs.lr, [1e-3,1e-2])

def test_seeds_and_learners_that_cannot_be_compared():
    with pytest.raises(ValueError, match='seeds=2'): compare_optimizers(small, dict(adam=Adam), 1, seeds=2)
    with pytest.raises(ValueError, match='valid_loss'): compare_optimizers(partial(small, valid_metrics=False), dict(adam=Adam), 1)
    assert compare_optimizers(partial(small, add_time=False), dict(adam=Adam), 1).valid_loss.notna().all()

@pytest.mark.parametrize('error', [RuntimeError,KeyboardInterrupt])
def test_nothing_watches_after_an_error(error):
    "The profiler of the first batch ends, though the exception is kept as a notebook keeps it"
    class Fails(Callback):
        def after_loss(self): raise error('in the first batch')
    with pytest.raises(error) as kept: compare_optimizers(partial(small, cbs=Fails()), dict(adam=Adam), 1)
    assert kept and not torch.autograd._profiler_enabled()

def test_a_seed_that_failed_is_no_success():
    "A rate at which two runs of three blow up is not the best"
    def row(seed, lr, loss): return dict(optimizer='x', seed=seed, lr=lr, default=0.1, train_loss=loss, valid_loss=loss, accuracy=loss,
        **{'s/epoch': 1., 'peak MB': 1.}, losses=[loss], valid_losses=[loss], seconds=[1.])
    runs = pd.DataFrame([row(s, lr, l) for lr,ls in {0.1: (0.5,0.5,0.5), 1.: (0.1,math.nan,math.nan)}.items() for s,l in enumerate(ls)])
    table = rates_table(runs)
    assert table.loc['x','best lr']==0.1 and table.loc['x','lowest loss']==0.5 and table.loc['x','near best']==0.5
    assert comparison_table(runs).valid_loss.isna().tolist()==[False,True]
    axs = plot_rates(runs)
    assert np.isnan(axs[0].lines[0].get_ydata()).tolist()==[False,True]

@pytest.mark.parametrize('text,want', [('signed=false', False), ('signed=False', False), ('signed=true', True)])
def test_switches_of_the_command_line(text, want):
    opt = parse_opts(f'adahessian:{text}')[f'adahessian:{text}']([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert (average_diag_hessian in opt.opt.cbs)==want

def test_arguments_with_commas():
    found = parse_opts('adahessian:block_length={2:8,3:1},signed=false,adam,adahessian:dense=[20,4],clip=1')
    assert list(found)==['adahessian:block_length={2:8,3:1},signed=false','adam','adahessian:dense=[20,4],clip=1']
    assert found['adahessian:block_length={2:8,3:1},signed=false'].keywords==dict(block_length={2:8,3:1}, signed=False)
