"A run whose loss leaves where it was says so once, and its advice helps"
import math,pytest,torch,warnings
from functools import partial
from fastai.basics import Callback,noop
from adahessian_fastai.all import *
from helpers_learner import learner,mlp

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
