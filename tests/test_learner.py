"The route that fastai's users take, and that other optimizers do not notice"
import copy,gc,pickle,warnings,weakref
from functools import partial
from itertools import chain

import numpy as np,pandas as pd,pytest,torch
import torch.nn.functional as F
from fastai.callback.schedule import ParamScheduler,SchedLin
from fastai.callback.training import GradientAccumulation,ShortEpochCallback
from fastai.learner import Callback,CancelBatchException,CancelStepException,Learner,defaults,load_learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam,Lookahead,OptimWrapper
from fastai.torch_core import params,set_seed
from torch import nn
import fastai.callback.all  # chkstyle: ignore
from adahessian_fastai.all import adahessian as modern,adahessian_paper as adahessian,hessian_free,sophia


def data(n=256, bs=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n,6, generator=g)
    ds = list(zip(x, (x[:,:2].sum(1)>0).long()))
    return DataLoaders.from_dsets(ds, ds[:64], bs=bs, shuffle=False, num_workers=0)


def split(m): return [params(m[0]),params(m[1]),params(m[3])]

def learner(opt_func=adahessian, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8,2))
    return Learner(data(), model, CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, **{'splitter': split, **kwargs})


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "No progress bars in the log of the tests"
    fit = Learner.fit
    def silent(self, *args, **kwargs):
        with self.no_bar(),self.no_logging(): return fit(self, *args, **kwargs)
    monkeypatch.setattr(Learner, 'fit', silent)


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).clone()

def moved(learn, before): return [not torch.equal(a,b) for a,b in zip(before, learn.model.parameters())]


def test_other_optimizers_train_bit_for_bit_as_without_us():
    "Plain Adam before, between and after: equal to a loop that never heard of this package"
    def plain():
        learn = learner(Adam)
        learn.fit(2, 1e-2)
        assert all(p.grad.grad_fn is None for p in learn.model.parameters())
        return weights(learn)
    first = plain()
    ours = learner()
    ours.fit(1)
    between = plain()
    ours.fit(1)
    assert torch.equal(first, between) and torch.equal(first, plain())
    learn = learner(Adam)
    learn.create_opt()
    learn.opt.set_hypers(lr=1e-2)
    for xb,yb in list(learn.dls.train)*2:
        learn.loss_func(learn.model.train()(xb), yb).backward()
        learn.opt.step()
        learn.opt.zero_grad()
    assert torch.equal(first, weights(learn))


def test_other_optimizers_get_no_second_graph(monkeypatch):
    flags,grad = [],torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad', lambda *a,**k: flags.append(k.get('create_graph')) or grad(*a,**k))
    learner(Adam).fit(1)
    learner(partial(OptimWrapper, opt=torch.optim.AdamW)).fit(1)
    assert flags==[]
    learner().fit(1)
    assert True in flags   # the patch works: an estimate does ask for one


def test_optim_wrapper_of_plain_torch_equals_plain_torch():
    learn,model = learner(partial(OptimWrapper, opt=torch.optim.SGD)),learner().model
    learn.fit(1, 0.1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for xb,yb in learn.dls.train:
        F.cross_entropy(model.train()(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    assert torch.allclose(weights(learn), torch.cat([p.detach().flatten() for p in model.parameters()]), atol=1e-7)


LRS = dict(nothing=(dict(), None, 0.15), learner=(dict(lr=0.05), None, 0.05), fit=(dict(), 0.02, 0.02), both=(dict(lr=0.05), 0.02, 0.02),
    same_number_as_fastai=(dict(lr=float('1e-3')), None, 1e-3), partial=(dict(opt_func=partial(adahessian, lr=0.07)), None, 0.07),
    partial_of_other=(dict(opt_func=partial(adahessian, eps=1e-3)), None, 0.15),
    lambda_=(dict(opt_func=lambda p,lr: adahessian(p, lr=lr)), None, 0.15), adam=(dict(opt_func=Adam), None, defaults.lr))

@pytest.mark.parametrize('case', LRS)
def test_the_learning_rate_of_the_user_wins_over_the_optimizers_own(case):
    kwargs,given,want = LRS[case]
    for method in ('fit','fit_one_cycle'):
        learn = learner(**kwargs)
        getattr(learn, method)(1, given)
        assert (max(learn.recorder.hps['lr']) if method=='fit_one_cycle' else learn.opt.hypers[0]['lr'])==pytest.approx(want)


def test_fit_one_cycle_schedules_lr_and_mom():
    learn = learner()
    learn.fit_one_cycle(3, 0.1)
    hps = learn.recorder.hps
    assert max(hps['lr'])==pytest.approx(0.1, rel=0.05) and hps['lr'][0]==pytest.approx(0.1/25, rel=0.2)
    assert max(hps['mom'])==pytest.approx(0.95, abs=0.01) and min(hps['mom'])==pytest.approx(0.85, abs=0.01)


@pytest.mark.parametrize('fit', [lambda l: l.fit_flat_cos(2, 0.1), lambda l: l.fine_tune(1, 0.1), lambda l: l.fit_one_cycle(2),
    lambda l: l.fit_sgdr(1, 2, 0.1), lambda l: l.fit_one_cycle(2, slice(0.01,0.1))], ids=['flat_cos','fine_tune','one_cycle','sgdr','slice'])
def test_the_fits_of_fastai_learn(fit):
    "The validation loss falls by a quarter at least; without a step it stays at 0.7"
    learn = learner()
    before = learn.validate()[0]
    fit(learn)
    assert learn.validate()[0]<before*3/4
    assert learn.opt.n_estimates==learn.opt.n_steps>0 and learn.opt.n_skipped==0


def test_discriminative_learning_rates():
    learn = learner()
    learn.fit(1, slice(1e-3,1e-1))
    assert [h['lr'] for h in learn.opt.hypers]==pytest.approx([1e-3,1e-2,1e-1])


def test_lr_find_leaves_the_weights_as_they_were(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(1, 0.1)
    before,state = weights(learn),copy.deepcopy(learn.opt.state_dict())
    learn.lr_find(num_it=20, show_plot=False)
    assert torch.equal(before, weights(learn))
    after = learn.opt.state_dict()
    for a,b in zip(state['state'], after['state']):
        assert a.keys()==b.keys() and all(torch.equal(torch.as_tensor(a[k]),torch.as_tensor(b[k])) for k in a)
    assert state['curvature']==after['curvature']


def test_freeze_and_unfreeze_before_between_and_after():
    learn = learner()
    learn.freeze()
    ps = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, 0.1)
    assert moved(learn, ps)==[False,False,True,True,True,True]    # BatchNorm trains in frozen groups, as always in fastai
    learn.freeze_to(-2)
    learn.fit(1, 0.1)
    assert moved(learn, ps)[:2]==[False,False]
    learn.unfreeze()
    learn.fit(1, 0.1)
    assert all(moved(learn, ps))
    learn.freeze()
    ps = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, 0.1)
    assert moved(learn, ps)==[False,False,True,True,True,True]


def test_a_thawed_layer_is_estimated_at_once():
    learn = learner(partial(adahessian, update_each=100))
    learn.freeze()
    learn.fit(1, 0.1)
    assert learn.opt.n_estimates==1
    learn.model[0].requires_grad_(True)
    learn.fit(1, 0.1)
    assert learn.opt.n_estimates==2 and learn.opt.state[learn.model[0].weight]['hess_step']==1


@pytest.mark.parametrize('update_each', [1,5])
def test_save_and_load_continue_exactly(tmp_path, update_each):
    def make(): return learner(partial(adahessian, update_each=update_each), path=tmp_path)
    whole,first,second = make(),make(),make()
    for l in (whole,first):
        set_seed(1)
        l.fit(1, 0.1)
    first.save('half')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        second.load('half', with_opt=True)
    for l in (whole,second): l.fit(2, 0.05)
    assert torch.equal(weights(whole), weights(second))


def test_a_state_of_adam_is_refused_and_nothing_lost(tmp_path):
    adam,ours = learner(Adam, path=tmp_path),learner(path=tmp_path)
    adam.fit(1)
    adam.save('adam')
    ours.fit(1)
    state = copy.deepcopy(ours.opt.state_dict())
    with pytest.raises(ValueError, match='not a state of AdaHessianWrapper'): ours.opt.load_state_dict(adam.opt.state_dict())
    with pytest.raises(ValueError, match='not a state of AdaHessianWrapper'): ours.load('adam', with_opt=True)
    for a,b in zip(state['state'], ours.opt.state_dict()['state']): assert all(torch.equal(torch.as_tensor(a[k]),torch.as_tensor(b[k])) for k in a)


def test_eps_and_hessian_power_can_be_scheduled():
    class Diary(Callback):
        run_valid = False
        def before_fit(self): self.seen = []
        def after_step(self): self.seen.append([self.opt.hypers[0][k] for k in ('eps','hessian_power')])
    diary,ends = Diary(),dict(eps=SchedLin(1e-2,1e-4), hessian_power=SchedLin(0.,1.))
    flat,bent = learner(),learner()
    flat.fit(2, 0.1)
    bent.fit(2, 0.1, cbs=[ParamScheduler(ends),diary])
    assert diary.seen[0]==[1e-2,0.] and diary.seen[-1]==pytest.approx([1e-2/32+1e-4*31/32,31/32], rel=1e-3)
    assert not torch.equal(weights(flat), weights(bent))


def test_a_parameter_without_gradient_stays():
    learn = learner(splitter=params)
    learn.model.spare = nn.Parameter(torch.ones(3))
    learn.model.forward = lambda x: nn.Sequential(*list(learn.model.children())[:4])(x)
    learn.fit(1, 0.1)
    assert torch.equal(learn.model.spare, torch.ones(3)) and learn.opt.n_steps==16


def test_n_acc_steps_once_for_its_batches():
    learn = learner(partial(adahessian, n_acc=2))
    learn.fit(2, 0.1)
    assert (learn.opt.n_steps,learn.opt.n_estimates)==(16,32)


def test_lookahead_around_adahessian():
    learn = learner(lambda p,lr: Lookahead(adahessian(p, lr=lr)))
    before = learn.validate()[0]
    learn.fit(3, 0.1)
    assert learn.opt.opt.n_estimates==48 and learn.opt.count==48 and learn.opt.opt.diags=={}
    assert learn.validate()[0]<before*2/3


def within_lookahead(opt_func, **kw): return lambda p,**k: Lookahead(opt_func(p, **kw, **k), k=10**6) # Which moves nothing by itself

class Cancelled(Callback):
    "Without a third step"
    run_valid = False
    def before_step(self):
        if self.train_iter==3: raise CancelStepException

@pytest.mark.parametrize('opt_func,kw', [(hessian_free,dict(cg_max_iter=5)),(adahessian,{})], ids=['hessian_free','adahessian'])
def test_a_cancelled_step_leaves_nothing_behind_within_lookahead(opt_func, kw):
    def trained(opt_func):
        learn = learner(opt_func)
        learn.fit(1, 0.1, cbs=Cancelled())
        return learn
    one,other = trained(partial(opt_func, **kw)),trained(within_lookahead(opt_func, **kw))
    assert torch.equal(weights(one), weights(other)) and one.opt.n_steps==other.opt.n_steps
    if opt_func is hessian_free: assert [o['loss'] for o in other.opt.record]==[o['loss'] for o in one.opt.record]

def test_weights_loaded_within_an_accumulation_drop_it_within_lookahead(tmp_path):
    learn = learner(within_lookahead(adahessian, n_acc=3))
    learn.path = tmp_path
    learn.create_opt()
    learn.save('w', with_opt=False)
    learn.fit(1, 0.1, cbs=ShortEpochCallback(0.2, short_valid=False))
    assert 0<learn.opt.n_batches<3 and learn.opt.diags
    learn.load('w', with_opt=False)
    assert learn.opt.n_batches==0 and not learn.opt.diags and all(p.grad is None for p in learn.model.parameters())

def test_a_refused_file_leaves_lookahead_as_it_was(tmp_path):
    learn = learner(within_lookahead(adahessian))
    learn.path = tmp_path
    learn.fit(1, 0.1)
    learn.save('ours')
    sd = torch.load(tmp_path/'models'/'ours.pth', weights_only=False)
    sd['opt'].update(count=99, curvature={}, slow_weights=[[w+1 for w in ws] for ws in sd['opt']['slow_weights']])
    torch.save(sd, tmp_path/'models'/'spoilt.pth')
    def slow(): return torch.cat([w.flatten() for w in chain(*learn.opt.slow_weights)])
    count,*before = learn.opt.count,slow().clone(),weights(learn)
    with pytest.raises(ValueError, match='incomplete'): learn.load('spoilt')
    assert learn.opt.count==count and all(map(torch.equal, before, (slow(),weights(learn))))


def test_memory_is_flat_over_300_steps():
    "The number of living tensors grows as with Adam: by what fastai's Recorder keeps of each batch"
    class Count(Callback):
        run_valid = False
        def before_fit(self): self.counts = []
        def after_batch(self):
            if self.train_iter%50: return
            gc.collect()
            self.counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    def growth(opt_func):
        learn = learner(opt_func, cbs=Count())
        learn.fit(19, 1e-3)
        return learn,np.diff(learn.count.counts)
    gc.collect()
    gc.freeze() # What was there before is not gone through again and again
    try:
        learn,ours = growth(adahessian)
        assert len(ours)==5 and (ours==growth(Adam)[1]).all() and ours.min()>0
        ref = weakref.ref(learn.opt)
        del learn
        gc.collect()
        assert ref() is None
    finally: gc.unfreeze()


def test_vision_learner_and_its_old_name():
    from fastai.vision.all import cnn_learner,resnet18,vision_learner
    g = torch.Generator().manual_seed(0)
    ds = [(torch.randn(3,32,32, generator=g),i%2) for i in range(8)]
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0)
    for make in (vision_learner,cnn_learner):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = make(dls, resnet18, pretrained=False, n_out=2, normalize=False, loss_func=CrossEntropyLossFlat(), opt_func=adahessian)
        ps = [p.detach().clone() for p in learn.model.parameters()]
        learn.fit_one_cycle(1)
        assert learn.opt.n_steps==2 and learn.opt.n_skipped==0 and all(moved(learn, ps))
        assert len(learn.opt.hypers)==3 and learn.lr==0.15


@pytest.fixture
def table():
    from fastai.tabular.all import Categorify,CategoryBlock,Normalize,TabularDataLoaders
    g = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=g.normal(size=256), b=g.normal(size=256), c=g.integers(3, size=256)))
    df['y'] = (df.a+(df.c==1)>0.3).astype(int)
    return TabularDataLoaders.from_df(df, y_names='y', cat_names=['c'], cont_names=['a','b'], procs=[Categorify,Normalize],
        y_block=CategoryBlock(), valid_idx=list(range(64)), bs=32, num_workers=0)


def test_tabular_learner_with_export(table, tmp_path):
    from fastai.tabular.all import tabular_learner
    set_seed(0)
    learn = tabular_learner(table, layers=[16], n_out=2, opt_func=adahessian, metrics=accuracy, path=tmp_path)
    before = learn.validate()[0]
    learn.fit_one_cycle(8)
    assert learn.lr==0.15 and learn.opt.n_skipped==0 and learn.validate()[0]<before*2/3
    learn.export('model.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'model.pkl')
    x = torch.zeros(1,1).long(),torch.ones(1,2)
    assert torch.equal(loaded.model.eval()(*x), learn.model.cpu().eval()(*x))


def test_one_row_is_refused_by_a_batch_norm_and_not_chosen_for_it():
    def run(**kw):
        learn = learner(partial(adahessian, **kw))
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
        return learn
    assert run(hessian_bs=.01).opt.n_estimates==16
    with pytest.raises(ValueError, match='hessian_bs=1'): run(hessian_bs=1)


class Rates(Callback):
    "Notes the rate of each batch, which is not trained"
    order,run_valid = ParamScheduler.order+1,False
    def __init__(self): self.seen = []
    def before_batch(self):
        self.seen.append(self.opt.hypers[-1]['lr'])
        raise CancelBatchException

def rates(opt_func, call='fit_one_cycle', n_epoch=2, bs=16, cbs=None, **kwargs):
    "The largest rate of a training that nobody gave one, and the Learner's rate afterwards"
    learn,seen = Learner(data(bs=bs), nn.Linear(6,2), CrossEntropyLossFlat(), opt_func=opt_func, **kwargs),Rates()
    getattr(learn, call)(n_epoch, cbs=[*([cbs] if cbs else []),seen])
    return max(seen.seen),learn.lr


@pytest.mark.parametrize('call', ['fit','fit_one_cycle','fit_flat_cos'])
def test_a_short_training_has_a_higher_rate_unless_somebody_gave_one(call):
    "32 steps: twice 0.15; 224 steps: 0.15; 112 steps: 0.15√2, however they are cut into batches"
    ours = modern
    assert rates(ours, call)==pytest.approx((0.3,0.15)) and rates(ours, call, 14)==pytest.approx((0.15,0.15))
    for opt,cbs in ((partial(ours, n_acc=2),None), (ours,GradientAccumulation(32))):
        assert rates(opt, call, 14, cbs=cbs)==pytest.approx((0.21,0.15))==rates(ours, call, 14, bs=32)
    assert rates(partial(ours, lr=0.15), call)==pytest.approx((0.15,0.15))==rates(ours, call, lr=0.15)
    assert rates(sophia, call)==pytest.approx((3e-3,1.5e-3)) and rates(sophia, call, 40)==pytest.approx((1e-3,1.5e-3))
    others = dict(signed=True),dict(estimator='gnb'),dict(curvature='ggn'),dict(n_samples=4),dict(debiased=True, n_samples=2)
    for opt,own,last in ((adahessian,0.15,1), (Adam,1e-3,1), *((partial(ours, **kw),o,1/5) for kw,o in zip(others, (0.05,0.05,0.1,0.1,0.1)))):
        assert rates(opt, call)==pytest.approx((own,own)) and rates(opt, call, 14)==pytest.approx((own*last,own))


@pytest.mark.parametrize('n_epoch,kwargs,want,gnb', [(1,{},0.1,0.033), (5,{},0.1,0.033), (13,{},0.067,0.0067), (20,{},0.067,0.0067),
    (1,dict(freeze_epochs=13),0.067,0.0067)], ids=str)
def test_a_long_fine_tuning_has_a_lower_rate(n_epoch, kwargs, want, gnb):
    "16 steps an epoch, the frozen ones among them: two thirds of 0.15 up to 100 steps, two thirds of that from 225 on; a fifth with 'gnb'; Adam's stays"
    def top(opt_func, *args):
        learn,seen = Learner(data(), nn.Linear(6,2), CrossEntropyLossFlat(), opt_func=opt_func),Rates()
        learn.fine_tune(n_epoch, *args, cbs=seen, **kwargs)
        return max(seen.seen)
    reached = top(modern, 1.) # The largest share of a rate that a batch comes to see
    assert top(modern)==pytest.approx(want*reached) and top(partial(modern, estimator='gnb'))==pytest.approx(gnb*reached)
    assert top(Adam)==pytest.approx(2e-3*reached)


@pytest.mark.parametrize('lr', [0.03, slice(0.001,0.03)], ids=str)
def test_fine_tuning_at_the_rate_that_was_given(lr):
    "To the Learner, with `opt_func`, or afterwards; a rate of the call comes first, and Adam has fastai's as ever"
    def top(opt_func, *args, then=None, **kwargs):
        learn,seen = Learner(data(), nn.Linear(6,2), CrossEntropyLossFlat(), opt_func=opt_func, **kwargs),Rates()
        if then: learn.lr = then
        learn.fine_tune(1, *args, cbs=seen)
        return max(seen.seen)
    reached = top(modern, 1.)
    assert top(modern, lr=lr)==top(partial(modern, lr=lr))==top(modern, then=lr)==pytest.approx(0.03*reached)
    assert top(partial(modern, lr=lr), 0.01)==pytest.approx(0.01*reached) and top(Adam, lr=0.03)==pytest.approx(2e-3*reached)


def test_a_number_that_equals_the_default_is_given_all_the_same(tmp_path):
    "`learn.lr = 0.15` after a training is somebody's, and does not become 0.3; a copy still knows what nobody gave"
    def top(learn):
        seen = Rates()
        learn.fit(1, cbs=seen)
        return max(seen.seen)
    learn = Learner(data(), nn.Linear(6,2), CrossEntropyLossFlat(), opt_func=modern)
    assert top(learn)==0.3 and learn.lr==0.15
    for copied in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))): assert top(copied)==0.3 and copied.lr==0.15
    learn.lr = float('0.15')
    assert top(learn)==top(copy.deepcopy(learn))==top(pickle.loads(pickle.dumps(learn)))==0.15


def test_no_rate_in_a_partial_is_none_given():
    learn = learner(partial(modern, lr=None))
    learn.create_opt()
    assert learn.lr==0.15 and [o['lr'] for o in learn.opt.hypers]==[0.15]*3


def test_the_rate_of_a_length_with_loaders_of_pytorch():
    "112 steps of two batches each: 0.15√2"
    ds = torch.utils.data.TensorDataset(torch.randn(256,6), torch.randint(2, (256,)))
    dls = DataLoaders(*(torch.utils.data.DataLoader(ds, batch_size=16) for _ in range(2)))
    learn = Learner(dls, nn.Linear(6,2), CrossEntropyLossFlat(), opt_func=modern, cbs=GradientAccumulation(32))
    learn.fit(14)
    assert max(learn.recorder.lrs)==pytest.approx(0.21)


def test_the_rate_of_a_length_with_restarts():
    "Cycles of three and six epochs are 144 steps: 0.15√(225/144)"
    learn = learner(modern)
    learn.fit_sgdr(2, 3)
    assert max(learn.recorder.lrs)==0.19 and learn.lr==0.15
    learn.fit_sgdr(2, 3, 0.1, cycle_mult=2)
    assert max(learn.recorder.lrs)==0.1


def test_the_rate_of_a_length_is_that_of_a_new_optimizer_too_and_goes_when_training_ends_early():
    learn = learner(modern)
    learn.fit(2)
    learn.fit(2, reset_opt=True)
    assert learn.opt.hypers[0]['lr']==0.3 and learn.lr==0.15
    class Stop(Callback):
        def after_batch(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Stop())
    assert learn.lr==0.15
    learn.fit(14)
    assert learn.opt.hypers[0]['lr']==0.15


def test_an_optimizer_that_came_in_the_middle_keeps_its_own_rate():
    "And does not get that of the one before it in the next training"
    class Switch(Callback):
        def before_epoch(self):
            if self.epoch==0: return
            self.learn.opt_func = Adam
            self.learn.create_opt()
    learn = learner(modern)
    learn.fit(2, cbs=Switch())
    assert learn.lr==defaults.lr
    learn.fit(1)
    assert learn.opt.hypers[0]['lr']==defaults.lr


@pytest.mark.parametrize('name,before', [('fit', (None,None)), ('fit_one_cycle', (None,25.,1e5,.25,None,None)), ('fit_flat_cos', (None,1e5,.75,None))])
def test_callbacks_by_position_count_for_the_rate_of_a_run(name, before):
    "Accumulation makes the training shorter in steps, so its rate is larger"
    x,y = torch.randn(60,4),torch.randint(3, (60,))
    seen = []
    class Rates(Callback):
        order = 99
        def before_batch(self):
            if self.training: seen[-1].append(self.opt.hypers[-1]['lr'])
    for by_name in (True,False):
        seen.append([])
        learn = Learner(DataLoaders(*2*[DataLoader(list(zip(x, y)), bs=6)]), nn.Linear(4,3), CrossEntropyLossFlat(), opt_func=modern)
        fit,cbs = getattr(learn, name),[GradientAccumulation(12),Rates()]
        with learn.no_bar(),learn.no_logging(): fit(25, cbs=cbs) if by_name else fit(25, *before, cbs)
    assert seen[0]==seen[1] and max(seen[0])>0.19
