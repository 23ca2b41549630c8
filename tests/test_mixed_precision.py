"fp16 and bf16 as users switch them on: gradients and estimates against float32, overflows of either, and no trace of the loss scale"
import math,warnings
import pytest,torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.callback.training import GradientAccumulation,GradientClip
from torch import nn
from adahessian_fastai.all import Problem,adahessian_paper,hessian_free,sophia
from adahessian_fastai.batch import CurvatureScale
from adahessian_fastai.cg import flat_product
from adahessian_fastai.hvp import twice_differentiable
from helpers_learner import HYPERS,Noted,convnet,data,distance,fit,given,learner,mlp,plain,relative,split,state_of
from twin import hessian_times

# float16 rounds by 2**-11 and bfloat16 by 2**-8. A convnet with ReLU loses more, because some activations change sides of the kink
# and batch norm divides by what is left: its gradient has an error of the same size
FP16,BF16,KINKS = 0.01,0.05,4
# `MixedPrecision` turns predictions into float32, those of a float64 model too
FLOAT_PRED = 1e-6


class Former(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0., activation='gelu', batch_first=True)
        self.emb,self.body,self.head = nn.Embedding(20,32),nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),nn.Linear(32,10)
    def forward(self, x): return self.head(self.body(self.emb(x)).mean(1))


def problem(kind):
    torch.manual_seed(0)
    if kind=='conv': return convnet().float(),*data(16, (3,16,16), 10, dtype=torch.float)
    return Former(),torch.randint(20, (16,6)),torch.randint(10, (16,))


def amp(learn, mode): return learn.to_fp16() if mode=='fp16' else learn.to_bf16()


def pending(learn):
    "The estimate of one batch, before it is averaged over blocks, and the gradient without its scale"
    notes = Noted('before_step', lambda l: ([d.clone() for d in l.opt.diags.values()], [p.grad.clone() for p in l.model.parameters()]))
    notes.order = 50
    learn.add_cb(notes)
    return fit(learn),*notes.notes[0]


def test_a_loss_scale_leaves_no_trace(cpu_amp):
    "Autocast leaves float64 alone, so only the scaling is at work: equal to the plain loop"
    x,y = data()
    learn = learner(mlp(), x, y, probe=given())
    fit(learn.to_fp16())
    want = plain(mlp(), [[b] for b in split(x,y,6)])
    assert distance(want, mlp())>0.1
    assert distance(learn.model, want)<FLOAT_PRED


@pytest.mark.parametrize('kwargs', [dict(init_scale=2.**20), dict(growth_interval=2), dict(init_scale=1.), dict(init_scale=1000.)])
def test_whatever_the_loss_scale_is(cpu_amp, kwargs):
    x,y = data()
    learn = learner(mlp(), x, y, probe=given(), update_each=2).to_fp16(**kwargs)
    fit(learn)
    assert distance(learn.model, plain(mlp(), [[b] for b in split(x,y,6)], update_each=2))<FLOAT_PRED


def test_with_accumulation_and_clipping(cpu_amp):
    x,y = data(30)
    cbs = [GradientAccumulation(12), GradientClip(0.1)]
    learn = fit(learner(mlp(), x, y, probe=given(), cbs=cbs).to_fp16())
    other = fit(learner(mlp(), x, y, probe=given(), cbs=[GradientAccumulation(12), GradientClip(0.1)]))
    assert distance(learn.model, mlp())>0.01
    assert distance(learn.model, other.model)<FLOAT_PRED


def errors(kind, mode, device='cpu', **kwargs):
    "Relative error of diagonal and gradient after one batch, against float32 with the same probe"
    def one(mode):
        model,x,y = problem(kind)
        learn = learner(model.float().to(device), x.to(device), y.to(device), bs=16, probe=given(), **kwargs)
        return pending(amp(learn, mode) if mode else learn)
    (learn,d,g),(_,d32,g32) = one(mode),one(None)
    assert learn.opt.n_estimates==1 and learn.opt.n_dropped==0
    return relative(d, d32),relative(g, g32)


@pytest.mark.parametrize('kind', ['conv','former'])
@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_the_estimate_is_as_good_as_the_gradient(cpu_amp, kind, mode, record_property):
    d,g = errors(kind, mode)
    record_property('relative errors', (d,g))
    bound = (FP16 if mode=='fp16' else BF16)*(KINKS if kind=='conv' else 1)
    assert 1e-5<g<bound and 1e-5<d<2*bound


@pytest.mark.parametrize('kind', ['conv','former'])
@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_gauss_newton_in_half_precision(cpu_amp, kind, mode):
    d,_ = errors(kind, mode, curvature='ggn')
    assert 1e-5<d<2*(FP16 if mode=='fp16' else BF16)*(KINKS if kind=='conv' else 1)


def naive(model, x, y, scale):
    "The diagonal of a loss that carries the loss scale of the gradient, divided by it"
    with twice_differentiable(model),torch.amp.autocast('cpu', dtype=torch.float16): pred = model(x)
    params,probe = list(model.parameters()),given()
    zs = [probe(p, None) for p in params]
    hz = hessian_times(F.cross_entropy(pred.float(), y)*scale, params, zs)[1]
    return [z*h/scale for z,h in zip(zs,hz)]


def test_the_loss_scale_of_gradients_is_wrong_for_curvature(cpu_amp):
    "At fastai's first scale the product of a convnet overflows; ours does not, at any loss scale"
    model,x,y = problem('conv')
    assert not all(d.isfinite().all() for d in naive(model.float(), x, y, 2.**16))
    for init_scale in (2.**16,2.**10,2.**4):
        model,x,y = problem('conv')
        learn,d,_ = pending(learner(model.float(), x, y, bs=16, probe=given()).to_fp16(init_scale=init_scale))
        assert all(o.isfinite().all() and o.abs().max()>0 for o in d) and learn.opt.curvature_scale.c==1


def test_nothing_underflows_to_zero(cpu_amp):
    "A loss of 1e-6: without any scale most of its Hessian is below the smallest float16"
    small = lambda pred,y: F.cross_entropy(pred, y)*1e-6
    def one(fp16):
        model,x,y = problem('former')
        learn = learner(model, x, y, bs=16, loss_func=small, probe=given())
        return pending(learn.to_fp16() if fp16 else learn)[1]
    half,full = one(True),one(False)
    model,x,y = problem('former')
    with twice_differentiable(model),torch.amp.autocast('cpu', dtype=torch.float16): pred = model(x)
    params,probe = list(model.parameters()),given()
    zs = [probe(p, None) for p in params]
    bare = [z*h for z,h in zip(zs, hessian_times(small(pred.float(), y), params, zs)[1])]
    assert relative(bare, full)>0.1
    assert relative(half, full)<FP16


class Wreck(Callback):
    "Makes the scaled loss of training batch 2 infinite, or only its gradient"
    order = 20
    def __init__(self, what): self.what = what
    def before_backward(self):
        if self.what=='loss' and self.train_iter==2: self.learn.loss_grad = self.loss_grad*float('inf')
    def after_backward(self):
        if self.what=='gradient' and self.train_iter==2: next(self.model.parameters()).grad[0] = float('inf')


@pytest.mark.parametrize('update_each', [1,5])
@pytest.mark.parametrize('what', ['loss','gradient'])
def test_an_overflow_skips_the_step_and_leaves_everything(cpu_amp, what, update_each):
    x,y = data(24, dtype=torch.float)
    before,after = (Noted(when, state_of) for when in ('before_batch','after_batch'))
    for o in (before,after): o.order = 70
    learn = learner(mlp().float(), x, y, cbs=[before,after,Wreck(what)], update_each=update_each).to_fp16()
    scales = Noted('after_batch', lambda l: l.scaler.get_scale())
    fit(learn.add_cb(scales))
    for o in (before.notes[2],after.notes[2]): o[1]['curvature']['counts'].pop('n_estimates')
    assert before.notes[2]==after.notes[2] and before.notes[1]!=after.notes[1] and before.notes[3]!=after.notes[3]
    assert learn.opt.diags=={} and learn.opt.n_steps==3
    assert [b/a for a,b in zip(scales.notes, scales.notes[1:])]==[1,0.5,1]


class Broken:
    "Probes with one infinite entry in estimate `at`"
    def __init__(self, at, n_params): self.probe,self.at,self.n_params,self.n = given(),at,n_params,0
    def __call__(self, p, g):
        z,i = self.probe(p, g),self.n//self.n_params
        self.n += 1
        if i==self.at: z.view(-1)[0] = float('inf')
        return z


@pytest.mark.filterwarnings('ignore:The estimate of the diagonal')
@pytest.mark.parametrize('fp16', [True,False])
def test_a_broken_estimate_skips_only_the_estimate(cpu_amp, fp16):
    "The plain loop that takes no estimate in step 2, of 4"
    x,y = data(24)
    learn = learner(mlp(), x, y, probe=Broken(2, 6))
    averages = Noted('after_batch', lambda l: [s['sqr_avg_diag_hessian'].clone() for s in l.opt.opt.state.values()])
    learn.add_cb(averages)
    fit(learn.to_fp16() if fp16 else learn)
    assert learn.opt.n_dropped==1 and learn.opt.n_skipped==0 and learn.opt.n_steps==4
    assert all(torch.equal(a,b) for a,b in zip(averages.notes[1], averages.notes[2]))
    assert not torch.equal(averages.notes[2][0], averages.notes[3][0])
    assert learn.opt.curvature_scale.c==(0.5 if fp16 else 1)
    assert all(s['hess_step']==3 and s['step']==4 for s in learn.opt.opt.state.values())


def test_the_scale_of_curvature_falls_until_the_estimate_is_finite(cpu_amp):
    "Set too high, it costs estimates and no steps of wrong length: the parameters wait for their first one"
    torch.manual_seed(0)
    x,y = data(16*12, (3,16,16), 10, dtype=torch.float)
    learn = learner(convnet().float(), x, y, bs=16, probe=given())
    learn.create_opt()
    learn.opt.curvature_scale.c,learn.opt.curvature_scale.size = 2.**8,2.**8
    with pytest.warns(UserWarning, match='estimate of the diagonal is not finite'): fit(learn.to_fp16())
    assert learn.opt.n_dropped>1 and learn.opt.curvature_scale.c==2.**(8-learn.opt.n_dropped)
    counts = [s['hess_step'] for s in learn.opt.opt.state.values() if 'hess_step' in s]
    assert min(counts)==12-learn.opt.n_dropped and max(counts)<=12 # where the estimate was finite it is used
    assert distance(learn.model, convnet().float())>0


def test_the_scale_grows_again_and_has_bounds():
    scale = CurvatureScale(shrink=4., growth_interval=3)
    for _ in range(20): scale.update(False)
    assert scale.c==1/16
    for _ in range(3): scale.update(True)
    assert scale.c==1/8
    for _ in range(60): scale.update(True)
    assert scale.c==4.


@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_training_in_half_precision_follows_float32(cpu_amp, mode):
    "Twelve steps of a Transformer: the weights move together, with the rounding of their format; a scale this low overflows on no processor"
    def run(mode):
        model,x,y = problem('former')
        start = [p.detach().clone() for p in model.parameters()]
        learn = learner(model, x, y, bs=8, probe=given(), hypers={**HYPERS, 'lr': 0.01})
        fit(learn.to_fp16(init_scale=2.**6) if mode=='fp16' else amp(learn, mode) if mode else learn, 6)
        assert (learn.opt.n_steps, learn.opt.n_dropped)==(12,0)
        return [p-q for p,q in zip(learn.model.parameters(), start)]
    full = run(None)
    assert relative(run(mode), full)<10*(FP16 if mode=='fp16' else BF16)


def test_float32_again_afterwards(cpu_amp):
    x,y = data()
    learn = fit(learner(mlp(), x, y, probe=given()).to_fp16())
    learn.to_fp32()
    fit(learn)
    assert distance(learn.model, fit(fit(learner(mlp(), x, y, probe=given()))).model)<FLOAT_PRED


@pytest.mark.cuda
@pytest.mark.parametrize('kind', ['conv','former'])
@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_on_a_gpu(kind, mode):
    d,g = errors(kind, mode, 'cuda')
    bound = (FP16 if mode=='fp16' else BF16)*(KINKS if kind=='conv' else 1)
    assert g<bound and d<2*bound


@pytest.mark.parametrize('event', ['after_pred','after_loss','before_step'])
@pytest.mark.parametrize('training', [True,False], ids=['training','validation'])
@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_an_interrupt_leaves_no_autocast_on(cpu_amp, mode, training, event):
    "A training afterwards, of this model or another one, is the one that it would have been"
    class Stop(Callback):
        order = 95
        def __call__(self, name):
            if name==('after_pred' if event=='before_step' and not training else event) and self.training==training: raise KeyboardInterrupt
    x,y = data(24, dtype=torch.float)
    made = lambda: amp(learner(mlp().float(), x, y), mode)
    torch.manual_seed(0)
    undisturbed = state_of(fit(made(), 3))
    with pytest.raises(KeyboardInterrupt): fit(made(), cbs=Stop())
    assert not torch.is_autocast_enabled('cpu')
    torch.manual_seed(0)
    assert state_of(fit(made(), 3))==undisturbed


@pytest.mark.parametrize('opt_func', [adahessian_paper,hessian_free])
def test_full_precision_after_an_interrupt_in_half(cpu_amp, opt_func):
    "fastai leaves the loss scale behind, which is nobody's then"
    class Stop(Callback):
        def before_batch(self): raise KeyboardInterrupt
    def train(interrupted):
        learn = learner(mlp(), *data(36), opt_func=opt_func, hypers=dict(lr=0.05))
        if interrupted:
            with pytest.raises(KeyboardInterrupt): fit(learn.to_fp16(), cbs=Stop())
            assert learn.to_fp32().scaler is not None
            learn.create_opt()
        torch.manual_seed(0)
        return fit(learn).model
    assert distance(train(True), train(False))==0


@pytest.mark.parametrize('curvature', ['ggn','hessian'])
@pytest.mark.parametrize('mode', ['fp16','bf16'])
def test_short_directions_of_conjugate_gradients_have_their_curvature(cpu_amp, mode, curvature):
    "The last ones are a millionth as long as the gradient: in float16 their products were zero"
    def products(mode):
        model,x,y = problem('former')
        learn = learner(model, x, y, bs=16, opt_func=hessian_free, hypers={}, curvature=curvature)
        learn.create_opt()
        solve,seen = learn.opt.cg.solve,[]
        def noted(product, b, ps, *args):
            seen.extend([flat_product(product, ps)(b*k)] for k in (1,1e-3,1e-6))
            return solve(product, b, ps, *args)
        learn.opt.cg.solve = noted
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            fit(amp(learn, mode) if mode else learn)
        return seen[:3]
    for half,full in zip(products(mode), products(None)): assert relative(half, full)<2*(FP16 if mode=='fp16' else BF16)

def test_an_overflow_of_one_parameter_is_one_of_all():
    "It may hide behind finite numbers elsewhere: the scale falls, and no estimate is used"
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian_paper([p,q], probe=lambda o,_: torch.full_like(o, math.inf if o is p and opt.n_estimates else 1.))
    for _ in range(2):
        opt.zero_grad()
        opt.differentiate(((p**4).sum()+(q**4).sum())*1024, scale=1024.)
        for o in (p,q): o.grad.div_(1024)
        assert [d.isfinite().all().item() for d in opt.diags.values()]==[opt.n_estimates==1,True]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            opt.step()
    assert opt.curvature_scale.c==0.5 and opt.n_dropped==1 and all(opt.state[o]['hess_step']==1 for o in (p,q))

def test_drawn_labels_leave_the_scale_of_curvature_alone():
    "They have no second derivative that could overflow"
    x,y = data(12)
    model = mlp()
    opt = sophia(model.parameters(), dense=20)
    out = model(x)
    opt.differentiate(Problem(list(model.parameters()), F.cross_entropy(out, y)*1024, out, y, F.cross_entropy, scale=1024.))
    assert not opt.pending.scaled

def test_a_gradient_of_which_nothing_is_known_is_not_scaled():
    scale = CurvatureScale()
    assert scale.fit([torch.tensor([4.])], 1.)==8
    assert scale.fit([torch.zeros(2)], 1.)==scale.fit([torch.tensor([math.inf])], 1.)==scale.fit([], 1.)==1


@pytest.mark.parametrize('kwargs', [{}, dict(curvature='ggn')], ids=str)
def test_a_loss_scale_divides_shared_memory_once(kwargs):
    "Autograd gives parameters that are added the same tensor, and a sum of one an expanded tensor; the scale is a power of two"
    def diags(scale):
        a,b,c = (nn.Parameter(torch.tensor(o)) for o in ([1.,2.,3.], [.5,.5,.5], [.1,.2]))
        opt,outs = adahessian_paper([a,b,c], block_length=1, probe=lambda p,g: torch.ones_like(p), **kwargs),a+b
        loss = (outs**2).sum()/2 + c.sum()**2
        opt.differentiate(Problem([a,b,c], loss*scale, outputs=outs, targets=torch.zeros(3), loss_func=nn.MSELoss(reduction='sum'), scale=scale))
        return [opt.diags[p] for p in (a,b,c)]
    assert all(torch.equal(d, e) for d,e in zip(diags(1.), diags(1024.), strict=True))
    assert diags(1024.)[0].tolist()==diags(1024.)[1].tolist()==[2.]*3


@pytest.mark.parametrize('kwargs', [{}, dict(curvature='ggn'), dict(hvp='auto'), dict(hessian_bs=6), dict(n_samples=2)], ids=str)
def test_a_batch_norm_of_a_channel_that_hardly_varies(cpu_amp, kwargs):
    "Behind a dead ReLU torch's second derivative overflows in float16: no estimate was finite, and no step was made"
    def made():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5,8,bias=False), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8,3))
        with torch.no_grad():
            net[0].weight[2] = torch.tensor([-1.,0,0,0,0])
            x,y = torch.randn(48,5),torch.randint(3, (48,))
            x[:,0] = x[:,0].abs()
        return learner(net, x, y, bs=12, probe=given(), **kwargs)
    half,whole = fit(made().to_fp16(), 2),fit(made(), 2)
    assert half.opt.n_dropped==half.opt.n_skipped==0 and half.opt.n_estimates==half.opt.n_steps==8
    assert distance(half, whole)<5*FP16


def test_hessian_free_in_half_precision_keeps_the_loss_scale_out_of_its_products(cpu_amp):
    "With large inputs curvature times a scale of 65536 overflows, and each step was skipped for good"
    def train(half):
        torch.manual_seed(0)
        x,y = 30*torch.randn(32,5),torch.randint(3, (32,))
        learn = learner(nn.Sequential(nn.Linear(5,8), nn.Tanh(), nn.Linear(8,3)), x, y, bs=32, opt_func=hessian_free, hypers={})
        return fit(learn.to_fp16() if half else learn, 12)
    half,whole = train(True),train(False)
    assert half.opt.n_skipped==0 and half.recorder.losses[-1]<0.7*half.recorder.losses[0]
    assert whole.recorder.losses[-1]<0.7*whole.recorder.losses[0]


def test_a_backward_of_ones_own_in_a_learner_is_shown_the_way(cpu_amp):
    "A loss alone knows neither the loss scale nor the batch; with the advice the training is the usual one"
    class Own(Learner):
        def _backward(self): self.opt.differentiate(self.loss_grad)
    class Advised(Learner):
        def _backward(self): self.opt.backward(self)
    def run(cls):
        torch.manual_seed(1)
        learn = learner(mlp().float(), *data(24, dtype=torch.float), probe=given())
        learn.__class__ = cls
        return fit(learn.to_fp16()).model
    with pytest.raises(ValueError, match=r"self\.opt\.backward\(self\)"): run(Own)
    assert distance(run(Advised), run(Learner))==0
