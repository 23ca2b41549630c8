"A run whose loss leaves where it was says so once, and its advice helps"
import math,pytest,torch,torch.nn.functional as F,warnings
from functools import partial
from fastai.basics import Callback,nn,noop
from fastai.callback.training import GradientAccumulation
from adahessian_fastai.all import *
from adahessian_fastai.diagnostics import step_rates
from adahessian_fastai.learner import LossGuard,by_parameter,norms_of,trainable_params
from adahessian_fastai.optimizer import remedy
from adahessian_fastai.steppers import Work
from helpers_learner import fit,learner,mlp

WILD = 50. # A learning rate at which every optimizer here leaves


def a_run(opt_func, *lr, epochs=20, dtype=torch.float, change=noop):
    "A small network on classes that can be learned, its losses, and what was said about them"
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    learn = learner(mlp().to(dtype), x, x[:,:3].argmax(1), bs=16, opt_func=opt_func, hypers={})
    with warnings.catch_warnings(record=True) as said,learn.no_bar(),learn.no_logging():
        warnings.simplefilter('always')
        change(learn).fit(epochs, *lr)
    return learn,learn.recorder.losses,[str(o.message) for o in said if 'loss has grown' in str(o.message)]


@pytest.mark.parametrize('opt_func', [adahessian_paper,sophia,sassha,m_sassha])
def test_a_run_that_diverges_says_so_once(opt_func):
    learn,losses,said = a_run(opt_func, WILD)
    assert max(filter(math.isfinite, losses))>10*losses[0] and math.isfinite(losses[10])
    assert len(said)==1 and f'than lr={WILD:.3g}' in said[0]


@pytest.mark.parametrize('opt_func', [adahessian,adahessian_paper,sophia,sassha,m_sassha])
def test_a_run_that_trains_says_nothing(opt_func): assert a_run(opt_func)[2]==[]


def test_the_loss_is_that_of_the_recorder_under_accumulation_too():
    "Otherwise a training with `GradientAccumulation` and one without it differ by its weight, and the second one seems to diverge"
    def change(learn):
        learn.fit(10, 1e-3, cbs=GradientAccumulation(320))
        return learn
    learn,losses,said = a_run(adahessian, 1e-3, change=change)
    assert said==[] and min(losses)/2<learn.opt.counts.guard.best<2*max(losses)


def test_the_numbers_are_the_averages_of_the_recorder():
    seen = []
    class Averages(Callback):
        order = 100
        def after_batch(self): seen.append(self.smooth_loss.item())
    _,losses,said = a_run(adahessian_paper, WILD, change=lambda l: l.add_cb(Averages()))
    i = next(i for i,o in enumerate(seen) if o>10*min(seen[:i+1]))
    assert f'its average is {seen[i]:.3g}, ' in said[0] and f'best of {min(seen[:i+1]):.3g}, after {i+1} steps' in said[0]


@pytest.mark.parametrize('change', [dict(lr=0.15),dict(lr=2., clip=3, cap=0.1)])
def test_the_advice_helps(change):
    said = a_run(partial(adahessian_paper, lr=2.))[2]
    assert 'smaller learning rate' in said[0] and 'clip=3, cap=0.1' in said[0]
    _,losses,said = a_run(partial(adahessian_paper, **change), epochs=5)
    assert said==[] and losses[-1]<losses[0]


# Gradients that are far too long

def a_net(spike, wilder=None):
    "Weights after 24 steps, of which one (`wilder`) has a loss a thousand times the others'; the lengths of the gradients that moved them"
    x = torch.randn(96, 5, generator=torch.Generator().manual_seed(1)).double()
    model,lengths = mlp(),[]
    opt = adahessian([*model.parameters()], lr=0.1, rho=0., clip=None, cap=None, spike=spike)
    for i,xb in enumerate(x.split(4)):
        opt.differentiate(F.cross_entropy(model(xb), xb[:,:3].argmax(1))*(1000 if i==wilder else 1))
        opt.step()
        lengths.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        opt.zero_grad()
    return [p.detach() for p in model.parameters()],lengths

def by_hand(lengths, spike):
    "The lengths that `spike` leaves, with the running mean written out"
    mean,res = 0.,[]
    for i,n in enumerate(lengths):
        res.append(min(n, spike*mean/(1-0.9**i)) if i else n)
        mean = 0.9*mean+0.1*res[-1]
    return res

ROUNDING = 1e-6 # Norms are read in single precision

@pytest.mark.parametrize('spike', [1.2,2.])
def test_the_length_of_a_gradient_is_bounded(spike):
    "The gradients of the free run up to the spike are those of the bounded one, as long as nothing was cut"
    free,cut = a_net(0.)[1],a_net(spike, 20)[1]
    i = next(i for i,(a,b) in enumerate(zip(by_hand(free, spike), free)) if a!=b or i==20)
    assert cut[:i]==pytest.approx(free[:i], rel=ROUNDING)
    if i==20: assert cut[20]==pytest.approx(spike*sum(0.1*0.9**(19-j)*n for j,n in enumerate(cut[:20]))/(1-0.9**20), rel=ROUNDING)
    else: assert cut[i]==pytest.approx(by_hand(free, spike)[i], rel=ROUNDING)


def test_one_bad_batch_moves_a_bounded_run_little():
    want = a_net(2.)[0]
    def away(spike): return max((a-b).abs().max().item() for a,b in zip(a_net(spike, 22)[0], want))
    assert away(0.)>5*away(2.)


def test_halves_that_train_in_turn_have_a_mean_each():
    a,b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = adahessian([a,b], lr=0.01, rho=0.)
    for i in range(8):
        p,scale = (a,1.) if i%2 else (b,1000.)
        for o in (a,b): o.requires_grad_(o is p)
        opt.differentiate(scale*(p**2).sum())
        length = p.grad.norm().item()
        opt.step()
        assert p.grad.norm().item()==pytest.approx(length)
        opt.zero_grad()


def test_the_mean_goes_with_a_checkpoint():
    x = torch.nn.Parameter(torch.ones(3))
    opt = adahessian([x], rho=0)
    opt.differentiate((x**2).sum())
    opt.step()
    sd = opt.state_dict()
    assert sd['state'][0]['norm_avg']==pytest.approx(0.1*12**0.5) and sd['state'][0]['norm_step']==1
    adahessian([x]).load_state_dict(sd)
    for k,v in (('norm_avg',math.nan),('norm_avg',-1.),('norm_step',1.5)):
        bad = {**sd, 'state': [{**sd['state'][0], k: v}]}
        with pytest.raises(ValueError, match=k): adahessian([x]).load_state_dict(bad)


# No curvature where there is a gradient

class Quantile(torch.nn.Module):
    def forward(self, p, y): return torch.maximum(0.9*(y-p), 0.1*(p-y)).mean()

class Hinge(torch.nn.Module):
    def forward(self, p, y): return torch.relu(1-p*y.sign()).mean()

class Percentage(torch.nn.Module):
    def forward(self, p, y): return ((p-y)/y.abs().clamp(min=0.1)).abs().mean()

def a_regression(opt_func, loss_func, steps=40, act=torch.nn.ReLU):
    "What was said of curvature, and the losses, of a net with one dead layer of units"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3,8), act(), torch.nn.Linear(8,8), act(), torch.nn.Linear(8,1))
    x = torch.randn(64, 3)
    y = x.sum(1, keepdim=True)
    opt,losses = opt_func([*net.parameters()]),[]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(steps):
            with perturbed(opt): opt.differentiate(loss := loss_func(net(x), y))
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
    return [str(o.message) for o in said if 'exactly zero' in str(o.message)],losses

@pytest.mark.parametrize('opt_func', [adahessian,adahessian_paper,sassha])
@pytest.mark.parametrize('loss_func', [torch.nn.L1Loss(),Hinge(),Quantile(),Percentage()], ids=['l1','hinge','quantile','mape'])
def test_a_loss_of_straight_pieces_is_told_once(opt_func, loss_func):
    said,_ = a_regression(opt_func, loss_func)
    assert len(said)==1 and 'eps' in said[0]

@pytest.mark.parametrize('loss_func', [torch.nn.L1Loss(),Quantile()], ids=['l1','quantile'])
def test_the_advice_on_straight_pieces_helps(loss_func):
    "A larger `eps` is silent and learns the plane"
    said,losses = a_regression(partial(adahessian, eps=0.1), loss_func, steps=300)
    assert said==[] and min(losses[-10:])<0.2*losses[0]
    assert a_regression(adahessian, torch.nn.SmoothL1Loss())[0]==[]

@pytest.mark.parametrize('loss_func', [torch.nn.MSELoss(),torch.nn.HuberLoss(delta=10.)], ids=['mse','huber'])
@pytest.mark.parametrize('act', [torch.nn.ReLU,torch.nn.Tanh])
def test_a_curved_loss_is_not_told_of(loss_func, act): assert a_regression(adahessian, loss_func, act=act)[0]==[]

def test_sophia_bounds_each_entry_and_says_nothing(): assert a_regression(partial(sophia, estimator='hutchinson'), torch.nn.L1Loss())[0]==[]


# Hessian-free behind batch norm

@pytest.mark.parametrize('bs,norm,told', [(16,torch.nn.BatchNorm1d,True),(16,torch.nn.LayerNorm,False),(512,torch.nn.BatchNorm1d,False)])
def test_hessian_free_tells_of_batch_norm_on_small_batches(bs, norm, told):
    x = torch.randn(512, 5, generator=torch.Generator().manual_seed(1))
    learn = learner(mlp(norm=norm).float(), x, x[:,:3].argmax(1), bs=bs, opt_func=hessian_free, hypers=dict(cg_max_iter=2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(learn)
    assert [f'a batch of {bs}' in str(o.message) for o in said if 'batch norm' in str(o.message)]==[True]*told

@pytest.mark.parametrize('spikes', [(2.,0.3),(0.3,0.),(0.,1.)])
def test_each_group_has_its_own_bound(spikes):
    "Of the running mean that all share"
    torch.manual_seed(0)
    a,b = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    opt = adahessian([[a],[b]], spike=list(spikes), update_each=1)
    opt.set_hyper('spike', list(spikes))
    means,n = 0.,0
    for k in range(6):
        a.grad,b.grad = (torch.randn(3)*(1+3*k) for _ in range(2))
        was,norm = (a.grad.clone(),b.grad.clone()),math.hypot(a.grad.norm(), b.grad.norm())
        work = Work.of(opt)
        work.bound([p.grad.norm().item() for p in work])
        mean = means/(1-0.9**n) if n else math.inf
        for p,g,c in zip((a,b), was, spikes): assert torch.allclose(p.grad, g*(min(1, c*mean/norm) if c else 1))
        means,n = 0.9*means+0.1*min(norm, max(spikes)*mean),n+1

def test_a_parameter_of_two_groups_counts_in_the_first():
    "Also where it is looked at"
    w = nn.Parameter(torch.ones(2))
    opt = adahessian([[w],[w]], lr=slice(0.1,0.2))
    assert step_rates(opt, [w])==[0.1] and by_parameter(opt)[w][1] is opt.hypers[0]
    assert len(trainable_params(opt))==1 and trainable_params(opt)[0] is w


def test_the_advice_names_the_largest_rate_and_the_bounds_that_are_off():
    a,b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian_paper([[a],[b]], lr=slice(0.1,0.2), clip=3)
    assert remedy(opt)=='take a smaller learning rate than lr=0.2, or bound the steps with cap=0.1, spike=2'

def said_of(*losses):
    guard = LossGuard()
    return [o for o in map(guard, losses) if o]

def test_a_loss_has_grown_where_it_was_far_below_the_first():
    "Ten times its best, and above a tenth of the first one"
    assert len(said_of(1., *[0.001]*600, *[0.5]*60))==1

def test_a_loss_that_is_still_far_below_the_first_has_not_grown():
    "A hundred times its best, and a hundredth of where it began: nothing; then a tenth of that and more"
    low = [1000.,*[0.1]*2000,*[10.]*300]
    assert said_of(*low)==[] and len(said_of(*low, *[200.]*300))==1

def test_of_a_loss_below_zero_nothing_is_said(): assert said_of(1., *[-5.]*20, *[0.9]*200)==[]

def test_the_loss_of_a_step_is_the_mean_of_its_batches():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian_paper([p], n_acc=2)
    for k in (1,3): opt.differentiate(k*(p**2).sum())
    opt.step()
    assert opt.counts.guard.first==4

def test_a_state_begins_the_average_of_the_loss_anew():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian_paper([p], lr=0.)
    def step(k):
        opt.differentiate(k*(p**2).sum())
        opt.step()
    step(1e-3)
    opt.load_state_dict(opt.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(5): step(1.)
    assert opt.counts.guard.first==2

def test_a_norm_belongs_to_its_tensor_where_one_is_empty():
    assert [n.item() for n in norms_of([torch.zeros(0),torch.ones(4),torch.zeros(0),torch.ones(9)])]==[0,2,0,3]


def test_a_loss_beyond_single_precision_is_finite():
    "Also one that comes out of a checkpoint in the middle of an accumulation"
    ps = [nn.Parameter(torch.ones(2, dtype=torch.double)) for _ in range(2)]
    opt,other = (adahessian([p], n_acc=2, rho=0.) for p in ps)
    def loss(p): return (p**2).sum()+1e300
    opt.differentiate(loss(ps[0]))
    other.load_state_dict(opt.state_dict())
    for p,o in zip(ps, (opt,other)):
        o.differentiate(loss(p))
        o.step()
        assert (o.n_steps,o.n_skipped)==(1,0) and (p<1).all()
