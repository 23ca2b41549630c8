"The products of the room `hvp` and how the optimizers use them"
import math,pytest,warnings,torch,torch.nn.functional as F
from fastai.basics import Callback,CrossEntropyLossFlat,DataLoaders,L1LossFlat,Learner,partial,set_seed
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from torch import nn
from helpers_learner import fit

from adahessian_fastai.adahessian import AdaHessian,adahessian_paper as adahessian
from adahessian_fastai.hvp import difference_product,dual_gradient,gradient,hessian_product,moved,step_size,total_norm
from adahessian_fastai.curvature import hvp_ways,nonsmooth,nonsmooth_graph,twice_differentiable,without_padding
from adahessian_fastai.adahessian import AdaHessianWrapper
from adahessian_fastai.problem import Problem
from adahessian_fastai.curvature import GaussNewton,Hessian
from adahessian_fastai.estimators import Hutchinson
from adahessian_fastai.hessian_free import hessian_free

EXACT = 1e-10 # Relative, double precision: a dozen layers of rounding
CENTRAL = 1e-7 # Relative, double precision: the square of the step size 1e-6 times a third derivative
ONE_SIDED = 1e-4 # Relative, double precision: the step size 1e-8 times a third derivative, rounding and some room
SINGLE = 0.02 # Relative, float32, one-sided; measured 0.001 to 0.003

class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv,self.bn,self.drop,self.act = nn.Conv2d(3,4,3),nn.BatchNorm2d(4),nn.Dropout(0.3),act
        self.attend,self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, activation='gelu', batch_first=True),nn.Linear(4,3)
    def forward(self, x): return self.head(self.attend(self.drop(self.act(self.bn(self.conv(x)))).flatten(2).transpose(1,2)).mean(1))

def batch(dtype=torch.double): return torch.randn(6,3,5,5, dtype=dtype),torch.randint(3, (6,))

def problem(act, dtype=torch.double, seed=0):
    torch.manual_seed(seed)
    net,(x,y) = Block(act).to(dtype),batch(dtype)
    def loss():
        torch.manual_seed(7)
        with twice_differentiable(net): return F.cross_entropy(net(x), y)
    return net,list(net.parameters()),loss

def relative(a, b): return (total_norm([x-y for x,y in zip(a,b)])/total_norm(b)).item()
def probe(ps): return [torch.randn_like(p).sign() for p in ps]

@pytest.mark.parametrize('act', [nn.GELU(), nn.ReLU(), nn.Tanh()], ids=lambda a: type(a).__name__)
def test_forward_is_reverse(act):
    net,ps,loss = problem(act)
    v = probe(ps)
    g,Hv = dual_gradient(loss, ps, v)
    assert relative(Hv, hessian_product(loss, ps)(v)) < EXACT
    assert relative(g, gradient(loss(), ps)) < EXACT

def test_reverse_is_the_dense_hessian():
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Linear(2,3), nn.Tanh(), nn.Linear(3,1)).double(),torch.randn(5,2).double()
    ps = list(net.parameters())
    def at(flat):
        values = {n: o.view_as(p) for (n,p),o in zip(net.named_parameters(), flat.split([p.numel() for p in ps]))}
        return torch.func.functional_call(net, values, (x,)).square().mean()
    H = torch.func.hessian(at)(torch.cat([p.detach().flatten() for p in ps]))
    for method,tol in (('reverse',EXACT),('forward',EXACT),('finite_difference',CENTRAL)):
        product = hessian_product(lambda: net(x).square().mean(), ps, method)
        for row in torch.eye(len(H)).double():
            v = [o.view_as(p) for p,o in zip(ps, row.split([p.numel() for p in ps]))]
            got = torch.cat([o.flatten() for o in product(v)])
            assert (got-H@row).norm() < tol*H.norm()

def test_dual_leaves_no_trace():
    net,ps,loss = problem(nn.GELU())
    before,versions = [p.detach().clone() for p in ps],[p._version for p in ps]
    pending = loss()
    dual_gradient(loss, ps, probe(ps))
    assert all(map(torch.equal, before, [p.detach() for p in ps]))
    assert versions==[p._version for p in ps]
    pending.backward() # would raise had a saved parameter changed
    with torch.autograd.forward_ad.dual_level(): assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in ps)

def test_dual_without_tangent():
    net,ps,loss = problem(nn.GELU())
    v = probe(ps)
    some = [o if i%2 else None for i,o in enumerate(v)]
    zeros = [o if i%2 else torch.zeros_like(o) for i,o in enumerate(v)]
    assert relative(dual_gradient(loss, ps, some)[1], dual_gradient(loss, ps, zeros)[1]) < EXACT

@pytest.mark.parametrize('act', [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Softplus()], ids=lambda a: type(a).__name__)
def test_differences_of_smooth_networks(act):
    for dtype,central,one_sided in ((torch.double,CENTRAL,ONE_SIDED),(torch.float,SINGLE,SINGLE)):
        net,ps,loss = problem(act, dtype)
        v,exact = probe(ps),hessian_product(loss, ps)
        assert relative(difference_product(loss, ps)(v), exact(v)) < central
        assert relative(difference_product(loss, ps, gradient(loss(), ps))(v), exact(v)) < one_sided

def test_differences_of_kinks_are_meaningless():
    torch.manual_seed(0)
    net,x,y = nn.Sequential(nn.Linear(20,300), nn.ReLU(), nn.Linear(300,300), nn.ReLU(), nn.Linear(300,3)),torch.randn(64,20),torch.randint(3, (64,))
    ps,loss = list(net.parameters()),lambda: F.cross_entropy(net(x), y)
    v = probe(ps)
    assert relative(difference_product(loss, ps)(v), hessian_product(loss, ps)(v)) > 1

def test_moved_returns_bit_by_bit():
    p = torch.randn(1000, requires_grad=True)
    before = p.detach().clone()
    with pytest.raises(ZeroDivisionError):
        with moved([p], [torch.ones(1000)], 1e-3):
            assert not torch.equal(p, before)
            1/0
    assert torch.equal(p, before)

def test_step_size_follows_dtype_and_norm():
    p,v = torch.full((4,), 3.),torch.full((4,), 2.)
    assert step_size([p], [v])==pytest.approx(torch.finfo(torch.float).eps**0.5*7/4)
    assert step_size([p], [v], central=True)==pytest.approx(0.3*torch.finfo(torch.float).eps**(1/3)*7/4)
    assert step_size([p.double()], [v.double()]) < 1e-4*step_size([p], [v])
    assert step_size([p], [torch.zeros(4)])==1.

# In a Learner

def data(n=3, bs=8):
    torch.manual_seed(3)
    ds = list(zip(torch.randn(n*bs,3,5,5), torch.randint(3, (n*bs,))))
    return DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=False, num_workers=0)

def trained(act=None, cbs=(), model=None, loss_func=None, epochs=2, **kwargs):
    set_seed(5)
    net = Block(act or nn.GELU()) if model is None else model
    learn = Learner(data(), net, loss_func or CrossEntropyLossFlat(), opt_func=partial(adahessian, lr=0.02, **kwargs), cbs=list(cbs))
    learn.start = weights(learn)
    with learn.no_bar(),learn.no_logging(): learn.fit(epochs)
    return learn

def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]

def values(learn): return [*(p.detach() for p in learn.model.parameters()), *(b.float() for b in learn.model.buffers())]

def apart(a, b):
    "Distance of two runs, relative to the way of `b`, for the median parameter: entries with hardly any curvature step far, and by rounding"
    ways = zip(*map(weights, (a,b)), b.start)
    return torch.stack([(p-q).norm()/(q-o).norm() for p,q,o in ways if not torch.equal(q, o)]).median().item()

SAME_RUN = 1e-4 # Relative, six steps of float32 whose products differ by rounding
NEAR_RUN = 0.1 # Of the way of six steps whose products differ by 0.3%; measured 0.022, and 0.6 with other probes

@pytest.mark.parametrize('kwargs', [{}, dict(n_samples=2), dict(update_each=2), dict(n_acc=3)], ids=str)
def test_methods_train_alike(kwargs):
    "Batch norm statistics, dropout masks and the probes are the same, so the runs are, too"
    ref = trained(**kwargs)
    assert relative(values(trained(hvp='forward', **kwargs)), values(ref)) < SAME_RUN
    assert apart(trained(hvp='finite_difference', **kwargs), ref) < NEAR_RUN
    other = trained(hvp='reverse', probe='gaussian', **kwargs)
    assert relative(values(other), values(ref)) > SAME_RUN and apart(other, ref) > NEAR_RUN # the comparisons see a difference

def test_with_accumulation_callback():
    ref,fwd = (trained(hvp=h, cbs=[GradientAccumulation(16)]) for h in ('reverse','forward'))
    assert relative(values(fwd), values(ref)) < SAME_RUN

def test_global_random_state_is_the_same_as_with_reverse():
    states = []
    for hvp in ('reverse','forward','finite_difference'):
        trained(hvp=hvp)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])

def test_opt_out_and_frozen():
    def run(hvp):
        set_seed(5)
        learn = Learner(data(), Block(nn.GELU()), CrossEntropyLossFlat(), opt_func=partial(adahessian, lr=0.02, hvp=hvp))
        learn.create_opt()
        learn.start = weights(learn)
        learn.model.conv.requires_grad_(False)
        learn.opt.opt_out(learn.model.head)
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
        return learn
    ref = run('reverse')
    assert relative(values(run('forward')), values(ref)) < SAME_RUN
    assert apart(run('finite_difference'), ref) < NEAR_RUN

# Refusals

def test_kinked_modules_are_named():
    with pytest.raises(ValueError, match=r"`act` \(ReLU\) has a kink.*hvp='reverse'"): trained(nn.ReLU(), hvp='finite_difference')
    with pytest.raises(ValueError, match='L1Loss'):
        trained(model=nn.Sequential(nn.Flatten(), nn.Linear(75,1)), loss_func=L1LossFlat(), hvp='finite_difference')

class Functional(nn.Module):
    "A kink that no module shows"
    def __init__(self, f, n):
        super().__init__()
        self.f,self.lin,self.out = [f],nn.Linear(75,n),nn.Linear(n,3)
    def forward(self, x): return self.out(self.f[0](self.lin(x.flatten(1))))

@pytest.mark.parametrize('f,name', [(F.relu,'Relu'),(torch.abs,'Abs'),(lambda x: x.clamp(min=-0.1),'Clamp')])
def test_kinked_functions_are_found_in_the_graph(f, name):
    with pytest.raises(ValueError, match=rf"{name}Backward\d has a kink"): trained(model=functional(f), hvp='finite_difference')

def functional(f, n=64):
    set_seed(9)
    return Functional(f, n)

class Stairs(torch.autograd.Function):
    "A kink that neither modules nor graph show"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()
    @staticmethod
    def backward(ctx, g): return g*(ctx.saved_tensors[0]>0)

def test_self_check_finds_the_rest():
    with pytest.raises(ValueError, match='was off by'): trained(model=functional(Stairs.apply, 4000), hvp='finite_difference')

def test_half_precision_is_refused():
    with pytest.raises(ValueError, match='half precision'): trained(cbs=[MixedPrecision(amp_mode='bf16')] , hvp='finite_difference')

def test_needs_the_closure():
    p = nn.Parameter(torch.ones(2))
    opt = AdaHessianWrapper(AdaHessian([p], lr=0.1), hvp='forward')
    with pytest.raises(ValueError, match='cannot be evaluated again.*evaluate=f'): opt.differentiate((p**3).sum())
    opt.differentiate(Problem([p], (p**3).sum(), evaluate=lambda twice=False: ((p**3).sum(), None)))
    assert torch.allclose(opt.diags[p], torch.full((2,), 6.)) and torch.allclose(p.grad, torch.full((2,), 3.))

@pytest.mark.parametrize('kwargs', [dict(estimator='gnb'), dict(curvature='ggn')], ids=str)
def test_what_does_not_go_together(kwargs):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="hvp='finite_difference'"): adahessian([p], hvp='finite_difference', **kwargs)
    assert adahessian([p], hvp='auto', **kwargs)

@pytest.mark.parametrize('hvp', ['forward','finite_difference'])
def test_rows_by_any_product(hvp):
    "On half of the batch each way gives the same estimates"
    found,ref = trained(hessian_bs=4, hvp=hvp),trained(hessian_bs=4)
    assert relative(values(found), values(ref)) < SAME_RUN if hvp=='forward' else apart(found, ref) < NEAR_RUN

# The choice

class NoDouble(torch.autograd.Function):
    "Smooth, with forward derivatives and without a double backward"
    @staticmethod
    def forward(x): return x.tanh()
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g*(1-ctx.saved_tensors[0]**2)
    @staticmethod
    def jvp(ctx, t): return t*(1-ctx.saved_tensors[0]**2)

@pytest.mark.parametrize('act,cbs,want,why', [(nn.GELU(),[],'finite_difference','smooth'), (nn.ReLU(),[],'reverse','ReLU'),
    (nn.GELU(),[MixedPrecision(amp_mode='bf16')],'reverse','half precision')], ids=['smooth','kink','half'])
def test_auto(act, cbs, want, why, capsys):
    learn = trained(act, hvp='auto', cbs=cbs)
    said = capsys.readouterr().out
    assert learn.opt.estimator.curvature.used==want and said.count("hvp='auto'")==1 and repr(want) in said and why in said
    assert learn.opt.state_dict()['curvature']['estimator']['used']==want
    if not cbs: assert relative(values(learn), values(trained(act, hvp=want))) < SAME_RUN

class Spoilt(Callback):
    "The loss of the first batch, or its gradient alone, is not a number"
    run_valid = False
    def __init__(self, how): self.how = how
    def after_loss(self):
        if self.iter+self.epoch==0: self.learn.loss_grad = self.loss_grad*math.nan if self.how=='loss' else self.loss_grad+(0*self.pred).sqrt().sum()

@pytest.mark.parametrize('how', ['loss','gradient'])
@pytest.mark.parametrize('hvp', ['reverse','forward','finite_difference','auto']) # 'compiled' goes with no callback that acts on the loss
def test_a_first_batch_that_is_not_finite_speaks_against_no_way(hvp, how):
    "It is skipped, and the way is judged by the next one"
    with pytest.warns(UserWarning, match='not finite'): learn = trained(nn.GELU(), hvp=hvp, cbs=[Spoilt(how)], epochs=1)
    assert (learn.opt.n_skipped,learn.opt.n_steps)==(1,2) and values(learn)[0].isfinite().all()
    assert learn.opt.estimator.curvature.used==('finite_difference' if hvp=='auto' else hvp)
    if hvp!='finite_difference': return
    with pytest.warns(UserWarning, match='not finite'),pytest.raises(ValueError, match='meaningless here'):
        trained(nn.ReLU(), hvp=hvp, cbs=[Spoilt(how)], epochs=1)

@pytest.mark.parametrize('kwargs', [dict(curvature=Hessian('auto')), dict(estimator=Hutchinson(Hessian('auto')))], ids=['curvature','estimator'])
def test_what_one_network_taught_holds_for_no_other(kwargs):
    "Objects in a `partial` serve several Learners: a smooth network and one with kinks"
    for act,want in ((nn.GELU(),'finite_difference'), (nn.ReLU(),'reverse'), (nn.GELU(),'finite_difference')):
        assert trained(act, **kwargs).opt.estimator.curvature.used==want

class Bends(nn.Module):
    "A kink in the body alone, in a function"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Linear(75,8),nn.Linear(8,3)
    def forward(self, x): return self.head(self.body(x.flatten(1)).relu().tanh())

def bends(hvp):
    set_seed(5)
    return Learner(data(), Bends(), CrossEntropyLossFlat(), opt_func=partial(adahessian, lr=0.02, hvp=hvp),
        splitter=lambda m: [list(m.body.parameters()),list(m.head.parameters())])

@pytest.mark.parametrize('through_file', [False,True])
def test_auto_looks_again_at_what_is_thawed(through_file, tmp_path):
    "The head alone is smooth; thawed, the way is that of a network with kinks"
    learn = bends('auto')
    learn.path = tmp_path
    learn.freeze()
    fit(learn)
    assert learn.opt.estimator.curvature.used=='finite_difference'
    if through_file:
        learn.save('a')
        learn = bends('auto')
        learn.path = tmp_path
        learn.freeze()
        learn.load('a')
    learn.unfreeze()
    assert fit(learn).opt.estimator.curvature.used=='reverse'

def test_finite_differences_that_suited_the_head_are_refused_for_the_body():
    learn = bends('finite_difference')
    learn.freeze()
    fit(learn).unfreeze()
    with pytest.raises(ValueError, match='meaningless here: ReluBackward0 has a kink'): fit(learn)

def test_auto_looks_again_at_another_half_of_the_same_size():
    "Two networks in turn, as in a GAN"
    class Kink(nn.Module):
        def forward(self, x): return x.relu()
    curvature,(x,y) = Hessian('auto'),data().one_batch()
    for act,want in ((nn.GELU(),'finite_difference'), (Kink(),'reverse')):
        net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 8), act, nn.Linear(8, 3))
        def evaluate(twice=False):
            out = net(x)
            return F.cross_entropy(out, y),out
        curvature.notice(list(net.parameters()), False)
        curvature(Problem(list(net.parameters()), evaluate()[0], evaluate=evaluate, model=net), list(net.parameters()))
        assert curvature.used==want

def test_auto_looks_again_in_half_precision():
    learn = trained(nn.GELU(), hvp='auto')
    assert learn.opt.estimator.curvature.used=='finite_difference'
    learn.add_cb(MixedPrecision(amp_mode='bf16'))
    assert fit(learn).opt.estimator.curvature.used=='reverse'

def test_auto_without_double_backward(capsys):
    "A function that is differentiable once, before a kink: neither finite differences nor a double backward"
    learn = trained(model=functional(lambda x: NoDouble.apply(x).relu()), hvp='auto')
    assert learn.opt.estimator.curvature.used=='forward' and 'no right double backward' in capsys.readouterr().out
    ref = trained(model=functional(lambda x: x.tanh().relu()))
    assert relative([learn.opt.state[p]['sqr_avg_diag_hessian'] for p in learn.model.parameters()],
        [ref.opt.state[p]['sqr_avg_diag_hessian'] for p in ref.model.parameters()]) < SAME_RUN

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.out = nn.LSTM(3, 6, batch_first=True),nn.Linear(6,3)
    def forward(self, x): return self.out(self.rnn(x.flatten(2).transpose(1,2))[0][:,-1])

def test_once_differentiable_is_refused_and_not_taken_for_zero():
    with pytest.raises(RuntimeError, match='once_differentiable'): trained(model=functional(NoDouble.apply))
    ref = trained(model=functional(torch.tanh))
    assert relative(values(trained(model=functional(NoDouble.apply), hvp='forward')), values(ref)) < SAME_RUN

class NoJvp(torch.autograd.Function):
    "Smooth, with a first derivative alone"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        return y
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g*(1-ctx.saved_tensors[0]**2)

def test_the_ways_out_of_a_function_that_is_differentiable_once():
    "Every error on the way names one that works"
    run = partial(trained, model=functional(NoJvp.apply))
    for kwargs in (dict(), dict(hvp='forward'), dict(curvature='ggn'), dict(curvature='ggn', hvp='forward')):
        with pytest.raises((RuntimeError,ValueError), match="estimator='gnb'"): run(**kwargs)
    ref = partial(trained, model=functional(torch.tanh))
    assert relative(values(run(estimator='gnb')), values(ref(estimator='gnb'))) < SAME_RUN
    assert apart(run(hvp='finite_difference'), ref()) < NEAR_RUN

def test_auto_of_recurrent_and_compiled_models(capsys):
    def run(hvp, compiled):
        set_seed(5)
        net = Recurrent()
        return trained(model=torch.compile(net, backend='eager') if compiled else net, hvp=hvp)
    ref = run('reverse', False)
    for compiled in (False,True):
        learn = run('auto', compiled)
        assert learn.opt.estimator.curvature.used=='finite_difference' and apart(learn, ref) < NEAR_RUN

@pytest.mark.parametrize('kwargs', [{}, dict(curvature='ggn')], ids=str)
def test_forward_derivatives_of_recurrent_models(kwargs):
    "oneDNN's layers have none"
    def run(**kw):
        set_seed(5)
        return values(trained(model=Recurrent(), **kwargs, **kw))
    assert relative(run(hvp='forward'), run()) < SAME_RUN

def test_graph_nodes_of_a_network():
    "The kinks and nothing else"
    net,ps,loss = problem(nn.GELU())
    assert nonsmooth_graph(loss())==[] and nonsmooth(net)==[]
    net,ps,loss = problem(nn.ReLU())
    assert nonsmooth_graph(loss())==['ReluBackward0'] and nonsmooth(net)==['`act` (ReLU)']

# Gauss-Newton products with a forward pass of dual numbers

@pytest.mark.parametrize('kwargs', [{}, dict(n_samples=3), dict(n_acc=3), dict(update_each=2)], ids=str)
def test_riding_along_is_reverse(kwargs):
    ref = trained(nn.ReLU(), curvature='ggn', **kwargs)
    assert relative(values(trained(nn.ReLU(), curvature='ggn', hvp='forward', **kwargs)), values(ref)) < SAME_RUN
    assert relative(values(trained(nn.ReLU(), **kwargs)), values(ref)) > SAME_RUN

def test_riding_leaves_no_dual_numbers():
    learn = trained(curvature='ggn', hvp='forward')
    with torch.autograd.forward_ad.dual_level():
        assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in learn.model.parameters())

# Compiled

@pytest.mark.slow
def test_compiled_trains_like_reverse():
    "Without dropout, whose masks are drawn anew in a compiled function"
    def run(**kwargs):
        set_seed(5)
        net = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36,3))
        return trained(model=net, **kwargs)
    ref,state = run(n_samples=2),torch.get_rng_state()
    assert relative(values(run(n_samples=2, hvp='compiled')), values(ref)) < SAME_RUN
    assert torch.equal(torch.get_rng_state(), state)

def test_compiled_refuses_callbacks():
    with pytest.raises(ValueError, match='GradientAccumulation'): trained(hvp='compiled', cbs=[GradientAccumulation(16)])

def test_compiled_follows_the_loss_function(monkeypatch):
    "The compiled function has the loss in it; another loss is another function"
    monkeypatch.setattr('adahessian_fastai.curvature.torch.compile', lambda f, **kwargs: f)
    def run(hvp):
        set_seed(5)
        learn = trained(model=nn.Sequential(nn.Flatten(), nn.Linear(75,3)), hvp=hvp)
        learn.loss_func = nn.CrossEntropyLoss(weight=torch.tensor([1.,5.,.1]))
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
        return values(learn)
    assert relative(run('compiled'), run('reverse')) < SAME_RUN

class Padded(nn.Module):
    "Mean of embeddings, 0 is padding; the same weight gives the predictions where it is `shared`"
    def __init__(self, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.emb,self.shared = nn.Embedding(6, 4, padding_idx=0).double(),shared
        nn.init.normal_(self.emb.weight)
        self.lin = nn.Linear(4, 6).double()
        if shared: self.lin.weight = self.emb.weight
    def forward(self, x): return self.lin(self.emb(x).mean(1).tanh())

@pytest.mark.parametrize('way', ['forward','finite_difference'])
def test_padding_is_a_constant_in_each_way(way):
    "Its row has no gradient, so a product must not move it"
    model,x,y = Padded(),torch.arange(30).reshape(6,5)%6,torch.arange(6)
    ps = list(model.parameters())
    def evaluate(twice=False):
        out = model(x)
        return F.cross_entropy(out, y),out
    def product(name): return hvp_ways[name](Problem(ps, *evaluate(), evaluate=evaluate, model=model), ps).product
    v = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)) for p in ps]
    got,want = product(way)(v),product('reverse')(v)
    error = sum((a-b).square().sum() for a,b in zip(got, want))/sum(b.square().sum() for b in want)
    assert error.sqrt() < (ONE_SIDED if way=='finite_difference' else EXACT)
    assert (got[0][0]==0).all() and v[0][0].abs().min()>0
    shared = Padded(shared=True)
    assert all(a is b for a,b in zip(without_padding(shared, list(shared.parameters()), v[:2]), v))

@pytest.mark.parametrize('jvp', ['dual','linearize','along'])
def test_padding_is_a_constant_in_products_of_gauss_and_newton(jvp):
    "Also where dual numbers ride with the forward pass, for a probe that would move it"
    model,x,y = Padded(),torch.arange(30).reshape(6,5)%6,torch.arange(6)
    ps = list(model.parameters())
    v = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)) for p in ps]
    def product(jvp):
        gn = GaussNewton(jvp)
        with gn.surround(model, ps, lambda params: v):
            def evaluate(twice=False): return F.cross_entropy(out := model(x), y),out
            problem = Problem(ps, *evaluate(), targets=y, loss_func=F.cross_entropy, evaluate=evaluate, model=model)
            return gn(problem, ps).product(v)
    for a,b in zip(product(jvp), product('reverse')): assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    assert v[0][0].abs().min()>0

def test_a_padded_model_keeps_the_fast_products_of_hessian_free():
    model,x = Padded(),torch.arange(30).reshape(6,5)%6
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        hessian_free(model.parameters(), jvp='dual').acc_step(model, F.cross_entropy, [(x,torch.arange(6))])

class Single(nn.Module):
    "A loss that is computed in single precision, as fastai's flattened ones are"
    def forward(self, z, y): return F.cross_entropy(z.float(), y)

@pytest.mark.parametrize('central', [False,True])
@pytest.mark.parametrize('dtypes', [(torch.double,torch.double), (torch.double,torch.float), (torch.float,torch.float)])
def test_steps_of_differences_suit_the_rounding_of_the_loss(dtypes, central):
    "Parameters in double precision with a loss in single: a step for sixteen digits would measure rounding"
    torch.manual_seed(0)
    net,x,y = nn.Sequential(nn.Linear(5,16), nn.Tanh(), nn.Linear(16,3)).to(dtypes[0]),torch.randn(24,5).to(dtypes[0]),torch.randint(3, (24,))
    ps,loss = list(net.parameters()),lambda: F.cross_entropy(net(x).to(dtypes[1]), y)
    v = probe(ps)
    off = relative(difference_product(loss, ps, None if central else gradient(loss(), ps))(v), hessian_product(loss, ps)(v))
    assert off < (SINGLE if torch.float in dtypes else ONE_SIDED)

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(),Single(),nn.CrossEntropyLoss()])
@pytest.mark.parametrize('hvp', ['finite_difference','auto','forward'])
def test_diagonals_of_models_in_double_precision(loss_func, hvp):
    "Through the Learner, beside the double backward with the same probe"
    class AsFloat(Callback):
        def after_loss(self): self.learn.loss = self.loss.float() # What fastai's Recorder can average
    def average(hvp):
        torch.manual_seed(0)
        net,x,y = nn.Sequential(nn.Linear(5,16), nn.GELU(), nn.Linear(16,3)).double(),torch.randn(24,5).double(),torch.randint(3, (24,))
        rows = list(zip(x, y))
        learn = Learner(DataLoaders.from_dsets(rows, rows, bs=24, shuffle=False, num_workers=0), net, loss_func, cbs=AsFloat(),
            opt_func=partial(adahessian, hvp=hvp, signed=True, block_length=1, average_kernels=False))
        torch.manual_seed(1)
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
        return [learn.opt.state[p]['avg_diag_hessian'] for p in net.parameters()]
    assert relative(average(hvp), average('reverse')) < SINGLE

def test_differences_are_looked_at_as_they_are_used():
    "One-sided ones start from the gradient of the step: where the batch is another function when it is evaluated again, that shows"
    torch.manual_seed(0)
    net,x,y = nn.Sequential(nn.Linear(5,8), nn.Tanh(), nn.Linear(8,3)).double(),torch.randn(6,5).double(),torch.randint(3, (6,))
    def p(shift):
        z = net(x)
        def again(twice=False): return F.cross_entropy(net(x+shift), y),net(x)
        return Problem(list(net.parameters()), F.cross_entropy(z, y), z, y, F.cross_entropy, again, model=net)
    Hessian('finite_difference')(p(0.), list(net.parameters()))
    with pytest.raises(ValueError, match='was off by'): Hessian('finite_difference')(p(0.1), list(net.parameters()))

# Kinks that depend on arguments, and those that no trained parameter feels

@pytest.mark.parametrize('f,name', [(F.selu,'Elu'), (partial(F.elu, alpha=0.3),'Elu'), (lambda x: torch.fmax(x, -x),'Fmax'),
    (lambda x: x.cummax(1)[0],'Cummax'), (lambda x: x-x.median(1, keepdim=True)[0],'Median'), (lambda x: x/x.norm(p=1, dim=1, keepdim=True),'LinalgVectorNorm'),
    (lambda x: x/torch.linalg.vector_norm(x, math.inf, 1, keepdim=True),'LinalgVectorNorm'), (lambda x: torch.cdist(x, x.detach()+1, p=1),'Cdist'),
    (lambda x: x.remainder(0.3),'Remainder')])
def test_functions_whose_kink_depends_on_arguments(f, name):
    x = torch.randn(6, 6, requires_grad=True)
    found = nonsmooth_graph(f(x).square().sum())
    assert any(o.startswith(name) for o in found), found

@pytest.mark.parametrize('f', [F.elu, F.celu, F.gelu, F.softplus, lambda x: x.norm(dim=1), lambda x: torch.cdist(x, x.detach()+1),
    lambda x: F.soft_margin_loss(x, torch.ones_like(x)), lambda x: F.multilabel_soft_margin_loss(x, torch.ones_like(x))])
def test_smooth_functions_have_no_kink(f):
    x = torch.randn(6, 6, requires_grad=True)
    assert nonsmooth_graph(f(x).square().sum())==[]

@pytest.mark.parametrize('f', [F.selu, partial(F.elu, alpha=0.3)])
def test_auto_sees_a_functional_kink(f, capsys):
    assert trained(model=functional(f), hvp='auto').opt.estimator.curvature.used=='reverse' and 'Elu' in capsys.readouterr().out

def test_a_frozen_kink_is_no_objection():
    "Of a frozen body with a smooth head nothing bends"
    set_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(75,16), nn.ReLU(), nn.Linear(16,16), nn.Tanh(), nn.Linear(16,3))
    for p in model[1].parameters(): p.requires_grad_(False)
    assert trained(model=model, hvp='auto').opt.estimator.curvature.used=='finite_difference'

def test_a_smooth_margin_is_no_objection():
    w = torch.randn(5, dtype=torch.double, requires_grad=True)
    def evaluate(twice=False): return F.soft_margin_loss(w, torch.ones_like(w)),None
    hv, = Hessian('finite_difference')(Problem([w], evaluate()[0], evaluate=evaluate), [w], 1).product([torch.ones_like(w)])
    assert torch.allclose(hv, torch.sigmoid(w).mul(torch.sigmoid(-w)).detach()/5, rtol=1e-5)
