"Conjugate gradients and what surrounds it, against dense solutions in float64"
import math, pytest, torch
from torch import nn
from adahessian_fastai.cg import *
from adahessian_fastai.hvp import flat, hessian_product, unflat
from adahessian_fastai.spectrum import dense_hessian, extreme_eigenvalues, hessian_times_gradient

DRIFT = 5e-6    # the recursively updated residual may differ from `b - A@x` by this much
EXACT = 1e-7    # one quadratic form computed in two orders, float64
SOLVED = 1e-10  # asked of a solve in float64; the solution is then good to SOLVED times the condition number

def problem(n, seed=0):
    "A random positive definite matrix, its condition far from 1, and a right-hand side"
    g = torch.Generator().manual_seed(seed)
    R = torch.rand(n, n, generator=g, dtype=torch.float64)-.5
    return R@R.T + 1e-3*torch.eye(n, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64)-.5

def scaled_problem(n=60, seed=0):
    "Columns and rows scaled over six decades: hard for CG, easy with a diagonal"
    A,b = problem(n, seed)
    s = torch.logspace(-3, 3, n, dtype=torch.float64)
    return s[:,None]*(A/n + torch.eye(n, dtype=torch.float64))*s, s*b

def jacobi(A): return lambda v: v/A.diagonal()

@pytest.mark.parametrize('n', [3,10,50])
@pytest.mark.parametrize('tol', [1e-3,1e-6])
@pytest.mark.parametrize('absolute', [False,True])
@pytest.mark.parametrize('precondition', [False,True])
def test_residual_reaches_the_tolerance(n, tol, absolute, precondition):
    A,b = problem(n)
    res = cg(lambda v: A@v, b, M=jacobi(A) if precondition else (lambda v: v), max_iter=10*n,
        tol=0. if absolute else tol, atol=tol if absolute else 0., eps=None)
    assert res.reason == 'tolerance'
    assert (A@res.x-b).norm() <= (tol if absolute else tol*b.norm()) + DRIFT

@pytest.mark.parametrize('precondition', [False,True])
@pytest.mark.parametrize('warm', [False,True])
def test_values_are_the_quadratic_model_at_the_kept_iterates(precondition, warm):
    A,b = problem(20)
    x0 = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if warm else None
    res = cg(lambda v: A@v, b, x0=x0, M=jacobi(A) if precondition else (lambda v: v), max_iter=40)
    assert len(res.iterates) > 5 and max(res.iterates) == res.n_iter
    for i,x in res.iterates.items(): assert abs(res.values[i] - (x@A@x/2 - b@x)) < EXACT
    assert all(a>=b for a,b in zip(res.values, res.values[1:]))

def test_identity_preconditioner_is_no_preconditioner():
    A,b = problem(10)
    plain,ident = cg(lambda v: A@v, b), cg(lambda v: A@v, b, M=lambda r: r.clone())
    assert torch.equal(plain.x, ident.x) and plain.values == ident.values

def test_exact_inverse_needs_one_iteration():
    A,b = problem(10)
    inv = torch.linalg.inv(A)
    res = cg(lambda v: A@v, b, M=lambda r: inv@r)
    assert res.n_iter == 1
    assert (res.x-inv@b).norm() < EXACT*b.norm()/1e-3   # condition number of the problem is about 1e3

def test_preconditioner_lowers_the_iterations_on_a_badly_scaled_problem():
    A,b = scaled_problem()
    plain = cg(lambda v: A@v, b, max_iter=2000, eps=None)
    precond = cg(lambda v: A@v, b, M=diag_preconditioner(A.diagonal(), exponent=1.), max_iter=2000, eps=None)
    assert precond.reason == 'tolerance' and precond.n_iter*5 < plain.n_iter

@pytest.mark.parametrize('every', [2,5])
def test_looking_less_often_never_stops_earlier_or_worse(every):
    A,b = problem(50)
    often,seldom = [cg(lambda v: A@v, b, max_iter=500, check_every=o) for o in (1,every)]
    assert often.reason == seldom.reason
    assert 0 <= seldom.n_iter-often.n_iter < every
    assert seldom.values[-1] <= often.values[-1]
    assert seldom.values[:len(often.values)] == often.values

@pytest.mark.parametrize('every', [1,4,7])
def test_negative_curvature_met_later_freezes_the_last_good_iterate(every):
    d = torch.linspace(-.05, 3, 30, dtype=torch.float64)
    b = torch.linspace(.01, 1, 30, dtype=torch.float64)
    res = cg(lambda v: d*v, b, check_every=every, eps=None)
    assert res.reason == 'negative curvature' and res.neg_curv and res.n_iter > 2
    assert abs(res.values[-1] - (res.x@(d*res.x)/2 - b@res.x)) < EXACT
    assert res.n_iter == cg(lambda v: d*v, b, check_every=1, eps=None).n_iter

def test_abs_goes_on_where_the_curvature_is_negative():
    d = torch.tensor([2.,-3.,1.], dtype=torch.float64)
    res = cg(lambda v: d*v, torch.ones(3, dtype=torch.float64), neg_curv='abs', max_iter=3)
    assert res.neg_curv and res.n_iter == 3 and res.values[-1] < res.values[0]

@pytest.mark.parametrize('every', [1,4])
@pytest.mark.parametrize('bad', [1,3,6])
def test_a_product_that_breaks_down_leaves_a_finite_iterate(bad, every):
    A,b = problem(30)
    calls = []
    def broken(v):
        calls.append(1)
        return A@v*(math.nan if len(calls)>=bad else 1.)
    res = cg(broken, b, check_every=every, eps=None)
    assert res.reason == 'divergence' and res.n_iter == bad-1 and res.x.isfinite().all()
    assert torch.equal(res.x, cg(lambda v: A@v, b, max_iter=bad-1, eps=None).x if bad>1 else torch.zeros_like(b))

@pytest.mark.parametrize('every', [1,6])
def test_exact_convergence_between_two_looks_is_no_negative_curvature(every):
    d = torch.tensor([1.,1.,4.])
    res = cg(lambda v: d*v, torch.tensor([1.,2.,8.]), check_every=every, max_iter=12, tol=1e-6)
    assert res.reason == 'tolerance' and torch.allclose(res.x, torch.tensor([1.,2.,2.]))

def test_zero_right_hand_side_and_a_solution_as_the_start_cost_no_iteration():
    A,b = problem(10)
    assert cg(lambda v: A@v, torch.zeros_like(b)).n_iter == 0
    x = torch.linalg.solve(A, b)
    res = cg(lambda v: A@v, b, x0=x)
    assert res.n_iter == 0 and torch.equal(res.x, x)

def test_martens_rule_has_the_factor_k():
    eps,k = 5e-4,10
    ms = lambda progress: [-(1+progress/k*i) for i in range(12)]
    per_k = lambda m: (m[-1]-m[-1-k])/m[-1]
    slow,fast = ms(.5*k*eps),ms(2*k*eps)
    assert per_k(slow) > eps and martens_stop(slow, eps)      # a rule without the factor would go on
    assert not martens_stop(fast, eps)
    assert not martens_stop(slow[:11], eps)                   # i > k is required
    assert not martens_stop([-m for m in slow], eps)          # and a model below zero

def test_looking_back_grows_with_the_run():
    m = [-1.-1e-3*min(i, 291) for i in range(300)]            # stood still for 8 iterations, looks back over 30
    assert not martens_stop(m, eps=5e-4)
    assert martens_stop(m, eps=5e-4, k_share=0., k_min=7)

def test_grid_is_that_of_the_paper():
    assert grid_iterations(250) == [0,1,2,3,4,6,8,10,13,17,23,30,39,51,66,86,112,146,190,247]
    assert grid_iterations(7, base=2.) == [0,1,3,7]
    with pytest.raises(ValueError, match='base'): grid_iterations(10, base=1.)

def test_only_the_latest_iterates_are_kept_and_they_are_copies():
    A,b = problem(50)
    full,few = cg(lambda v: A@v, b, max_iter=60, eps=None), cg(lambda v: A@v, b, max_iter=60, eps=None, keep=4)
    assert len(few.iterates) <= 5 and list(few.iterates) == list(full.iterates)[-len(few.iterates):]
    for i,x in few.iterates.items(): assert torch.equal(x, full.iterates[i])
    assert list(cg(lambda v: A@v, b, max_iter=9, grid=None).iterates) == [9]

def test_the_host_looks_only_every_few_iterations():
    A,b = problem(50)
    seen = []
    cg(lambda v: A@v, b, max_iter=40, tol=0., eps=None, check_every=5, progress=lambda i,m,r: seen.append(i))
    assert seen == [0,5,10,15,20,25,30,35]

def test_backtracking_walks_back_while_the_function_falls():
    steps = [2,1,None,2.7,2.4,None,None,7.3]
    f,kept = (lambda i: steps[i]+10), [i for i,o in enumerate(steps) if o is not None]
    assert backtrack(f, kept) == (4, 12.4)
    assert backtrack(f, kept, exhaustive=True) == (1, 11)
    assert backtrack(lambda i: 5., kept, exhaustive=True)[0] == 0                  # first of equals
    assert backtrack(lambda i: math.nan if i>3 else steps[i]+10, kept) == (1, 11)  # values that are not numbers are passed over
    calls = []
    backtrack(lambda i: calls.append(i) or steps[i], kept)
    assert calls == [7,4,3]

def test_line_search_accepts_the_first_sufficient_decrease():
    tried = []
    def f(a):
        tried.append(a)
        return (a-.1)**2
    a,f_a = armijo(f, .01, -.2, alpha=1., beta=.5)
    assert a == .125 and f_a == f(.125) and tried[:4] == [1., .5, .25, .125]
    assert armijo(lambda a: math.nan, 1., -1.) == (0., 1.)
    tried.clear()
    armijo(lambda a: tried.append(a) or 2., 1., -1., max_iter=7)
    assert len(tried) == 7
    assert armijo(lambda a: -.5*a, 0., -1., c=.6)[0] == 0. and armijo(lambda a: -.5*a, 0., -1., c=.4)[0] == 1.

def test_damping_rule():
    assert lm_damping(1., .2) == 1.5 and lm_damping(1., .8) == 2/3 and lm_damping(1., .5) == 1.
    assert lm_damping(1., math.nan) == 1.5 and lm_damping(1., -math.inf) == 1.5 and lm_damping(1., math.inf) == 1.5
    assert lm_damping(1., .2, lower=.1) == 1. and lm_damping(1., .2, up=4.) == 4. and lm_damping(1., .8, down=.5) == .5
    assert lm_damping(1., .8, upper=.9) == 1. and lm_damping(1., .8, bounds=(.9,2.)) == .9 and lm_damping(1.9, 0., bounds=(.9,2.)) == 2.
    assert reduction_ratio(3., 2., -2.) == .5 and math.isnan(reduction_ratio(3., 2., 0.))

def test_flat_product_equals_the_matrix_plus_the_damping_of_each_tensor():
    A,b = problem(7)
    like = [torch.zeros(2,2), torch.zeros(3)]
    product = lambda vs: unflat(A@flat(vs), [o.double() for o in like])
    lams = torch.tensor([.1]*4+[2.]*3, dtype=torch.float64)
    got = flat_product(product, [o.double() for o in like], damping=[.1,2.])(b)
    assert torch.allclose(got, A@b + lams*b, rtol=0, atol=EXACT)
    v = torch.arange(7.)
    assert all(torch.equal(a, c) for a,c in zip(unflat(v, like), (v[:4].view(2,2), v[4:])))

def test_preconditioner_inverts_the_power_of_the_damped_diagonal():
    d,v = torch.rand(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    assert torch.allclose((d+.3)**.75*diag_preconditioner(d, .3)(v), v)
    assert not torch.allclose(diag_preconditioner(d, .3, exponent=1.)(v), diag_preconditioner(d, .3)(v))

@pytest.mark.parametrize('every', [1,5])
def test_a_system_solved_between_two_looks_has_no_negative_curvature(every):
    "The steps after the last one have a direction of zeros"
    res = cg(lambda v: 2*v, torch.ones(3), max_iter=50, check_every=every, neg_curv='abs')
    assert res.x.tolist()==[0.5]*3 and not res.neg_curv
    assert cg(lambda v: torch.stack([v[0],0*v[1]]), torch.ones(2), max_iter=2, check_every=every, neg_curv='abs').neg_curv

@pytest.mark.parametrize('kwargs', [dict(neg_curv='x'), dict(max_iter=0), dict(max_iter=True), dict(max_iter=1.5), dict(max_iter=math.nan), dict(tol=-1),
    dict(tol=math.nan), dict(tol='x'), dict(atol=-1.), dict(atol=math.inf), dict(eps=-1.), dict(keep=-1), dict(check_every=0), dict(check_every=True),
    dict(grid=.5), dict(grid=math.nan), dict(x0=torch.ones(3))])
def test_wrong_settings_are_named(kwargs):
    with pytest.raises(ValueError, match=f'^{list(kwargs)[0]} must be '): cg(lambda v: v, torch.ones(2), **kwargs)

def test_no_limit_lets_rounding_have_its_iterations():
    "Twelve unknowns in single precision: the default cap of twelve is too low, and without one the tolerance is met"
    d,b = torch.logspace(0, 4, 12),torch.ones(12)
    capped,free = (cg(lambda v: d*v, b, max_iter=m, tol=1e-6, eps=None) for m in (None,math.inf))
    assert (capped.reason,capped.n_iter)==('max_iter',12) and free.reason=='tolerance' and free.n_iter>12
    assert (d*free.x-b).norm() <= 1e-5*b.norm()
    assert list(free.iterates)[:6]==[0,1,2,3,4,6] and list(free.iterates)[-1]==free.n_iter

@pytest.mark.parametrize('every', [1,5])
@pytest.mark.parametrize('d', [[0.,0.],[1.,0.]])
def test_zero_curvature_ends_a_run_without_limit(d, every):
    "Nothing moves any more after it, so no tolerance would ever be met"
    n_products,d = 0,torch.tensor(d)
    def product(v):
        nonlocal n_products
        n_products += 1
        assert n_products<100
        return d*v
    res = cg(product, torch.ones(2), max_iter=math.inf, eps=None, neg_curv='abs', check_every=every)
    assert res.reason=='negative curvature' and res.neg_curv and res.x.isfinite().all()

def test_a_system_without_unknowns():
    res = cg(lambda v: v, torch.zeros(0))
    assert res.x.shape==(0,) and res.reason=='tolerance' and res.n_iter==0
    assert solve(lambda v: v, [torch.zeros(0)]).x[0].shape==(0,)

WRONG_RULES = [('bounds', (.75,.25)), ('bounds', (.25,)), ('bounds', .25), ('bounds', (math.nan,.75)), ('bounds', ('a','b')),
    ('factors', (2/3,3/2)), ('factors', (1.5,0.)), ('factors', (1.5,-1.)), ('factors', (1.5,2.)), ('factors', (math.inf,.5)),
    ('factors', None), ('limits', (1.,0.)), ('limits', (-1.,1.)), ('limits', (0.,math.inf)), ('limits', (True,2.))]

@pytest.mark.parametrize('name,value', WRONG_RULES)
def test_a_damping_rule_without_sense_is_named(name, value):
    with pytest.raises(ValueError, match=f'^{name} must be .*got {name}='): Damping(**{name: value})
    Damping()

@pytest.mark.parametrize('kwargs', [dict(upper=.2), dict(lower=math.nan), dict(up=.5), dict(down=0.), dict(down=2.), dict(bounds=(2.,1.)), dict(bounds=1.),
    dict(damping=-1.), dict(damping=math.nan)], ids=str)
def test_the_rule_checks_what_it_is_given(kwargs):
    name, = kwargs
    with pytest.raises(ValueError, match=f'^{name} must be .*got {name}='): lm_damping(**{'damping': 1., 'rho': .5, **kwargs})

@pytest.mark.parametrize('kwargs', [dict(alpha=0.), dict(alpha=math.inf), dict(c=math.nan), dict(beta=math.nan),
    dict(max_iter=0), dict(max_iter=True)])
def test_a_line_search_without_sense_is_named(kwargs):
    with pytest.raises(ValueError, match=list(kwargs)[0]): armijo(lambda a: a, 0., -1., **kwargs)

@pytest.mark.parametrize('kwargs', [dict(damping=math.nan), dict(damping=math.inf), dict(damping='1'), dict(tol=-1.), dict(max_iter=0)])
def test_arguments_of_solve_are_named(kwargs):
    with pytest.raises(ValueError, match=list(kwargs)[0]): solve(lambda v: v, [torch.ones(2)], **kwargs)

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    model,X,Y = nn.Sequential(nn.Linear(4,6), nn.Tanh(), nn.Linear(6,3)).double(),torch.randn(30,4).double(),torch.randint(0,3,(30,))
    loss,params = (lambda: nn.functional.cross_entropy(model(X), Y)),list(model.parameters())
    return loss,params,dense_hessian(loss, params)

def test_newton_step_of_a_network(net):
    loss,params,H = net
    _,g = hessian_times_gradient(loss, params)
    product = hessian_product(loss, params)
    lam = -extreme_eigenvalues(product, params, which='smallest', generator=torch.Generator().manual_seed(0)).values[0].item()
    assert lam > 0
    sol = solve(product, g, damping=lam+.1, tol=SOLVED, max_iter=500)
    exact = torch.linalg.solve(H+(lam+.1)*torch.eye(len(H)), flat(g))
    assert torch.allclose(flat(sol.x), exact, atol=1e-7) and sol.reason=='tolerance' and sol.residual <= 10*SOLVED
    assert [o.shape for o in sol.x]==[p.shape for p in params]

def test_negative_curvature_is_refused(net):
    loss,params,_ = net
    _,g = hessian_times_gradient(loss, params)
    with pytest.raises(ValueError, match='not positive definite, got damping=0.0'): solve(hessian_product(loss, params), g, max_iter=500)

def test_count_residual_and_cap():
    A,count = torch.diag(torch.logspace(-3, 0, 40, dtype=torch.double)),[0]
    def product(v):
        count[0] += 1
        return [A@v[0]]
    b = [torch.ones(40, dtype=torch.double)]
    sol = solve(product, b, max_iter=5)
    assert sol.reason=='max_iter' and sol.n_products==count[0]
    assert abs(sol.residual-(A@sol.x[0]-b[0]).norm()/b[0].norm()) < 1e-12 and sol.residual > 1e-3

def test_zero_right_hand_side():
    sol = solve(lambda v: v, [torch.zeros(3)])
    assert torch.equal(sol.x[0], torch.zeros(3)) and sol.residual==0

@pytest.mark.parametrize('seed', range(6))
def test_values_are_the_model_where_abs_goes_up_the_hill(seed):
    "Steps along negative curvature lead to no minimum, so the residual is not orthogonal to what comes after"
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
    A = Q@torch.diag(torch.linspace(-2, 3, 8, dtype=torch.float64))@Q.T
    b = torch.randn(8, generator=g, dtype=torch.float64)
    res = cg(lambda v: A@v, b, neg_curv='abs', max_iter=6, eps=None, tol=0., grid=1.01)
    assert res.neg_curv and [*res.iterates]==[*range(7)]
    for i,x in res.iterates.items(): assert res.values[i]==pytest.approx((x@A@x/2 - b@x).item(), rel=1e-9, abs=1e-9)
    x,n = res.iterates[6],CG(neg_curv='abs', max_iter=6, martens_eps=0)
    assert res.ratio(0., (x@A@x/2 - b@x).item())==pytest.approx(1)

@pytest.mark.parametrize('inf', [math.inf,float('inf'),torch.tensor(math.inf).item()])
def test_any_infinity_is_no_limit(inf): assert cg(lambda v: 2*v, torch.ones(3), max_iter=inf).reason=='tolerance'

@pytest.mark.parametrize('every', [1,6])
def test_the_iterate_stays_where_negative_curvature_was_met(every):
    "The second direction has negative curvature, and the one that would follow has not"
    d,b = torch.tensor([5.,2.,-1.]),torch.tensor([3.,2.,3.])
    res = cg(lambda v: d*v, b, check_every=every, max_iter=6)
    assert res.reason=='negative curvature' and torch.equal(res.x, b/2) and res.values==[0.,-5.5] and list(res.iterates)==[0,1]

@pytest.mark.parametrize('every', [1,5])
@pytest.mark.parametrize('neg_curv,reason', [('stop','negative curvature'), ('abs','max_iter')])
def test_without_curvature_the_step_is_the_right_hand_side(every, neg_curv, reason):
    b = torch.tensor([1.,2.])
    res = cg(lambda v: 0*v, b, neg_curv=neg_curv, check_every=every, max_iter=1)
    assert (res.reason,res.neg_curv,res.n_iter,res.values)==(reason,True,1,[0.,-5.]) and torch.equal(res.x, b)

@pytest.mark.parametrize('max_iter', [1,3,5,7])
def test_no_look_goes_beyond_the_last_iteration(max_iter):
    A,b = problem(20)
    res = cg(lambda v: A@v, b, max_iter=max_iter, check_every=5, eps=None)
    assert (res.reason,res.n_iter)==('max_iter',max_iter)
    assert torch.equal(res.x, cg(lambda v: A@v, b, max_iter=max_iter, check_every=1, eps=None).x)

def test_flat_product_keeps_the_type_and_wants_a_damping_for_each_tensor():
    like = [torch.ones(1), torch.ones(2)]
    assert flat_product(lambda v: [o.double() for o in v], like, damping=1.)(torch.ones(3)).dtype==torch.float
    with pytest.raises(ValueError, match='shorter'): flat_product(lambda v: v, like, damping=[1.])(torch.ones(3))

def test_a_diagonal_with_zeros_and_no_damping_is_finite():
    assert diag_preconditioner(torch.tensor([0.,16.]))(torch.tensor([0.,8.])).tolist()==[0.,1.]

def test_an_exhaustive_search_goes_beyond_a_hill():
    fs = {1: 3., 2: 4., 3: 2.}
    assert backtrack(fs.get, fs, exhaustive=True)==(3,2.) and backtrack({1: 1., 2: 4., 3: 2.}.get, fs)==(3,2.)

def test_a_length_that_lowers_by_just_as_much_as_asked_will_do(): assert armijo(lambda a: 1-a/2, 1., -1., c=.5)==(1.,.5)

def test_the_first_iterate_is_a_step_where_the_start_was_warm():
    sol = CGResult({0: torch.ones(1), 2: torch.ones(1)}, [0.,-1.,-2.], 'tolerance', False)
    assert CG().best({0: 1., 2: 3.}.get, sol, cold=False)==(0,1.) and CG().best({0: 1., 2: 3.}.get, sol, cold=True)==(2,3.)

def test_damping_stays_within_its_limits_and_none_stays_none():
    assert Damping().adapted(0., 0.)==0. and Damping(limits=(.9,1.2)).adapted(1., math.nan)==1.2

def test_cells_are_recurrent_layers():
    net = nn.Sequential(nn.GRUCell(2, 3), nn.Linear(3, 1), nn.LSTM(1, 2))
    assert recurrent_layers(net)==[net[0],net[2]]

def test_martens_looks_back_by_a_rounded_up_share_and_equality_goes_on():
    assert not martens_stop([-1.,-1.,-2.,-2.], .1, k_min=1, k_share=.5) and not martens_stop([-1.,-1.,-2.], .5, k_min=1, k_share=0.)

def test_a_huge_limit_is_none(): assert grid_iterations(10**30)==grid_iterations(math.inf)

def test_the_start_stays_as_it_is():
    A,b = problem(5)
    x0 = b.clone()
    assert not torch.equal(cg(lambda v: A@v, b, x0=x0).x, x0) and torch.equal(x0, b)

@pytest.mark.parametrize('tol,n', [(.7,1), (.4,2)])
def test_the_larger_tolerance_counts(tol, n):
    "The first residual is 0.6 of the right-hand side"
    d,b = torch.tensor([1.,4.]),torch.ones(2)
    assert cg(lambda v: d*v, b, tol=tol, atol=.5).n_iter==n==cg(lambda v: d*v, b, tol=.2, atol=tol*2**.5).n_iter

@pytest.mark.parametrize('keep,n,kept', [(3,6,[3,4,6]), (2,5,[3,4,5]), (None,5,[0,1,2,3,4,5])])
def test_the_latest_iterates_are_kept(keep, n, kept):
    A,b = problem(20)
    assert list(cg(lambda v: A@v, b, max_iter=n, keep=keep, eps=None).iterates)==kept

def test_a_right_hand_side_that_is_not_finite_costs_no_iteration():
    res = cg(lambda v: v, torch.tensor([math.nan,1.]))
    assert (res.reason,res.n_iter,res.x.tolist())==('divergence',0,[0.,0.])

def test_armijo_by_hand():
    assert armijo(lambda a: .001*a, 0., slope=1.)==(0.,0.)
    assert armijo(lambda a: 1-.1*a if a<1 else 2., 1., slope=-1., beta=.5, c=.08)==(.5,.95)

def test_nothing_promised_and_ratios_at_the_bounds():
    assert math.isnan(reduction_ratio(1., .5, m1=1.)) and lm_damping(1., 1/4)==1.==lm_damping(1., 3/4)

def test_settings_of_cg_arrive():
    A,b = problem(20)
    def solved(**kwargs):
        looks = []
        return CG(max_iter=6, martens_eps=None, **kwargs).solve(lambda v: [A@v[0]], b, [b], progress=lambda i, *_: looks.append(i))[0],looks
    assert list(solved(keep_iterates=3)[0].iterates)==[3,4,6] and list(solved(backtracking=False)[0].iterates)==[6]
    assert solved()[1]==[0,1,2,3,4,5] and solved(check_every=4)[1]==[0,4]
    with pytest.raises(ValueError, match='x0_decay must be a number >= 0 and <= 1'): CG(x0_decay=1.5)

def test_a_way_through_a_saddle_where_the_first_direction_is_one():
    d = torch.tensor([1.,-2.])
    sol,saddle = CG().solve(lambda v: [d*v[0]], torch.ones(2), [torch.ones(2)])
    assert sol.n_iter==1 and torch.allclose(saddle, 1/d)


def test_a_product_of_other_shapes_is_named():
    "A vector of one entry for all parameters was added to each of theirs"
    ps = [torch.zeros(2),torch.zeros(1)]
    for wrong in (lambda v: v[:1], lambda v: [o[:1] for o in v], lambda v: [o.reshape(-1,1) for o in v], lambda v: v[0]):
        with pytest.raises(ValueError, match='the product must be tensors of the shapes'): flat_product(wrong, ps)(torch.ones(3))
    assert flat_product(lambda v: [2*o for o in v], ps, damping=1.)(torch.ones(3)).tolist()==[3.]*3

def test_the_way_through_a_saddle_ends_after_two_iterations():
    "The best point of the span of Ab and A³b, which is not yet the solution"
    d = torch.tensor([1.,-2.,4.])
    K = torch.stack([d, d**3], 1)
    want = K@torch.linalg.solve(K.T@(d[:,None]**2*K), K.T@d)
    assert torch.allclose(through_saddle(lambda v: d*v, torch.ones(3)), want, rtol=1e-4) and not torch.allclose(want, 1/d, rtol=.1)

def test_no_limit_and_what_to_do_at_negative_curvature_arrive():
    "Twelve unknowns in single precision take more than twelve iterations; along the right-hand side the curvature is -1"
    def reason(d, *args, **kwargs): return CG(*args, tol=1e-5, martens_eps=0, **kwargs).solve(lambda v: [d*v[0]], torch.ones_like(d), [d])[0].reason
    steep,bent = torch.logspace(0, 4, 12),torch.tensor([1.,-2.])
    assert (reason(steep, 12),reason(steep, None))==('max_iter','tolerance')
    assert (reason(bent),reason(bent, 1, neg_curv='abs'))==('negative curvature','max_iter')

def test_a_list_of_modules_is_several():
    net = nn.ModuleList([nn.Linear(1, 1), nn.Linear(2, 2)])
    for hidden,want in ((lambda m: m, [*net]), (lambda m: m[1], [net[1]])): assert Damping(structural=.1, hidden=hidden).states_of(net)==want

@pytest.mark.parametrize('every', [1,5])
def test_an_infinite_negative_curvature_moves_nothing_and_the_model_stays_zero(every):
    res = cg(lambda v: v*-math.inf, torch.ones(2), check_every=every, max_iter=9)
    assert (res.values,res.reason,res.x.tolist())==([0.,0.],'negative curvature',[0.,0.])
