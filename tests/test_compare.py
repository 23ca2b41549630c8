"The command line, as a user calls it, and the tables and pictures of comparisons"
import math,os,subprocess,sys,time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib,numpy as np,pandas as pd,pytest,torch
from fastai.basics import SGD,Adam,Callback,CancelFitException,DataLoaders,Learner,get_random_states
from fastai.callback.tracker import TerminateOnNaNCallback
matplotlib.use('Agg')
from PIL import Image
from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.steppers import average_diag_hessian
from adahessian_fastai.compare import compare_optimizers,comparison_table,digits_dls,main,muted,parse_opts,plot_comparison,plot_rates
from adahessian_fastai.compare import Meter,check_machine,default_rate,fitted,folder_dls,parse_lr,parse_value,peak_memory,prepare,rates_around,rates_table
from adahessian_fastai.compare import save_comparison,train_once


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
    with pytest.raises(ValueError, match='make_learner must be a function.*got'): compare_optimizers(small(Adam), dict(adam=Adam), 1)
    for opts in ([Adam], Adam, 'adam'):
        with pytest.raises(ValueError, match=r'opts must be a dict such as .*got'): compare_optimizers(small, opts, 1)
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

def test_a_run_that_a_callback_ends_at_its_first_loss_that_is_no_number_has_failed():
    "Before the Recorder notes that loss: the run does not count with the epoch before"
    class Later(Callback):
        def after_loss(self):
            if self.training and self.train_iter>=6: self.learn.loss_grad = self.learn.loss = self.loss*math.nan
    runs = compare_optimizers(partial(small, cbs=[Later(),TerminateOnNaNCallback()]), dict(adam=Adam), 2)
    assert math.isnan(runs.valid_loss.item()) and len(runs.valid_losses[0])==1

def test_rates_near_a_best_loss_below_zero():
    "As of a log density: the best rate itself is near it"
    rows = [dict(optimizer='x', seed=0, lr=lr, default=0.1, train_loss=l, valid_loss=l, losses=[l], valid_losses=[l], seconds=[1.], **{'s/epoch': 1.})
        for lr,l in ((0.1,-10.), (0.2,-9.5), (0.3,-8.), (0.4,1.))]
    assert rates_table(pd.DataFrame(rows)).loc['x','near best']==0.5

@pytest.mark.parametrize('text,want', [('signed=false', False), ('signed=False', False), ('signed=true', True)])
def test_switches_of_the_command_line(text, want):
    opt = parse_opts(f'adahessian:{text}')[f'adahessian:{text}']([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert (average_diag_hessian in opt.opt.cbs)==want

def test_arguments_with_commas():
    found = parse_opts('adahessian:block_length={2:8,3:1},signed=false,adam,adahessian:dense=[20,4],clip=1')
    assert list(found)==['adahessian:block_length={2:8,3:1},signed=false','adam','adahessian:dense=[20,4],clip=1']
    assert found['adahessian:block_length={2:8,3:1},signed=false'].keywords==dict(block_length={2:8,3:1}, signed=False)


# Time and memory by hand

def test_the_peak_is_of_what_lives_together():
    "4 and 2 MB, and 4 again when they are gone"
    with peak_memory(torch.device('cpu')) as res:
        a,b = torch.zeros(2**20),torch.zeros(2**19)
        del a,b
        torch.zeros(2**20)
    assert res['mb']==pytest.approx(6, abs=0.1)

@pytest.mark.parametrize('n_iter,want', [(4,[4.,7.]), (1,[8.,7.])])
def test_the_batch_that_is_watched_is_not_in_the_time_of_its_epoch(n_iter, want, monkeypatch):
    "8 seconds with 5 for the first of four batches: 3 for three of them are 4 for all; the second epoch is taken as it is"
    meter,now = Meter(),[0.]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    meter.learn = SimpleNamespace(n_iter=n_iter, train_iter=0, model=torch.nn.Linear(1, 1))
    def at(t, **kwargs):
        now[0] = t
        vars(meter.learn).update(kwargs)
    meter.before_fit()
    assert meter.secs==[] and math.isnan(meter.mb)
    meter.before_train()
    meter.before_batch()
    kept = torch.zeros(2**19)
    at(5., train_iter=1)
    meter.after_batch()
    assert len(kept) and meter.mb==pytest.approx(2, abs=0.1)
    at(8., train_iter=n_iter)
    meter.after_train()
    at(10.)
    meter.before_train()
    meter.before_batch()
    at(17., train_iter=2*n_iter)
    meter.after_batch()
    meter.after_train()
    assert meter.secs==pytest.approx(want)

def test_a_row_of_a_run():
    "The end of each column, losses of all batches and epochs, seconds from the start, and a seed of its own for weights and batches"
    rows = [train_once(small, Adam, 3, 0.01, seed) for seed in (0,1,0)]
    a,b,again = rows
    assert (a['seed'],b['seed'])==(0,1) and a['losses']==again['losses']!=b['losses'] and len(a['losses'])==12
    assert a['valid_loss']==a['valid_losses'][-1]!=a['valid_losses'][0] and len(a['valid_losses'])==len(a['seconds'])==3
    secs = np.diff(a['seconds'], prepend=0)
    assert (secs>0).all() and a['s/epoch']==pytest.approx(np.median(secs)) and (a['lr'],a['default'])==(0.01,1e-3)

class First(Callback):
    "Notes the weights and the batch that a training begins with"
    def __init__(self, notes): self.notes = notes
    def before_batch(self):
        if self.training and self.train_iter==0: self.notes.append((self.model.weight.tolist(),self.x.tolist()))

def test_a_seed_is_of_the_weights_and_of_the_batches():
    "Both are alike for two optimizers, also where they share the loaders, and others with another seed"
    notes,dls = [],small(Adam).dls
    def make(opt): return Learner(dls, torch.nn.Linear(2,2), torch.nn.CrossEntropyLoss(), opt_func=opt, cbs=First(notes))
    assert compare_optimizers(make, dict(a=Adam, b=SGD), 1, seeds=(1,2)).seed.tolist()==[1,1,2,2]
    for one,same,other,also in zip(*notes): assert one==same!=other==also

def test_a_run_whose_last_loss_is_no_number_has_failed():
    "Though its weights could be validated"
    class Later(Callback):
        def after_loss(self):
            if self.training and self.train_iter>=6: self.learn.loss = self.loss*math.nan
    run, = compare_optimizers(lambda o: small(o, Later()), dict(adam=Adam), 2).itertuples()
    assert math.isnan(run.valid_loss) and len(run.valid_losses)==2 and np.isfinite(run.valid_losses).all()


# Tables by hand

def two_seeds():
    "`b` before `a`; only `b` has two rates"
    rows = [('b',.1,0,1.,2.), ('b',.2,0,3.,4.), ('a',.1,0,5.,1.), ('b',.1,1,2.,4.), ('b',.2,1,3.,4.), ('a',.1,1,9.,2.)]
    runs = pd.DataFrame(rows, columns=['optimizer','lr','seed','valid_loss','s/epoch'])
    return runs.assign(default=.1, losses=[[1.]]*6, valid_losses=[[1.]]*6, seconds=[[1.]]*6)

def test_a_comparison_is_of_means_in_the_order_of_the_runs():
    table = comparison_table(two_seeds())
    assert table.index.tolist()==[('b',.1),('b',.2),('a',.1)] and list(table.columns)==['valid_loss','s/epoch','ratio','valid_loss sd']
    assert table.valid_loss.tolist()==[1.5,3.,7.] and table['valid_loss sd'].tolist()==pytest.approx([.5**.5,0.,8**.5])
    assert table['s/epoch'].tolist()==[3.,4.,1.5] and table.ratio.tolist()==pytest.approx([1.,4/3,.5])
    one = comparison_table(two_seeds().query('lr==.1 and seed==0'))
    assert one.index.tolist()==['b','a'] and list(one.columns)==['valid_loss','s/epoch','ratio']

@pytest.mark.parametrize('default,loss', [(.1,1.5), (.1*(1+1e-9),1.5), (.15,math.nan)])
def test_a_table_of_rates(default, loss):
    "In the order of the runs; the default is met up to rounding, or has no loss"
    table = rates_table(two_seeds().assign(default=default))
    assert list(table.index)==['b','a'] and table.loc['b'].tolist()==pytest.approx([default,loss,.1,1.5,.5,4.], nan_ok=True)
    assert table.loc['a'].tolist()==pytest.approx([default,7. if loss else loss,.1,7.,1.,1.5] if default<.12 else [default,math.nan,.1,7.,1.,1.5], nan_ok=True)

@pytest.mark.parametrize('width', [36,60])
def test_a_table_as_text(width):
    "A long name takes several lines, its numbers are on the first of them"
    names = pd.Index(['adam','adahessian:update_each=2,clip=1'], name='optimizer')
    table = pd.DataFrame({'train_loss': [7.,8.], 'valid_loss': [.5,.25], 'peak MB': [1.,2.]}, index=names)
    for t in (table,table.drop(columns='train_loss')):
        lines = fitted(t, width).split('\n')
        body = [o for o in lines if o.split()[-2:] in (['valid','MB'],['0.5','1'],['0.25','2'])]
        assert len(body)==3 and len(lines)==(3 if width==60 else 4) and '7' not in ''.join(lines)
        words = [w for o in lines for w in (o.split()[:-2] if o in body else o.split())]
        assert words==['optimizer','adam','adahessian:','update_each=2,','clip=1']
        assert max(map(len, lines))<=width

def test_a_table_wider_than_the_screen_keeps_its_columns():
    "Names have eight letters to a line then"
    table = pd.DataFrame({'valid_loss': [.5,.25]}, index=pd.Index(['adam','adahessian'], name='optimizer'))
    assert fitted(table, 10).split('\n')==['optimize   valid','r','adam         0.5','adahessi    0.25','an']

def test_validation_stands_where_its_epoch_ended():
    "Five batches in two epochs; a name is in the legend once; a run that never validated is drawn too"
    runs = pd.concat([runs_of(('b',.1,.3), ('b',.1,.4)), runs_of(('a',.1,.5))], ignore_index=True)
    runs['losses'] = [[3.,2.,1.,.5,.4]]*3
    runs.at[2,'valid_losses'] = []
    runs.at[2,'seconds'] = []
    axs = plot_comparison(runs)
    assert [o.get_xdata().tolist() for o in axs[0].lines[1::2]]==[[2.5,5.],[2.5,5.],[]]
    assert [o.get_text() for o in axs[0].get_legend().get_texts()]==['b','a']

def test_curves_at_the_default_and_at_the_best_rate():
    "The default is met up to rounding; in the order of the runs"
    runs = runs_of(('b',.1*(1+1e-9),.4), ('b',1.,.2), ('b',2.,.3), ('a',.1,.6))
    loss,time_ = plot_rates(runs)
    assert [o.get_ydata().tolist()[-1] for o in time_.lines[:2]]==[.4,.2] and loss.lines[1].get_ydata().tolist()==[.4]
    assert [o.get_text() for o in loss.get_legend().get_texts()]==['b','a','default rate']

def test_the_picture_ends_at_a_hundred_times_the_lowest_loss():
    assert plot_rates(runs_of(('a',.1,.2), ('a',1.,1e9)))[0].get_ylim()[1]==pytest.approx(20)
    assert plot_rates(runs_of(('a',.1,.2), ('a',1.,15.)))[0].get_ylim()[1]>15


# Rates and words of the command line

@pytest.mark.parametrize('n,middle,want', [(5,None,[1e-4,3.2e-4,1e-3,3.2e-3,1e-2]), (3,1e-2,[1e-3,1e-2,.1]), (3,2e-3,[2e-4,1e-3,2e-3,2e-2]), (3,1.,[.1,1.,10.]),
    (3,1e-5,[1e-6,1e-5,1e-4]), (1,.5,[1e-3]), (2,1e-2,[1e-3,.1])])
def test_rates_over_two_decades(n, middle, want):
    "The default of 0.001 is one of them where it lies within"
    assert rates_around(Adam, n, middle)==pytest.approx(want)

def test_default_rates():
    assert default_rate(Adam)==default_rate(partial(SGD))==1e-3 and default_rate(partial(Adam, lr=.2))==.2 and default_rate(partial(Adam, lr=0))==0
    assert default_rate(adahessian)==.15 and default_rate(partial(adahessian, signed=True))==.05
    with pytest.raises(ValueError, match='lr must be a number'): default_rate(partial(Adam, lr='x'))
    with pytest.raises(ValueError, match='betas'): default_rate(partial(Adam, betas=3))

NAMES = ['adam','sgd:lr=0.2','sgd:wd=0,lr=1','sgd:decouple_wd=False','adam:eps=1']

@pytest.mark.parametrize('text,want', [('',{}), ('0.1',{'adam': .1,'sgd:decouple_wd=False': .1,'adam:eps=1': .1}),
    ('adam=1e-3',{'adam': 1e-3,'adam:eps=1': 1e-3}), ('adam=1,sgd=2',{'adam': 1.,'sgd:decouple_wd=False': 2.,'adam:eps=1': 1.})])
def test_rates_of_the_command_line(text, want):
    "By the optimizer, with its arguments or without; one that has its own keeps it"
    assert parse_lr(text, NAMES)==want

def test_an_argument_that_ends_like_a_rate_is_none(): assert parse_lr('0.1', ['x:min_lr=1'])=={'x:min_lr=1': .1}

@pytest.mark.parametrize('text,said', [('0','> 0'), ('-1','> 0'), ('inf','> 0'), ('nan','> 0'), ('adam=0','> 0'), ('word','a number or as'),
    ('adam=1=2','a number or as'), ('ranger=1',"lr names 'ranger'")])
def test_rates_of_the_command_line_that_cannot_be(text, said):
    with pytest.raises(ValueError, match=said): parse_lr(text, NAMES)

@pytest.mark.parametrize('text,want', [('1e-3',1e-3), ('[20,4]',[20,4]), ('true',True), ('FALSE',False), ('None',None), ('none',None), ('gnb','gnb'),
    ('two words','two words'), ("'1'",'1')])
def test_values_of_the_command_line(text, want):
    found = parse_value(text)
    assert found==want and type(found) is type(want)

@pytest.mark.parametrize('text,said', [('adam:wd',"as clip=0.1, got 'wd'"), ('adam:wd=',"as clip=0.1"), ('adam:mom=0.5','schedule of its own'),
    ('adam:betas=3',"'adam:betas=3'"), ('adam:betas=a=b',"'adam:betas=a=b'"), ('newton','unknown optimizer'), ('clip=1,adam','unknown optimizer')])
def test_optimizers_of_the_command_line_that_cannot_be(text, said):
    with pytest.raises(ValueError, match=said): parse_opts(text)

def test_an_argument_may_hold_the_signs_that_part_arguments():
    assert list(parse_opts("sgd:wd=0.1,adahessian:n_acc=2,block_length={2:8,3:1}").values())[1].keywords==dict(n_acc=2, block_length={2:8,3:1})

def prepared(tmp_path, **kwargs):
    given = dict(data='digits', arch='', size=64, bs=64, epochs=8, opts='adam:eps=1e-3,sgd:lr=0.3,adahessian', lr='', rates=0, seeds=2, fp16=False, bf16=False)
    return prepare(**{**given, **kwargs}, out=str(tmp_path/'some'/'folder'))

@pytest.mark.parametrize('kwargs,middles', [(dict(),[1e-2,.3,None]), (dict(rates=3),[1e-2,.3,None]), (dict(rates=3, lr='adam=0.5'),[.5,.3,None]),
    (dict(rates=2, lr='1'),[1.,.3,1.])])
def test_rates_that_a_sweep_tries(kwargs, middles, tmp_path):
    "Around what is given, else around the middle of the optimizer, else around the default of a training of this length; five for digits"
    args,n = prepared(tmp_path, **kwargs),kwargs.get('rates', 5)
    funcs,steps = [Adam,partial(SGD, lr=.3),adahessian],8*len(digits_dls().train)
    assert list(args['lr'].values())==[rates_around(f, n, m, steps) for f,m in zip(funcs, middles)]
    assert (args['seeds'],args['n_epoch'])==(range(2),8) and (tmp_path/'some'/'folder').is_dir()

@pytest.mark.parametrize('kwargs,want', [(dict(lr='0.5'),{'adam:eps=1e-3': .5,'adahessian': .5}), (dict(rates=1),{})])
def test_one_rate_is_no_sweep(kwargs, want, tmp_path): assert prepared(tmp_path, **kwargs)['lr']==want

@pytest.mark.parametrize('kwargs', [dict(rates=-1), dict(size=0), dict(bs=0), dict(epochs=0), dict(seeds=0), dict(arch='xresnet18'), dict(bs=2000),
    dict(lr='x')], ids=str)
def test_what_cannot_be_prepared(kwargs, tmp_path):
    with pytest.raises(ValueError, match=next(iter(kwargs))): prepared(tmp_path, **kwargs)
    assert not (tmp_path/'some').exists()

@pytest.mark.parametrize('fp16,bf16,said', [(True,True,'one of'), (True,False,'CUDA'), (False,True,'CUDA')])
def test_precisions_that_a_machine_lacks(fp16, bf16, said, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match=said): check_machine(fp16, bf16, tmp_path)
    check_machine(False, False, tmp_path)
    with pytest.raises(ValueError, match='out must be a folder'): check_machine(False, False, __file__)


# Data

def test_digits_are_shuffled_pictures_between_0_and_1():
    from sklearn.datasets import load_digits
    X,y = load_digits(return_X_y=True)
    dls = digits_dls(100)
    (x,t),n = zip(*dls.valid_ds),len(dls.train_ds)
    x = torch.stack(x)
    assert (n,len(x),dls.c,dls.train.bs)==(1437,360,10,100) and x.shape[1:]==(1,8,8) and (x.min(),x.max())==(0,1)
    counts = np.bincount(t, minlength=10)
    assert counts.min()>20 and [int(o) for o in t]!=y[-360:].tolist()
    rows = {tuple(o) for o in X.astype(int).tolist()}
    assert all(tuple((o.flatten()*16).int().tolist()) in rows for o in x)

@pytest.mark.parametrize('layout', ['train and valid','classes','valid alone'])
def test_folders_of_images(layout, tmp_path):
    "A validation folder counts beside a training folder only; without one a fifth is held out, the same each time"
    parts = {'train and valid': [('train/a',4),('train/b',4),('valid/a',2),('valid/b',2)], 'classes': [('a',10),('b',10)]}
    parts['valid alone'] = [('valid',10),('b',10)]
    for name,n in parts[layout]:
        (tmp_path/name).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (8,8)).save(tmp_path/name/f'{i}.png')
    one,two = (folder_dls(tmp_path, 8, 2) for _ in range(2))
    assert (len(one.train_ds),len(one.valid_ds))==((8,4) if layout=='train and valid' else (16,4))
    assert one.valid_ds.items==two.valid_ds.items and list(one.vocab)==(['b','valid'] if layout=='valid alone' else ['a','b'])

@pytest.mark.parametrize('names', [[],['train/a','valid/a'],['a']], ids=str)
def test_a_folder_with_one_class_is_none(names, tmp_path):
    for name in names:
        (tmp_path/name).mkdir(parents=True)
        Image.new('RGB', (8,8)).save(tmp_path/name/'0.png')
    with pytest.raises(ValueError, match='at least 2 class folders'): folder_dls(tmp_path)
