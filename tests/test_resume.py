"A run that was interrupted and continued is the run that was not, bit for bit; what does not fit is refused and changes nothing"
import copy,io,itertools,json,math,os,pickle,random,re,signal,subprocess,sys,time,zipfile
from pathlib import Path
import numpy as np,pytest,torch,torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner,load_learner
from fastai.optimizer import Adam,Lookahead
from fastai.text.learner import TextLearner
from functools import partial
from torch import nn
from adahessian_fastai.all import adahessian,adahessian_paper,hessian_free,sassha,sophia
from helpers_learner import ROUNDING,data,fit,learner,mlp,state_of
from adahessian_fastai.optimizer import load_parts,upgraded

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
CASES = [dict(), dict(update_each=5), dict(n_acc=4), dict(n_acc=4, update_each=5), dict(n_samples=2, debiased=True, n_acc=3)]


def made(tmp_path, seed=0, model=None, **kwargs):
    "A Learner whose probes come from the optimizer's own generators; 30 items make 5 batches, so `n_acc=4` ends an epoch in the middle"
    torch.manual_seed(seed)
    x,y = data(30)
    return learner(model or mlp(norm=nn.BatchNorm1d), x, y, path=tmp_path, **kwargs)


@pytest.mark.parametrize('fp16', [False,True])
@pytest.mark.parametrize('kwargs', CASES, ids=str)
def test_a_file_continues_bit_for_bit(kwargs, fp16, cpu_amp, tmp_path):
    "Two epochs, a file, another Learner with other weights and another seed, two epochs more"
    half = lambda l: l.to_fp16() if fp16 else l
    straight = fit(half(made(tmp_path, **kwargs)), 2)
    straight.save('two')
    fit(straight, 2)
    other = half(made(tmp_path, seed=9, model=mlp(5, norm=nn.BatchNorm1d), **kwargs))
    other.create_opt()
    assert other.opt.seed!=straight.opt.seed
    other.load('two')
    assert state_of(fit(other, 2))==state_of(straight)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy','pickle'])
@pytest.mark.parametrize('kwargs', CASES, ids=str)
def test_copies_continue_bit_for_bit(kwargs, copied, tmp_path):
    "Model and optimizer copied together, in the middle of an accumulation where there is one"
    learn = fit(made(tmp_path, **kwargs), 2)
    model,opt = copied((learn.model,learn.opt))
    other = made(tmp_path, seed=9, model=model, **kwargs)
    other.create_opt()
    other.opt = opt
    assert {id(p) for p in model.parameters()}=={id(p) for p,*_ in opt.all_params()}
    assert state_of(fit(other))==state_of(fit(learn))


@pytest.mark.parametrize('weights_only', [True,False])
def test_both_ways_in_which_fastai_loads(weights_only, tmp_path):
    learn = fit(made(tmp_path, n_acc=4))
    learn.save('a')
    other = made(tmp_path, seed=1, n_acc=4)
    other.load('a', weights_only=weights_only)
    assert state_of(other)==state_of(learn)


def test_save_model_callback_every_epoch(tmp_path):
    "Continued from the file of the second epoch, with `start_epoch`"
    straight = fit(made(tmp_path, update_each=5, cbs=[SaveModelCallback(every_epoch=True, with_opt=True)]), 4)
    other = made(tmp_path, seed=1, update_each=5)
    other.load('model_1')
    fit(other, 4, start_epoch=2)
    assert state_of(other)==state_of(straight)


def unchanged(learn, f, match):
    "`f` is refused; the optimizer is as it was, to the last bit, and the very same tensors"
    before,ids = state_of(learn)[1],[id(v) for s in learn.opt.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    with pytest.raises((ValueError,RuntimeError), match=match): f()
    assert state_of(learn)[1]==before
    assert ids==[id(v) for s in learn.opt.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def test_the_state_of_adam_is_refused(tmp_path):
    adam = fit(made(tmp_path, opt_func=lambda ps,lr,**kwargs: Adam(ps, lr)))
    adam.save('adam')
    learn = fit(made(tmp_path))
    unchanged(learn, lambda: learn.load('adam'), 'not a state of AdaHessianWrapper')
    learn.load('adam', with_opt=False)


def test_the_state_of_a_bare_optimizer_is_none_of_lookahead(tmp_path):
    "It is refused with what helps, and that helps"
    bare = fit(made(tmp_path))
    bare.save('bare')
    learn = fit(made(tmp_path, opt_func=lambda ps,**kwargs: Lookahead(adahessian_paper(ps, **kwargs))), 2)
    before = state_of(learn)[1]
    with pytest.raises(ValueError, match='not a state of Lookahead.*with_opt=False'): learn.load('bare')
    assert state_of(learn)[1]==before
    learn.load('bare', with_opt=False)
    fit(learn)


def test_lookahead_itself_takes_its_own_states_only():
    "A refused state changes nothing, one that is taken stays as it is"
    def made(p): return Lookahead(adahessian_paper([p], lr=0.1), k=2)
    def stepped(opt):
        opt.zero_grad()
        opt.differentiate((opt.param_lists[0][0]**2).sum())
        opt.step()
        return opt.param_lists[0][0].item()
    one,other = (made(torch.nn.Parameter(torch.ones(1))) for _ in range(2))
    stepped(one)
    with pytest.raises(ValueError, match='not a state of Lookahead.*with_opt=False'): other.load_state_dict(one.opt.state_dict())
    sd = one.state_dict()
    with pytest.raises(ValueError, match='curvature must be a dict'): other.load_state_dict({**sd, 'curvature': 1})
    assert other.count==0 and other.slow_weights is None and not any(other.opt.state.values())
    other.param_lists[0][0].data.copy_(one.param_lists[0][0])
    other.load_state_dict(sd)
    assert {'count','slow_weights'}<=set(sd) and other.count==1
    assert stepped(one)==stepped(other)


@pytest.mark.parametrize('kwargs', [dict(signed=True), dict()])
def test_the_average_of_another_kind_is_refused(kwargs, tmp_path):
    "Squares are no signed averages, and a count without the average that it counts would make steps too long"
    fit(made(tmp_path, **kwargs)).save('one')
    learn = fit(made(tmp_path, signed=not kwargs.get('signed', False)))
    unchanged(learn, lambda: learn.load('one'), 'avg_diag_hessian')


def test_the_state_of_another_model_is_refused(tmp_path):
    "Other shapes, and another number of parameters"
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(5,8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8,3)).double()
    deep = nn.Sequential(*mlp(norm=nn.BatchNorm1d), nn.Linear(3,3).double())
    learn = fit(made(tmp_path))
    for name,model,match in (('wide',wide,'size mismatch'),('deep',deep,'Unexpected key')):
        fit(made(tmp_path, model=model)).save(name)
        unchanged(learn, lambda: learn.load(name), match)
    for model,match in ((wide,r'has shape \(8, 5\), the parameter \(7, 5\)'),(deep,'for 8 parameters, the model has 6')):
        sd = fit(made(tmp_path, model=model)).opt.state_dict()
        unchanged(learn, lambda: learn.opt.load_state_dict(sd), match)


def test_other_groups_are_refused(tmp_path):
    other = made(tmp_path)
    other.splitter = lambda m: [list(m[0].parameters())+list(m[1].parameters()), list(m[3].parameters())]
    sd = fit(other).opt.state_dict()
    learn = fit(made(tmp_path))
    unchanged(learn, lambda: learn.opt.load_state_dict(sd), 'parameter groups')


@pytest.mark.parametrize('share', [0.1,0.5,0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    learn = fit(made(tmp_path))
    file = learn.save('whole')
    content = file.read_bytes()
    (tmp_path/'models/part.pth').write_bytes(content[:int(share*len(content))])
    model = state_of(learn)[0]
    unchanged(learn, lambda: learn.load('part'), 'not a whole checkpoint')
    assert state_of(learn)[0]==model


@pytest.mark.parametrize('key', ['counts','scale','estimator','when'])
def test_an_incomplete_state_is_refused(key, tmp_path):
    learn = fit(made(tmp_path, n_acc=4))
    sd = learn.opt.state_dict()
    del sd['curvature'][key]
    unchanged(learn, lambda: learn.opt.load_state_dict(sd), f"incomplete, it has no .'{key}'")
    sd = learn.opt.state_dict()
    sd['curvature']['pending']['grads'] = sd['curvature']['pending']['grads'][:-1]
    unchanged(learn, lambda: learn.opt.load_state_dict(sd), 'parameters, the model has 6')


def test_a_loaded_state_shares_no_memory_with_its_source(tmp_path):
    learn,other = fit(made(tmp_path, n_acc=4)),made(tmp_path, n_acc=4)
    other.create_opt()
    sd = learn.opt.state_dict()
    other.opt.load_state_dict(sd)
    before = state_of(learn)
    fit(other, 2)
    assert state_of(learn)==before


# Every entry of a state, and what may have happened to it

GONE = object()
tensors = dict(  # chkstyle: ignore-node
    nan=lambda t: t.clone().fill_(math.nan), inf=lambda t: t.clone().fill_(math.inf), half=lambda t: t.half(), single=lambda t: t.float(),
    bfloat16=lambda t: t.bfloat16(), complex=lambda t: t.to(torch.complex128), scalar=torch.tensor(1., dtype=torch.double), short=lambda t: t[:1], text='a',
    none=None, list=[1.], number=1., gone=GONE)
wholes = dict(negative=-1, half=1.5, text='a', none=None, tensor=torch.tensor(1), true=True, nan=math.nan, gone=GONE)
sections = dict(none=None, list=[], text='a', number=3)
SPOILT = [  # chkstyle: ignore-node
    *[(f'state.0.{k}', v) for k in ('grad_avg','sqr_avg_diag_hessian') for v in tensors.items()],
    *[(f'state.0.{k}', v) for k in ('step','age') for v in wholes.items()],
    *[('state.0.hess_step', v) for v in wholes.items() if v[0]!='half'], # A dense start counts in parts
    *[('state.0.hess_weight', v) for v in wholes.items() if v[0] not in ('half','gone')], # Without it an estimate counts once
    *[(f'curvature.counts.{k}', v) for k in ('seed','n_steps','n_estimates','n_dropped','n_skipped') for v in wholes.items()],
    *[('hypers.0.lr', v) for v in dict(nan=math.nan, inf=math.inf, negative=-1., text='a', none=None, gone=GONE, tensor=torch.tensor(0.1)).items()],
    ('hypers.0.mom', ('one',1.)), ('hypers.0.eps', ('zero',0.)),
    *[('curvature.scale.c', v) for v in dict(nan=math.nan, zero=0., text='a', none=None, gone=GONE).items()],
    *[('curvature.scale.n_good', v) for v in wholes.items()],
    *[('curvature.estimator.seen', v) for v in dict(none=None, number=5, text='a', alone=(1,), none_in_it=(None,False)).items()],
    *[('curvature.estimator.used', v) for v in dict(number=-1, text='a', list=[]).items()],
    *[(k, v) for k in ('curvature','state','hypers','state.0','hypers.0') for v in sections.items() if (k,v[0])!=('state.0','dict')],
    *[(f'curvature.{k}', v) for k in ('counts','scale','estimator','when') for v in sections.items()]]
SPOILT_PENDING = [  # chkstyle: ignore-node
    *[('curvature.pending', v) for v in sections.items()],
    *[('curvature.pending.n_batches', v) for v in wholes.items()],
    *[('curvature.pending.n_items', v) for v in wholes.items() if v[0]!='half'], # A mean over processes need not be whole
    *[(f'curvature.pending.{k}', v) for k in ('scaled','grads','diags','noises','losses') for v in dict(none=None, text='a', number=-1, gone=GONE).items()],
    *[('curvature.pending.share', v) for v in dict(text='a', negative=-1, gone=GONE).items()],
    *[(f'curvature.pending.{k}.0', (n,tensors[n])) for k in ('grads','diags') for n in ('single','short','text','scalar')]]

def spoil(sd, path, v):
    *way,last = [int(k) if k.isdigit() else k for k in path.split('.')]
    for k in way: sd = sd[k]
    if v is GONE: del sd[last]
    else: sd[last] = v(sd[last]) if callable(v) else v


@pytest.fixture(scope='module')
def at_rest(tmp_path_factory): return fit(made(tmp_path_factory.mktemp('a'))),fit(made(tmp_path_factory.mktemp('b')), 2)

@pytest.fixture(scope='module')
def accumulating(tmp_path_factory):
    kwargs = dict(n_acc=4, n_samples=2, debiased=True)
    return fit(made(tmp_path_factory.mktemp('a'), **kwargs)),fit(made(tmp_path_factory.mktemp('b'), **kwargs), 2)


@pytest.mark.parametrize('pending', [False,True])
def test_a_spoilt_state_is_refused_and_changes_nothing(pending, at_rest, accumulating):
    "Also where an accumulation is under way, of which no half is replaced"
    source,learn = accumulating if pending else at_rest
    assert bool(learn.opt.n_batches)==pending
    for path,(name,v) in [*SPOILT, *(SPOILT_PENDING if pending else [])]:
        sd = copy.deepcopy(source.opt.state_dict())
        spoil(sd, path, v)
        said = [k for k in path.split('.') if not k.isdigit()][-1]
        try: unchanged(learn, lambda: learn.opt.load_state_dict(sd), said)
        except BaseException as e: raise AssertionError(f'{path} {name}') from e
    learn.opt.load_state_dict(source.opt.state_dict())
    assert state_of(learn)[1]==state_of(source)[1]


def test_a_part_that_was_loaded_before_another_was_refused_is_as_it_was(at_rest):
    "Also of an estimator of one's own, which refuses in its own way"
    source,learn = at_rest
    sd = copy.deepcopy(source.opt.state_dict())
    sd['curvature']['when']['update_each'],sd['curvature']['estimator']['seen'] = 7,None
    unchanged(learn, lambda: learn.opt.load_state_dict(sd), 'seen')
    assert learn.opt.update_each==1
    class Own(type(learn.opt.estimator)):
        def load_state_dict(self, sd): raise KeyError('of its own')
    parts = dict(when=learn.opt.when, estimator=Own())
    with pytest.raises(KeyError, match='of its own'): load_parts(parts, sd['curvature'])
    assert learn.opt.update_each==1



@pytest.mark.parametrize('a,b', [('double','float'),('float','double'),('float','bfloat16'),('double','half')])
def test_the_state_of_another_precision_is_refused(a, b, tmp_path):
    source,learn = (made(tmp_path, model=getattr(mlp(), o)()) for o in (a,b))
    for o,l in ((a,source),(b,learn)):
        l.create_opt()
        l.opt.differentiate(l.model(data(6, dtype=getattr(torch, o))[0]).square().mean())
        l.opt.step()
    unchanged(learn, lambda: learn.opt.load_state_dict(source.opt.state_dict()), 'with_opt=False')


def test_what_is_pending_may_be_an_overflow(tmp_path):
    "A file between a bad batch and its step: the step is skipped after loading as it would have been"
    class Bad(Callback):
        def after_loss(self):
            if self.training and self.train_iter==4: self.learn.loss_grad = self.loss_grad*math.inf
    learn,other = (made(tmp_path, n_acc=4, seed=s, cbs=[Bad()]) for s in (0,1))
    fit(learn).save('bad')
    other.load('bad')
    assert state_of(other)[1]['curvature']['counts']==state_of(learn)[1]['curvature']['counts']
    for l in (learn,other):
        with pytest.warns(UserWarning, match='step skipped'): fit(l)
    assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), other.model.parameters())) and other.opt.n_skipped==1


# Files of version 0.0.1

def tensors_again(o):
    if isinstance(o, dict): return torch.tensor(o['tensor'], dtype=torch.double) if 'tensor' in o else {k: tensors_again(v) for k,v in o.items()}
    return [tensors_again(v) for v in o] if isinstance(o, list) else o


@pytest.mark.parametrize('case', ['sparse','auto','n_acc_samples'])
def test_a_file_of_version_0_0_1_continues_where_it_stood(case, tmp_path, capsys):
    "Two epochs there; the third one ends here as it ended there"
    found = tensors_again(json.loads(Path(__file__).with_name('state_0_0_1.json').read_text())[case])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5,3), nn.Tanh(), nn.Linear(3,3)).double()
    learn = made(tmp_path, model=model, seed=7, **found['kwargs'])
    (tmp_path/'models').mkdir()
    torch.save({k: found[k] for k in ('model','opt')}, tmp_path/'models/old.pth')
    learn.load('old')
    torch.manual_seed(5)
    fit(learn)
    assert max((v-found['after'][k]).abs().max().item() for k,v in learn.model.state_dict().items())<10*ROUNDING # On another processor


# The real error, and the rate that nobody gave

def test_a_stream_shows_what_was_wrong(tmp_path):
    learn = fit(made(tmp_path))
    file = learn.save('whole')
    learn.load(io.BytesIO(file.read_bytes()))
    unchanged(learn, lambda: learn.load(io.BytesIO(file.read_bytes()[:900])), 'PytorchStreamReader|archive|zip|pickle|not a whole')
    broken = io.BytesIO()
    torch.save(dict(model=learn.model.state_dict(), opt=fit(made(tmp_path, model=nn.Sequential(nn.Linear(5,3).double()))).opt.state_dict()), broken)
    broken.seek(0)
    unchanged(learn, lambda: learn.load(broken), 'parameters, the model has')


def zipped(_):
    file = io.BytesIO()
    np.savez(file, a=np.ones(2))
    return file.getvalue()


def turned(content):
    "The pickled part is spoilt, the archive around it is whole"
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made := io.BytesIO(), 'w') as new:
        for o in old.namelist(): new.writestr(o, old.read(o)[::-1] if o.endswith('data.pkl') else old.read(o))
    return made.getvalue()


def legacy(_, what=None):
    torch.save(dict(model={}, opt={}) if what is None else what, file := io.BytesIO(), _use_new_zipfile_serialization=False)
    return file.getvalue()


BROKEN = dict(  # chkstyle: ignore-node
    cut=lambda c: c[:900], cut_late=lambda c: c[:-9], empty=lambda c: b'', text=lambda c: b'weights and biases', npz=zipped, turned=turned,
    cut_legacy=lambda c: legacy(c)[:-20])

@pytest.mark.parametrize('weights_only', [True,False])
@pytest.mark.parametrize('how', BROKEN)
def test_what_is_no_checkpoint_is_named(how, weights_only, tmp_path):
    "A file by its path, a stream by the name of the argument; what PyTorch says comes along, and nothing has changed"
    learn = fit(made(tmp_path, n_acc=4))
    content = BROKEN[how](learn.save('whole').read_bytes())
    (tmp_path/'models/part.pth').write_bytes(content)
    before = state_of(learn)
    for file,name in (('part','part.pth'), (io.BytesIO(content),'file=<_io.BytesIO')):
        with pytest.raises((ValueError,pickle.UnpicklingError)) as e: learn.load(file, weights_only=weights_only)
        if isinstance(e.value, ValueError):
            said,why = str(e.value),str(e.value.__cause__)
            assert name in said and ('whole checkpoint' in said or 'as a checkpoint' in said) and why in said
        else: assert how=='turned' # What may not be unpickled is PyTorch's to say
    assert state_of(learn)==before


def test_errors_that_say_enough_are_left_as_they_are(tmp_path):
    "A file that is not there, what may not be unpickled, weights that do not fit; the model keeps its weights, also those that would fit"
    learn = fit(made(tmp_path))
    before = state_of(learn)
    for e,file in ((FileNotFoundError,'nowhere'), (pickle.UnpicklingError,io.BytesIO(pickled(print))), (RuntimeError,io.BytesIO(legacy(None, mlp(3).state_dict())))):
        with pytest.raises(e): learn.load(file)
        assert state_of(learn)==before


def pickled(o):
    torch.save(dict(model=o, opt={}), file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize('spoilt', [('opt','curvature','counts'), ('opt','state'), ('model','3.bias')])
@pytest.mark.parametrize('stream', [True,False])
def test_a_refused_checkpoint_leaves_the_weights_too(spoilt, stream, tmp_path):
    learn = fit(made(tmp_path, n_acc=4))
    file = fit(made(tmp_path, seed=3, model=mlp(3, norm=nn.BatchNorm1d), n_acc=4)).save('other')
    held = torch.load(file, weights_only=False)
    at = held
    for k in spoilt[:-1]: at = at[k]
    at[spoilt[-1]] = at[spoilt[-1]][:1] if isinstance(at[spoilt[-1]], (list,torch.Tensor)) else None
    torch.save(held, file)
    before = state_of(learn)
    with pytest.raises((ValueError,RuntimeError)): learn.load(io.BytesIO(file.read_bytes()) if stream else 'other')
    assert state_of(learn)==before


class Items(list):
    "What can be exported"
    def new_empty(self): return Items()


def trip(how, learn, tmp_path):
    if how=='pickle': return pickle.loads(pickle.dumps(learn))
    if how=='deepcopy': return copy.deepcopy(learn)
    learn.export('a.pkl')
    return load_learner(learn.path/'a.pkl')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['pickle','deepcopy','export'])
@pytest.mark.parametrize('first,then', [(adahessian,sophia), (sophia,adahessian), (adahessian,Adam), (Adam,adahessian), (sophia,Adam)])
@pytest.mark.parametrize('created', [True,False])
def test_the_rate_that_nobody_gave_survives_copies_and_another_optimizer(how, first, then, created, tmp_path):
    "`learn.lr` is that of the optimizer at hand; a rate of the user stays the user's"
    own = [nn.Parameter(torch.ones(2))]
    default = {adahessian: adahessian(own).default_lr, sophia: sophia(own).default_lr, Adam: 1e-3}
    assert len(set(default.values()))>=2
    def new(**kwargs):
        x,y = data(12)
        ds = Items(zip(x, y))
        dls = DataLoaders(DataLoader(ds, bs=6), DataLoader(ds, bs=6), device=torch.device('cpu'))
        learn = Learner(dls, mlp(), F.cross_entropy, opt_func=first, path=tmp_path, **kwargs)
        if created: learn.create_opt()
        return trip(how, learn, tmp_path)
    for rate in (None,0.02):
        learn = new(**({} if rate is None else dict(lr=rate)))
        for opt in (first,then,first):
            learn.opt_func = opt
            learn.create_opt()
            assert learn.lr==(rate or default[opt]) and {h['lr'] for h in learn.opt.hypers}=={learn.lr}


def rate_learner(opt, tmp_path, **kwargs):
    ds = Items(zip(*data(12)))
    dls = DataLoaders(DataLoader(ds, bs=6), DataLoader(ds, bs=6), device=torch.device('cpu'))
    learn = Learner(dls, mlp(), F.cross_entropy, opt_func=opt, path=tmp_path, **kwargs)
    learn.remove_cb(learn.recorder) # It wants a loss of float32
    return learn


def after(how, learn, tmp_path):
    "`learn` after more trips than `trip` knows"
    if how=='fit': return fit(learn)
    if how=='export, kept': learn.export('a.pkl')
    if how=='fit, export': return trip('export', fit(learn), tmp_path)
    if how=='twice': return trip('pickle', trip('export', learn, tmp_path), tmp_path)
    if how=='load':
        learn.create_opt()
        learn.save('a')
        return rate_learner(learn.opt_func, tmp_path).load('a')
    return learn


OPTIMIZERS = dict(adahessian=adahessian, paper=adahessian_paper, sophia=sophia, sassha=sassha, free=hessian_free,
    each=partial(adahessian, update_each=3), adam=Adam)
RATES = {**OPTIMIZERS, 'given': partial(adahessian, lr=0.07), 'adam_given': partial(Adam, lr=0.03)}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['pickle','deepcopy','export','export, kept','fit','fit, export','twice','load'])
@pytest.mark.parametrize('created', [True,False])
def test_every_optimizer_finds_its_own_rate_after_every_trip(how, created, tmp_path):
    "There, to any other, and back; a rate that came with an optimizer goes with it"
    own = {k: (o.keywords if isinstance(o, partial) else {}).get('lr') or getattr(o([nn.Parameter(torch.ones(2))], **({'lr': 1e-3} if o is Adam else {})),
        'default_lr', 1e-3) for k,o in RATES.items()}
    assert len(set(own.values()))>=5
    for a,b in itertools.product(RATES, RATES):
        if {a,b}=={'adam','adam_given'}: continue # fastai's own affair
        learn = rate_learner(RATES[a], tmp_path)
        if created: learn.create_opt()
        learn = trip(how, learn, tmp_path) if how in ('pickle','deepcopy','export') else after(how, learn, tmp_path)
        for o in (a,b,a):
            learn.opt_func = RATES[o]
            learn.create_opt()
            assert (learn.lr,{h['lr'] for h in learn.opt.hypers})==(own[o],{own[o]}), (a,b,o)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['load','export','pickle'])
@pytest.mark.parametrize('name', ['adahessian','sophia','free'])
def test_fine_tuning_after_a_file_finds_the_optimizers_rate(how, name, tmp_path):
    "Two thirds of its default with the head alone, half of that with all layers; a rate that is given counts"
    first = fit(rate_learner(OPTIMIZERS[name], tmp_path))
    default,dls = first.opt.default_lr,first.dls
    learn = after('load', first, tmp_path) if how=='load' else trip(how, first, tmp_path)
    learn.dls,one_cycle = dls,learn.fit_one_cycle
    def noted(n, lr, **kwargs):
        seen.append(lr.stop)
        one_cycle(n, lr, **kwargs)
    learn.fit_one_cycle = noted
    for given,top in (((),float(f'{default*2/3:.2g}')), ((0.01,),0.01)):
        seen = []
        with learn.no_bar(),learn.no_logging(): learn.fine_tune(1, *given)
        assert seen==[top,top/2] and learn.opt.default_lr==default


@pytest.mark.cuda
@pytest.mark.parametrize('kwargs', CASES, ids=str)
def test_through_the_memory_of_another_device(kwargs, tmp_path):
    "Trained on the GPU, loaded by way of the CPU, continued on the GPU"
    def gpu(seed):
        learn = made(tmp_path, seed=seed, **kwargs)
        learn.dls.cuda()
        learn.model.cuda()
        return learn
    straight = fit(gpu(0), 2)
    straight.save('two')
    fit(straight, 2)
    other = gpu(9)
    other.load('two', device='cpu')
    assert state_of(fit(other, 2))==state_of(straight)

@pytest.mark.parametrize('number', [np.float32,np.float64])
def test_a_number_of_another_library_set_by_hand_is_loaded(number, tmp_path):
    "In a file, and after `lr_find`, which would leave its weights behind otherwise"
    def make(): return learner(mlp(), *data(36), path=tmp_path)
    learn = fit(make())
    for h in learn.opt.hypers: h['wd'] = number(0.01)*h['lr']
    learn.save('own')
    before,state = copy.deepcopy(learn.model.state_dict()),state_of(learn)
    with learn.no_bar(),learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)
    assert state_of(learn)==state and all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items())
    assert state_of(fit(make().load('own')))==state_of(fit(learn))

def test_the_noise_of_undone_steps_is_forgotten(tmp_path):
    learn = fit(learner(mlp(), *data(36), path=tmp_path, n_samples=2))
    steps = [n for n,_ in learn.opt.noise_record]
    with learn.no_bar(),learn.no_logging(): learn.lr_find(num_it=9, show_plot=False)
    assert [n for n,_ in learn.opt.noise_record]==steps==list(range(6))


script = """
import os,sys
sys.path.insert(0, {tests!r})
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler,combined_cos
from torch import nn
from helpers_learner import data,fit,learner,mlp
folder,n_epoch = sys.argv[1],40
torch.set_num_threads(1)
torch.manual_seed(int.from_bytes(os.urandom(4), 'little') if os.path.exists(folder+'/models/last.pth') else 0)

class Checkpoint(Callback):
    order = 90
    def after_epoch(self):
        self.learn.save('new')
        torch.save(dict(file=torch.load(folder+'/models/new.pth', weights_only=False), epoch=self.epoch+1), folder+'/models/both.new')
        os.replace(folder+'/models/both.new', folder+'/models/last.pth')

x,y = data(30)
cbs = [Checkpoint(), ParamScheduler(dict(lr=combined_cos(0.25, 1e-3, 5e-2, 1e-4)))]
learn = learner(mlp(norm=nn.BatchNorm1d), x, y, update_each=3, cbs=cbs, path=folder)
learn.create_opt()
start = 0
if os.path.exists(folder+'/models/last.pth'):
    last = torch.load(folder+'/models/last.pth', weights_only=False)
    start = last['epoch']
    learn.model.load_state_dict(last['file']['model'])
    learn.opt.load_state_dict(last['file']['opt'])
print('start', start, flush=True)
if start<n_epoch: fit(learn, n_epoch, start_epoch=start)
torch.save(learn.model.state_dict(), folder+'/done')
"""


def wait_for_checkpoint(p, folder, since):
    "Return when the run `p` has written a checkpoint after `since`, or has ended"
    last = folder/'models/last.pth'
    while p.poll() is None and not (last.exists() and last.stat().st_mtime>since): time.sleep(0.005)


def run(folder, kill_after=None, checkpoint=False):
    "Run the script, and kill it after so many seconds of training, or after its next `checkpoint`: first epoch, was it killed, seconds"
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with open(folder/'log', 'a') as log:
        p = subprocess.Popen([sys.executable, '-c', script.format(tests=str(Path(__file__).parent)), str(folder)], stdout=subprocess.PIPE, stderr=log, env=env)
        line = p.stdout.readline()
        assert line.startswith(b'start'), (folder/'log').read_text()
        begun = time.time()
        if checkpoint: wait_for_checkpoint(p, folder, begun)
        try: p.wait(timeout=kill_after or 300)
        except subprocess.TimeoutExpired: p.send_signal(signal.SIGKILL)
        code = p.wait()
    assert code==0 or (kill_after and code==-signal.SIGKILL), (folder/'log').read_text()
    return int(line.split()[1]),code!=0,time.time()-begun


@pytest.mark.slow
def test_twenty_kills_end_with_the_same_weights(tmp_path):
    "SIGKILL after a random time of training, 20 times; whenever a run gets to its end, its weights are those of the run nobody killed"
    def fresh(name):
        (tmp_path/name/'models').mkdir(parents=True)
        return tmp_path/name
    whole = fresh('whole')
    seconds = run(whole)[2]
    want,rng,starts,n = torch.load(whole/'done'),random.Random(0),[],0
    while len(starts)<20:
        folder,n = fresh(f'killed{n}'),n+1
        while len(starts)<20:
            start,killed,_ = run(folder, rng.uniform(0.05, 0.9)*seconds, checkpoint=rng.random()<0.5)
            if not killed: break
            starts.append(start)
        if not (folder/'done').exists(): run(folder)
        got = torch.load(folder/'done')
        assert all(torch.equal(got[k], want[k]) for k in want)
    assert len(starts)==20 and sum(o>0 for o in starts)>=5, starts


@pytest.mark.parametrize('old,new', [*itertools.permutations(['hutchinson','ggn','gnb'], 2)])
def test_a_state_of_a_near_relative_goes_on(old, new, tmp_path):
    "The averages are of the same kind; what the other estimator has learned of products is left out"
    kinds = dict(hutchinson={}, ggn=dict(curvature='ggn'), gnb=dict(estimator='gnb'))
    fit(made(tmp_path, **kinds[old])).save('old')
    learn = made(tmp_path, seed=1, **kinds[new])
    learn.load('old')
    assert learn.opt.n_steps==5 and fit(learn).opt.n_steps==10


@pytest.mark.parametrize('other', ['sophia','groups'])
def test_the_weights_alone_go_on_where_the_state_does_not_fit(other, tmp_path):
    "The advice of the error, followed"
    fit(made(tmp_path)).save('old')
    learn = made(tmp_path, seed=1)
    if other=='sophia': learn.opt_func = sophia
    else: learn.splitter = lambda m: [list(m[:2].parameters()), list(m[2:].parameters())]
    with pytest.raises(ValueError, match='load the weights alone with `with_opt=False`'): learn.load('old')
    learn.load('old', with_opt=False)
    assert fit(learn).opt.n_steps==5


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['load','export, kept','pickle'])
def test_what_was_set_by_hand_goes_on(how, tmp_path):
    "A period that was set in the middle of a training; one that another optimizer was told stays"
    learn = fit(rate_learner(adahessian, tmp_path))
    learn.opt.update_each,learn.opt.hessian_bs = 4,0.5
    state = learn.opt.state_dict()
    if how=='load': learn.save('b')
    there = rate_learner(adahessian, tmp_path).load('b') if how=='load' else trip('pickle', learn, tmp_path) if how=='pickle' else after(how, learn, tmp_path)
    assert (there.opt.update_each,there.opt.hessian_bs,there.opt.dense)==(4,0.5,20)
    other = rate_learner(partial(adahessian, update_each=7), tmp_path)
    other.create_opt()
    other.opt.load_state_dict(state)
    assert (other.opt.update_each,other.opt.hessian_bs)==(7,None)
    for k,odd in (('update_each',0), ('hessian_bs',2.), ('dense',-1)):
        spoilt = {**state, 'curvature': {**state['curvature'], 'when': {**state['curvature']['when'], k: odd}}}
        fresh = rate_learner(adahessian, tmp_path)
        fresh.create_opt()
        with pytest.raises(ValueError, match=k): fresh.opt.load_state_dict(spoilt)
        assert (fresh.opt.update_each,fresh.opt.n_steps)==(10,0)


def test_an_old_file_says_of_a_loss_that_was_not_finite_and_of_parameters_that_had_no_estimate():
    own = dict(seed=1, n_steps=5, n_estimates=5, n_dropped=0, n_skipped=0, n_batches=1, n_items=6, bad_loss=True)
    new = upgraded(dict(wrapper=own, state=[{},dict(hess_step=5, step=5)], hypers=[{}]))
    assert [math.isnan(o) for o in new['curvature']['pending']['losses']]==[True] and new['state']==[{},dict(hess_step=5, step=5, age=5)]

def test_the_scale_of_curvature_goes_with_a_state():
    p = nn.Parameter(torch.ones(2))
    a,b = (adahessian_paper([p]) for _ in range(2))
    a.curvature_scale.update(False)
    b.load_state_dict(a.state_dict())
    assert b.curvature_scale.c==0.5


@pytest.mark.parametrize('opt_func', [adahessian,hessian_free])
@pytest.mark.parametrize('sd', [None,3,[]])
def test_what_is_no_state_at_all_is_shown(opt_func, sd):
    with pytest.raises(ValueError, match=re.escape(f"not a state of {type(opt_func([torch.nn.Parameter(torch.ones(2))])).__name__}")+f".*got {re.escape(repr(sd))}$"):
        opt_func([torch.nn.Parameter(torch.ones(2))]).load_state_dict(sd)

def test_a_generator_of_another_size_is_named():
    opt = hessian_free([torch.nn.Parameter(torch.ones(2))], precondition=True)
    sd = opt.state_dict()
    sd['curvature']['generator'] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match='generator of the state must be'): opt.load_state_dict(sd)

@pytest.mark.parametrize('opt_func', [adahessian_paper,sophia,hessian_free])
def test_a_state_that_was_taken_does_not_follow_a_schedule(opt_func):
    opt = opt_func([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    sd = opt.state_dict()
    opt.set_hyper('lr', 0.2)
    opt.load_state_dict(sd)
    assert opt.hypers[0]['lr']==0.1
    opt.set_hyper('lr', 0.3)
    assert sd['hypers'][0]['lr']==0.1

@pytest.mark.parametrize('k', ['step','age','asked','norm_step'])
def test_a_count_of_zero_is_one(k):
    "As of a parameter that an estimate was asked for before its first step; one below is refused"
    opt = adahessian_paper([torch.nn.Parameter(torch.ones(2))])
    sd = {**opt.state_dict(), 'state': [{k: 0}]}
    opt.load_state_dict(sd)
    assert opt.state_dict()['state']==[{k: 0}]
    with pytest.raises(ValueError, match=f'{k} of parameter 0 must be a whole number >= 0'): opt.load_state_dict({**sd, 'state': [{k: -1}]})

@pytest.mark.parametrize('odd', [math.nan,math.inf,'0.1'])
def test_settings_of_a_state_are_finite_numbers(odd):
    "Those of somebody's own too"
    opt = adahessian_paper([torch.nn.Parameter(torch.ones(2))])
    sd = opt.state_dict()
    with pytest.raises(ValueError, match='hyperparameters must be finite numbers'): opt.load_state_dict({**sd, 'hypers': [{**sd['hypers'][0], 'own': odd}]})


def test_a_text_learner_loads_as_any_other(tmp_path):
    "fastai's `TextLearner` has a `load` of its own, which swallowed what the optimizer refused and kept what was pending"
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(9,4),nn.Linear(4,3)
        def forward(self, x): return self.out((h := self.emb(x)).mean(1)),[h],[h]
        def reset(self): pass
    def made(opt_func):
        torch.manual_seed(0)
        items = list(zip(torch.randint(9, (24,6)), torch.randint(3, (24,))))
        learn = TextLearner(DataLoaders(*2*[DataLoader(items, bs=6)]), Reads(), loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, path=tmp_path)
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.1)
        return learn
    made(Adam).save('adam')
    learn = made(partial(adahessian_paper, n_acc=3))
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='with_opt=False'): learn.load('adam')
    assert all(map(torch.equal, before, learn.model.parameters())) and learn.opt.n_batches==1
    learn.load('adam', with_opt=False)
    assert learn.opt.n_batches==0 and not torch.equal(before[0], learn.model.emb.weight)
