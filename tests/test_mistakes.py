"What a newcomer gets wrong: the error names the argument, what it got, and a way out that works there"
import inspect
from functools import partial

import numpy as np,pytest,torch
from fastai.basics import CrossEntropyLossFlat,DataLoaders,FocalLossFlat,Learner,nn
from fastai.callback.all import MixUp,ParamScheduler,SchedLin
from adahessian_fastai.all import AdaHessian,AdaHessianWrapper,CurvatureRecorder,Sophia,adahessian,adahessian_paper,hessian_free,m_sassha
from adahessian_fastai.all import edge_of_stability,overestimate,own_diagonal,perturbed,sassha,sophia,twice_differentiable,win_rate
from adahessian_fastai.curvature import GaussNewton,Hessian
from adahessian_fastai.estimators import GNB,Hutchinson
from adahessian_fastai.problem import MeanProblem,Problem,weights_of
from helpers_learner import data,mlp

def learner(opt_func, loss=None, **kwargs):
    ds = list(zip(*data(16, dtype=torch.float)))
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu')
    return Learner(dls, mlp().float(), loss or CrossEntropyLossFlat(), opt_func=opt_func, **kwargs)

def fitted(learn, *args):
    with learn.no_bar(),learn.no_logging(): learn.fit(1, *args)
    return learn

def loss_of(model): return model(torch.randn(8,3)).square().mean()

IN_A_LEARNER = dict(  # chkstyle: ignore-node
    an_optimizer_instead_of_its_maker=(lambda: adahessian(mlp().parameters()), {}, r"opt_func must be a function.*`partial\(adahessian, lr=0.1\)`"),
    the_bare_wrapper=(lambda: AdaHessianWrapper, {}, 'as `opt_func` give `adahessian`'),
    a_schedule_of_what_is_none=(lambda: adahessian, dict(cbs=ParamScheduler({'learning_rate': SchedLin(0.1, 0.)})), 'learning_rate is none of .*lr, mom, spike'),
    its_name=(lambda: 'adahessian', {}, "opt_func must be a function.*got str"),
    the_bare_steppers=(lambda: partial(AdaHessian, lr=0.1), {}, 'give `opt_func=adahessian`'),
    the_bare_steppers_of_sophia=(lambda: partial(Sophia, lr=0.1), {}, 'or `sophia`'),
    a_rate_in_quotes=(lambda: partial(adahessian, lr='0.1'), {}, "lr must be .*got lr='0.1'"),
    a_rate_in_quotes_for_the_learner=(lambda: adahessian, dict(lr='0.1'), "lr must be .*got lr='0.1'"),
    another_name=(lambda: partial(adahessian, update_every=5), {}, "'update_every': use update_each"),
    per_cent=(lambda: partial(adahessian, budget='25%'), {}, 'such as 0.25'),
    labels_of_a_loss_that_is_no_likelihood=(lambda: sophia, dict(loss=FocalLossFlat()), "use estimator='hutchinson'"),
    labels_under_mixup=(lambda: partial(adahessian, estimator='gnb'), dict(cbs=MixUp()), "use estimator='hutchinson'.*MixUp"))

@pytest.mark.parametrize('name', IN_A_LEARNER)
def test_in_a_learner(name):
    make,kwargs,said = IN_A_LEARNER[name]
    with pytest.raises((TypeError,ValueError), match=f'(?s){said}'): fitted(learner(make(), **kwargs))

def test_a_learner_without_a_parameter_to_train():
    learn = learner(adahessian)
    for p in learn.model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='is all of it frozen'): fitted(learn)

@pytest.mark.parametrize('spoil,said', [(lambda l: l.item(), 'tensor of one number with its graph'),
    (lambda l: l.repeat(8), r'such as a mean, got .*8')])
def test_a_loss_that_is_not_one_number(spoil, said):
    model = nn.Linear(3,1)
    with pytest.raises(ValueError, match=said): adahessian(model.parameters()).differentiate(spoil(loss_of(model)))

@pytest.mark.parametrize('make,said', [(adahessian, r'call `opt.differentiate\(loss\)`'), (hessian_free, 'give `step` a closure')])
def test_a_loop_that_calls_backward(make, said):
    model = nn.Linear(3,1)
    opt,before = make(model.parameters()),model.weight.detach().clone()
    loss_of(model).backward()
    with pytest.raises(ValueError, match=said): opt.step()
    assert torch.equal(model.weight, before)

def test_attention_in_a_loop_names_the_context_that_helps():
    layer,x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True),torch.randn(2,5,8)
    opt = adahessian(layer.parameters())
    with pytest.raises(RuntimeError, match=r'is not implemented: .*`with twice_differentiable\(model\):`'):
        opt.differentiate(layer(x).square().mean())
    opt.zero_grad()
    with perturbed(opt),twice_differentiable(layer): opt.differentiate(layer(x).square().mean())
    opt.step()
    assert opt.n_estimates==1

def test_another_error_in_a_product_stays_as_it_is():
    model = nn.Linear(3,1)
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return Again.apply(g)
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise RuntimeError('out of something')
    loss = Fails.apply(loss_of(model)).square()
    with pytest.raises(RuntimeError, match='^out of something$'): adahessian(model.parameters()).differentiate(loss)


def a_step(model, opt, **kwargs):
    with perturbed(opt): opt.differentiate(loss_of(model), **kwargs)
    opt.step()

def test_one_of_several_processes_that_keeps_to_itself(monkeypatch, recwarn):
    "Without a group each process would step on its own estimate; a process that is alone hears nothing"
    model = nn.Linear(3,1)
    opt = adahessian(model.parameters())
    a_step(model, opt)
    assert not recwarn.list
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda *args: 2)
    with pytest.warns(UserWarning, match='drift apart: give .*group=torch.distributed.group.WORLD'): a_step(model, opt)

@pytest.mark.parametrize('kwargs,name', [(dict(when=3),'when'), (dict(when='Every(3)'),'when'), (dict(estimator=Hessian()),'estimator'),
    (dict(curvature=GNB()),'curvature'), (dict(curvature=Hutchinson()),'curvature')])
@pytest.mark.parametrize('opt_func', [adahessian,sophia])
def test_objects_of_another_kind_are_refused_at_once(kwargs, name, opt_func):
    with pytest.raises(ValueError, match=f'{name}(=|.* must be)'): opt_func([torch.nn.Parameter(torch.ones(2))], **kwargs)

ps = lambda: [nn.Parameter(torch.ones(2))]
OF_ANOTHER_KIND = dict(  # chkstyle: ignore-node
    signed=lambda: adahessian(ps(), signed='False'), decouple_wd=lambda: adahessian(ps(), decouple_wd='false'),
    debiased=lambda: adahessian(ps(), debiased='no', n_samples=2), average_kernels=lambda: sophia(ps(), average_kernels='no'),
    signed_blocks=lambda: adahessian(ps(), signed_blocks='no'), per_layer=lambda: CurvatureRecorder(per_layer='no'),
    closed=lambda: GaussNewton(closed='no'), hvp=lambda: adahessian(ps(), curvature='ggn', hvp='dual'), probe=lambda: adahessian(ps(), probe=['rademacher']),
    curvature=lambda: Hutchinson(curvature='ggn'), weights=lambda: MeanProblem([Problem(ps(), torch.ones(()))]*2, [1.]),
    reduction=lambda: weights_of([1,2], 'none'), loss=lambda: Problem(ps(), torch.ones((), dtype=torch.cfloat)))

@pytest.mark.parametrize('name', OF_ANOTHER_KIND)
def test_values_of_another_kind_are_named(name):
    with pytest.raises(ValueError, match=f'^{name} must be '): OF_ANOTHER_KIND[name]()

@pytest.mark.parametrize('f', [np.bool_,bool,int])
def test_switches_take_what_is_true_or_false(f): assert adahessian(ps(), signed=f(1)).smooth.keywords['signed'] and not adahessian(ps(), signed=f(0)).smooth.keywords['signed']

def test_what_takes_no_part_has_to_be_there():
    "Nothing alien comes into the state; modules and parameters may stand in one list"
    a,b = nn.Linear(2,2),nn.Linear(2,2)
    opt = adahessian([*a.parameters(), *b.parameters()])
    for odd in (nn.Linear(2,2), nn.Parameter(torch.ones(2)), 'a'):
        with pytest.raises(ValueError, match='that this optimizer trains'): opt.opt_out(odd)
    assert not any('do_hessian' in s for s in opt.state.values())
    opt.opt_out([a, b.bias])
    assert [opt.state[p].get('do_hessian', True) for p in (*a.parameters(), *b.parameters())]==[False,False,True,False]

@pytest.mark.parametrize('opt_func', [adahessian,adahessian_paper,sophia,sassha,m_sassha])
@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fine_tune'])
def test_a_rate_of_none_is_the_usual_one(opt_func, fit):
    def rates(f):
        learn = learner(f)
        with learn.no_bar(),learn.no_logging(): getattr(learn, fit)(1)
        return learn.recorder.lrs
    assert rates(partial(opt_func, lr=None))==rates(opt_func)

def test_a_list_of_rates_serves_fine_tune():
    def rates(lr):
        learn = learner(adahessian, lr=lr)
        with learn.no_bar(),learn.no_logging(): learn.fine_tune(1)
        return learn.recorder.lrs
    assert rates([0.1])==rates(0.1)

@pytest.mark.parametrize('word', ['valley','xyz'])
def test_suggestions_are_functions(word):
    with pytest.raises(ValueError, match=f"suggest_funcs must be .*{word}"): learner(adahessian).lr_find(suggest_funcs=word)

def test_help_of_m_sassha_says_how_it_moves():
    assert inspect.signature(m_sassha).parameters['along'].default=='momentum'==m_sassha(ps()).perturb.along
    assert m_sassha(ps(), along='gradient').perturb.along=='gradient'
    with pytest.raises(TypeError, match="m_sassha has no argument 'momentum': use mom"): m_sassha(ps(), momentum=0.9)

def test_none_is_the_default_of_settings():
    a,b = hessian_free(ps(), cg=None, batches=None),hessian_free(ps())
    assert vars(a.cg)==vars(b.cg) and repr(a)==repr(b)


def test_one_odd_parameter_among_others_opts_nothing_out():
    p,other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian_paper([p])
    with pytest.raises(ValueError, match='got 1 of 2 that are none'): opt.opt_out([p,other])
    assert 'do_hessian' not in opt.state[p]


def own(problem, params, n_products=None): return Hessian()(problem, params, n_products)

@pytest.mark.parametrize('make', [lambda ps: adahessian(ps, curvature=own), lambda ps: adahessian(ps, estimator=Hutchinson(own)),
    lambda ps: adahessian(ps, estimator=own), lambda ps: hessian_free(ps, curvature=own)], ids=['curvature','hutchinson','estimator','hessian_free'])
def test_a_function_alone_is_no_part_of_an_optimizer(make):
    "It says neither what the forward pass needs nor has a state to save; an object that has both is taken"
    with pytest.raises(ValueError, match='(curvature|estimator) must be .*own'): make(mlp().parameters())
    class Own(Hessian):
        def __call__(self, *args): return own(*args)
    assert adahessian(mlp().parameters(), curvature=Own()).estimator.curvature.__class__ is Own


def test_arguments_of_hessian_free_go_by_place_too():
    "As in fastai's own loops: `opt_func(params, lr)`"
    assert hessian_free(mlp().parameters(), 0.5).hypers[0]['lr']==0.5


def test_a_long_loss_does_not_hide_the_advice():
    "A module of many parts is named by its class"
    class Perceptual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*[nn.Linear(2,2) for _ in range(9)])
        def forward(self, z, y): return (self.net(z)-y).pow(2).mean()
    x,y = torch.randn(6,5),torch.randn(6,2)
    dls = DataLoaders(*[[(x,y)]]*2)
    learn = Learner(dls, nn.Linear(5,2), Perceptual(), opt_func=partial(adahessian, estimator='gnb'))
    with learn.no_bar(),learn.no_logging(),pytest.raises(ValueError, match="got loss_func=Perceptual of .*use estimator='hutchinson'") as e: learn.fit(1)
    assert len(str(e.value))<700

@pytest.mark.parametrize('shape', [(),(3,)])
@pytest.mark.parametrize('opt_func', [adahessian,sophia,sassha,hessian_free])
def test_a_parameter_alone_is_a_list_of_one(opt_func, shape):
    "Also one that is a single number"
    p = nn.Parameter(torch.ones(shape))
    assert opt_func(p).all_params().itemgot(0)==[p]

def test_a_learner_stands_for_its_optimizer():
    learn = fitted(learner(partial(sophia, update_each=1)))
    product,params,own = learn.curvature_product(),list(learn.model.parameters()),own_diagonal(learn.opt)
    assert win_rate(learn)==win_rate(learn.opt) and own and all(torch.equal(own[p], d) for p,d in own_diagonal(learn).items())
    torch.manual_seed(0)
    of_learner = edge_of_stability(learn, product, params, generator=torch.Generator().manual_seed(0))
    assert of_learner==edge_of_stability(learn.opt, product, params, generator=torch.Generator().manual_seed(0))

ask = dict(win_rate=win_rate, own_diagonal=own_diagonal, overestimate=lambda o: overestimate(o, [], None),
    edge_of_stability=lambda o: edge_of_stability(o, lambda v: v, ps()))

@pytest.mark.parametrize('f', ask)
@pytest.mark.parametrize('make', [lambda: learner(sophia),mlp,lambda: None])
def test_what_has_no_optimizer_is_named(make, f):
    with pytest.raises(ValueError, match=r"^opt must be an optimizer, or a Learner after `create_opt\(\)`, got opt="): ask[f](make())

def test_the_optimizer_that_a_learner_is_to_make_is_enough():
    learn = learner(sophia)
    learn.create_opt()
    assert own_diagonal(learn)=={} and np.isnan(win_rate(learn)).all()

OF_ANOTHER_OPTIMIZER = [(sophia,'hessian_power','adahessian and sassha'), (sophia,'debiased','adahessian'), (adahessian,'along','sassha'),
    (m_sassha,'when','adahessian and sophia'), (adahessian,'hidden','hessian_free'), (hessian_free,'when','adahessian and sophia'), (adahessian,'batches','hessian_free')]

@pytest.mark.parametrize('make,name,of', OF_ANOTHER_OPTIMIZER)
def test_an_argument_of_another_optimizer_is_told_so(make, name, of):
    with pytest.raises(TypeError, match=f"^{make.__name__} has no argument '{name}', which is for {of}$"): make(ps(), **{name: 1})

def test_the_collector_of_others_is_no_argument():
    with pytest.raises(TypeError, match="adahessian has no argument 'others'$"): adahessian(ps(), others=1)

SETTINGS = {*inspect.signature(adahessian).parameters, *inspect.signature(sassha).parameters} - {'params','others'}

@pytest.mark.parametrize('make', [adahessian,sophia,sassha])
def test_no_setting_is_lost_in_an_attribute(make):
    "What is not set is refused, and the error names a way"
    opt = make(ps())
    held,read = {*vars(opt)},{k for k in SETTINGS if hasattr(opt, k)}
    for k in SETTINGS-read:
        with pytest.raises(AttributeError, match=f"^{k} is no attribute of this optimizer, got {k}=0.5: (call|set|make) "): setattr(opt, k, 0.5)
    assert {*vars(opt)}==held and {k for k in SETTINGS if hasattr(opt, k)}==read=={'estimator','when','n_acc','debiased','update_each','hessian_bs','dense'}

def test_the_ways_to_a_setting_work():
    opt,other = adahessian(ps()),sophia(ps())
    opt.perturb.rho,opt.perturb.along,opt.estimator.n_samples = 0.5,'gradient',3
    assert opt.perturb.twice and 'n_samples=3' in repr(opt)
    for k in ('lr','mom','sqr_mom','eps','wd','hessian_power','clip','cap','spike'): opt.set_hyper(k, 0.5)
    assert {*opt.hypers[0].values()}=={0.5}
    other.set_hyper('rho', 0.5)
    assert other.hypers[0]['rho']==0.5
