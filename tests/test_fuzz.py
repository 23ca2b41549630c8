"What no public function can use is refused by an error that names the argument, and nothing has changed; a number is a number, whoever made it"
import itertools,math,re
import numpy as np,pytest,torch
from functools import partial
from torch import nn
import adahessian_fastai.all as package
from adahessian_fastai.all import *
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.schedule import ParamScheduler
from helpers_learner import HYPERS,data,fit,learner,mlp,state_of

nan,inf = math.nan,math.inf


# What can be wrong with an argument, by its kind

NO_NUMBER = ['a', [], torch.ones(2), np.ones(2), nan, True, 1j, dict(a=1), object()]
NO_COUNT = [*NO_NUMBER, 0, -1, 1.5, inf, torch.tensor(1.5), np.float32(1.5)]
NO_NAME = ['nonsense', '', 3, nan, True, torch.ones(2)]
NO_NAMES = [*NO_NAME, []]
bad = dict(  # chkstyle: ignore-node
    positive=[*NO_NUMBER, None, 0., -1., inf, torch.tensor(nan), np.float64(nan)], least0=[*NO_NUMBER, None, -1., inf, torch.tensor(-1.), np.float64(inf)],
    bound=[*NO_NUMBER, -1., inf, torch.tensor(nan)], below1=[*NO_NUMBER, None, 1., -0.1, inf, torch.tensor(1.)], power=[*NO_NUMBER, None, 1.5, -1., inf],
    count=[*NO_COUNT, None], count0=[o for o in [*NO_COUNT, None] if not isinstance(o, int) or isinstance(o, bool) or o], maybe_count=NO_COUNT,
    period=[*NO_COUNT, None, (1,), (1,2,3), (0,2), (2,0), (True,2)], rows=[*NO_NUMBER, 0, -1, 0., -0.5, 1.5, inf, (0,0.5), (3,2.5)],
    budget=[*NO_NUMBER, 0, -1., 25, inf], name=[*NO_NAMES, None], maybe_name=NO_NAMES, probe=NO_NAME, maybe_probe=NO_NAME)
good = dict(count6=6,  # chkstyle: ignore-node
    positive=0.5, least0=0.5, bound=0.5, below1=0.5, power=0.5, count=2, count0=2, maybe_count=2, period=3, rows=4, budget=0.5)


def twins(v):
    "The number `v` as NumPy and PyTorch write it"
    if isinstance(v, int): return [np.int64(v), np.int32(v), torch.tensor(v), np.array(v)]
    return [np.float64(v), np.float32(v), torch.tensor(v), torch.tensor(v, dtype=torch.double), np.array(v)]


# The public functions: how to call each of them, and the kinds of its arguments

def weights(): return list(mlp().parameters())

def curved():
    "A loss of two parameters, with its graph"
    p = nn.Parameter(torch.tensor([1.,2.], dtype=torch.double))
    return (p**3).sum(),[p],(p*2,p.exp())

def product_of_curved(**kwargs):
    loss,params = curved()[:2]
    return hessian_product(lambda: loss, params, **kwargs)

def dense_of_curved(**kwargs):
    p = nn.Parameter(torch.ones(2, dtype=torch.double))
    return dense_hessian(lambda: (p**3).sum(), [p], **kwargs)

def gnb_of_curved(**kwargs):
    _,ps,(out,_) = curved()
    return list(gnb_samples(out, ps, lambda g: torch.ones(2, dtype=torch.double), **kwargs))

def differences(**kwargs):
    p = nn.Parameter(torch.ones(2, dtype=torch.double))
    return difference_product(lambda: (p**3).sum(), [p], **kwargs)(P)

def double(v): return [2*o for o in v]

def symmetric(v): return torch.tensor([[2.,1.],[1.,3.]], dtype=torch.double)@v

P = [torch.ones(2, dtype=torch.double)]
OWN = dict(lr='bound', mom='below1', sqr_mom='below1', eps='positive', wd='least0')
STEP = dict(OWN, hessian_power='power', clip='bound', cap='bound', spike='bound')
CURVED = dict(estimator='name', curvature='maybe_name', hvp='maybe_name', probe='probe', n_samples='maybe_count', update_each='period', dense='count0',
    hessian_bs='rows', block_length='count', n_acc='count')
HF = dict(lr='least0', wd='least0', damping='least0', curvature='name', jvp='name', reduction='name', n_acc='count', curv_batches='maybe_count',
    held_out='held_out', cg_max_iter='maybe_count', cg_tol='least0', martens_eps='maybe_least0', x0_decay='power', neg_curv='name', check_every='maybe_count', grid='maybe_grid',
    keep_iterates='maybe_count', ls_beta='inside', ls_c='least0', ls_max_iter='count', fisher_exponent='number', fisher_probes='maybe_count',
    lm_bounds='pair', lm_factors='pair', damping_bounds='pair')
ON = dict(precondition=True) # What `fisher_probes` belongs to
bad.update(  # chkstyle: ignore-node
    limit0=[o for o in [*NO_COUNT, None] if o is not inf and (isinstance(o, bool) or not isinstance(o, int) or o)],
    open1=[*NO_NUMBER, None, 0., 1., -1., inf], grid=[*NO_NUMBER, None, 1., 0.5, -1., inf],
    switch=['a', '', 3, None, [], nan, torch.ones(2)], function=['a', None, 3, nan, []], maybe_positive=[*NO_NUMBER, 0., -1., inf],
    count6=[*NO_COUNT, None, 5], held_out=[*bad['count0'], 1], maybe_grid=[*NO_NUMBER, 1., 0.5, -1., inf],
    maybe_least0=[*NO_NUMBER, -1., inf], number=[*NO_NUMBER, None, inf],
    maybe_limit=[o for o in NO_COUNT if o is not inf], inside=[*NO_NUMBER, None, 0., 1., -1., inf],
    pair=[*[o for o in NO_NUMBER if not hasattr(o, 'ndim')], None, 1., (1.,), (nan,1.), (2.,1.,3.), (-1.,-2.), ('a','b')])

functions = dict(  # chkstyle: ignore-node
    adahessian=(lambda **k: adahessian(weights(), **k), dict(STEP, rho='bound', budget='budget', **CURVED)),
    AdaHessian=(lambda **k: AdaHessian(weights(), **{'lr': 0.1, **k}), STEP),
    sassha=(lambda **k: sassha(weights(), **k), dict(STEP, rho='bound', update_each='period', dense='count0', hessian_bs='rows', n_acc='count',
        n_samples='maybe_count', along='name')), Perturbation=(Perturbation, dict(rho='bound', along='name')),
    sophia=(lambda **k: sophia(weights(), **k), dict(OWN, rho='positive', **CURVED)),
    Sophia=(lambda **k: Sophia(weights(), **{'lr': 0.1, **k}), dict(OWN, rho='positive')),
    hessian_free=(lambda **k: hessian_free(weights(), **ON, **k), HF), HessianFree=(lambda **k: HessianFree(weights(), **ON, **k), HF),
    CurvatureOptimizer=(lambda **k: CurvatureOptimizer(AdaHessian(weights(), 0.1), **k), dict(n_acc='count')),
    Every=(Every, dict(update_each='period', hessian_bs='rows', dense='count0')), Budget=(lambda overhead=0.5, **k: Budget(overhead, **k), dict(overhead='budget')),
    Hutchinson=(Hutchinson, dict(n_samples='count', probe='probe')), ControlVariate=(ControlVariate, dict(n_samples='count', probe='probe')),
    GNB=(GNB, dict(n_samples='count')), Hessian=(Hessian, dict(method='name')), GaussNewton=(GaussNewton, dict(jvp='name')),
    CurvatureRecorder=(CurvatureRecorder, dict(every='maybe_count', n_samples='count', max_iter='count', tol='positive', curvature='name')),
    hutchinson_samples=(lambda **k: list(hutchinson_samples(double, P, **k)), dict(n_samples='count', probe='probe')),
    hutchinson_diag=(lambda **k: hutchinson_diag(double, P, **k), dict(n_samples='count', probe='probe')),
    hutchinson_trace=(lambda **k: hutchinson_trace(double, P, **k), dict(n_samples='count', probe='probe')),
    control_variate_samples=(lambda **k: list(control_variate_samples(double, P, [torch.zeros(2)], **k)), dict(n_samples='count', probe='probe')),
    get_probe=(lambda probe='rademacher': get_probe(probe), dict(probe='probe')),
    block_mean=(lambda **k: block_mean(torch.ones(4,6), **k), dict(block_length='count')),
    average_diag=(lambda **k: average_diag(torch.ones(4,6), **k), dict(block_length='count')),
    dense_matrix=(lambda **k: dense_matrix(double, P, **k), dict(chunk_size='count')), dense_hessian=(dense_of_curved, dict(chunk_size='count')),
    exact_diag=(lambda **k: exact_diag(double, P, progress=False, **k), dict(chunk_size='count')),
    extreme_eigenvalues=(lambda **k: extreme_eigenvalues(double, P, **k), dict(k='count', which='name', tol='least0', max_iter='count')),
    hutch_plus_plus=(lambda **k: hutch_plus_plus(double, P, **k), dict(n_products='count6', probe='probe')),
    spectral_density=(lambda **k: spectral_density(double, P, **k), dict(n_steps='count', n_samples='count', probe='probe')),
    check_product=(lambda **k: check_product(double, P, **k), dict(rtol='least0')),
    hessian_product=(product_of_curved, dict(method='name')),
    cg=(lambda **k: cg(symmetric, torch.ones(2, dtype=torch.double), **k), dict(max_iter='maybe_limit', tol='least0', atol='least0', eps='maybe_least0', grid='maybe_grid',
        keep='maybe_count', neg_curv='name', check_every='maybe_count')),
    solve=(lambda **k: solve(double, P, **k), dict(damping='number', tol='least0', max_iter='maybe_limit')),
    diag_preconditioner=(lambda **k: diag_preconditioner(torch.ones(2), **k), dict(damping='least0', exponent='number')),
    armijo=(lambda **k: armijo(lambda a: 1-a, 1., -1., **k), dict(alpha='positive', beta='inside', c='least0', max_iter='count')),
    lm_damping=(lambda damping=1., **k: lm_damping(damping, 0.5, **k), dict(damping='least0')),
    fisher_diagonal=(lambda **k: fisher_diagonal(curved()[2], *curved()[:2], **k), dict(n_probes='maybe_count', reduction='name')),
    gnb_samples=(gnb_of_curved, dict(n_samples='count')),
    adahessian_paper=(lambda **k: adahessian_paper(weights(), **k), dict(STEP, rho='bound', budget='budget', **CURVED)),
    AdaHessianWrapper=(lambda **k: AdaHessianWrapper(AdaHessian(weights(), 0.1), **k), dict(CURVED, budget='budget')),
    m_sassha=(lambda **k: m_sassha(weights(), **k), dict(STEP, rho='bound', update_each='period', n_acc='count')),
    CG=(CG, dict(max_iter='maybe_count', tol='least0', martens_eps='maybe_least0', x0_decay='power', neg_curv='name', check_every='maybe_count',
        backtracking='switch', grid='maybe_grid', keep_iterates='maybe_count')),
    Damping=(Damping, dict(start='least0', adapt='switch', bounds='pair', factors='pair', limits='pair', structural='least0')),
    LineSearch=(LineSearch, dict(beta='inside', c='least0', max_iter='count')),
    Preconditioner=(Preconditioner, dict(diagonal='name', exponent='number', n_probes='maybe_count')),
    Batches=(Batches, dict(n_acc='count', curv_batches='maybe_count', held_out='held_out', reduction='name', keep_graph='switch',
        check_deterministic='switch')),
    Given=(lambda diagonal=double, **k: Given(diagonal, **k), dict(diagonal='function', second_order='switch')),
    check_symmetric=(lambda **k: check_symmetric(double, P, **k), dict(tol='least0')),
    curvature_stats=(lambda **k: curvature_stats(double, P, **k), dict(n_samples='count', max_iter='count', tol='least0')),
    grid_iterations=(lambda max_iter=3, **k: grid_iterations(max_iter, **k), dict(max_iter='limit0', base='grid')),
    lanczos=(lambda **k: list(itertools.islice(lanczos(double, P, **k), 1)), dict(probe='probe')),
    confidence_interval=(lambda estimate=1., error=0.1, n_samples=4, **k: confidence_interval(estimate, error, n_samples, **k),
        dict(n_samples='count', level='open1')),
    descend=(lambda **k: descend(rosenbrock, partial(adahessian, lr=0.1), (0.,0.), **{'n_steps': 2, **k}), dict(n_steps='count0', clip='maybe_positive')),
    difference_product=(differences, dict(factor='positive')),
    compare_optimizers=(lambda **k: compare_optimizers(None, {}, **{'n_epoch': 1, **k}), dict(n_epoch='count')))

# What takes tensors, functions and states alone, is handed on as it is, or is a record that others fill
OF_OTHERS = '''CGResult Eigenpairs Estimate LearnerProblem MeanProblem Problem Rule Solution SpectralDensity Stability adahessian_step average_diag_hessian
    average_sqr_diag_hessian backtrack best_jvp block_product cg_steps check_block_length comparison_table denominator difference_error draw_like dual_jvp
    edge_of_stability flat flat_product fresh_ggn_product gaussian_like ggn_product gradient graph_product hessian_times_gradient known_hessian label_noise
    linear_jvp loss_hessian martens_stop mean_and_noise mean_product model_forward overestimate own_diagonal perturbed plot_comparison plot_noise
    plot_paths quadratic rademacher_like rastrigin real_parameters recurrent_layers reduction_ratio reverse_jvp rosenbrock sample_mean sophia_step substituted
    through_saddle trained_lr twice_differentiable unflat win_rate'''.split()

def test_every_public_function_is_looked_at():
    "A new one has to be put into one of the two lists"
    public = {k for k,v in vars(package).items() if callable(v) and not k.startswith('_') and getattr(v, '__module__', '').startswith('adahessian_fastai')}
    assert public=={*functions, *OF_OTHERS} and not set(functions)&set(OF_OTHERS)


also_named = {('Budget','overhead'): 'budget', ('Hessian','method'): 'hvp', ('Preconditioner','diagonal'): 'precondition', ('Damping','start'): 'damping'}
ARGUMENTS = [(f,a,k) for f,(_,kinds) in functions.items() for a,k in kinds.items()]

def refused(f, name, **kwargs):
    "Is it refused by name? An error of another kind is raised"
    try: f(**kwargs)
    except (ValueError,TypeError) as e: return bool(re.search(rf'\b{name}\b', str(e))) or f'not named: {type(e).__name__}: {e}'
    return 'accepted'


@pytest.mark.parametrize('function', functions)
def test_what_is_right_is_taken(function): functions[function][0]()


@pytest.mark.parametrize('function,arg,kind', ARGUMENTS)
def test_what_is_wrong_is_refused_by_name(function, arg, kind):
    name = also_named.get((function,arg), arg)
    said = {repr(v): refused(functions[function][0], name, **{arg: v}) for v in bad[kind]}
    assert {k: v for k,v in said.items() if v is not True}=={}


@pytest.mark.parametrize('function,arg,kind', [o for o in ARGUMENTS if o[2] in good])
def test_a_number_is_a_number_whoever_made_it(function, arg, kind):
    "Or is refused by name; no other error"
    f,name = functions[function][0],also_named.get((function,arg), arg)
    f(**{arg: good[kind]})
    said = {repr(v): refused(f, name, **{arg: v}) for v in twins(good[kind])}
    assert {k: v for k,v in said.items() if v not in (True,'accepted')}=={}


PARAMS = [None, 3, 'a', nan, [], [[],[]], [1.,2.], [nn.Linear(2,2)], nn.Sequential(nn.Linear(2,2)), nn.Linear(2,2), object(), dict(params=weights())]

@pytest.mark.parametrize('opt', [adahessian,partial(AdaHessian, lr=0.1),sophia,partial(Sophia, lr=0.1),hessian_free])
def test_what_are_no_parameters(opt):
    said = {repr(v): refused(lambda: opt(v), 'params|parameters') for v in PARAMS}
    assert {k: v for k,v in said.items() if v is not True}=={}


@pytest.mark.parametrize('opt', [adahessian,m_sassha,hessian_free])
def test_groups_may_be_tuples(opt):
    groups = [tuple(nn.Linear(2,2).parameters()) for _ in range(2)]
    assert [len(o) for o in opt(groups).param_lists]==[2,2] and all(p.requires_grad for p,*_ in opt(tuple(groups)).all_params())


@pytest.mark.parametrize('opt', [adahessian,sophia])
@pytest.mark.parametrize('arg', ['lr','mom','sqr_mom','eps','wd'])
def test_numpys_numbers_train_as_pythons_do(opt, arg):
    "Bit for bit, and the state is one of Python's numbers, which every file takes"
    x,y = data(12)
    def trained(v): return state_of(fit(learner(mlp(), x, y, hypers={arg: v}, opt_func=opt)))
    want = trained(0.25)
    for v in twins(0.25): assert trained(v)==want


# A fit and a schedule bring numbers too

class Stop(Callback):
    run_valid,order = False,50
    def __init__(self, n): self.n = n
    def before_batch(self):
        if self.train_iter==self.n: raise CancelFitException

RATES = [-1.,nan,inf,-inf,'a',[],torch.tensor(nan),[0.1,0.1],slice(-1.,0.1),slice(0.1,nan)]

@pytest.mark.parametrize('lr', RATES, ids=str)
def test_a_fit_with_a_wrong_rate_moves_nothing(lr):
    x,y = data(12)
    learn = fit(learner(mlp(), x, y))
    before = state_of(learn)
    with pytest.raises((ValueError,TypeError), match='lr'): fit(learn, lr=lr)
    assert state_of(learn)==before
    with pytest.raises((ValueError,TypeError), match='lr'): learn.opt.set_hyper('lr', lr)
    assert state_of(learn)==before
    fit(learn, lr=0.01)


@pytest.mark.parametrize('arg,wrong', [('lr',-1.), ('mom',1.), ('sqr_mom',-0.1), ('eps',0.), ('wd',nan), ('hessian_power',2.)])
def test_a_schedule_that_leaves_the_range_is_named_before_the_step(arg, wrong):
    "At the third batch; parameters and averages are those after the second"
    x,y = data(24)
    learn,steps,right = learner(mlp(), x, y),iter(range(99)),dict(HYPERS)[arg]
    two = learner(mlp(), *data(24), cbs=[Stop(2)])
    for o in (learn,two):
        torch.manual_seed(3)
        o.create_opt()
    with pytest.raises(ValueError, match=f'{arg} must be'): fit(learn, cbs=ParamScheduler({arg: lambda pct: right if next(steps)<2 else wrong}))
    fit(two, cbs=ParamScheduler({arg: lambda pct: right}))
    assert state_of(learn)==state_of(two) and (learn.opt.n_steps,learn.opt.n_batches)==(2,0)
    assert all(p.grad is None for p in learn.model.parameters())


def test_wrong_arguments_of_a_fit_leave_the_learner_whole(tmp_path):
    "Of `lr_find` too: weights, averages, counts and callbacks are as they were"
    learn = fit(learner(mlp(), *data(24), path=tmp_path))
    def now():
        model,opt = state_of(learn)
        return model,opt['state'],opt['curvature'],sorted(str(type(o)) for o in learn.cbs)
    before = now()
    for name,call in (('lr',lambda: learn.fit_one_cycle(1, -0.1)), ('wd',lambda: learn.fit(1, wd=-1.)), ('lr',lambda: learn.fit_flat_cos(1, nan)),
        ('mom',lambda: learn.fit_one_cycle(1, moms=(2.,1.,2.))), ('lr',lambda: learn.lr_find(-1., show_plot=False))):
        with pytest.raises(ValueError, match=f'{name} must be'), learn.no_bar(), learn.no_logging(): call()
        assert now()==before
    fit(learn)
