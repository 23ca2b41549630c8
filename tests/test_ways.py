"Every way to a product ends with the weights of the double backward, in every setting that it can be combined with"
import pytest,torch
from fastai.callback.core import Callback
from helpers_learner import HYPERS,InTurn,ROUNDING,data,distance,fit,learner,mlp

SETTINGS = dict(  # chkstyle: ignore-node
    whole={}, rows=dict(hessian_bs=0.5), rows4=dict(hessian_bs=4), rows_changed=dict(hessian_bs=(3,0.5)), each=dict(update_each=2), samples=dict(n_samples=2),
    debiased=dict(n_samples=2, debiased=True), n_acc=dict(n_acc=2), n_acc_rows=dict(n_acc=2, hessian_bs=0.5), signed=dict(signed=True), rho=dict(rho=0.3),
    rho_rows=dict(rho=0.3, hessian_bs=0.5), gaussian=dict(probe='gaussian'),
    control=dict(estimator='control_variate', probe='gaussian', signed=True), rows_samples=dict(hessian_bs=0.5, n_samples=2),
    control_rows=dict(estimator='control_variate', probe='gaussian', signed=True, hessian_bs=0.5))


def trained(model=None, n=2, **kwargs):
    learn = learner(model or mlp(), *data(36), hypers={**HYPERS, **kwargs})
    torch.manual_seed(3)
    learn.create_opt()
    return fit(learn, n).model


@pytest.mark.parametrize('curvature', ['hessian','ggn'])
@pytest.mark.parametrize('name', SETTINGS)
def test_the_forward_way_is_the_reverse_way(curvature, name):
    "12 steps with the same random numbers; of the whole batch or of rows, along with the forward pass or after it"
    kwargs = dict(SETTINGS[name], curvature=curvature)
    assert distance(trained(hvp='forward', **kwargs), trained(hvp='reverse', **kwargs))<ROUNDING


class Calls:
    "Probes that no generator determines, another one at each call; of `each` draws the first one counts"
    def __init__(self, each=1): self.each,self.n = each,0
    def __call__(self, p, _):
        turn,i = divmod(self.n, 6) # The network has six parameters
        self.n += 1
        g = torch.Generator().manual_seed(i+6*(1000+turn if turn%self.each else turn//self.each))
        return (torch.randint(2, p.shape, generator=g)*2-1).to(p)


@pytest.mark.parametrize('kwargs', [dict(signed=True),dict(signed=True, hessian_bs=0.5),dict(n_samples=1, signed_blocks=True)], ids=str)
def test_a_probe_that_comes_from_no_generator_is_drawn_once(kwargs):
    "Products that run along ask for it ahead, and the estimate multiplies by the same one"
    probe = Calls(2)
    along = trained(curvature='ggn', hvp='forward', probe=probe, **kwargs)
    assert probe.n%12==0 and distance(along, trained(curvature='ggn', probe=Calls(), **kwargs))<ROUNDING
    assert distance(along, trained(curvature='ggn', probe=lambda p,_: Calls()(p, _), **kwargs))>100*ROUNDING # Probes matter


heads = [] # What was called; the memory of a module is put back

class Noted(InTurn):
    def forward(self, x):
        out = super().forward(x)
        heads.append(self.n%2)
        return out


class Trained(Callback):
    "Validation counts nothing"
    def after_epoch(self): del heads[-1:]


@pytest.mark.parametrize('kwargs', [dict(),dict(curvature='ggn'),dict(estimator='gnb')], ids=str)
def test_rows_are_evaluated_with_the_memory_of_their_batch(kwargs):
    "Here, which head is next; and the count goes on where the batch left it"
    model = Noted()
    heads.clear()
    learn = fit(learner(model, *data(36), hypers={**HYPERS, **kwargs}, hessian_bs=3, cbs=[Trained()]), 2)
    assert heads==[o for i in range(12) for o in [(i+1)%2]*2] and model.n==12 and learn.opt.n_estimates==12
