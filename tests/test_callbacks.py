"fastai's callbacks around AdaHessian, each against a plain loop or against what it promises"
import math
import pytest,torch
import torch.nn.functional as F
from fastai.callback.core import Callback,CancelBackwardException,CancelBatchException,CancelFitException,CancelStepException,CancelTrainException
from fastai.callback.mixup import CutMix,MixUp
from fastai.callback.schedule import ParamScheduler,SchedLin
from fastai.callback.tracker import EarlyStoppingCallback,ReduceLROnPlateau,SaveModelCallback,TerminateOnNaNCallback
from fastai.callback.training import BnFreeze,GradientAccumulation,GradientClip,ShortEpochCallback
from fastai.losses import CrossEntropyLossFlat,LabelSmoothingCrossEntropy
from fastai.optimizer import Adam
from functools import partial
from torch import nn
from adahessian_fastai.all import CurvatureRecorder,adahessian_paper as adahessian,hessian_free,sassha
from helpers_learner import HYPERS,ROUNDING,Noted,convnet,data,distance,fit,given,learner,mlp,one_loss,plain,split,state_of
from twin import Twin
from adahessian_fastai.batch import check_rows_possible

# fastai mixes in float32: four steps of a convnet with batch norm against the same in float64
SINGLE = 1e-4


def steps(x, y, bs=6): return [[b] for b in split(x,y,bs)]


def test_gradient_clip_clips_the_gradient_and_not_the_curvature():
    "A twin whose gradient is scaled to norm 0.1 before each step, and whose estimate is not"
    class Clipped(Twin):
        def curvature(self, losses):
            g,d = super().curvature(losses)
            norm = torch.cat([o.flatten() for o in g]).norm()
            assert norm>0.1
            return [o*0.1/(norm+1e-6) for o in g],d
    x,y = data(24)
    learn = fit(learner(mlp(), x, y, probe=given(), cbs=[GradientClip(0.1)]))
    want = mlp()
    twin = Clipped([dict(params=list(want.parameters()), **HYPERS)], given())
    for i,(a,b) in enumerate(split(x,y,6)): twin.step([partial(one_loss, want, F.cross_entropy, a, b, i)])
    assert distance(learn.model, want)<ROUNDING
    assert distance(want, plain(mlp(), steps(x,y)))>1e-3


class Taped(Callback):
    "Keeps the inputs and everything that the loss of a mixed batch depends on"
    run_valid,order = False,90
    def __init__(self, mix): self.mix,self.tape = mix,[]
    def before_batch(self): self.tape.append((self.x.clone(), self.y.clone(), self.mix.yb1[0].clone(), torch.as_tensor(self.mix.lam).clone()))


@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixed_batches_equal_the_plain_loop(mix):
    x,y = data(24, (3,8,8), 10, dtype=torch.float)
    mix = mix()
    tape = Taped(mix)
    learn = fit(learner(convnet().float(), x, y, loss_func=CrossEntropyLossFlat(), probe=given(), cbs=[mix,tape]))
    def mixed(i):
        a,y0,y1,lam = tape.tape[i]
        def loss_func(pred, _):
            a,b = (F.cross_entropy(pred, o, reduction='none') for o in (y1,y0))
            return (a+lam.double()*(b-a)).mean()
        return a.double(),y0,loss_func
    want = convnet().double()
    twin = Twin([dict(params=list(want.parameters()), **HYPERS)], given())
    for i in range(4):
        a,b,loss_func = mixed(i)
        twin.step([partial(one_loss, want, loss_func, a, b, i)])
    assert any((t[0]-o[0]).abs().max()>0 for t,o in zip(tape.tape, split(x,y,6)))
    assert distance(learn.model, want)<SINGLE and distance(want, convnet().double())>0.05


def test_label_smoothing_equals_the_plain_loop():
    x,y = data(24)
    learn = fit(learner(mlp(), x, y, loss_func=LabelSmoothingCrossEntropy(), probe=given()))
    def smooth(pred, y): return 0.9*F.cross_entropy(pred, y) + 0.1*(-F.log_softmax(pred, -1).mean())
    assert distance(learn.model, plain(mlp(), steps(x,y), loss_func=smooth))<ROUNDING


def test_bn_freeze_keeps_the_statistics_and_the_estimate_right():
    "Frozen norms run on their stored statistics; the reference has them in `eval`"
    x,y = data(24)
    def model():
        m = mlp(norm=nn.BatchNorm1d)
        m[1].running_mean += 0.3
        for p in m[1].parameters(): p.requires_grad_(False)
        return m
    learn = fit(learner(model(), x, y, probe=given(), cbs=[BnFreeze()]))
    want = model().train()
    want[1].eval()
    plain(want, steps(x,y), params=[p for p in want.parameters() if p.requires_grad])
    assert torch.equal(learn.model[1].running_mean, model()[1].running_mean)
    assert distance(learn.model, want)<ROUNDING


def test_schedules_reach_every_step():
    "`lr`, `mom`, `sqr_mom`, `eps`, `wd` and `hessian_power` move together; the twin gets the numbers of the schedule"
    ends = dict(lr=(0.01,0.1), mom=(0.8,0.95), sqr_mom=(0.9,0.99), eps=(1e-3,1e-1), wd=(0.,0.1), hessian_power=(1.,0.5))
    x,y = data(36)
    learn = learner(mlp(), x, y, probe=given(), cbs=[ParamScheduler({k: SchedLin(*v) for k,v in ends.items()})])
    learn.wd_bn_bias = True
    fit(learn)
    want = mlp()
    twin = Twin([dict(params=list(want.parameters()), **HYPERS)], given())
    for i,(a,b) in enumerate(split(x,y,6)):
        twin.step([partial(one_loss, want, F.cross_entropy, a, b, i)], **{k: lo+(hi-lo)*i/6 for k,(lo,hi) in ends.items()})
    assert distance(learn.model, want)<ROUNDING


def test_the_recorder_sees_losses_and_hypers_as_with_adam():
    x,y = data(24)
    ours,adam = (fit(learner(mlp(), x, y, opt_func=o)) for o in (adahessian, lambda ps,lr,**kw: Adam(ps, lr)))
    assert ours.recorder.losses[0]==adam.recorder.losses[0] and len(ours.recorder.losses)==len(adam.recorder.losses)==4
    assert ours.recorder.lrs==[HYPERS['lr']]*4


def test_terminate_on_nan_leaves_weights_and_averages_finite():
    class Poison(Callback):
        run_valid = False
        def after_pred(self):
            if self.train_iter==2: self.learn.pred = self.pred*float('nan')
    x,y = data(36)
    kept = Noted('before_batch', state_of)
    learn = learner(mlp(), x, y, cbs=[Poison(),TerminateOnNaNCallback(),kept])
    with pytest.warns(UserWarning, match='step skipped'): fit(learn)
    assert len(kept.notes)==3
    model,opt = state_of(learn)
    assert model==kept.notes[2][0] and opt['state']==kept.notes[2][1]['state']


class Losses(Callback):
    "Replaces the validation loss by the next of `values`, so that trackers have something to decide"
    run_train,order = False,-5
    def __init__(self, *values): self.values = iter(values)
    def before_validate(self): self.value = next(self.values)
    def after_loss(self): self.learn.loss = torch.tensor(self.value)


def test_early_stopping_and_training_on():
    x,y = data(12)
    learn = fit(learner(mlp(), x, y, probe=given(), cbs=[Losses(1.,2.,3.), EarlyStoppingCallback(patience=2)]), 9)
    assert learn.opt.n_steps==6
    learn.remove_cbs([Losses,EarlyStoppingCallback])
    fit(learn)
    assert learn.opt.n_steps==8


def test_save_model_with_its_optimizer_returns_to_the_best_epoch(tmp_path):
    "The best epoch is the second of three: weights, averages and counts are those of its end"
    x,y = data(12)
    snaps = []
    class Snap(Callback):
        order = 59
        def after_epoch(self): snaps.append(state_of(self.learn))
    learn = learner(mlp(), x, y, cbs=[Losses(2.,1.,3.), Snap(), SaveModelCallback(with_opt=True)], path=tmp_path)
    fit(learn, 3)
    assert state_of(learn)==snaps[1] and snaps[1]!=snaps[2]


def test_reduce_lr_on_plateau():
    x,y = data(12)
    learn = fit(learner(mlp(), x, y, cbs=[Losses(1.,2.,2.), ReduceLROnPlateau(patience=1)]), 3)
    assert math.isclose(learn.opt.hypers[-1]['lr'], HYPERS['lr']/100)


def without_rates(snapshot):
    "What `lr_find` must restore: all but the learning rate, which each `fit` sets anew"
    model,opt = snapshot
    return model,{**opt, 'hypers': [{k: v for k,v in h.items() if k!='lr'} for h in opt['hypers']]}


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('kwargs', [{}, dict(update_each=5), dict(n_acc=3)], ids=str)
def test_lr_find_in_the_middle_leaves_everything_bit_for_bit(kwargs, tmp_path):
    "Weights, buffers, averages, counts, the stream of probes; with `n_acc` a half accumulated step too"
    x,y = data(42)
    def run(find):
        torch.manual_seed(3)
        learn = fit(learner(mlp(norm=nn.BatchNorm1d), x, y, path=tmp_path, **kwargs))
        before = without_rates(state_of(learn))
        if find:
            with learn.no_bar(),learn.no_logging(): learn.lr_find(num_it=20, show_plot=False)
            assert without_rates(state_of(learn))==before
        return state_of(fit(learn))
    assert run(True)==run(False)


def test_a_start_epoch_continues_the_schedule():
    "`SkipToEpoch`: two of four epochs are skipped, and nothing was estimated in them"
    x,y = data(24)
    learn = learner(mlp(), x, y, probe=given())
    seen = Noted('before_batch', lambda l: l.epoch)
    fit(learn.add_cb(seen), 4, start_epoch=2)
    assert set(seen.notes)=={2,3} and learn.opt.n_steps==learn.opt.n_estimates==8


def test_short_epochs():
    x,y = data(36)
    learn = fit(learner(mlp(), x, y, probe=given(), cbs=[ShortEpochCallback(pct=0.5)]))
    n = learn.opt.n_steps
    assert 0<n<6 and distance(learn.model, plain(mlp(), steps(x,y)[:n]))<ROUNDING


class Cancel(Callback):
    "Raises `ex` at `when` in training batch 2"
    run_valid,order = False,40
    def __init__(self, when, ex):
        def f():
            if self.train_iter==2: raise ex
        setattr(self, when, f)


def run_cancelled(when, ex, **kwargs):
    x,y = data(30)
    return fit(learner(mlp(), x, y, probe=given(), cbs=[Cancel(when, ex)], **kwargs)),steps(x,y)


@pytest.mark.parametrize('when,ex', [('after_pred',CancelBatchException), ('after_loss',CancelBatchException)])
def test_a_batch_cancelled_before_its_backward_pass_never_was(when, ex):
    learn,s = run_cancelled(when, ex)
    want = mlp()
    twin = Twin([dict(params=list(want.parameters()), **HYPERS)], given())
    for i in (0,1,3,4): twin.step([partial(one_loss, want, F.cross_entropy, *s[i][0], i)])
    assert learn.opt.n_steps==4 and distance(learn.model, want)<ROUNDING


def test_a_cancelled_step_drops_gradient_and_estimate():
    "The estimate was taken, so its probes are used up"
    learn,s = run_cancelled('before_step', CancelStepException)
    want,probe = mlp(),given()
    twin = Twin([dict(params=list(want.parameters()), **HYPERS)], probe)
    for i in range(5):
        if i==2: [probe(p, None) for p in want.parameters()]
        else: twin.step([partial(one_loss, want, F.cross_entropy, *s[i][0], i)])
    assert learn.opt.n_steps==4 and not learn.opt.diags and distance(learn.model, want)<ROUNDING


def test_a_batch_cancelled_at_its_step_is_added_to_the_next():
    "As `GradientAccumulation` cancels: gradient and estimate of both batches in one step, like fastai's gradient"
    learn,s = run_cancelled('before_step', CancelBatchException)
    want = mlp()
    twin = Twin([dict(params=list(want.parameters()), **HYPERS)], given())
    loss = lambda i: partial(one_loss, want, F.cross_entropy, *s[i][0], i)
    for group in ([0],[1],[2,3],[4]): twin.step([lambda i=i,n=len(group): loss(i)()*n for i in group])
    assert learn.opt.n_steps==4 and distance(learn.model, want)<ROUNDING


def test_a_cancelled_backward_pass_moves_nothing():
    "There is no gradient, so no parameter has a step; fastai's Adam would take one with its momentum, because it keeps gradients of zero"
    learn,s = run_cancelled('before_backward', CancelBackwardException)
    want = mlp()
    twin = Twin([dict(params=list(want.parameters()), **HYPERS)], given())
    for i in (0,1,3,4): twin.step([partial(one_loss, want, F.cross_entropy, *s[i][0], i)])
    assert learn.opt.n_estimates==4 and distance(learn.model, want)<ROUNDING


@pytest.mark.parametrize('ex', [CancelTrainException,CancelFitException])
@pytest.mark.parametrize('when', ['after_loss','before_step'])
def test_a_cancelled_training_leaves_nothing_half_done(when, ex):
    learn,s = run_cancelled(when, ex)
    assert learn.opt.n_steps==2 and not learn.opt.diags and learn.opt.n_batches==0
    assert all(p.grad is None for p in learn.model.parameters())
    assert distance(learn.model, plain(mlp(), s[:2]))<ROUNDING


def test_hooks_of_a_parameter_are_called_once_with_a_plain_gradient():
    "A hook that halves the gradient, and the twin with half the gradient and the whole curvature"
    class Halved(Twin):
        def curvature(self, losses):
            g,d = super().curvature(losses)
            return [o/2 for o in g],d
    x,y = data(24)
    model,seen = mlp(),[]
    def hook(g):
        seen.append(g.requires_grad)
        return g/2
    for p in model.parameters(): p.register_hook(hook)
    learn = fit(learner(model, x, y, probe=given()))
    want = mlp()
    twin = Halved([dict(params=list(want.parameters()), **HYPERS)], given())
    for i,(a,b) in enumerate(split(x,y,6)): twin.step([partial(one_loss, want, F.cross_entropy, a, b, i)])
    assert seen==[False]*4*6 and distance(learn.model, want)<ROUNDING


class Changed(Callback):
    "Does `f` to the loss at `when`, in training"
    run_valid = False
    def __init__(self, when, f): setattr(self, when, lambda: f(self.learn))

def in_place(learn): learn.loss_grad *= 5
def anew(learn): learn.loss_grad,learn.loss = learn.loss_grad*5,learn.loss*5
def weights_too(learn): learn.loss_grad = learn.loss_grad*5+sum(p.square().sum() for p in learn.model.parameters())

FACTORS = dict(in_place=('after_loss',in_place), anew=('after_loss',anew), last_word=('before_backward',anew), weights_too=('after_loss',weights_too))

@pytest.mark.parametrize('name', FACTORS)
@pytest.mark.parametrize('kwargs', [dict(), dict(hessian_bs=4), dict(n_acc=2), dict(cbs=[GradientAccumulation(12)])], ids=str)
def test_drawn_labels_have_the_curvature_of_the_loss_that_is_trained(name, kwargs):
    "Five times the loss has five times the curvature, whoever multiplies it"
    cbs,kwargs = kwargs.get('cbs', []),{k: v for k,v in kwargs.items() if k!='cbs'}
    def diag(*changed):
        log = Noted('before_step', lambda learn: torch.cat([d.flatten() for d in learn.opt.diags.values()]))
        fit(learner(mlp(), *data(12), estimator='gnb', cbs=[*cbs, *changed, log], **kwargs))
        return log.notes[0]
    bare,five = diag(),diag(Changed(*FACTORS[name]))
    assert bare.abs().max()>1e-3 and (five-5*bare).norm()<ROUNDING*bare.norm()


def test_drawn_labels_are_refused_where_the_loss_is_no_multiple_and_the_way_out_works():
    "A term of the outputs has curvature of its own"
    def more(learn): learn.loss_grad = learn.loss_grad+learn.pred.square().mean()
    def trained(**kwargs): return fit(learner(mlp(), *data(12), cbs=[Changed('after_loss', more)], **kwargs))
    with pytest.raises(ValueError, match="estimator='hutchinson' with curvature='ggn'"): trained(estimator='gnb')
    assert trained(estimator='hutchinson', curvature='ggn').opt.n_estimates==2


def test_rows_of_a_sum_are_refused():
    "A sum over half of the rows has half of the curvature"
    kwargs = dict(loss_func=nn.CrossEntropyLoss(reduction='sum'), estimator='gnb')
    with pytest.raises(ValueError, match='reduction'): fit(learner(mlp(), *data(12), hessian_bs=0.5, **kwargs))
    assert fit(learner(mlp(), *data(12), **kwargs)).opt.n_estimates==2


class Centred(nn.Module):
    "A loss with centres of its own, which some other optimizer trains"
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.centres = nn.Parameter(torch.randn(3,3).double())
    def forward(self, pred, y): return F.cross_entropy(pred, y)+0.1*((pred-self.centres[y])**2).mean()

OTHERS = dict(paper={}, forward=dict(hvp='forward'), difference=dict(hvp='finite_difference'), rows=dict(hessian_bs=3), accumulated=dict(n_acc=2),
    ggn=dict(curvature='ggn'), perturbed=dict(rho=0.3))

@pytest.mark.parametrize('opt_func,kwargs', [*((adahessian,o) for o in OTHERS.values()),(hessian_free,{})], ids=[*OTHERS,'hessian_free'])
def test_what_another_optimizer_trains_has_its_gradient(opt_func, kwargs):
    "At each step, with and without an estimate, that of the predictions of the training pass"
    loss_func,want,got,n = Centred(),[],[],kwargs.get('n_acc', 1)
    def expect(learn):
        c,p,y = loss_func.centres.detach(),learn.pred.detach(),learn.yb[0]
        want.append(0.2/p.numel()/n*torch.zeros_like(c).index_add(0, y, c[y]-p))
    def look(learn):
        got.append(loss_func.centres.grad.clone())
        loss_func.centres.grad = None
    cbs = [Noted('after_backward', expect),Noted('before_step', look)]
    learn = fit(learner(mlp(), *data(36), loss_func=loss_func, opt_func=opt_func, hypers=dict(lr=0.05), cbs=cbs, **kwargs))
    assert len(want)==6 and len(got)==6//n and (opt_func is hessian_free or learn.opt.n_estimates==6)
    assert all((a-sum(want[i*n:(i+1)*n])).norm()<1e-6*a.norm() for i,a in enumerate(got))

class HeadsInTurn(nn.Module):
    "A head for each batch in turn"
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body,self.heads,self.n = nn.Linear(4,3),nn.ModuleList([nn.Linear(3,3),nn.Linear(3,3)]),0
    def forward(self, x):
        self.n += self.training
        return self.heads[self.n%2](self.body(x).tanh())

@pytest.mark.parametrize('ours', ['all','body'])
def test_a_mean_holds_batches_that_a_parameter_had_no_part_in(ours):
    "A head that one of two batches uses has half of that batch's gradient, whoever trains it; so has one that stops taking gradients between them"
    grads,net,(x,y) = [],HeadsInTurn().double(),data(12, (4,))
    want = [torch.autograd.grad(F.cross_entropy(h(net.body(x[s]).tanh()), y[s]), h.weight)[0]/2 for h,s in zip(reversed(net.heads), (slice(6),slice(6,12)))]
    def stop(learn): net.heads[1].weight.requires_grad_(ours=='body' or learn.iter==0)
    look = Noted('before_step', lambda learn: grads.extend(net.heads[i].weight.grad.clone() for i in (1,0)))
    params = lambda m: [list(m.parameters() if ours=='all' else m.body.parameters())]
    learn = learner(net, x, y, n_acc=2, cbs=[Noted('before_batch', stop),look])
    learn.splitter = params
    fit(learn)
    assert len(grads)==2 and all((g-w).norm()<1e-6*w.norm() for g,w in zip(grads, want))

def test_a_second_optimizer_in_a_plain_loop():
    "The head is another's: both parts move as with one loss and one backward pass"
    def train(opt_func, differentiate):
        model,seen = mlp(),[]
        opt,head = opt_func(model[:3].parameters()),torch.optim.SGD(model[3].parameters(), 0.1)
        for i in range(3):
            differentiate(opt, F.cross_entropy(model(data(36)[0]), data(36)[1]))
            seen.append(model[3].weight.grad.clone())
            for o in (opt,head): o.step()
            for o in (opt,head): o.zero_grad()
        return seen[0],model
    grads,model = train(partial(adahessian, lr=0.05), lambda opt,loss: opt.differentiate(loss))
    assert torch.allclose(grads, train(partial(Adam, lr=0.05), lambda opt,loss: loss.backward())[0]) and distance(model[3], mlp()[3])>0.01


def test_what_a_callback_does_to_the_number_it_shows_changes_no_curvature():
    "`loss` is a copy of `loss_grad`, in each evaluation"
    class Doubles(Callback):
        order = -30
        def after_loss(self): self.learn.loss.mul_(2)
    def one(cbs): return fit(learner(mlp(), *data(12), probe=given(), hvp='forward', cbs=cbs)).model
    assert all(map(torch.equal, one([]).parameters(), one([Doubles()]).parameters()))

def test_curvature_in_evaluation_hears_no_backward_pass():
    "As in validation, where the loss has no such part"
    class Penalty(Callback):
        def before_backward(self): self.learn.loss_grad = self.loss_grad+sum(p.square().sum() for p in self.model.parameters())
    model = mlp()
    v = [torch.ones_like(p) for p in model.parameters()]
    def product(cbs, train): return learner(model, *data(12), cbs=cbs).curvature_product(train=train)(v)[0]
    assert torch.equal(product([], False), product([Penalty()], False)) and not torch.equal(product([], True), product([Penalty()], True))

def test_a_measurement_leaves_no_attribute():
    learn = learner(mlp(), *data(12))
    before = set(vars(learn))
    learn.curvature_product()([torch.ones_like(p) for p in learn.model.parameters()])
    assert not {'xb','yb','pred','loss','loss_grad','training'} & (set(vars(learn))-before)

def test_more_rows_of_inputs_than_of_targets_are_refused_too():
    learn = learner(mlp(), *data(12))
    learn.xb,learn.yb = (torch.zeros(12,5),),(torch.zeros(6),)
    with pytest.raises(ValueError, match='12 rows of inputs for 6'): check_rows_possible(learn, 3, 6)


AGAIN = [dict(), dict(hvp='forward'), dict(hvp='finite_difference'), dict(hessian_bs=3), dict(curvature='ggn'), dict(opt_func=sassha), dict(opt_func=hessian_free)]
AGAIN_IDS = ['reverse','forward','difference','rows','ggn','sassha','hessian_free']

class Seen:
    "What is noted in an object like this stays, where a list would be put back after another evaluation"
    def __init__(self): self.targets = []

def keywords(kwargs): return kwargs if 'opt_func' not in kwargs else dict(kwargs, hypers=dict(lr=0.1))


@pytest.mark.parametrize('kwargs', AGAIN, ids=AGAIN_IDS)
def test_targets_that_a_callback_exchanges_are_exchanged_once(kwargs):
    "Each evaluation of a batch begins with the targets of the loader, here 0, which become 1; those of the diagnostics too"
    class Relabelled(Callback):
        def after_pred(self): self.learn.pred,self.learn.yb = 2*self.pred,(self.yb[0]+1,)
    seen = Seen()
    def loss_func(pred, y):
        seen.targets.append(sorted(set(y.tolist())))
        return F.cross_entropy(pred, y)
    x,cbs = data(12)[0],[Relabelled(),CurvatureRecorder(every=1)]
    learn = learner(mlp(), x, torch.zeros(12, dtype=torch.long), loss_func=loss_func, cbs=cbs, **keywords(kwargs))
    fit(learn)
    learn.curvature_summary()
    assert len(seen.targets)>4 and all(o==[1] for o in seen.targets)

@pytest.mark.parametrize('hvp', ['reverse','forward','finite_difference'])
def test_exchanged_targets_train_as_in_a_plain_loop(hvp):
    class Relabelled(Callback):
        def after_pred(self): self.learn.pred,self.learn.yb = 2*self.pred,((self.yb[0]+1)%3,)
    x,y = data(12)
    learn = fit(learner(mlp(), x, y, probe=given(), cbs=[Relabelled()], hvp=hvp))
    want = plain(mlp(), steps(x, y), lambda pred,y: F.cross_entropy(2*pred, (y+1)%3))
    assert distance(learn.model, want)<(1e-6 if hvp=='finite_difference' else ROUNDING)


@pytest.mark.parametrize('kwargs', AGAIN[:5], ids=AGAIN_IDS[:5])
def test_a_backward_pass_of_a_callback_counts_once(kwargs):
    "The gradient that it leaves is added to that of the batch, whatever evaluates the batch again"
    class Own(Callback):
        def before_backward(self): (0.1*sum(p.square().sum() for p in self.model.parameters())).backward()
    x,y = data(6)
    grads = []
    class Look(Callback):
        def after_backward(self): grads.extend(p.grad.clone() for p in self.model.parameters())
    learn = fit(learner(mlp(), x, y, cbs=[Own(),Look()], **kwargs))
    model = mlp()
    torch.manual_seed(0)
    (F.cross_entropy(model(x), y)+0.1*sum(p.square().sum() for p in model.parameters())).backward()
    assert all(torch.allclose(g, p.grad) for g,p in zip(grads, model.parameters())) and len(grads)==len(list(learn.model.parameters()))

def test_a_measurement_leaves_no_gradient_of_a_callback():
    class Own(Callback):
        def before_backward(self): (0.1*sum(p.square().sum() for p in self.model.parameters())).backward()
    learn = learner(mlp(), *data(12), cbs=[Own()])
    learn.curvature_summary()
    assert all(p.grad is None for p in learn.model.parameters())


@pytest.mark.parametrize('hvp', ['auto','finite_difference'])
def test_other_modules_in_the_middle_of_a_training_are_looked_at(hvp, capsys):
    "A kink in the place of a smooth activation, with the same parameters"
    class Exchange(Callback):
        def before_epoch(self):
            if self.epoch==1: self.model[1] = nn.ReLU()
    x,y = data(24)
    model = nn.Sequential(nn.Linear(x.shape[1],8), nn.Tanh(), nn.Linear(8,3)).double()
    learn = learner(model, x, y, hvp=hvp, cbs=[Exchange()])
    if hvp=='auto':
        fit(learn, 2)
        assert learn.opt.estimator.curvature.used=='reverse' and capsys.readouterr().out.count("hvp='auto' is")==2
    else:
        with pytest.raises(ValueError, match='kink'): fit(learn, 2)
