"The spectrum against dense matrices in float64, and against every kind of matrix that lures Lanczos into a lucky stop"
import math

import pytest,torch
from scipy.linalg import eigvalsh
from torch import nn
from torch.nn.attention import SDPBackend,sdpa_kernel

from adahessian_fastai.hutchinson import hutchinson_trace
from adahessian_fastai.hvp import gradient,graph_product,hessian_product
from adahessian_fastai.spectrum import *
from adahessian_fastai.hvp import flat,unflat

EXACT = 1e-9   # float64 products of networks with a few hundred parameters, relative to entries of order 1
TOL = 1e-4     # the default tolerance of `extreme_eigenvalues`, relative to the largest absolute eigenvalue

def gen(seed=0): return torch.Generator().manual_seed(seed)

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.enc,self.out = nn.Embedding(5,4),nn.TransformerEncoderLayer(4, 2, 6, dropout=0., batch_first=True),nn.Linear(4,3)
    def forward(self, x): return self.out(self.enc(self.emb(x)).mean(1))

def problem(name):
    "Loss and parameters of one small network in double precision"
    torch.manual_seed(1)
    if name=='mlp': model,x = nn.Sequential(nn.Linear(6,10), nn.Tanh(), nn.Linear(10,3)),torch.randn(20,6)
    if name=='conv':
        model = nn.Sequential(nn.Conv2d(1,3,3), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12,3))
        x = torch.randn(12,1,6,6)
    if name=='attention': model,x = Attention(),torch.randint(0,5,(8,5))
    model,x,y = model.double(),x.double() if x.is_floating_point() else x,torch.randint(0,3,(len(x),))
    def loss():
        with sdpa_kernel(SDPBackend.MATH): return nn.functional.cross_entropy(model(x), y)
    return loss,list(model.parameters())

def literal_hessian(loss, params):
    "The textbook double loop: each entry of the gradient differentiated once more"
    gs = torch.autograd.grad(loss(), params, create_graph=True)
    rows = []
    for g in torch.cat([g.reshape(-1) for g in gs]):
        hs = torch.autograd.grad(g, params, retain_graph=True, allow_unused=True) if g.requires_grad else [None]*len(params)
        rows.append(torch.cat([torch.zeros_like(p).reshape(-1) if h is None else h.reshape(-1) for h,p in zip(hs, params)]))
    return torch.stack(rows)

@pytest.fixture(scope='module', params=['mlp', 'conv', 'attention'])
def net(request):
    loss,params = problem(request.param)
    H = literal_hessian(loss, params)
    return loss,params,H,torch.from_numpy(eigvalsh(H)).flip(0)

def one_graph(loss, params):
    "Products from one graph; `hessian_product` would evaluate the loss for each"
    return graph_product(gradient(loss(), params, create_graph=True), params)

def symmetric(eigenvalues, seed=0):
    "A random symmetric matrix with the given eigenvalues, as product, parameters and values in descending order"
    lam = torch.tensor(eigenvalues, dtype=torch.double)
    Z = torch.linalg.qr(torch.randn(len(lam), len(lam), dtype=torch.double, generator=gen(seed)))[0]
    A = Z@torch.diag(lam)@Z.T
    A = (A+A.T)/2
    return (lambda v: [A@v[0]]),[torch.zeros(len(lam), dtype=torch.double)],lam.sort(descending=True).values

def wanted(lam, k, which):
    n = len(lam)
    hi,lo = set(range(min(k,n))),set(range(max(n-k,0), n))
    return lam[sorted(dict(largest=hi, smallest=lo, both=hi|lo)[which])]

# ---- the matrix written out -----------------------------------------------------------------------------------------

def test_dense_hessian_is_the_literal_one(net):
    loss,params,H,_ = net
    for chunk in (1, 7, 10_000): assert torch.allclose(dense_hessian(loss, params, chunk_size=chunk), H, atol=EXACT)

def test_exact_diag(net):
    loss,params,H,_ = net
    product = one_graph(loss, params)
    for chunk in (1, 13):
        d = exact_diag(product, params, chunk_size=chunk, progress=False)
        assert [o.shape for o in d]==[p.shape for p in params]
        assert torch.allclose(flat(d), H.diag(), atol=EXACT)

def test_progress_bar_is_shown_or_silent(capsys):
    product,params,_ = symmetric([1.,2.,3.])
    exact_diag(product, params, progress=False)
    assert capsys.readouterr().out==''
    exact_diag(product, params)
    assert '3/3' in capsys.readouterr().out

def test_flat_keeps_precision_and_promotes_half():
    ps = [torch.zeros(2,3, dtype=torch.half), torch.ones(2, dtype=torch.half)]
    assert flat(ps).dtype==torch.float32 and unflat(flat(ps), ps)[0].dtype==torch.half
    assert flat([o.double() for o in ps]).dtype==torch.float64

@pytest.mark.parametrize('n', [0, -1, True, 1.5, math.nan, None, '3'])
def test_bad_arguments_name_themselves(n):
    product,params,_ = symmetric([1.,2.])
    calls = [(dense_matrix, 'chunk_size'), (exact_diag, 'chunk_size'), (extreme_eigenvalues, 'k'), (extreme_eigenvalues, 'max_iter'),
        (hutch_plus_plus, 'n_products'), (spectral_density, 'n_steps'), (spectral_density, 'n_samples')]
    for f,name in calls:
        with pytest.raises(ValueError, match=f'{name} must be a whole number'): f(product, params, **{name: n})
    with pytest.raises(ValueError, match='n_samples'): confidence_interval(0., 1., n)

@pytest.mark.parametrize('x', [-1., math.nan, math.inf, None, 'x'])
def test_bad_tolerances_name_themselves(x):
    product,params,_ = symmetric([1.,2.])
    with pytest.raises(ValueError, match='tol'): extreme_eigenvalues(product, params, tol=x)
    with pytest.raises(ValueError, match='rtol'): check_product(product, params, rtol=x)
    for level in (0., 1., 95, math.nan):
        with pytest.raises(ValueError, match='level'): confidence_interval(0., 1., 9, level=level)
    for sigma in (0., -1., math.nan):
        with pytest.raises(ValueError, match='sigma'): spectral_density(product, params)(torch.zeros(1), sigma)
        with pytest.raises(ValueError, match='sigma'): spectral_density(product, params).plot(sigma=sigma)

def test_no_parameters_is_an_error_that_says_so():
    for f in (extreme_eigenvalues, spectral_density, hutch_plus_plus, dense_matrix):
        with pytest.raises(ValueError, match='at least one tensor'): f(lambda v: v, [])

# ---- extreme eigenvalues --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('which', ['largest', 'smallest', 'both'])
def test_eigenvalues_of_networks(net, which):
    loss,params,H,full = net
    eig = extreme_eigenvalues(one_graph(loss, params), params, k=3, which=which, max_iter=300, vectors=True, generator=gen())
    truth = wanted(full, 3, which)
    assert eig.converged and ((eig.values-truth).abs() <= eig.bounds).all()
    assert eig.bounds.max() <= 2*TOL*full.abs().max()
    for lam,b,v in zip(eig.values, eig.bounds, map(flat, eig.vectors)):
        assert abs(v.norm()-1) < EXACT
        assert (H@v-lam*v).norm() <= b+EXACT

def test_eigenvalues_of_one_layer(net):
    loss,params,H,_ = net
    n = params[-1].numel()+params[-2].numel()
    truth = eigvalsh(H[-n:,-n:])
    eig = extreme_eigenvalues(hessian_product(loss, params[-2:]), params[-2:], which='both', generator=gen())
    of_layer = block_product(hessian_product(loss, params), params, params[-2:])
    block = extreme_eigenvalues(of_layer, params[-2:], which='both', generator=gen())
    for e in (eig, block): assert abs(e.values[0]-truth[-1]) <= e.bounds[0] and abs(e.values[1]-truth[0]) <= e.bounds[1]

spectra = dict(tiny_next_to_one=[1., 1e-6, 1e-6/2] + [0.]*30, tiny_negative=[1., -1e-6] + [1e-9]*40, repeated_everywhere=[1.]*30,
    repeated_top=[2.]*5 + [1.]*20 + [.1]*20, all_zero=[0.]*12, all_negative=[-float(i) for i in range(1,25)],
    plus_minus=[3., -3.] + [.5]*10 + [-.5]*10, clustered_top=[1., 1-1e-3, 1-2e-3] + [i/50 for i in range(45)],
    long_bulk=[10., 9.9] + [math.cos(i) for i in range(100)], one_parameter=[7.], one_negative_parameter=[-7.], two=[1., 1.])

def held(eig, lam, truth, tol=TOL):
    "An eigenvalue lies within each bound, and it is the right one as far as `tol` tells eigenvalues apart"
    near = (eig.values[:,None]-lam).abs().min(1).values <= eig.bounds
    right = (eig.values-truth).abs() <= eig.bounds.clamp_min(tol*lam.abs().max())
    return len(eig.values)==len(truth) and bool(near.all() and right.all())

@pytest.mark.parametrize('tol', [TOL, 1e-11])
@pytest.mark.parametrize('name', spectra)
def test_bounds_hold_for_any_spectrum(name, tol):
    "The values at the wanted ends are found with their multiplicity"
    for seed in range(4):
        product,params,lam = symmetric(spectra[name], seed)
        for k in (1, 3):
            for which in ('largest', 'smallest', 'both'):
                eig = extreme_eigenvalues(product, params, k, which, tol, max_iter=200, generator=gen(seed+100))
                assert eig.converged and held(eig, lam, wanted(lam, k, which), tol), (seed, k, which, eig, lam)

def test_bounds_hold_for_random_matrices():
    for seed in range(60):
        g = gen(seed)
        n = int(torch.randint(1, 40, (), generator=g))
        lam = torch.randn(n, generator=g, dtype=torch.double)*10**(-6*torch.rand(n, generator=g, dtype=torch.double))
        product,params,lam = symmetric(lam.tolist(), seed)
        k = 1+seed%5
        eig = extreme_eigenvalues(product, params, k, 'both', generator=g)
        assert held(eig, lam, wanted(lam, k, 'both')), (seed, n, k)

def test_a_tiny_eigenvalue_is_not_regularised():
    "1e-6 beside 1 comes out as 1e-6 with the accuracy asked for, and its vector has unit length"
    product,params,lam = symmetric([1., 1e-6] + [0.]*20)
    eig = extreme_eigenvalues(product, params, k=2, tol=1e-12, vectors=True, generator=gen())
    assert abs(eig.values[1]-1e-6) < 1e-12
    assert all(abs(flat(v).norm()-1) < 1e-12 for v in eig.vectors)

def test_start_vector_that_cannot_see_the_top():
    "A start vector inside an invariant subspace is no reason to stop with what is in there"
    d = torch.linspace(1, 2, 30, dtype=torch.double)
    d[0] = 50.
    params,blind = [torch.zeros(30, dtype=torch.double)],[True]
    def product(v): return [d*v[0]]
    import adahessian_fastai.spectrum as spectrum
    original = spectrum._direction
    def direction(params, probe, generator, basis):
        w = original(params, probe, generator, basis)
        if not blind: return w
        blind.pop()
        w[0] = 0
        return w/w.norm()
    spectrum._direction = direction
    try:
        assert extreme_eigenvalues(product, params, check=False, generator=gen()).values[0] < 3
        blind.append(True)
        eig = extreme_eigenvalues(product, params, generator=gen())
    finally: spectrum._direction = original
    assert abs(eig.values[0]-50) <= eig.bounds[0]

def test_too_few_steps_are_reported():
    product,params,lam = symmetric(torch.linspace(0, 1, 300).tolist())
    eig = extreme_eigenvalues(product, params, k=2, max_iter=8, generator=gen())
    assert not eig.converged and ((eig.values[:1]-lam[:1]).abs() <= eig.bounds[:1]).all()
    assert not extreme_eigenvalues(product, params, max_iter=2, generator=gen()).converged

def test_bounds_see_a_product_that_changes():
    g,d = gen(3),torch.linspace(-1, 1, 50, dtype=torch.double)
    product = lambda v: [d*v[0] + .1*torch.randn(50, dtype=torch.double, generator=g)*v[0]]
    eig = extreme_eigenvalues(product, [torch.zeros(50, dtype=torch.double)], check=False, generator=gen())
    assert eig.bounds[0] > 1e-3 and not eig.converged

def test_float32_bounds_hold():
    loss,params = problem('mlp')
    full = torch.from_numpy(eigvalsh(literal_hessian(loss, params)))
    product = lambda v: [h.float() for h in hessian_product(loss, params)([o.double() for o in v])]
    eig = extreme_eigenvalues(product, [p.float() for p in params], k=2, which='both', max_iter=150, generator=gen())
    assert eig.converged and ((eig.values-full[[-1,-2,1,0]]).abs() <= eig.bounds).all()

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.half])
def test_bounds_hold_in_half_precision(dtype):
    "Products are rounded to the type of the parameters, coarser than that of the vectors of Lanczos' method"
    for seed in range(30):
        A = torch.randn(20, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)
        A = (A+A.T)/2
        values,bounds = extreme_eigenvalues(lambda v: [A@v[0]], [torch.zeros(20, dtype=dtype)], generator=torch.Generator().manual_seed(seed))
        assert (torch.from_numpy(eigvalsh(A.double().numpy()))-values).abs().min()<=bounds and bounds<0.1*values

def test_seeded_and_alone_with_its_random_numbers():
    product,params,_ = symmetric([math.sin(i) for i in range(60)])
    before = torch.get_rng_state()
    a,b = (extreme_eigenvalues(product, params, which='both', generator=gen(5)) for _ in range(2))
    s,t = (spectral_density(product, params, n_steps=10, generator=gen(5)) for _ in range(2))
    assert torch.equal(a.values, b.values) and torch.equal(s.nodes, t.nodes) and torch.equal(s.weights, t.weights)
    assert hutch_plus_plus(product, params, generator=gen(5))==hutch_plus_plus(product, params, generator=gen(5))
    assert torch.equal(torch.get_rng_state(), before)

def test_products_are_counted():
    count,(product,params,_) = [0],symmetric([math.sin(i) for i in range(60)])
    def counted(v):
        count[0] += 1
        return product(v)
    assert extreme_eigenvalues(counted, params, k=2, which='both', generator=gen()).n_products==count[0]

def test_not_finite_is_an_error_of_its_own():
    with pytest.raises(FloatingPointError, match='not finite'): extreme_eigenvalues(lambda v: [v[0]*math.nan], [torch.zeros(5)])

# ---- trace and density ----------------------------------------------------------------------------------------------

def test_confidence_intervals_cover():
    "Of 200 intervals at 90% between 84% and 97% hold the truth: three standard deviations of such a count are 6.4%"
    product,params,lam = symmetric([math.sin(i) for i in range(40)])
    hits = 0
    for seed in range(200):
        lo,hi = confidence_interval(*hutchinson_trace(product, params, n_samples=8, generator=gen(seed)), 8, level=.9)
        hits += lo <= lam.sum() <= hi
    assert .836*200 <= hits <= .964*200

def test_hutch_plus_plus_is_unbiased_and_its_error_honest():
    product,params,lam = symmetric([1/(1+i)**2 for i in range(80)])
    runs = torch.tensor([hutch_plus_plus(product, params, 18, generator=gen(s)) for s in range(200)], dtype=torch.double)
    spread = runs[:,0].std()
    assert abs(runs[:,0].mean()-lam.sum()) < 4*spread/200**.5
    assert .7 < spread/(runs[:,1]**2).mean().sqrt() < 1.4

def test_a_confidence_interval_by_the_table():
    "0.95 quantile with 4 degrees of freedom: 2.13185"
    assert confidence_interval(10., 2., 5, level=.9)==pytest.approx((10-2*2.13185,10+2*2.13185), abs=1e-4)
    assert confidence_interval(1., 2., 1)==(-math.inf,math.inf)

def test_hutch_plus_plus_by_hand():
    "Two probes find 1 and 2, two others meet 3 and 4: the mean is 3.5, its standard error ½"
    d,probes,n = torch.tensor([1.,2.,3.,4.]),list(torch.eye(4).flip(0)),[]
    found = hutch_plus_plus(lambda v: n.append(1) or [d*v[0]], [torch.zeros(4)], 6, probe=lambda p, generator: probes.pop())
    assert found==pytest.approx((6.5,.5)) and len(n)==6

def test_density_has_the_moments_of_the_spectrum(net):
    loss,params,H,full = net
    n = len(full)
    dens = spectral_density(one_graph(loss, params), params, n_steps=25, n_samples=40, generator=gen())
    for power in (1, 2, 3):
        f = lambda x: x**power
        each = (dens.weights*f(dens.nodes)).sum(1)*40
        assert abs(dens.mean(f)-(full**power).mean()) < 4*each.std()/40**.5 + EXACT
    assert abs(dens.weights.sum()-1) < EXACT
    assert dens.nodes.max() <= full.max()+EXACT and dens.nodes.min() >= full.min()-EXACT

def test_quadrature_is_exact_for_its_own_start_vector():
    "One start vector, m steps: moments up to 2m-1 of that vector's spectral measure, and not the next"
    product,params,_ = symmetric([math.sin(i) for i in range(30)])
    A = dense_matrix(product, params)
    m,z = 4,None
    def probe(p, generator):
        nonlocal z
        z = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        return z
    dens = spectral_density(product, params, n_steps=m, n_samples=1, probe=probe, generator=gen())
    u = z/z.norm()
    moment = lambda k: u@torch.linalg.matrix_power(A, k)@u
    for k in range(2*m): assert abs(dens.mean(lambda x: x**k)-moment(k)) < EXACT
    assert abs(dens.mean(lambda x: x**(2*m))-moment(2*m)) > 1e-6

def test_density_integrates_to_one_and_plots(net):
    loss,params,_,_ = net
    dens = spectral_density(one_graph(loss, params), params, n_steps=10, n_samples=2, generator=gen())
    x = torch.linspace(dens.nodes.min().item()-1, dens.nodes.max().item()+1, 4000, dtype=torch.double)
    assert abs(torch.trapezoid(dens(x, .05), x)-1) < 1e-3
    assert len(dens.plot().lines)==1

def test_a_picture_of_the_density_has_a_floor_and_margins():
    def drawn(nodes): return SpectralDensity(torch.tensor([nodes]), torch.full((1,len(nodes)), 1/len(nodes))).plot().lines[0].get_data()
    x,y = drawn([0.,1.])
    assert (x[0],x[-1],len(x),y.min())==pytest.approx((-.05,1.05,400,1e-6))
    x,y = drawn([2.])
    assert (x[0],x[-1],y.max())==pytest.approx((1.95,2.05,100/math.sqrt(2*math.pi)), rel=1e-3)

# ---- groups, batches, gradient ---------------------------------------------------------------------------------------

def test_mean_over_batches_is_the_whole():
    torch.manual_seed(1)
    model,X,Y = nn.Sequential(nn.Linear(4,5), nn.Tanh(), nn.Linear(5,3)).double(),torch.randn(23,4).double(),torch.randint(0,3,(23,))
    ps = list(model.parameters())
    of = lambda b: hessian_product(lambda: nn.functional.cross_entropy(model(b[0]), b[1]), ps)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=5)
    mean = mean_product(of, dl, weight=lambda b: len(b[1]))
    whole = dense_hessian(lambda: nn.functional.cross_entropy(model(X), Y), ps)
    assert torch.allclose(dense_matrix(mean, ps), whole, atol=EXACT)
    assert not torch.allclose(dense_matrix(mean_product(of, dl), ps), whole, atol=1e-6)

def test_used_up_generator_is_an_error():
    product,params,_ = symmetric([1.,2.])
    mean = mean_product(lambda b: product, iter([0]))
    mean(params)
    with pytest.raises(ValueError, match='generator is used up'): mean(params)

def test_starts_in_the_span_of_earlier_ones_are_no_overflow():
    "Every start vector of a multiple of the identity is one of its eigenvectors, and of two signs there are two directions"
    for n in (2,4): assert spectral_density(lambda v: [2*v[0]], [torch.zeros(n).double()], n, 50, generator=gen()).mean(lambda x: x)==pytest.approx(2)

def test_check_product_on_networks(net):
    loss,params,_,_ = net
    check_product(hessian_product(loss, params), params, generator=gen())
    drop,(w,) = nn.Dropout(.5),params[:1]
    with pytest.raises(ValueError, match='two answers'):
        check_product(hessian_product(lambda: (drop(w)**4).sum(), [w]), [w], generator=gen())

def test_check_product_sees_an_asymmetry_in_a_large_matrix():
    "A tenth of the matrix is not symmetric; relative to the lengths of the vectors that is 1/1000 for 10,000 unknowns"
    n = 10_000
    left,right = torch.randn(2,n, dtype=torch.double, generator=gen()),torch.randn(2,n, dtype=torch.double, generator=gen(1))
    def product(v): return [left.T@(left@v[0]) + .1*(left.T@(right@v[0]) - right.T@(left@v[0]))]
    with pytest.raises(ValueError, match='not symmetric'): check_product(product, [torch.zeros(n, dtype=torch.double)], generator=gen(2))

def test_weight_norm_is_right_in_the_dense_hessian():
    "torch's own double backward of it is not symmetric"
    torch.manual_seed(0)
    layer,x = nn.utils.parametrizations.weight_norm(nn.Linear(3,2)).double(),torch.randn(5,3).double()
    params,loss = list(layer.parameters()),lambda: layer(x).tanh().pow(2).sum()
    H = dense_hessian(loss, params)
    assert (H-H.T).norm()<=1e-10*H.norm()
    hg,g = hessian_times_gradient(loss, params)
    assert torch.allclose(flat(hg), H@flat(g), rtol=1e-10)

def test_hessian_times_gradient(net):
    loss,params,H,_ = net
    hg,g = hessian_times_gradient(loss, params)
    literal = torch.cat([o.reshape(-1) for o in torch.autograd.grad(loss(), params)])
    assert torch.allclose(flat(g), literal, atol=EXACT) and torch.allclose(flat(hg), H@literal, atol=EXACT)

def test_unused_parameter_has_zero_curvature():
    w,unused = (torch.tensor([1.,2.], dtype=torch.double, requires_grad=True) for _ in range(2))
    loss = lambda: (w**3).sum()
    hg,g = hessian_times_gradient(loss, [w, unused])
    assert torch.equal(hg[1], torch.zeros(2)) and torch.equal(hg[0], 6*w.detach()*3*w.detach()**2)
    assert torch.equal(dense_hessian(loss, [w, unused]).diag(), torch.tensor([6.,12.,0.,0.], dtype=torch.double))

# ---- beside another package -----------------------------------------------------------------------------------------

def test_same_numbers_as_curvlinops():
    curv = pytest.importorskip('curvlinops')
    torch.manual_seed(1)
    model,X,Y = nn.Sequential(nn.Linear(6,10), nn.Tanh(), nn.Linear(10,3)).double(),torch.randn(20,6).double(),torch.randint(0,3,(20,))
    lossf,params = nn.CrossEntropyLoss(),list(model.parameters())
    theirs = curv.HessianLinearOperator(model, lossf, params, [(X, Y)])
    ours = hessian_product(lambda: lossf(model(X), Y), params)
    v = [torch.randn(p.shape, dtype=p.dtype, generator=gen()) for p in params]
    assert all(torch.allclose(a, b, atol=EXACT) for a,b in zip(ours(v), theirs@v))

def test_parameters_may_come_from_a_generator():
    "`model.parameters()` is one: each function reads it once"
    from adahessian_fastai.diagnostics import diag_entries
    from adahessian_fastai.ggn import fisher_diagonal,graph_vjp,linear_jvp,reverse_jvp
    from torch.func import functional_call
    from adahessian_fastai.hutchinson import hutchinson_diag,hutchinson_trace
    from adahessian_fastai.hvp import difference_product,flat
    from adahessian_fastai.losses import gnb_samples
    torch.manual_seed(0)
    m,x,y = torch.nn.Linear(3,2).double(),torch.randn(5,3).double(),torch.randint(2, (5,))
    loss = lambda: torch.nn.functional.cross_entropy(m(x), y)
    def twice(v): return [2*o for o in v]
    def drawn(g): return torch.ones(5,2).double()
    def out(ps): return [functional_call(m, dict(zip(('weight','bias'), ps)), (x,))]
    z,ones = m(x),[torch.ones_like(p) for p in m.parameters()]
    readers = [lambda ps: hutchinson_diag(twice, ps, 2, generator=gen()), lambda ps: hutchinson_trace(twice, ps, 2, generator=gen()),
        lambda ps: check_product(twice, ps, generator=gen()), lambda ps: spectral_density(twice, ps, n_samples=2, generator=gen()).nodes,
        lambda ps: exact_diag(twice, ps, progress=False), lambda ps: dense_matrix(twice, ps, progress=False),
        lambda ps: difference_product(loss, ps)(ones),
        lambda ps: fisher_diagonal(z, torch.nn.functional.cross_entropy(z, y), ps), lambda ps: next(gnb_samples(z, ps, drawn)),
        lambda ps: diag_entries(twice, ps, torch.arange(3)), lambda ps: gradient(loss(), ps), lambda ps: graph_vjp([z], ps)([torch.ones_like(z)]),
        lambda ps: reverse_jvp([z], ps)(ones), lambda ps: linear_jvp(out, ps)(ones)]
    for f in readers:
        a,b = f(m.parameters()),f(list(m.parameters()))
        if a is not None: assert torch.equal(*(flat(o) if isinstance(o, list) else torch.as_tensor(o) for o in (a,b)))

def test_a_list_of_parameters_is_one():
    w = torch.tensor([1.,2.], dtype=torch.double, requires_grad=True)
    loss = lambda: (w**3).sum()
    for f in (dense_hessian, hessian_times_gradient):
        with pytest.raises(ValueError, match='params must be several tensors'): f(loss, w)
    assert torch.equal(dense_hessian(loss, iter([w])), torch.diag(6*w.detach()))
    product = lambda v: [3*o for o in v]
    assert hutch_plus_plus(product, iter([w]), 6)[0]==pytest.approx(6)
    assert torch.equal(block_product(product, iter([w]), iter([w]))([torch.ones_like(w)])[0], torch.full_like(w, 3))

@pytest.mark.parametrize('which,n', [('largest',3),('smallest',3),('both',6)])
def test_as_many_eigenvalues_as_asked_for(which, n):
    "However few steps are allowed"
    d = torch.arange(1., 9, dtype=torch.double)
    assert len(extreme_eigenvalues(lambda v: [d*v[0]], [torch.zeros(8, dtype=torch.double)], 3, which, max_iter=1, check=False).values)==n

def test_weights_that_add_up_to_nothing_are_named():
    with pytest.raises(ValueError, match='weights of the 2 batches add up to 0'): mean_product(lambda b: lambda v: v, [1,2], lambda b: 0)([torch.ones(1)])
    with pytest.raises(ValueError, match='batches is empty'): mean_product(lambda b: lambda v: v, [])([torch.ones(1)])

def test_no_direction_is_left_beside_a_whole_basis():
    with pytest.raises(ValueError, match='no direction is left'): next(lanczos(lambda v: v, [torch.zeros(2)], against=list(torch.eye(2))))

@pytest.mark.parametrize('which', ['largest','smallest'])
def test_the_search_for_missed_eigenvalues_ends_at_the_first_copy(which):
    "Five times the eigenvalue 3: a step and a product for the pair, and as many for its copy, whatever its rounding"
    def n_products(seed): return extreme_eigenvalues(lambda v: [3*v[0]], [torch.ones(5)], which=which, generator=gen(seed)).n_products
    assert {*map(n_products, range(20))}=={4}


def test_a_start_of_signs_in_the_span_of_the_others_is_drawn_anew():
    "Beside (1,1) signs leave (1,-1) or nothing: rounding had been taken for a vector, and an eigenvalue of 1 for 2.5e-29"
    for seed in range(6):
        for Q,alpha,_ in lanczos(lambda v: [v[0]], [torch.ones(2)], 'rademacher', gen(seed), [torch.ones(2)/2**.5]): pass
        assert Q[0].norm().item()==pytest.approx(1.) and alpha==pytest.approx([1.])

@pytest.mark.parametrize('v', [[torch.ones(2)],[torch.ones(3),torch.ones(2)],[torch.ones(2),torch.ones(3),torch.ones(4)]])
def test_a_block_takes_a_direction_like_its_group(v):
    "What was missing counted as zero"
    ps = [torch.zeros(2),torch.zeros(3),torch.zeros(4)]
    block = block_product(lambda v: [2*o for o in v], ps, ps[:2])
    assert [o.tolist() for o in block([torch.ones(2),torch.ones(3)])]==[[2.]*2,[2.]*3]
    with pytest.raises(ValueError, match=r'v must be tensors of the shapes \[\(2,\), \(3,\)\]'): block(v)
