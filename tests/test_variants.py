"Every variant in every situation ends with the weights that were recorded, and every way to curvature knows the same loss"
import functools,itertools,json
import pytest,torch
from fastai.basics import Callback,DataLoader,DataLoaders,Learner,partial
from fastai.callback.training import GradientAccumulation
from torch import nn
from adahessian_fastai.all import adahessian_paper as adahessian,hessian_free
from variants import Case,cases,recorded,stream,summary,train,train_on_ranks,variants,wrong_before

# Another instruction set of the processor changed sums of 600 weights, after some 12 steps in float64, by up to 1e-10
EXACT = 1e-9
# A one-sided difference in float64 has half of the digits. It changed by up to 7e-8
DIFFERENCE = 1e-5
# In float32, also that of the predictions under `MixedPrecision`: by up to 1e-4. Its differences have half of those digits
FLOAT,FLOAT_DIFFERENCE = 2e-3,2e-2
# float16 and bfloat16 inside: by up to 1e-5, on one processor; another one may do these convolutions in its own way
HALF = 2e-2
# Rounding in half precision decides about some of the labels that are drawn: by up to 1 where overflows come at other steps too
LABELS = dict(half=0.1, overflow=1.5)
# Weights of different variants are further apart than this
APART = 1e-3

found = json.loads(recorded.read_text())
trained = functools.cache(lambda name: train(cases[name]))


def tolerance(case):
    by_difference = case.kwargs.get('hvp') in ('finite_difference','auto')
    if case.dtype==torch.float and case.half and 'gnb' in case.name: return LABELS['overflow' if 'overflow' in case.name else 'half']
    if case.dtype==torch.float: return HALF if case.half else FLOAT_DIFFERENCE if by_difference else FLOAT
    return FLOAT if case.half else DIFFERENCE if by_difference else EXACT


@pytest.fixture(scope='module')
def same_random_numbers():
    "The recorded weights are those of one stream of random numbers; PyTorch has another one without MKL"
    if stream()!=pytest.approx(found['random'], abs=1e-4): pytest.skip('this build of PyTorch draws other random numbers')


def far(a, b): return max(abs(x-y) for x,y in zip(a, b))


def check(name, w):
    assert isinstance(w, torch.Tensor), w
    assert far(summary(w), found['cases'][name])<tolerance(cases[name])


ON_ONE = [n for n in found['cases'] if n in cases and cases[n].ranks==1]
ON_TWO = [n for n in found['cases'] if n in cases and cases[n].ranks==2]

@pytest.mark.parametrize('name', ON_ONE)
def test_ends_with_the_recorded_weights(name, same_random_numbers): check(name, trained(name))


@pytest.fixture(scope='module')
def on_ranks(): return train_on_ranks()

@pytest.mark.slow
@pytest.mark.parametrize('name', ON_TWO)
def test_ends_with_the_recorded_weights_on_two_ranks(name, on_ranks, same_random_numbers):
    check(name, on_ranks[name])
    assert torch.equal(*on_ranks[name].chunk(2))


def test_every_case_is_recorded(): assert set(found['cases'])=={n for n in cases if wrong_before.get(n, n)}


def test_the_recorded_weights_tell_the_variants_apart():
    "Except where two names are one computation: another way to the same product"
    alike = [{'default','forward','difference','auto'}, {'ggn','ride','ggn_auto'}, {'n_acc2','n_acc2_forward'}, {'compiled','rows_all'}]
    of = found['cases']
    for a,b in itertools.combinations(variants, 2):
        if cases[a].net==cases[b].net and not any({a,b}<=o for o in alike): assert far(of[a], of[b])>APART, (a,b)


INTERRUPTED = [n for n in cases if n.endswith('_interrupted') and n.replace('interrupted', 'two_fits') in cases]

@pytest.mark.parametrize('name', INTERRUPTED)
def test_a_file_in_the_middle_changes_nothing(name):
    "Also in the middle of an accumulation"
    assert torch.equal(trained(name), trained(name.replace('interrupted', 'two_fits')))


ELSEWHERE = 'accumulation thawing penalty recurrent attentive attentive_drop odd kinked mse'
FORWARD = ['default', *(f'default_{o}' for o in ELSEWHERE.split()), 'n_acc2']
RIDE = ['ggn', *(f'ggn_{o}' for o in 'accumulation attentive odd kinked smoothed mse bce'.split())]
BY_DIFFERENCE = ['default', *(f'default_{o}' for o in 'accumulation penalty attentive'.split())]
AUTO = ['default', *(f'default_{o}' for o in 'penalty attentive odd mse'.split())]
HALVES = 'default ggn gnb rows n_acc2 ride control auto'.split()
SAME = [  # chkstyle: ignore-node
    *[(o.replace('default', 'forward') if o!='n_acc2' else 'n_acc2_forward', o, EXACT) for o in FORWARD],
    *[(o.replace('ggn', 'ride'), o, EXACT) for o in RIDE], *[(o.replace('default', 'difference'), o, DIFFERENCE) for o in BY_DIFFERENCE],
    *[(o.replace('default', 'auto'), o, DIFFERENCE) for o in AUTO], ('auto_kinked','default_kinked',EXACT),
    ('auto_relu','default_relu',EXACT), ('ggn_auto','ggn',EXACT), ('rows_all','compiled',EXACT),
    *[(f'{o}_bare', o, EXACT) for o in 'default ggn gnb compiled rows_gnb'.split()],
    *[(f'hessian_free_{o}', 'hessian_free_ggn', EXACT) for o in 'dual linearize no_graph'.split()],
    ('hessian_free_own_lr','hessian_free_by_closure',EXACT), *[(f'{o}_fp16', o, FLOAT) for o in HALVES],
    ('sophia_fp16','sophia_gnb',FLOAT), ('default_fp16_growing','default',FLOAT), *[(f'{o}_float32', o, FLOAT) for o in ('default','gnb')],
    *[(f'{o}_float16', o, HALF) for o in 'default ggn gnb rows n_acc2'.split()],
    *[(f'{o}_bfloat16', o, HALF) for o in 'default ggn gnb rows'.split()]]

@pytest.mark.parametrize('one,other,tol', SAME, ids=[f'{a}={b}' for a,b,_ in SAME])
def test_another_way_to_the_same_weights(one, other, tol): assert (trained(one)-trained(other)).abs().max()<tol


# One loss, one matrix: the model's w² and a callback's 5w², so the second derivative is 12

class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.5], dtype=torch.double))
    def forward(self, x): return self.w*x


class Added(Callback):
    "Adds 5w² to the loss"
    def after_loss(self):
        more = 5*self.model.w.pow(2).sum()
        self.learn.loss_grad,self.learn.loss = self.loss_grad+more,self.loss+more.detach()


def mean_square(pred, y): return (pred-y).square().mean()


def weight_learner(opt_func, n_batches=1, cbs=()):
    ds = [(torch.ones(1).double(),torch.zeros(1).double())]*8*n_batches
    dls = DataLoaders(DataLoader(ds, bs=8), DataLoader(ds[:8], bs=8), device=torch.device('cpu'))
    learn = Learner(dls, Weight(), mean_square, opt_func=opt_func, cbs=[Added(),*cbs])
    learn.remove_cb(learn.recorder)
    return learn


def seen(learn, lr, w0=1.5):
    "What one step divided the gradient by, which is 12w"
    with learn.no_bar(),learn.no_logging(): learn.fit(1, lr)
    return lr*12*w0/(w0-learn.model.w.item())


ONE_STEP = dict(mom=0., eps=1e-30, wd=0.)
WAYS = [  # chkstyle: ignore-node
    *[dict(hvp=o) for o in ('reverse','forward','finite_difference','auto')], dict(hessian_bs=1.), dict(hessian_bs=4),
    dict(hessian_bs=0.5), dict(signed=True), dict(n_samples=2, debiased=True), dict(hvp='forward', n_samples=2)]

@pytest.mark.parametrize('kwargs', WAYS, ids=str)
def test_one_matrix_in_every_way_to_it(kwargs):
    assert seen(weight_learner(partial(adahessian, **ONE_STEP, **kwargs)), 0.1)==pytest.approx(12, abs=DIFFERENCE)


@pytest.mark.parametrize('kwargs', [o for o in WAYS if o.get('hvp')!='auto'], ids=str)
@pytest.mark.parametrize('how', ['n_acc','callback'])
def test_one_matrix_over_several_batches(kwargs, how):
    "Each has half of the weight in both"
    own,cbs = (dict(n_acc=2),[]) if how=='n_acc' else ({},[GradientAccumulation(16)])
    assert seen(weight_learner(partial(adahessian, **ONE_STEP, **own, **kwargs), 2, cbs), 0.1)==pytest.approx(12, abs=DIFFERENCE)


@pytest.mark.parametrize('kwargs', [dict(), dict(hessian_bs=1.)], ids=str)
def test_one_matrix_with_a_loss_scale(kwargs, cpu_amp):
    assert seen(weight_learner(partial(adahessian, **ONE_STEP, **kwargs)).to_fp16(), 0.1)==pytest.approx(12, abs=FLOAT)


@pytest.mark.parametrize('n_batches', [1,2])
def test_one_matrix_in_diagnostics(n_batches):
    learn = weight_learner(adahessian, n_batches)
    Hv, = learn.curvature_product(n_batches=n_batches)([torch.tensor([0.5], dtype=torch.double)])
    assert Hv.item()==pytest.approx(6, abs=EXACT)


NEWTON = dict(curvature='hessian', damping=0., adapt_damping=False, backtracking=False, line_search=False)

@pytest.mark.parametrize('keep_graph', [True,False])
@pytest.mark.parametrize('n_acc', [1,2])
def test_one_matrix_in_hessian_free(keep_graph, n_acc):
    "Without damping the step is Newton's, from anywhere to the minimum at 0; half of it, as `lr` wants"
    opt_func = partial(hessian_free, keep_graph=keep_graph, n_acc=n_acc, **NEWTON)
    assert seen(weight_learner(opt_func, n_acc), 0.5)==pytest.approx(12, abs=EXACT)


ESTIMATORS = dict(  # chkstyle: ignore-node
    hessian={}, ggn=dict(curvature='ggn'), gnb=dict(estimator='gnb'), samples=dict(n_samples=2, debiased=True), n_acc=dict(n_acc=2))

@pytest.mark.parametrize('net', ['conv','plain','attentive_drop','recurrent'])
@pytest.mark.parametrize('kind', ESTIMATORS)
def test_all_rows_are_the_batch(kind, net):
    "Batch norm, dropout and memory included: `hessian_bs=1.` is no other estimate than `None`"
    of = lambda **kwargs: train(Case(kind, kwargs={**ESTIMATORS[kind], **kwargs}, net=net))
    assert (of(hessian_bs=1.)-of()).abs().max()<EXACT
